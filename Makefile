# Every target installs missing packages first. PYTHON picks the interpreter of a new environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# pinned: an open range pulls gigabytes of CUDA packages where a CPU build would do
TORCH ?= -r constraints.txt
OUT ?= benchmarks/results/gpu
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu') CMakeLists.txt setup.py pyproject.toml

.PHONY: setup call-setup docs demo evidence studies test test-all test-asan worlds dist lint resources bench gpu doctor tables clean

setup: $(VENV)/.ready

# Where python3 already has torch and triton (a GPU machine, perhaps without network), the environment
# uses them; elsewhere they are installed, pinned. That python3 may itself be of a virtual environment,
# which --system-site-packages would ignore, and may lack ensurepip.
$(VENV)/.ready: $(SOURCES)
	@set -e; if $(PYTHON) -c 'import torch, triton' 2>/dev/null; then \
	  echo "setup: using the torch of $(PYTHON)"; \
	  $(PYTHON) -m venv --without-pip --system-site-packages $(VENV); \
	  $(PYTHON) -c 'import sys; print(*[p for p in sys.path if p.endswith("-packages")], sep="\n")' > \
	    "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"; \
	  $(BIN)/python -c 'import pip' 2>/dev/null || $(BIN)/python -m ensurepip; \
	  $(BIN)/python -m pip install -q $$($(BIN)/python scripts/missing.py) || echo "setup: no network: going on with what is there"; \
	else \
	  $(PYTHON) -m venv $(VENV); \
	  $(BIN)/python -m pip install -q --upgrade pip; \
	  $(BIN)/python -m pip install -q $(TORCH) wheel $$($(BIN)/python scripts/missing.py --build); \
	fi
	@$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]' || \
	  $(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

demo: setup
	$(BIN)/mts-fast demo

# The committed comparison on ten fresh seeds of each data set, and the tables of the documents: about
# an hour on 2 cores. Fashion-MNIST: apt-get install dataset-fashion-mnist. Goes on where it stopped.
EVIDENCE ?= coloured-digits coloured-fashion fashion
EVIDENCE_OUT := benchmarks/results/evidence
evidence: setup
	@$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev,evidence]'
	set -e; for data in $(EVIDENCE); do \
	  $(BIN)/mts-fast demo --data $$data --seeds 10 --out $(EVIDENCE_OUT)/$$data; done
	$(BIN)/python benchmarks/evidence/collect.py
	$(BIN)/python benchmarks/tables/documents.py

# What moves the result, each as STUDY:DATA.
STUDIES ?= features:coloured-fashion batch-size:coloured-fashion gsnr:coloured-fashion \
  validation-size:coloured-digits bad-share:coloured-digits selector-every:coloured-digits \
  embeddings:coloured-digits
