// Params of embedding.cu.
#pragma once
#include "rt/step_state.h"

#define EMBEDDING_THREADS 256

struct EmbeddingForwardParams {
    PTR(bf16) out;          // [T, D]
    PTR(const bf16) table;  // [V, D]
    PTR(const StepStateDevice) step;
    uint32_t hidden_size;
    uint32_t vocab_size;
};
