// What all kernels over routed rows are told: which rows an expert has, cut into tiles, and where its weights lie.
#pragma once
#include "linear.h"

// Rows of a tile; the small ones where an expert has few.
#define MOE_TILE_ROWS 128
#define MOE_SMALL_TILE_ROWS 64

// Some rows of one expert.
struct MoeTile {
    uint32_t expert;
    uint32_t first_row;
    uint32_t num_rows;
    uint32_t reserved;
};

// Routed rows, sorted by expert.
struct MoeRows {
    PTR(const MoeTile) tiles;            // [at most ceil(R / tile rows) + E] made by moe_tiles
    PTR(const uint32_t) num_tiles;       // [1]
    PTR(const uint32_t) expert_offsets;  // [E + 1]
    PTR(const uint32_t) slot_of_row;     // [R] slot t K + j of each row
    PTR(const uint32_t) token_of_row;    // [R] token t of each row, made by moe_tiles
    PTR(const StepStateDevice) step;
};

// One projection of all experts: expert e's weight and adapter are e strides behind expert 0's.
struct MoeProjection {
    LinearProjection expert0;
    uint64_t dense_stride;          // elements
    uint64_t codes_stride;          // bytes
    uint64_t absmax_stride;         // elements
    uint64_t nested_codes_stride;   // bytes
    uint64_t nested_absmax_stride;  // elements
    uint64_t lora_stride;           // elements of the arena
    uint32_t module_stride;
    uint32_t reserved;
};
