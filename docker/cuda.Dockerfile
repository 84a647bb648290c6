# The command mts-fast with PyTorch's own CUDA image, and kernels compiled for A100, H100 and H200.
#
#     docker build -f docker/cuda.Dockerfile -t mts-fast:cuda .
#     docker run --rm --gpus all --user "$(id -u)" -v "$PWD":/work mts-fast:cuda train --real ...
#
# PYTORCH is the tag of pytorch/pytorch without -devel or -runtime: torch 2.11 or newer.
ARG PYTORCH=2.11.0-cuda13.0-cudnn9

FROM pytorch/pytorch:${PYTORCH}-devel AS build
# where Python is the system's, pip asks for leave
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && python -m pip install "setuptools>=77" wheel pybind11 ninja cmake
WORKDIR /source
COPY . .
RUN MTS_FAST_CPP=1 MTS_FAST_CUDA=1 \
    python -m pip wheel --no-build-isolation --no-deps --wheel-dir /dist .

FROM pytorch/pytorch:${PYTORCH}-runtime
ARG EXTRAS="demo,train"
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
COPY --from=build /dist /dist
# the image's torch and triton stay as they are
RUN python -m pip list --format=freeze | grep -E '^(torch|triton)==' > /dist/constraints.txt \
 && python -m pip install -c /dist/constraints.txt "$(echo /dist/*.whl)[$EXTRAS]" \
 && rm -r /dist \
 && useradd --create-home --uid 10001 mts && install -d -o mts /work
# any user may run it; matplotlib needs a folder to write to
ENV MPLCONFIGDIR=/tmp/matplotlib
USER 10001
WORKDIR /work
ENTRYPOINT ["mts-fast"]
CMD ["--help"]
