#!/usr/bin/env bash
# The long loops, with their full counts. Of a run: 200 kills at random durable writes and at random times, each resumed and compared. Of the
# worker: 100 kills anywhere in a job's life, each ending with one adapter of the same bytes; and memory while 300 MB come and 100 MB go.
set -euo pipefail
cd "$(dirname "$0")/.."
BRIGHTRUN_KILLS=${BRIGHTRUN_KILLS:-200} cargo test --release --locked --test resume -- --nocapture kill
BRIGHTRUN_TEST_KILLS=${BRIGHTRUN_TEST_KILLS:-100} cargo test --release --locked --test worker -- --nocapture kills::
cargo test --release --locked --test worker_net_memory -- --nocapture
