# The command mts-fast with a CPU build of torch and compiled kernels.
#
#     docker build -f docker/cpu.Dockerfile --build-arg TORCH_INDEX=URL -t mts-fast .
#     docker run --rm --user "$(id -u)" -v "$PWD":/work mts-fast train --real ...
#
# TORCH_INDEX is the index of CPU builds that pytorch.org names under "Get started". Without it pip takes
# torch from its usual index, with several gigabytes of CUDA.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG TORCH_INDEX=""
ARG EXTRAS="demo,train"
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY constraints.txt ./
ENV PATH=/opt/mts_fast/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_CONSTRAINT=/source/constraints.txt
RUN python -m venv /opt/mts_fast \
 && pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch \
 && pip install "setuptools>=77" wheel pybind11 ninja cmake
COPY . .
# the tools stay out of the image that is made from this environment; torch needs setuptools
RUN MTS_FAST_CPP=1 pip wheel --no-build-isolation --no-deps --wheel-dir /dist . \
 && pip install "$(echo /dist/*.whl)[$EXTRAS]" \
 && pip uninstall -y wheel pybind11 ninja cmake

FROM python:${PYTHON}-slim
RUN useradd --create-home --uid 10001 mts && install -d -o mts /work
COPY --from=build /opt/mts_fast /opt/mts_fast
# any user may run it; matplotlib needs a folder to write to
ENV PATH=/opt/mts_fast/bin:$PATH MPLCONFIGDIR=/tmp/matplotlib
USER 10001
WORKDIR /work
ENTRYPOINT ["mts-fast"]
CMD ["--help"]
