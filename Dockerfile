# The set for GPUs: torch for CUDA 13.0, megatron-core and vLLM as constraints/gpu.txt pins them, this package, and a C++
# compiler and CUDA's headers for the kernels that Triton and FlashInfer compile when they are first used.
#
#     docker build -t megatron-opd .
#     docker run --gpus all --ipc host -v "$PWD:/work" megatron-opd doctor
#     docker run --gpus all --ipc host -v "$PWD:/work" megatron-opd train RECIPE --nproc 8
#
# NOT RUN YET: this file has been built nowhere, and nothing of it has run on a GPU. constraints/gpu.txt was resolved, and
# installed on a machine without a GPU. The host needs a driver for CUDA 13 (580 or newer) and the NVIDIA container toolkit.
FROM nvidia/cuda:13.0.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.12-dev python3.12-venv g++ git \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/megatron-opd \
    PATH=/opt/megatron-opd/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1

# Apart from the package, so that a change of its code does not install 10 GB anew.
COPY constraints/gpu.txt /tmp/gpu.txt
RUN python3.12 -m venv "$VIRTUAL_ENV" \
    && pip install --no-deps -r /tmp/gpu.txt setuptools==78.1.1

# Transformer Engine is compiled against the torch that is installed: half an hour, and optional.
#     docker build --build-arg WITH_TE=1 -t megatron-opd .
ARG WITH_TE=0
RUN if [ "$WITH_TE" = 1 ]; then \
        NVTE_FRAMEWORK=pytorch pip install --no-build-isolation "transformer-engine[pytorch]"; \
    fi

COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE /src/
COPY megatron_opd /src/megatron_opd
COPY recipes /src/recipes
COPY slurm /src/slurm
RUN pip install --no-deps --no-build-isolation /src

WORKDIR /work
ENTRYPOINT ["megatron-opd"]
