#!/usr/bin/env python3
"""The peer of `cargo bench --bench step`: PyTorch + PEFT, the same model, tokens, adapter and threads.

    python benches/peers/torch_step.py --threads 2 [--layers 24] [--tokens 512] [--steps 5]

Qwen2.5-0.5B's shape, random f32 weights, LoRA r16 on the seven projections, one sequence, all tokens learnt; forward,
backward, clipping, AdamW. Prints one JSON line.
"""

import argparse
import json
import resource
import time

import peft
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=arguments.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        use_cache=False,
        attn_implementation="sdpa",
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(Qwen2ForCausalLM(config).float(), lora).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(0, config.vocab_size, (1, arguments.tokens))
    seconds = []
    for step in range(arguments.steps + 1):
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        # The first step warms up.
        if step > 0:
            seconds.append(time.perf_counter() - start)
    ordered = sorted(seconds)
    print(
        json.dumps(
            {
                "what": "qwen2.5-0.5b lora r16 f32 train step",
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
                "layers": arguments.layers,
                "tokens": arguments.tokens,
                "threads": torch.get_num_threads(),
                "median_s": ordered[len(ordered) // 2],
                "min_s": ordered[0],
                "each_s": seconds,
                "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main()
