// Params of causal_conv.cu. Hk key heads of dk, Hv value heads of dv, C = 2 Hk dk + Hv dv channels, W = C + Hv dv.
#pragma once
#include "rt/step_state.h"

#define CAUSAL_CONV_THREADS 128
#define CAUSAL_CONV_TOKENS 32  // of a thread

struct CausalConvParams {
    PTR(bf16) u;             // [T, C] out
    PTR(bf16) d_qkvz;        // [T, W] out, its q, k and v columns
    PTR(const bf16) d_u;     // [T, C]
    PTR(const bf16) qkvz;    // [T, W] per key head q, k, then v and z of its value heads
    PTR(const float) weight; // [C, taps]
    PTR(const StepStateDevice) step;
    uint32_t num_key_heads;
    uint32_t num_value_heads;
    uint32_t key_head_dim;
    uint32_t value_head_dim;
    uint32_t taps;
    uint32_t reserved;
};
