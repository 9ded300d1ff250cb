#!/usr/bin/env python3
"""What brightrun exports, loaded by transformers and PEFT: nothing missing, nothing left over, the same loss.

    python scripts/peers/peft/check_adapter.py BRIGHTRUN MODEL_DIR {peft|peft5|merged} [--set key=value ...]

Trains a few steps of MODEL_DIR on random rows with brightrun (unquantised base, f32 adapter), exports, loads the
export in Python, and compares the mean loss of other random rows with the one brightrun reports for them before its
first update. Run it with transformers 4 + PEFT 0.18 for `peft`, transformers 5 + PEFT 0.21 for `peft5`, either for
`merged`.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
from safetensors import safe_open
from transformers import AutoModelForCausalLM

LIMIT = 2e-5


def rows(count, vocab, seed):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(5, 60))] for _ in range(count)]


def brightrun(binary, work, model, data, out, *more):
    path = work / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"input_ids": row, "labels": row}) for row in data))
    config = work / "config.yml"
    config.write_text(
        json.dumps(
            {
                "base_model": str(model),
                "datasets": [{"path": str(path)}],
                "output_dir": str(work / out),
                "adapter": "lora",
                "adapter_dtype": "f32",
                "lora_dropout": 0,
                "micro_batch_size": len(data),
                "learning_rate": 5e-3,
                "lr_scheduler": "constant",
                "warmup_ratio": 0,
                "shuffle": False,
                "device": "cpu",
            }
        )
    )
    command, *arguments = more
    subprocess.run([binary, command, str(config), *arguments], check=True, capture_output=True)


def first_loss(work, out):
    return json.loads((work / out / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def mean_loss(model, data):
    total, count = 0.0, 0
    with torch.no_grad():
        for row in data:
            ids = torch.tensor([row])
            logits = model(input_ids=ids, use_cache=False).logits[0].double()
            total += torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum").item()
            count += len(row) - 1
    return total / count


def load(model_dir):
    key = "dtype"
    model, info = AutoModelForCausalLM.from_pretrained(
        model_dir, output_loading_info=True, attn_implementation="eager", **{key: torch.float32}
    )
    unexpected = [name for name in info["unexpected_keys"] if not name.startswith("mtp.")]
    assert not info["missing_keys"] and not unexpected, info
    return model.eval()


def load_adapter(model, directory):
    with safe_open(directory / "adapter_model.safetensors", "pt") as file:
        written = sum(int(file.get_tensor(name).count_nonzero()) for name in file.keys())
    model = peft.PeftModel.from_pretrained(model, directory)
    held = {name: p for name, p in model.named_parameters() if "lora_" in name}
    # transformers 5 holds gate and up as one block-diagonal pair: zeros are added, nothing is left out.
    number = sum(int(p.count_nonzero()) for p in held.values())
    assert number == written, f"the file holds {written} values that are not zero, PEFT {number}"
    zero = [name for name, p in held.items() if "lora_B" in name and not p.any()]
    assert not zero, f"not loaded: {zero[:3]}"
    return model.eval()


def main():
    binary, model_dir, form, *more = sys.argv[1:]
    model_dir = Path(model_dir).resolve()
    vocab = json.loads((model_dir / "config.json").read_text())["vocab_size"]
    held_out = rows(6, vocab, 2)
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        steps = ["--set", "max_steps=5"]
        brightrun(binary, work, model_dir, rows(6, vocab, 1), "out", "train", *steps, *more)
        brightrun(binary, work, model_dir, rows(6, vocab, 1), "out", "export", "--format", form, *more)
        adapter = f"init_adapter={work / 'out' / 'adapter'}"
        one = ["--set", "max_steps=1"]
        brightrun(binary, work, model_dir, held_out, "probe", "train", *one, "--set", adapter, *more)
        ours = first_loss(work, "probe")
        brightrun(binary, work, model_dir, held_out, "base", "train", *one, *more)
        base_ours = first_loss(work, "base")
        if form == "merged":
            model = load(work / "out" / "merged")
        else:
            name = {"peft": "adapter", "peft5": "adapter-peft5"}[form]
            model = load_adapter(load(model_dir), work / "out" / name)
        theirs = mean_loss(model, held_out)
    print(
        f"{form} of {model_dir.name} (transformers {transformers.__version__}, PEFT {peft.__version__}): "
        f"brightrun {ours:.6f}, Python {theirs:.6f}, difference {abs(ours - theirs):.1e}; "
        f"base alone {base_ours:.6f}"
    )
    limit = LIMIT
    if form == "merged":
        # The merged weights are rounded to the element type of the base.
        limit = 2e-2
    if abs(ours - theirs) > limit or abs(ours - base_ours) < 10 * LIMIT:
        sys.exit("FAILED")


if __name__ == "__main__":
    main()
