#!/usr/bin/env bash
# The platform's own Python SDK as a worker of brightrun-sim: is the simulator what the SDK takes for the platform, and
# does the SDK do what docs and source say? Needs python3 with venv, and network for pip. Takes about three minutes.
set -euo pipefail
cd "$(dirname "$0")/../../.."
venv=$(mktemp -d)
trap 'rm -rf "$venv"' EXIT
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet runpod==1.12.0
cargo build --quiet --bin brightrun-sim
target=$(cargo metadata --format-version 1 --no-deps | python3 -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')
"$venv/bin/python" scripts/peers/runpod/check_sdk.py "$target/debug/brightrun-sim"
