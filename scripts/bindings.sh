#!/usr/bin/env bash
# Rewrites src/backend/gpu/params.rs from kernels/*.h. Needs libclang: LIBCLANG_PATH, or scripts/get-nvcc.sh first.
set -euo pipefail
cd "$(dirname "$0")/.."
export LIBCLANG_PATH=${LIBCLANG_PATH:-$PWD/.cuda/clang/native}
touch build.rs
cargo check --quiet --features regen-bindings
rustfmt --edition 2024 src/backend/gpu/params.rs
