// Helpers of the kernels over routed rows: the token of a row, and the dropout mask of an adapter's input.
#pragma once

#include "rt/philox.cuh"
#include "rt/vector.cuh"

#include "moe_rows.h"

// Row of x that routed row `row` reads.
DEVICE size_t token_of_row(const MoeRows& rows, size_t row) { return rows.slot_of_row[row] / rows.num_experts_per_tok; }

// The dropout mask of one expert's pair: which elements of the adapter's input are zero. The kept ones' scale is left to
// whoever sums them, so that the mask itself is exact in bf16.
struct DropoutMask {
    const StepStateDevice* step;
    uint32_t module;
    uint32_t threshold;  // 0: nothing is dropped
    float keep_scale;
};

DEVICE DropoutMask dropout_mask(const MoePair& pair, uint32_t expert, const StepStateDevice* step) {
    const bool on = pair.dropout_threshold && step->dropout_on;
    return {step, pair.module + expert * pair.module_stride, on ? pair.dropout_threshold : 0, on ? pair.keep_scale : 1.0f};
}

// Bit i: column 4 quad + i of the token's row is kept.
DEVICE unsigned kept_of_quad(const DropoutMask& mask, size_t token, unsigned quad) {
    const StepStateDevice& step = *mask.step;
    const Philox4 words = philox4x32(
        {{quad, step.first_token + static_cast<uint32_t>(token), mask.module, step.optimizer_step}}, step.dropout_key_low,
        step.dropout_key_high);
    unsigned kept = 0;
    for (unsigned i = 0; i < 4; ++i) kept |= static_cast<unsigned>(words.word[i] >= mask.threshold) << i;
    return kept;
}

// Zeroes what is dropped of columns [column, column + 8) of the token's row; `at` is 16-byte aligned.
DEVICE void drop8(bf16* at, const DropoutMask& mask, size_t token, unsigned column) {
    const unsigned kept = kept_of_quad(mask, token, column / 4) | kept_of_quad(mask, token, column / 4 + 1) << 4;
    Packed8& packed = *reinterpret_cast<Packed8*>(at);
    for (unsigned i = 0; i < kVector; ++i)
        if (!(kept >> i & 1)) packed.value[i] = to_bf16(0.0f);
}
