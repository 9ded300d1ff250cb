#!/usr/bin/env bash
# Assembles every kernel with the ptxas of CUDA 12.8, the image's: PyPI has that program, not that nvcc. The PTX is of the fetched nvcc 13.0, its version
# line lowered. Prints the bytes that spill; an error is a kernel that 12.8 cannot assemble.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/get-nvcc.sh
nvcc=.cuda/nvidia/cu13/bin/nvcc
older=.cuda/ptxas-12.8
[ -d "$older" ] || python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target "$older" 'nvidia-cuda-nvcc-cu12==12.8.*'
ptxas=$older/nvidia/cuda_nvcc/bin/ptxas
chmod +x "$ptxas"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for arch in ${ARCHS:-80 90a 100a 120}; do
    for kernel in kernels/*.cu; do
        "$nvcc" -std=c++17 -O3 --ptx -arch="compute_$arch" -Ikernels -o "$out/ptx" "$kernel"
        sed -i 's/^\.version 9\.[0-9]*/.version 8.7/' "$out/ptx"
        "$ptxas" -arch="sm_$arch" -O3 -v "$out/ptx" -o "$out/cubin" 2> "$out/said" || { cat "$out/said"; exit 1; }
        spilled=$(grep -o '[0-9]* bytes spill stores' "$out/said" | awk '{sum += $1} END {print sum + 0}')
        echo "sm_$arch $(basename "$kernel" .cu): $spilled bytes spilled"
    done
done
