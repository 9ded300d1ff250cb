// Params of attention_gate.cu.
#pragma once
#include "rt/step_state.h"

#define ATTENTION_GATE_THREADS 256

struct AttentionGateForwardParams {
    PTR(bf16) y;             // [T, Hq, hd]
    PTR(const bf16) o;       // [T, Hq, hd]
    PTR(const bf16) q_proj;  // [T, Hq, 2, hd]
    PTR(const StepStateDevice) step;
    uint32_t num_attention_heads;
    uint32_t head_dim;
};

struct AttentionGateBackwardParams {
    PTR(bf16) d_o;           // [T, Hq, hd]
    PTR(bf16) d_q_proj;      // [T, Hq, 2, hd]; the gate's half is written
    PTR(const bf16) d_y;     // [T, Hq, hd]
    PTR(const bf16) o;       // [T, Hq, hd]
    PTR(const bf16) q_proj;  // [T, Hq, 2, hd]
    PTR(const StepStateDevice) step;
    uint32_t num_attention_heads;
    uint32_t head_dim;
};
