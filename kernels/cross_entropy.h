// Params of cross_entropy.cu.
#pragma once
#include "rt/step_state.h"

#define CROSS_ENTROPY_THREADS 256
#define CROSS_ENTROPY_CLEAR_THREADS 256
// Columns of a row of logits that share a maximum.
#define CROSS_ENTROPY_GROUP 64
// Output tiles of the two products: rows, columns, threads, and dynamic shared memory for three stages of 64 in depth. The small
// tile is for devices without so much shared memory, and for few rows.
#define CROSS_ENTROPY_TILE_ROWS 128
#define CROSS_ENTROPY_TILE_COLUMNS 256
#define CROSS_ENTROPY_TILE_THREADS 256
#define CROSS_ENTROPY_TILE_SHARED 147456
#define CROSS_ENTROPY_SMALL_COLUMNS 128
#define CROSS_ENTROPY_SMALL_THREADS 128
#define CROSS_ENTROPY_SMALL_SHARED 98304
// Depth of a stage.
#define CROSS_ENTROPY_DEPTH 64
// Rows that a block of cross_entropy_gradient_sum makes.
#define CROSS_ENTROPY_SUM_ROWS 8

// A chunk: targets [first_target, first_target + num_rows) of the step, as far as there are so many. C num_rows,
// G = ceil(V / 64) groups of columns, Vp the row length of logits: V rounded up to 64.
struct CrossEntropyLogitsParams {
    PTR(bf16) logits;         // [C, Vp] less the maximum of their group; null: only the loss is wanted
    PTR(float) group_max;     // [C, G]
    PTR(float) group_sum;     // [C, G] sum of exp(logit - group_max)
    PTR(float) target_logit;  // [C]
    PTR(const bf16) x;        // [T, D]
    PTR(const bf16) head;     // [V, D]
    PTR(const StepStateDevice) step;
    uint32_t first_target;
    uint32_t num_rows;
    uint32_t hidden_size;
    uint32_t vocab_size;
};

struct CrossEntropyLossParams {
    PTR(float) token_loss;    // [T] +=
    PTR(bf16) logits;         // [C, Vp] becomes loss_scale (softmax - onehot); null: only the loss is wanted
    PTR(const float) group_max;
    PTR(const float) group_sum;
    PTR(const float) target_logit;
    PTR(const StepStateDevice) step;
    uint32_t first_target;
    uint32_t vocab_size;
};

struct CrossEntropyClearParams {
    PTR(bf16) d_x;  // [T, D]
    PTR(const StepStateDevice) step;
    uint32_t hidden_size;
    uint32_t reserved;
};

// cross_entropy_gradient, cross_entropy_gradient_sum.
struct CrossEntropyGradientParams {
    PTR(bf16) d_x;             // [T, D] rows that have a target
    PTR(float) partial;        // [num_multiprocessors, tile] sums of tiles over a part of the vocabulary
    PTR(const bf16) d_logits;  // [C, Vp]
    PTR(const bf16) head;      // [V, D]
    PTR(const StepStateDevice) step;
    uint32_t first_target;
    uint32_t num_rows;
    uint32_t hidden_size;
    uint32_t vocab_size;
    uint32_t num_multiprocessors;
    uint32_t reserved;
};
