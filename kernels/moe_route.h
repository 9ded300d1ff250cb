// Params of moe_route.cu.
#pragma once
#include "rt/step_state.h"

#define MOE_ROUTE_THREADS 256
// Tokens of a block; its slots are a chunk, the unit of the stable sort.
#define MOE_ROUTE_TOKENS 32
// Expert numbers fit a mask of 32 bits per lane.
#define MOE_ROUTE_MAX_EXPERTS 1024
// Experts of a block of moe_route_scan.
#define MOE_ROUTE_SCAN_EXPERTS 32

struct MoeRouteParams {
    PTR(uint32_t) topk_ids;        // [T, K]
    PTR(float) topk_weights;       // [T, K]
    PTR(uint32_t) expert_offsets;  // [E + 1]
    PTR(uint32_t) slot_of_row;     // [R]
    PTR(uint32_t) row_of_slot;     // [R]
    PTR(uint32_t) counts;          // [chunks, E] slots of each expert in a chunk; after the scan, in the chunks before it
    PTR(uint32_t) totals;          // [E]
    PTR(const float) logits;       // [T, E]
    PTR(const StepStateDevice) step;
    uint32_t num_experts;          // E
    uint32_t num_experts_per_tok;  // K
    uint32_t norm_topk_prob;
    uint32_t reserved;
};

struct MoeRouteBackwardParams {
    PTR(float) d_logits;              // [T, E]
    PTR(const float) d_topk_weights;  // [T, K]
    PTR(const float) logits;          // [T, E]
    PTR(const uint32_t) topk_ids;     // [T, K]
    PTR(const float) topk_weights;    // [T, K]
    PTR(const StepStateDevice) step;
    uint32_t num_experts;
    uint32_t num_experts_per_tok;
    uint32_t norm_topk_prob;
    uint32_t reserved;
};
