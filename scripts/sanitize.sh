#!/usr/bin/env bash
# The tests of the emulated device and every op case, kernels and scheduler compiled with AddressSanitizer and UndefinedBehaviorSanitizer.
set -euo pipefail
cd "$(dirname "$0")/.."
# The runtime must be loaded first; Rust's own memory is not its business.
runtime=$(${CXX:-c++} -print-file-name=libasan.so)
export BRIGHTRUN_EMU_SANITIZE=1 CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/sanitized
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="env LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0"
# Without CUDA: nvcc has nothing to do with it.
cargo test --profile sanitize --locked --no-default-features --features emu --test emu --test kernels --test selftest "$@"
