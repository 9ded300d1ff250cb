// Params of shared_expert.cu.
#pragma once
#include "rt/step_state.h"

#define SHARED_EXPERT_THREADS 256

struct SharedExpertAddForwardParams {
    PTR(bf16) out;           // [T, D] +=
    PTR(const bf16) shared;  // [T, D]
    PTR(const float) logit;  // [T]
    PTR(const StepStateDevice) step;
    uint32_t hidden_size;
    uint32_t reserved;
};

struct SharedExpertAddBackwardParams {
    PTR(bf16) d_shared;      // [T, D]; may be d_out
    PTR(float) d_logit;      // [T]
    PTR(const bf16) d_out;   // [T, D]
    PTR(const bf16) shared;  // [T, D]
    PTR(const float) logit;  // [T]
    PTR(const StepStateDevice) step;
    uint32_t hidden_size;
    uint32_t reserved;
};
