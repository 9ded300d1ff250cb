#!/usr/bin/env bash
# Exports of every model family, loaded by transformers and PEFT. PYTHON=... is a Python with torch 2.13.0 and either
# transformers 4.57.6 + peft 0.18.1 or transformers 5.23.0 + peft 0.21.2.
set -euo pipefail
cd "$(dirname "$0")/../../.."
python=${PYTHON:-python3}
cargo build --release --quiet
check() { "$python" scripts/peers/peft/check_adapter.py target/release/brightrun "$@" 2>/dev/null; }
form=peft
if "$python" -c 'import sys, transformers; sys.exit(transformers.__version__ < "5")'; then form=peft5; fi
for model in tests/golden/models/{llama,mistral,qwen2,qwen3,qwen3_moe,qwen3_next} examples/demo/model; do
    check "$model" "$form"
    check "$model" merged
done
for model in $("$python" scripts/peers/peft/random_models.py target/peers/random-"$form" 2>/dev/null); do
    check "$model" "$form"
    check "$model" "$form" --set moe_lora=none
done
for setting in lora_expert_r=4 moe_lora=shared_only moe_lora=none use_rslora=true \
    "lora_target_modules=[q_proj, k_proj, v_proj, o_proj, in_proj_qkvz, in_proj_ba, out_proj, gate_proj, up_proj, down_proj]" \
    "lora_target_modules=[in_proj_qkvz, out_proj]" "lora_target_modules=[down_proj]"; do
    echo "with $setting:"
    check tests/golden/models/qwen3_next "$form" --set "$setting"
done
