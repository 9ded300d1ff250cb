// Params of gated_rms_norm.cu. Hk key heads of dk, Hv value heads of dv, W = 2 Hk dk + 2 Hv dv.
#pragma once
#include "rt/step_state.h"

#define GATED_RMS_NORM_THREADS 256
#define GATED_RMS_NORM_HEADS 16  // of a block: one per 16 threads

struct GatedRmsNormParams {
    PTR(bf16) y;             // [T, Hv dv] out
    PTR(float) rstd;         // [T, Hv]: out, backward in
    PTR(bf16) d_o;           // [T, Hv dv] out
    PTR(bf16) d_qkvz;        // [T, W] out, its z columns
    PTR(const bf16) d_y;     // [T, Hv dv]
    PTR(const bf16) o;       // [T, Hv dv]
    PTR(const bf16) qkvz;    // [T, W] per key head q, k, then v and z of its value heads
    PTR(const float) weight; // [dv]
    PTR(const StepStateDevice) step;
    uint32_t num_key_heads;
    uint32_t num_value_heads;
    uint32_t key_head_dim;
    uint32_t value_head_dim;
    float eps;
    uint32_t reserved;
};