studies: setup
	set -e; for each in $(STUDIES); do study=$${each%:*}; data=$${each#*:}; \
	  $(BIN)/mts-fast demo --study $$study --data $$data --out $(EVIDENCE_OUT)/$$study-$$data; done
	$(BIN)/python benchmarks/tables/documents.py

# the blocks of a document share variables, so one process runs them
DOCUMENTS := README.md docs

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadgroup tests mts_fast
	$(BIN)/python -m pytest $(DOCUMENTS)

# The tests that the core suite samples, in full: a step interrupted at every operator and at 500
# moments, 2000 random worlds. Its summary is committed.
test-all: setup
	@mkdir -p build
	$(BIN)/python -m pytest $(DOCUMENTS)
	MTS_FAST_TEST_ALL=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests mts_fast | tee build/test-all.txt
	$(MAKE) worlds
	tail -n 1 build/test-all.txt > benchmarks/results/test_all.txt

# The C++ kernels under the address and undefined-behaviour sanitizers, then the usual build again.
# Python and torch are not instrumented, so leaks are not checked.
ASAN_TESTS ?= tests/backends/cpp tests/ops tests/features tests/test_golden_features.py
test-asan: setup
	rm -rf build/asan && mkdir -p build/asan
	git ls-files -co --exclude-standard | xargs cp --parents -t build/asan
	cd build/asan && MTS_FAST_CPP=1 MTS_FAST_SANITIZE=1 $(abspath $(BIN))/python setup.py -q build_ext --inplace
	cd build/asan && PYTHONPATH=tests/helpers ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  $(abspath $(BIN))/python -m pytest --capture=sys -p no:cacheprovider -p sanitized $(ASAN_TESTS)

# Random models, losses, optimizers and options against an independent oracle: how many are computed,
# refused or wrong. WORLDS_ARGS: --seed, --package OTHER_CHECKOUT, --against, --replay FILE.
WORLDS ?= 2000
WORLDS_ARGS ?=
worlds: setup
	$(BIN)/python scripts/search_worlds.py --count $(WORLDS) --jobs 2 $(WORLDS_ARGS)

# dist/: the sources, and from them one wheel for every Python 3 and every torch from 2.11 on, with the
# C++ kernels (MTS_FAST_CPP=0: without, for every platform), both checked. auditwheel says for which glibc.
dist: setup
	rm -rf dist && mkdir -p build
	MTS_FAST_CPP=$${MTS_FAST_CPP:-1} $(BIN)/python -m build --no-isolation > build/dist.log 2>&1 || { tail -n 30 build/dist.log; exit 1; }
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python scripts/check_wheel.py dist/*.whl
	for wheel in dist/*-linux_*.whl; do test ! -e $$wheel || $(BIN)/python -m auditwheel show $$wheel; done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests/cuda_emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu')

# The site in build/docs; a warning (a broken reference, a failing example) is an error.
docs: setup
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	$(BIN)/python scripts/check_site.py build/docs

# Registers and shared memory of every Triton kernel, compiled without a GPU; fails where one spills.
resources: setup
	env -u TRITON_INTERPRET $(BIN)/python scripts/check_triton.py --json benchmarks/results/triton_resources.json

# Also compares with higher, torchopt and Opacus, where they install. BENCH picks one file.
BENCH ?= benchmarks/cpu
bench: setup
	@$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev,bench]' || echo "bench: going on without the packages to compare with"
	mkdir -p build
	$(BIN)/python -m pytest $(BENCH) --benchmark-only --benchmark-json=build/bench.json
	$(BIN)/python benchmarks/tables/condense.py build/bench.json benchmarks/results

# This checkout's step against that of another commit, turn by turn: make bench-compare BEFORE=5476895
BEFORE ?= 5476895
bench-compare: setup
	@mkdir -p build
	$(BIN)/python benchmarks/cpu/compare_step.py --before $(BEFORE)

# On a machine with a GPU: the whole suite on CUDA (compiled, never interpreted), the kernels' and
# the steps' benchmarks, other tiles; records and table.md under OUT. Each part can be called alone,
# and one benchmark as gpu-run-NOUN. A benchmark file starts no new benchmark after BENCH_SECONDS, and
# every part is stopped after GPU_SECONDS; a part that fails does not stop the rest. GPU_ARGS are for
# pytest, TUNE picks kernels.
GPU_SECONDS ?= 580
BENCH_SECONDS ?= 450
GPU_WORKERS ?= 8
GPU_BENCH ?= cross_entropy linear_cross_entropy virtual_update hypergradient_dot norm_sample_gradients
GPU_ARGS ?=
TUNE ?=
IN_TIME := timeout -s INT -k 10 $(GPU_SECONDS) env -u TRITON_INTERPRET -u MTS_FAST_BENCH_TINY MTS_FAST_BENCH_SECONDS=$(BENCH_SECONDS)

gpu: setup
	@$(MAKE) -k -j1 gpu-test gpu-bench gpu-features gpu-step gpu-tune

gpu-test: setup
	@mkdir -p $(OUT)
	@$(BIN)/python -c 'from mts_fast.cli.doctor import report; print(report())' > $(OUT)/tests.txt 2>&1 || true
	@$(BIN)/python -c 'import torch; assert torch.cuda.is_available(), "gpu-test: no CUDA device"'
	@status=0; $(IN_TIME) $(BIN)/python -m pytest -p no:cacheprovider -n $(GPU_WORKERS) $(GPU_ARGS) >> $(OUT)/tests.txt 2>&1 || status=$$?; \
	  tail -n 60 $(OUT)/tests.txt; exit $$status

gpu-bench: setup
	@$(MAKE) -k -j1 $(GPU_BENCH:%=gpu-run-%)

gpu-features: setup
	@$(MAKE) gpu-run-neighbor_statistics

gpu-step: setup
	@$(MAKE) gpu-run-step

gpu-run-%: setup
	@mkdir -p build $(OUT)
	@rm -f build/$*.json
	@status=0; $(IN_TIME) $(BIN)/python -m pytest benchmarks/gpu/bench_$*.py -p no:cacheprovider --benchmark-only --benchmark-json=build/$*.json $(GPU_ARGS) || status=$$?; \
	  test ! -s build/$*.json || $(BIN)/python benchmarks/tables/condense.py build/$*.json $(OUT) "make gpu-run-$*"; \
	  $(BIN)/python benchmarks/tables/gpu.py $(OUT); exit $$status

gpu-tune: setup
	@mkdir -p $(OUT)
	@status=0; $(IN_TIME) $(BIN)/python benchmarks/gpu/tune.py --json $(OUT)/tune.json $(TUNE) || status=$$?; \
	  $(BIN)/python benchmarks/tables/gpu.py $(OUT); exit $$status

# The most informative parts in three calls of at most nine minutes each on a GPU machine without
# network: build, correctness and whole steps; the kernels that `auto` may use; where a step's time
# goes. Each call writes fewer than eight files to OUT. call-setup does not rebuild an environment that
# exists: files copied again have new times, for which `setup` would.
CALL := PIP_NO_INDEX=1 PYTHONUNBUFFERED=1
CALL_TESTS := tests/backends tests/ops tests/training tests/hypergradient tests/csrc/test_cuda_kernels.py --ignore tests/backends/triton/test_compiles.py
# benchmark:selection
CALL_BENCH := hypergradient_dot:bfloat16 cross_entropy:bfloat16_and_not_statistics virtual_update:perturb_or_update linear_cross_entropy:50257 norm_sample_gradients:bfloat16

call-setup:
	@test -f $(VENV)/.ready && touch $(VENV)/.ready || $(CALL) $(MAKE) setup

gpu-call-1: call-setup
	@$(CALL) $(MAKE) GPU_SECONDS=220 GPU_WORKERS=14 GPU_ARGS="--maxfail=40 $(CALL_TESTS)" gpu-test || true
	@$(CALL) $(MAKE) GPU_SECONDS=190 BENCH_SECONDS=130 GPU_ARGS="-k bf16" gpu-step

gpu-call-2: call-setup
	@status=0; for pair in $(CALL_BENCH); do \
	  words=$$(echo $${pair#*:} | tr _ ' '); \
	  $(CALL) $(MAKE) GPU_SECONDS=105 BENCH_SECONDS=75 GPU_ARGS="-k '$$words'" gpu-run-$${pair%%:*} || status=$$?; \
	done; exit $$status

gpu-call-3: call-setup
	@mkdir -p $(OUT)
	@timeout -k 10 300 env -u TRITON_INTERPRET $(BIN)/python benchmarks/gpu/profile_step.py $(OUT) || true
	@$(CALL) $(MAKE) GPU_SECONDS=200 TUNE="hypergradient_dot sample_dot" gpu-tune

# Checks that the GPU benchmarks still run: tiny sizes on the CPU, in triton's interpreter.
TINY := env MTS_FAST_BENCH_TINY=1 TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1
bench-tiny: setup
	@mkdir -p build/tiny
	$(TINY) $(BIN)/python -m pytest $(GPU_BENCH:%=benchmarks/gpu/bench_%.py) benchmarks/gpu/bench_step.py -W ignore --benchmark-only --benchmark-json=build/tiny.json
	$(BIN)/python benchmarks/tables/condense.py build/tiny.json build/tiny "make bench-tiny"
	$(TINY) $(BIN)/python -W ignore benchmarks/gpu/tune.py --json build/tiny/tune.json
	$(BIN)/python benchmarks/tables/gpu.py build/tiny > /dev/null

# Copies the numbers of benchmarks/results into README.md and docs/
tables: setup
	$(BIN)/python benchmarks/tables/documents.py

doctor: setup
	$(BIN)/mts-fast doctor

clean:
	rm -rf $(VENV) build dist *.egg-info mts_fast/*.so mts_fast/_build.json
