// Params of swiglu.cu.
#pragma once
#include "rt/step_state.h"

#define SWIGLU_THREADS 256

struct SwigluBackwardParams {
    PTR(bf16) d_gate;      // [T rows_per_token, I]
    PTR(bf16) d_up;        // [T rows_per_token, I]
    PTR(const bf16) d_h;   // [T rows_per_token, I]
    PTR(const bf16) gate;  // [T rows_per_token, I]; may be d_gate
    PTR(const bf16) up;    // [T rows_per_token, I]; may be d_up
    PTR(const StepStateDevice) step;
    uint32_t width;           // I
    uint32_t rows_per_token;  // 1, or the experts of a token
};
