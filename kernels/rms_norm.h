// Params of rms_norm.cu.
#pragma once
#include "rt/step_state.h"

#define RMS_NORM_THREADS 256
// For rows of at most this many columns.
#define RMS_NORM_NARROW_THREADS 32
#define RMS_NORM_NARROW_COLUMNS 512

// rms_norm_forward, add_rms_norm_forward.
struct RmsNormForwardParams {
    PTR(bf16) out;          // [T, D]
    PTR(float) rstd;        // [T]
    PTR(bf16) sum;          // [T, D] x + delta; null: no addition
    PTR(const bf16) x;      // [T, D]
    PTR(const bf16) delta;  // [T, D]; null: no addition
    PTR(const float) weight;
    PTR(const StepStateDevice) step;
    uint32_t hidden_size;
    float eps;
    float weight_offset;    // 1 where weights are stored around zero
    uint32_t reserved;
};

struct RmsNormBackwardParams {
    PTR(bf16) d_x;          // [T, D]
    PTR(const bf16) d_out;  // [T, D]
    PTR(const bf16) x;      // [T, D]
    PTR(const float) rstd;  // [T]
    PTR(const float) weight;
    PTR(const StepStateDevice) step;
    uint32_t hidden_size;
    float weight_offset;
    uint32_t accumulate;    // 1: d_x += ...
    uint32_t reserved;
};
