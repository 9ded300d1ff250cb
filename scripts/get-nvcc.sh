#!/usr/bin/env bash
# Fetches the CUDA 13.0 compiler (277 MB, no driver, no GPU) and libclang into .cuda/, with pip.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .cuda/nvidia/cu13/bin/nvcc ] && [ -d .cuda/clang ] && exit 0
python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target .cuda \
    'nvidia-cuda-nvcc==13.0.*' 'nvidia-cuda-crt==13.0.*' 'nvidia-nvvm==13.0.*' 'nvidia-cuda-runtime==13.0.*' nvidia-cuda-cccl \
    'libclang==18.1.1'
