// Params of moe_lora.cu.
#pragma once
#include "moe_rows.h"

#define MOE_LORA_THREADS 128
// Columns of xa that a block of moe_lora_project makes, and ranks that one of moe_lora_grads does.
#define MOE_LORA_RANKS 32
// Columns of the wide operand of a block of moe_lora_grads.
#define MOE_LORA_GRAD_COLUMNS 128
#define MOE_LORA_MAX_JOBS 4

// One product xa = x A^T (or s x B, the gradient), for every row.
struct MoeLoraProjectJob {
    PTR(const bf16) x;  // [T or R, depth]
    MoePair pair;
};

struct MoeLoraProjectParams {
    PTR(bf16) xa;         // [R, xa_width]
    PTR(const void) lora; // the arena
    MoeRows rows;
    MoeLoraProjectJob jobs[2];
    uint32_t xa_width;
    uint32_t depth;            // columns of x
    uint32_t gathered;         // x has a row per token
    uint32_t backward;         // d_xa = scaling d_out B instead of dropout(x) A^T
    uint32_t lora_is_bf16;
    uint32_t rank_blocks;      // of the job with the most ranks
};

// One gradient: d_a[r, c] += sum_rows narrow[row, r] wide[row, c], or d_b[c, r] likewise.
struct MoeLoraGradJob {
    PTR(const bf16) wide;    // x, or d_out [T or R, width]
    PTR(const bf16) narrow;  // d_xa, or xa [R, narrow_width]
    MoePair pair;
    uint32_t width;
    uint32_t gathered;       // wide has a row per token
    uint32_t is_b;           // writes d_b, scaled; else d_a, with the dropout of x
    uint32_t reserved;
};

struct MoeLoraGradsParams {
    PTR(float) d_lora;
    PTR(const float) topk_weights;  // [T, K] scales the rows; null: 1
    MoeRows rows;
    MoeLoraGradJob jobs[MOE_LORA_MAX_JOBS];
    uint32_t narrow_width;
    uint32_t column_blocks;  // of the widest job
};
