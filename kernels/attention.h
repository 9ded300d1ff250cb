// Params of attention_forward.cu and attention_backward.cu.
#pragma once
#include "rt/step_state.h"

// Threads of a block: up to 128 columns a head, and above.
#define ATTENTION_THREADS 128
#define ATTENTION_WIDE_THREADS 256
// Forward: rows of a block's queries, and keys of a step.
#define ATTENTION_QUERIES 128
#define ATTENTION_KEYS 64
// Backward: rows and columns of a block's scores.
#define ATTENTION_TILE 64
// Columns that pad a row in shared memory.
#define ATTENTION_PADDING 8
#define ATTENTION_DELTA_THREADS 256
#define ATTENTION_DELTA_ROWS 32

// attention_forward_<columns>.
struct AttentionForwardParams {
    PTR(bf16) o;        // [T, Hq, hd]
    PTR(float) lse;     // [T, Hq]
    PTR(const bf16) q;  // [T, Hq, hd]
    PTR(const bf16) k;  // [T, Hk, hd]
    PTR(const bf16) v;  // [T, Hk, hd]
    PTR(const StepStateDevice) step;
    uint32_t num_attention_heads;
    uint32_t num_key_value_heads;
    uint32_t head_dim;
    uint32_t window;    // keys a query sees, itself included; all: 0xffffffff
    float scale;        // of the scores
    uint32_t reserved;
};

// attention_delta, attention_backward_query_<columns>, attention_backward_key_<columns>.
struct AttentionBackwardParams {
    PTR(bf16) d_q;        // [T, Hq, hd]
    PTR(bf16) d_k;        // [T, Hk, hd]
    PTR(bf16) d_v;        // [T, Hk, hd]
    PTR(float) delta;     // [T, Hq] <d_o, o>, written by attention_delta
    PTR(const bf16) d_o;  // [T, Hq, hd]
    PTR(const bf16) o;    // [T, Hq, hd]
    PTR(const float) lse; // [T, Hq]
    PTR(const bf16) q;    // [T, Hq, hd]
    PTR(const bf16) k;    // [T, Hk, hd]
    PTR(const bf16) v;    // [T, Hk, hd]
    PTR(const StepStateDevice) step;
    uint32_t num_attention_heads;
    uint32_t num_key_value_heads;
    uint32_t head_dim;
    uint32_t window;
    float scale;
    uint32_t reserved;
};
