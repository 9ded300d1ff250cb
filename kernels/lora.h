// Params of lora.cu.
#pragma once
#include "linear.h"

#define LORA_THREADS 128
// Rows of a block of the projections, and ranks that it makes.
#define LORA_ROWS 64
#define LORA_RANKS 64
// Columns of a block of lora_grads, tokens that it sums, and jobs of a launch.
#define LORA_GRAD_COLS 128
#define LORA_GRAD_TOKENS 1024
#define LORA_MAX_JOBS 8
// Dynamic shared memory of lora_grads.
#define LORA_GRAD_SHARED 57344

// The modules of one call, each with what it reads.
struct LoraProjectParams {
    LoraModule modules[LINEAR_MAX_PROJECTIONS];
    PTR(const bf16) rows[LINEAR_MAX_PROJECTIONS];   // x [T, K]; backward: d_out [T, stride]
    uint32_t num_cols[LINEAR_MAX_PROJECTIONS];      // K; backward: N
    uint32_t strides[LINEAR_MAX_PROJECTIONS];       // elements from row to row, a multiple of 8
    PTR(bf16) xa;                                   // [T, xa_width]; backward: d_xa
    PTR(const void) lora;
    PTR(const StepStateDevice) step;
    uint32_t xa_width;
    uint32_t lora_is_bf16;
};

// One gradient, of A or of B: element (r, c) += sum_t narrow[t, r] wide[t, c].
struct LoraGradJob {
    LoraModule module;
    PTR(const bf16) narrow;  // d_xa for A, xa for B: [T, xa_width]
    PTR(const bf16) wide;    // x for A, d_out for B: [T, stride]
    uint32_t num_cols;       // K for A, N for B
    uint32_t stride;         // a multiple of 8
    uint32_t is_b;
    uint32_t first_tile;     // of its column tiles in the grid
    uint64_t first_partial;  // of its rank num_cols elements among the partial sums
};

struct LoraGradsParams {
    LoraGradJob jobs[LORA_MAX_JOBS];
    PTR(void) d_lora;       // the arena, f32 or bf16
    PTR(float) partials;    // [splits, num_partials]; null: one split, added at once
    PTR(const StepStateDevice) step;
    uint64_t num_partials;  // of all jobs
    uint32_t num_jobs;
    uint32_t xa_width;
    uint32_t d_lora_is_bf16;
    uint32_t reserved;
};
