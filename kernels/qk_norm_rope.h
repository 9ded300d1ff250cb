// Params of qk_norm_rope.cu.
#pragma once
#include "rt/step_state.h"

#define QK_NORM_ROPE_THREADS 128

struct QkNormRopeForwardParams {
    PTR(bf16) q;                // [T, Hq, hd]
    PTR(bf16) k;                // [T, Hk, hd]
    PTR(float) q_rstd;          // [T, Hq]; written where there is a norm
    PTR(float) k_rstd;          // [T, Hk]
    PTR(const bf16) q_proj;     // [T, Hq, q_head_stride]
    PTR(const bf16) k_proj;     // [T, Hk, hd]
    PTR(const float) q_weight;  // [hd]; null: no norm
    PTR(const float) k_weight;  // [hd]; null: no norm
    PTR(const float) cos;       // [positions, rotary_dim / 2]
    PTR(const float) sin;       // [positions, rotary_dim / 2]
    PTR(const StepStateDevice) step;
    uint32_t num_attention_heads;
    uint32_t num_key_value_heads;
    uint32_t head_dim;
    uint32_t q_head_stride;
    uint32_t rotary_dim;
    uint32_t lanes_per_head;    // power of two, 8 lanes_per_head >= hd
    float eps;
    float weight_offset;        // 1 where weights are stored around zero
};

struct QkNormRopeBackwardParams {
    PTR(bf16) d_q_proj;         // [T, Hq, q_head_stride]; the first hd of each head are written
    PTR(bf16) d_k_proj;         // [T, Hk, hd]
    PTR(const bf16) d_q;        // [T, Hq, hd]
    PTR(const bf16) d_k;        // [T, Hk, hd]
    PTR(const bf16) q_proj;     // [T, Hq, q_head_stride]
    PTR(const bf16) k_proj;     // [T, Hk, hd]
    PTR(const float) q_rstd;    // [T, Hq]
    PTR(const float) k_rstd;    // [T, Hk]
    PTR(const float) q_weight;  // [hd]; null: no norm
    PTR(const float) k_weight;  // [hd]; null: no norm
    PTR(const float) cos;       // [positions, rotary_dim / 2]
    PTR(const float) sin;       // [positions, rotary_dim / 2]
    PTR(const StepStateDevice) step;
    uint32_t num_attention_heads;
    uint32_t num_key_value_heads;
    uint32_t head_dim;
    uint32_t q_head_stride;
    uint32_t rotary_dim;
    uint32_t lanes_per_head;
    float weight_offset;
    uint32_t reserved;
};
