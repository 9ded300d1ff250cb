#!/usr/bin/env python3
"""Tiny random checkpoints of shapes that the golden models do not have: `random_models.py OUT_DIR` prints their directories."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, Qwen3NextConfig

COMMON = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, max_position_embeddings=512)
MOE = dict(num_experts=7, num_experts_per_tok=3, moe_intermediate_size=40)
CONFIGS = {
    "mistral-window-16": MistralConfig(**COMMON, num_attention_heads=4, num_key_value_heads=1, head_dim=24, sliding_window=16),
    "llama-tied": LlamaConfig(**COMMON, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True),
    "qwen2-untied": Qwen2Config(**COMMON, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False),
    "qwen3-wide-heads": Qwen3Config(**COMMON, num_attention_heads=3, num_key_value_heads=3, head_dim=48),
    "qwen3-moe-dense-first": Qwen3MoeConfig(
        **COMMON, **MOE, num_attention_heads=4, num_key_value_heads=2, head_dim=16, mlp_only_layers=[0], norm_topk_prob=False
    ),
    "qwen3-moe-sparse-step": Qwen3MoeConfig(
        **COMMON,
        **MOE,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    "qwen3-next-grouped": Qwen3NextConfig(
        **COMMON,
        **MOE,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        partial_rotary_factor=0.5,
        linear_num_key_heads=1,
        linear_num_value_heads=3,
        linear_key_head_dim=20,
        linear_value_head_dim=12,
        linear_conv_kernel_dim=3,
        full_attention_interval=3,
        shared_expert_intermediate_size=24,
        norm_topk_prob=False,
    ),
}


def main():
    for seed, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Norms and biases away from one and zero.
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.data.mul_(3.0)
        path = Path(sys.argv[1]) / name
        model.save_pretrained(path)
        print(path)


if __name__ == "__main__":
    main()
