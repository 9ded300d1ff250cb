// Dropout masks of adapters: which elements of a module's input are zero. docs/math/linear.md.
#pragma once

#include "bits.cuh"
#include "philox.cuh"
#include "step_state.h"

struct Dropout {
    bool is_on;
    uint32_t threshold;  // 2^32 p: a word below it drops its element
    float keep_scale;    // 1 / (1 - p), of what is kept; 1 where nothing is dropped
    uint32_t module;
    uint32_t first_token;
    uint32_t optimizer_step;
    uint32_t key[2];
};

// The mask of `module` in this step; threshold 0: none.
DEVICE Dropout dropout_of(const StepStateDevice& step, uint32_t module, uint32_t threshold, float keep_scale) {
    const bool is_on = threshold != 0 && step.dropout_on != 0;
    return {is_on,  threshold, is_on ? keep_scale : 1.0f, module, step.first_token, step.optimizer_step,
            {step.dropout_key_low, step.dropout_key_high}};
}

// Mask words of columns [4 quad, 4 quad + 4) of row `row` of the micro-batch.
DEVICE Philox4 dropout_words(const Dropout& mask, unsigned row, unsigned quad) {
    return philox4x32({{quad, mask.first_token + row, mask.module, mask.optimizer_step}}, mask.key[0], mask.key[1]);
}

// Zeroes what is dropped of eight bf16: columns [col, col + 8) of row `row`. col is a multiple of 4.
DEVICE void drop_part(Words4& part, const Dropout& mask, unsigned row, unsigned col) {
    UNROLL for (unsigned quad = 0; quad < 2; ++quad) {
        const Philox4 words = dropout_words(mask, row, col / 4 + quad);
        UNROLL for (unsigned i = 0; i < 2; ++i) {
            const uint32_t low = words.word[2 * i] < mask.threshold ? 0 : 0xffffu;
            const uint32_t high = words.word[2 * i + 1] < mask.threshold ? 0 : 0xffff0000u;
            part.word[quad * 2 + i] &= low | high;
        }
    }
}

// Zeroes what is dropped of a fragment, columns col, col + 1 of rows rows[0] (value[0], value[1]) and rows[1], and scales the
// rest. Two neighbouring lanes share the four columns of a quad: one makes its words for one row, the other for the other. All
// lanes of the warp call it, with the rows and columns that mma_16x8x16 gives them.
DEVICE void drop_fragment(float (&value)[4], const Dropout& mask, const unsigned (&rows)[2], unsigned col) {
    const bool is_odd = col / 2 % 2 != 0;
    const Philox4 own = dropout_words(mask, is_odd ? rows[1] : rows[0], col / 4);
    const uint32_t given[2] = {is_odd ? own.word[0] : own.word[2], is_odd ? own.word[1] : own.word[3]};
    const uint32_t taken[2] = {__shfl_xor_sync(kFullMask, given[0], 1), __shfl_xor_sync(kFullMask, given[1], 1)};
    UNROLL for (unsigned i = 0; i < 2; ++i) {
        const uint32_t upper = is_odd ? taken[i] : own.word[i], lower = is_odd ? own.word[2 + i] : taken[i];
        value[i] = upper < mask.threshold ? 0.0f : value[i] * mask.keep_scale;
        value[2 + i] = lower < mask.threshold ? 0.0f : value[2 + i] * mask.keep_scale;
    }
}

// The same for rows row and row + 8.
DEVICE void drop_fragment(float (&value)[4], const Dropout& mask, unsigned row, unsigned col) {
    const unsigned rows[2] = {row, row + 8};
    drop_fragment(value, mask, rows, col);
}
