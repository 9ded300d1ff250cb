// What all kernels over routed rows are told: which rows an expert has, cut into tiles, and where its adapter lies.
#pragma once
#include "rt/step_state.h"

// Some rows of one expert.
struct MoeTile {
    uint32_t expert;
    uint32_t first_row;
    uint32_t num_rows;
    uint32_t reserved;
};

// Routed rows. Row r belongs to slot slot_of_row[r], and that to token slot / K.
struct MoeRows {
    PTR(const MoeTile) tiles;            // [at most ceil(R / tile_rows) + E] made by moe_tiles
    PTR(const uint32_t) num_tiles;       // [1]
    PTR(const uint32_t) expert_offsets;  // [E + 1]
    PTR(const uint32_t) slot_of_row;     // [R]
    PTR(const StepStateDevice) step;
    uint32_t num_experts_per_tok;        // K
    uint32_t tile_rows;
};

// The adapters of one projection: expert e's pair is e strides behind expert 0's. rank 0: none.
struct MoePair {
    uint64_t a;                  // first element of expert 0's A [rank, in_features] in the arena
    uint64_t b;                  // of its B [out_features, rank]
    uint64_t stride;             // elements from one expert's pair to the next one's
    uint32_t rank;
    uint32_t first_column;       // of this pair in rows of xa
    uint32_t module;             // of expert 0, for the dropout mask
    uint32_t module_stride;
    uint32_t dropout_threshold;  // 2^32 p; a word below drops its element; 0: no dropout
    float keep_scale;            // 1 / (1 - p)
    float scaling;
    uint32_t reserved;
};
