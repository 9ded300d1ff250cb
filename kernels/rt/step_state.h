// What changes from one micro-batch to the next, in device memory: kernels read it there, so that one recorded launch
// serves batches of any length up to the capacity its grid was made for.
#pragma once
#include "params.h"

struct StepStateDevice {
    uint32_t num_tokens;
    uint32_t num_sequences;
    float loss_scale;
    uint32_t dropout_on;
    uint32_t dropout_seed_low;
    uint32_t dropout_seed_high;
    uint32_t optimizer_step;
    uint32_t first_token;
};
