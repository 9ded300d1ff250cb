// Params of moe_combine.cu.
#pragma once
#include "moe_rows.h"

#define MOE_TILES_THREADS 256
#define MOE_COMBINE_THREADS 256

struct MoeTilesParams {
    PTR(MoeTile) tiles;                  // [max_tiles]
    PTR(uint32_t) num_tiles;             // [1]
    PTR(uint32_t) token_of_row;          // [R]
    PTR(const uint32_t) expert_offsets;  // [E + 1]
    PTR(const uint32_t) slot_of_row;     // [R]
    uint32_t num_experts;
    uint32_t num_experts_per_tok;        // K
    uint32_t tile_rows;
    uint32_t reserved;
};

struct MoeCombineParams {
    PTR(bf16) out;                    // [T, D]
    PTR(const bf16) rows;             // [R, D]
    PTR(const uint32_t) row_of_slot;  // [R]
    PTR(const float) topk_weights;    // [T, K]; null: 1
    PTR(const StepStateDevice) step;
    uint32_t hidden_size;  // D
    uint32_t num_experts_per_tok;
    uint32_t accumulate;
    uint32_t reserved;
};

struct MoeWeightGradsParams {
    PTR(float) d_topk_weights;        // [T, K]
    PTR(const float) partial;         // [R, num_parts]
    PTR(const uint32_t) row_of_slot;  // [R]
    PTR(const StepStateDevice) step;
    uint32_t num_parts;
    uint32_t num_experts_per_tok;
};
