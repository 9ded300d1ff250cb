// Params of delta_gates.cu. Hv value heads, `ratio` per key head.
#pragma once
#include "rt/step_state.h"

#define DELTA_GATES_THREADS 256

struct DeltaGatesParams {
    PTR(float) g;               // [T, Hv] out
    PTR(float) beta;            // [T, Hv] out
    PTR(bf16) d_ba;             // [T, 2 Hv] out
    PTR(const float) d_g;       // [T, Hv]
    PTR(const float) d_beta;    // [T, Hv]
    PTR(const bf16) ba;         // [T, 2 Hv] per key head b, then a, of its value heads
    PTR(const float) a_log;     // [Hv]
    PTR(const float) dt_bias;   // [Hv]
    PTR(const StepStateDevice) step;
    uint32_t num_value_heads;
    uint32_t ratio;
};
