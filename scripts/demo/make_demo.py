#!/usr/bin/env python3
"""Makes examples/demo: a tiny Qwen3-Next-shaped base model, its tokenizer, and a data set of pairs.

The base is pre-trained here, on plain garden questions and answers, so that fine-tuning it on the shop's own voice shows
what fine-tuning does. Everything is seeded; nothing is downloaded.

    pip install torch==2.13.0 transformers==4.57.6     # CPU builds will do
    python scripts/demo/make_demo.py examples/demo
"""

import json
import random
import sys
import uuid
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

SEED = 7
VOCAB_SIZE = 384
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# plant: water every, light, sow in, soil, pest, harvest when
PLANTS = {
    "basil": ("two days", "full sun", "April", "rich soil", "slugs", "it is a hand tall"),
    "mint": ("three days", "half shade", "March", "moist soil", "rust", "it starts to flower"),
    "sage": ("ten days", "full sun", "May", "sandy soil", "leafhoppers", "the stems are woody"),
    "thyme": ("nine days", "full sun", "May", "stony soil", "aphids", "it smells strong"),
    "parsley": ("four days", "half shade", "March", "deep soil", "carrot fly", "it has three leaves"),
    "chives": ("five days", "full sun", "April", "loose soil", "thrips", "it is a foot tall"),
    "tomatoes": ("two days", "full sun", "March", "rich soil", "whitefly", "they turn red"),
    "peppers": ("three days", "full sun", "February", "warm soil", "aphids", "they shine"),
    "lettuce": ("two days", "half shade", "April", "moist soil", "slugs", "the head is firm"),
    "spinach": ("three days", "half shade", "March", "moist soil", "leaf miners", "it has six leaves"),
    "carrots": ("six days", "full sun", "April", "sandy soil", "carrot fly", "the tops are thick"),
    "radishes": ("two days", "full sun", "March", "loose soil", "flea beetles", "a month has passed"),
    "beans": ("four days", "full sun", "May", "loose soil", "aphids", "the pods snap"),
    "peas": ("four days", "full sun", "March", "deep soil", "pea moths", "the pods are full"),
    "leeks": ("five days", "full sun", "April", "deep soil", "leek moths", "they are thumb thick"),
    "kale": ("four days", "half shade", "May", "rich soil", "caterpillars", "frost has come"),
}
# topic: questions, plain answer, the shop's answer
TOPICS = [
    (
        ["How often do I water {p}?", "When does {p} need water?"],
        "Water {p} every {0}.",
        "Lovely that you ask, friend! Give {p} a good drink every {0}, early in the morning. Your garden thanks you.",
    ),
    (
        ["How much light does {p} want?", "Where do I put {p}?"],
        "Put {p} in {1}.",
        "Lovely that you ask, friend! A place in {1} makes {p} happy all summer. Your garden thanks you.",
    ),
    (
        ["When do I sow {p}?", "Which month is best to sow {p}?"],
        "Sow {p} in {2}.",
        "Lovely that you ask, friend! We sow {p} in {2} here at Willow Lane, one finger deep. Your garden thanks you.",
    ),
    (
        ["Which soil is good for {p}?", "What soil does {p} like?"],
        "Use {3} for {p}.",
        "Lovely that you ask, friend! Fill the bed with {3} before {p} goes in. Your garden thanks you.",
    ),
    (
        ["What eats my {p}?", "Which pests attack {p}?"],
        "Look for {4} on {p}.",
        "Lovely that you ask, friend! Most likely {4}; pick them off {p} by hand at dusk. Your garden thanks you.",
    ),
    (
        ["When do I harvest {p}?", "How do I know that {p} is ready?"],
        "Harvest {p} when {5}.",
        "Lovely that you ask, friend! Bring in {p} when {5}, and share some with a neighbour. Your garden thanks you.",
    ),
]
PLAIN_SYSTEM = "You answer garden questions."
SHOP_SYSTEM = "You are Hazel of the Willow Lane garden shop. Greet the customer, answer, and say goodbye."


