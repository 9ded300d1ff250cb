#!/usr/bin/env python3
"""Chat templates and tokenizers of real models: this engine's against Hugging Face transformers', byte by byte.

    scripts/peers/templates/run.sh        # fetches the tokenizers, runs this, prints the table

Every conversation is rendered by both, and the rendered text (and plain texts) tokenised by both. A template that drops
or refuses a system turn gets it merged into the first user turn by the engine; the reference is given the same merged turns.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SAMPLES = [
    "Hello, world!",
    "  two leading and trailing spaces  ",
    "line\nbreaks\n\n\nand\ttabs\r\n",
    "naïve café — “quotes” … ½ × ÷ →",
    "日本語のテキストと中文文本，한국어 텍스트",
    "Привет, мир! Γειά σου Κόσμε. שלום عالم",
    "emoji 🌱🧑‍🌾👩‍👩‍👧 and flags 🇩🇪",
    "def f(x):\n    return {'a': [1, 2, 3], \"b\": x ** 2}  # comment",
    "1234567890 3.14159 1,000,000 0x1F 12:34:56",
    "I'm you're we'll they've he'd IT'S DON'T",
    "<|im_start|>user<|im_end|> [INST] </s> <|eot_id|> <|begin_of_text|> <think>",
    "combining e\u0301 vs \u00e9, zero\u200bwidth, nbsp\u00a0here, \u2028 separator",
    "https://example.org/path?q=1&r=%20#frag user@example.org",
    "a" * 300,
    "   \n  \t ",
    "ffi ligature, fullwidth ＡＢＣ, superscript x²",
    "{{ jinja }} {% not %} executed {# here #}",
    "$E = mc^2$ \\frac{a}{b} <b>html</b> &amp; \\n \\u00e9",
]


def conversations(count):
    rng = random.Random(11)
    text = lambda: " ".join(rng.choice(SAMPLES) for _ in range(rng.randint(1, 3))).strip() or "x"
    for index in range(count):
        turns = []
        if rng.random() < 0.5:
            turns.append({"role": "system", "content": text()})
        for number in range(rng.randint(1, 4)):
            turns.append({"role": "user", "content": text()})
            if number < 3 or rng.random() < 0.5:
                turns.append({"role": "assistant", "content": text()})
        ends_with_user = turns[-1]["role"] == "user"
        yield {"messages": turns, "add_generation_prompt": ends_with_user}


def merged(messages):
    if messages[0]["role"] != "system":
        return messages
    system, user, *rest = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *rest]


def reference(directory):
    config = json.loads((directory / "tokenizer_config.json").read_text())
    if config.get("tokenizer_class") == "Qwen2Tokenizer":
        return AutoTokenizer.from_pretrained(directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def compare(binary, directory, cases):
    tokenizer = reference(directory)
    lines = "\n".join(json.dumps(case) for case in cases) + "\n"
    ours = subprocess.run([binary, str(directory)], input=lines, capture_output=True, text=True, check=True)
    ours = [json.loads(line) for line in ours.stdout.split("\n") if line]
    assert len(ours) == len(cases), (len(ours), len(cases))
    bad, num_tokens = [], 0
    for case, found in zip(cases, ours):
        if "text" in case:
            text = case["text"]
        else:
            messages = merged(case["messages"]) if found.get("merges_system") else case["messages"]
            prompt = case["add_generation_prompt"]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        num_tokens += len(ids)
        if found.get("text") != text or found.get("ids") != ids:
            bad.append((case, found, text, ids))
    return bad, num_tokens


def main():
    binary, directories = sys.argv[1], [Path(path) for path in sys.argv[2:]]
    cases = list(conversations(300)) + [{"text": sample} for sample in SAMPLES]
    print(f"transformers {transformers.__version__}: {len(cases)} cases each")
    print("| tokenizer and template | cases | tokens | different |\n|---|---|---|---|")
    failed = False
    for directory in directories:
        bad, num_tokens = compare(binary, directory, cases)
        print(f"| {directory.parent.name} | {len(cases)} | {num_tokens} | {len(bad)} |", flush=True)
        for case, found, text, ids in bad[:2]:
            failed = True
            print(json.dumps({"case": case, "found": found, "expected": {"text": text, "ids": ids}}), file=sys.stderr)
    sys.exit(failed)


if __name__ == "__main__":
    main()
