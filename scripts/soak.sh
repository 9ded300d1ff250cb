#!/usr/bin/env bash
# The long loops, with their full counts. Of a run: 200 kills at random durable writes and at random times, each resumed and compared. Of the
# worker: 100 kills and 50 cancellations anywhere in a job's life, each ending with one adapter of the same bytes; memory while 500 MB come and
# 1 GB goes; and 200 downloads of 256 MB whose connection is cut every 1 to 64 MB.
set -euo pipefail
cd "$(dirname "$0")/.."
BRIGHTRUN_KILLS=${BRIGHTRUN_KILLS:-200} cargo test --release --locked --test resume -- --nocapture kill
BRIGHTRUN_TEST_KILLS=${BRIGHTRUN_TEST_KILLS:-100} cargo test --release --locked --test worker -- --nocapture kills::
BRIGHTRUN_TEST_CANCELS=${BRIGHTRUN_TEST_CANCELS:-50} cargo test --release --locked --test worker -- --nocapture cancel::
BRIGHTRUN_TEST_MB=${BRIGHTRUN_TEST_MB:-500} cargo test --release --locked --test worker -- --nocapture memory::
cargo test --release --locked --test worker_net_memory -- --nocapture
BRIGHTRUN_TEST_CUTS=${BRIGHTRUN_TEST_CUTS:-200} BRIGHTRUN_TEST_CUT_MB=${BRIGHTRUN_TEST_CUT_MB:-64} \
  cargo test --release --locked --test worker_net -- --nocapture cuts::