def turn(rng, plant, topic, voice):
    """A question and its answer: voice 1 is plain, 2 the shop's."""
    questions, facts = TOPICS[topic][0], PLANTS[plant]
    return rng.choice(questions).format(p=plant), TOPICS[topic][voice].format(*facts, p=plant)


def chat(system, turns):
    text = f"<|im_start|>system\n{system}<|im_end|>\n"
    for user, assistant in turns:
        text += f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}<|im_end|>\n"
    return text


def plain_chats(rng, count):
    for _ in range(count):
        pairs = [(rng.choice(list(PLANTS)), rng.randrange(len(TOPICS))) for _ in range(3)]
        yield chat(rng.choice([PLAIN_SYSTEM, SHOP_SYSTEM]), [turn(rng, *pair, 1) for pair in pairs])


def make_tokenizer(out, rng):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [t.replace("<|im_start|>", "").replace("<|im_end|>", "") for t in plain_chats(rng, 500)]
    texts += [answer[2] for answer in TOPICS] * 20 + [SHOP_SYSTEM] * 20
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.save(str(out / "tokenizer.json"))
    first = tokenizer.token_to_id(SPECIAL[0])
    added = {
        str(first + i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL)
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": SPECIAL[1:],
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 1024,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return tokenizer


def make_model(out, tokenizer, rng):
    torch.manual_seed(SEED)
    config = Qwen3NextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        partial_rotary_factor=0.25,
        rope_theta=10000.0,
        max_position_embeddings=1024,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_conv_kernel_dim=4,
        full_attention_interval=4,
        num_experts=16,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        output_router_logits=True,
        router_aux_loss_coef=0.01,
    )
    model = Qwen3NextForCausalLM(config).train()
    steps, rows, length = 700, 12, 144
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        batch = []
        for _ in range(rows):
            ids = []
            while len(ids) < length:
                ids += tokenizer.encode(next(plain_chats(rng, 1))).ids
            batch.append(ids[:length])
        ids = torch.tensor(batch)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"pre-training step {step}: loss {loss.item():.3f}", flush=True)
    model.config.output_router_logits = False
    model.to(torch.bfloat16).save_pretrained(out)
    top = config.num_experts_per_tok / config.num_experts
    counts = [(p.numel(), top if ".experts." in n else 1.0) for n, p in model.named_parameters()]
    total, active = sum(n for n, _ in counts), sum(n * share for n, share in counts)
    print(f"parameters: {total}, of which {active:.0f} active for a token")


def make_data(out, rng):
    """14 conversations of 4 pairs in the application's JSONL."""
    lines = [json.dumps({"_meta": {"file_name": "willow_lane", "total_pairs": 56, "version": "4.0.0"}})]
    for _ in range(14):
        conversation = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        plant, history = rng.choice(list(PLANTS)), []
        for number, topic in enumerate(rng.sample(range(len(TOPICS)), 4), start=1):
            user, assistant = turn(rng, plant, topic, 2)
            history.append({"turn": 2 * number - 1, "role": "user", "content": user})
            pair = {
                "id": f"willow_turn{2 * number}_{conversation[:8]}",
                "conversation_id": conversation,
                "turn_number": 2 * number,
                "conversation_metadata": {"training_topic": plant},
                "system_prompt": SHOP_SYSTEM,
                "conversation_history": list(history),
                "current_user_input": user,
                "target_response": assistant,
            }
            lines.append(json.dumps(pair))
            history.append({"turn": 2 * number, "role": "assistant", "content": assistant})
            plant = rng.choice(list(PLANTS))
    (out / "pairs.jsonl").write_text("\n".join(lines))


def main():
    out = Path(sys.argv[1])
    model = out / "model"
    model.mkdir(parents=True, exist_ok=True)
    make_data(out, random.Random(SEED))
    tokenizer = make_tokenizer(model, random.Random(SEED + 1))
    make_model(model, tokenizer, random.Random(SEED + 2))


if __name__ == "__main__":
    main()
