#!/usr/bin/env bash
# The long loops, with their full counts: 200 kills at random durable writes and at random times, each resumed and compared.
set -euo pipefail
cd "$(dirname "$0")/.."
BRIGHTRUN_KILLS=${BRIGHTRUN_KILLS:-200} cargo test --release --locked --test resume -- --nocapture kill
