# Every verb sets up what is missing first. PYTHON picks the interpreter of a new environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pinned: an open range pulls gigabytes of CUDA packages where a CPU build would do
TORCH ?= torch==2.13.0 triton==3.9.0
OUT ?= benchmarks/results/gpu
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') CMakeLists.txt setup.py pyproject.toml

.PHONY: setup demo test test-asan wheel lint resources bench gpu doctor tables clean

setup: $(VENV)/.ready

# A machine whose python3 already has torch and triton (a GPU machine, perhaps without network)
# lends them to the environment; elsewhere they are installed, pinned.
$(VENV)/.ready: $(SOURCES)
	@set -e; if $(PYTHON) -c 'import torch, triton' 2>/dev/null; then \
	  echo "setup: using the torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --system-site-packages $(VENV); \
	  $(BIN)/python -m pip install -q $$($(BIN)/python scripts/missing.py) || echo "setup: no network: going on with what is there"; \
	else \
	  $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install -q --upgrade pip; \
	  $(BIN)/python -m pip install -q $(TORCH) numpy pybind11 ninja cmake "setuptools>=77" wheel; \
	fi
	@$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]' || \
	  $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	$(BIN)/mts-fast demo

test: setup
	$(BIN)/python -m pytest -n 2

# The C++ kernels under the address and undefined-behaviour sanitizers, then the usual build again.
# Nothing of Python or torch is instrumented, so leaks are not looked for.
ASAN_TESTS ?= tests/ops tests/features tests/test_golden_features.py
test-asan: setup
	rm -rf build/asan && mkdir -p build/asan
	git ls-files -co --exclude-standard | xargs cp --parents -t build/asan
	cd build/asan && MTS_FAST_CPP=1 MTS_FAST_SANITIZE=1 $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd build/asan && PYTHONPATH=tests ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(abspath $(BIN))/python -m pytest --capture=sys -p no:cacheprovider -p sanitized $(ASAN_TESTS)

# dist/*.whl: for every Python 3 and every torch from 2.11 on, with the C++ kernels.
wheel: setup
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w dist .

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/cuda_emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# What every Triton kernel takes of a chip, compiled without a GPU; fails where one spills.
resources: setup
	env -u TRITON_INTERPRET $(BIN)/python scripts/check_triton.py --json benchmarks/results/triton_resources.json

# Compares with higher, torchopt and Opacus, too, where they install. BENCH picks one file.
BENCH ?= benchmarks
bench: setup
	@$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev,bench]' || echo "bench: going on without the packages to compare with"
	mkdir -p build
	$(BIN)/python -m pytest $(BENCH) --benchmark-only --benchmark-json=build/bench.json
	$(BIN)/python scripts/condense.py build/bench.json benchmarks/results

# On a machine with a GPU: the whole suite on CUDA, then the benchmarks, results under OUT.
gpu: setup
	mkdir -p $(OUT)
	$(BIN)/mts-fast doctor | tee $(OUT)/doctor.txt
	$(BIN)/python -m pytest -p no:cacheprovider
	$(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-json=$(OUT)/bench.json
	$(BIN)/python scripts/condense.py $(OUT)/bench.json $(OUT)

# Copies the numbers of benchmarks/results into README.md and docs/
tables: setup
	$(BIN)/python scripts/tables.py

doctor: setup
	$(BIN)/mts-fast doctor

clean:
	rm -rf $(VENV) build dist *.egg-info mts_fast/*.so mts_fast/_build.json
