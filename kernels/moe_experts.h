// Params of moe_forward.cu and moe_backward.cu.
#pragma once
#include "moe_rows.h"

#define MOE_THREADS 128
// Columns of a block's tile; of gate_up half of it belongs to gate and half to up.
#define MOE_TILE_COLS 128
// Dynamic shared memory of a block: the dynamic map, and stages of 64 in depth. Weights are all NF4, or all dense.
#define MOE_SHARED_NF4 82944
#define MOE_SHARED_DENSE 99328
#define MOE_SMALL_SHARED_NF4 58368
#define MOE_SMALL_SHARED_DENSE 74752
// Sums of <h, delta> that moe_input_grad leaves per row and column tile.
#define MOE_PARTS_PER_TILE 2

struct MoeForwardParams {
    MoeProjection projections[2];  // gate and up, or down; their outputs are expert0.out [R, N]
    MoeRows rows;
    PTR(bf16) h;           // [R, N] gate_up: silu(gate) up
    PTR(const bf16) x;     // gate_up: [T, K]; down: h [R, K]
    PTR(const bf16) xa;    // [R, xa_width]
    PTR(const void) lora;  // the arena
    uint32_t in_features;  // K
    uint32_t xa_width;
    uint32_t lora_is_bf16;
    uint32_t reserved;
};

struct MoeInputGradParams {
    MoeProjection projections[2];  // the gradients of their outputs are expert0.out [T or R, N]
    MoeRows rows;
    PTR(bf16) d_x;                  // [R, K]
    PTR(const bf16) d_xa;           // [R, xa_width]
    PTR(const void) lora;           // the arena
    PTR(const bf16) h;              // [R, K] down; null: gate and up
    PTR(const float) topk_weights;  // [T, K] down
    PTR(float) partial;             // [R, num_parts] down: parts of <h, delta>
    uint32_t num_projections;
    uint32_t in_features;           // K
    uint32_t xa_width;
    uint32_t lora_is_bf16;
    uint32_t is_gathered;           // the gradients have a row per token
    uint32_t num_parts;
};
