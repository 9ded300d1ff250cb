// Params of moe_lora.cu.
#pragma once
#include "moe_rows.h"

#define MOE_LORA_THREADS 128
// Rows of a step of the projections, and ranks that a block makes.
#define MOE_LORA_ROWS 64
#define MOE_LORA_RANKS 64
// Columns of a block of moe_lora_grads, and its dynamic shared memory.
#define MOE_LORA_GRAD_COLS 128
#define MOE_LORA_GRAD_SHARED 57344
#define MOE_LORA_MAX_JOBS 4

// One product xa = dropout(x) A^T, or d_xa = scaling d_out B.
struct MoeLoraProjectJob {
    MoeProjection projection;
    PTR(const bf16) rows;  // x, or d_out [T or R, num_cols]
    uint32_t num_cols;     // in_features, or out_features
    uint32_t is_gathered;  // has a row per token
};

struct MoeLoraProjectParams {
    MoeLoraProjectJob jobs[2];
    MoeRows rows;
    PTR(bf16) xa;  // [R, xa_width]
    PTR(const void) lora;
    uint32_t xa_width;
    uint32_t lora_is_bf16;
};

// One gradient, of A or of B: element (r, c) += sum over the expert's rows of narrow[row, r] wide[row, c].
struct MoeLoraGradJob {
    MoeProjection projection;
    PTR(const bf16) narrow;  // d_xa for A, xa for B: [R, xa_width]
    PTR(const bf16) wide;    // x for A, d_out for B: [T or R, num_cols]
    uint32_t num_cols;       // in_features, or out_features
    uint32_t is_gathered;    // wide has a row per token
    uint32_t is_b;
    uint32_t first_tile;     // of its column tiles in the grid
};

struct MoeLoraGradsParams {
    MoeLoraGradJob jobs[MOE_LORA_MAX_JOBS];
    MoeRows rows;
    PTR(void) d_lora;               // the arena, f32 or bf16
    PTR(const float) topk_weights;  // [T, K] factor of each row; null: 1
    uint32_t num_jobs;
    uint32_t xa_width;
    uint32_t d_lora_is_bf16;
    uint32_t reserved;
};
