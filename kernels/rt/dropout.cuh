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

// What is kept of fragments n < kFragments of a row of them: bit 4 n + i is element i of the n-th, whose columns are col + 8 n.
// Two neighbouring lanes share the four columns of a quad: one makes its words for the fragments' upper row, the other for the
// lower. All lanes of the warp call it, with the rows and columns that mma_16x8x16 gives them.
template <unsigned kFragments>
DEVICE uint32_t kept_of_fragments(const Dropout& mask, unsigned upper_row, unsigned lower_row, unsigned col) {
    static_assert(kFragments <= 8, "one word");
    const bool is_odd = col / 2 % 2 != 0;
    uint32_t kept = 0;
    // A loop: unrolled, its words would take the registers of the sums.
    NO_UNROLL for (unsigned n = 0; n < kFragments; ++n) {
        const Philox4 own = dropout_words(mask, is_odd ? lower_row : upper_row, col / 4 + 2 * n);
        uint32_t own_kept = 0;
        UNROLL for (unsigned i = 0; i < 4; ++i) own_kept |= static_cast<uint32_t>(own.word[i] >= mask.threshold) << i;
        const uint32_t other_kept = __shfl_xor_sync(kFullMask, own_kept, 1);
        // Of a row's four bits, the even lane's columns are the lower two.
        const uint32_t upper = is_odd ? other_kept >> 2 : own_kept & 3, lower = is_odd ? own_kept >> 2 : other_kept & 3;
        kept |= (upper | lower << 2) << 4 * n;
    }
    return kept;
}

// For add_low_rank: sum += mask(product), kept elements scaled. The tile lies at (first_row, first_col); row r of the matrix is
// token r of the micro-batch, or tokens[r], as far as there are rows.
template <class Tile>
struct AddDropped {
    Dropout mask;
    unsigned first_row, first_col;
    const uint32_t* tokens;
    unsigned num_rows;
    uint32_t kept[Tile::kFragmentsM] = {};  // of each row of fragments

    METHOD AddDropped(const Dropout& mask, unsigned first_row, unsigned first_col, const uint32_t* tokens = nullptr,
                      unsigned num_rows = 0)
        : mask(mask), first_row(first_row), first_col(first_col), tokens(tokens), num_rows(num_rows) {}
    METHOD unsigned token(unsigned row) const {
        if (!tokens) return first_row + row;
        return first_row + row < num_rows ? tokens[first_row + row] : 0;
    }
    METHOD void begin(unsigned row, unsigned col) {
        UNROLL for (unsigned m = 1; m < Tile::kFragmentsM; ++m) kept[m - 1] = kept[m];
        kept[Tile::kFragmentsM - 1] =
            mask.is_on ? kept_of_fragments<Tile::kFragmentsN>(mask, token(row), token(row + 8), first_col + col) : ~0u;
    }
    METHOD void operator()(unsigned index, unsigned, float (&sum)[4], const float (&product)[4]) const {
        const uint32_t bits = kept[index / Tile::kFragmentsN] >> index % Tile::kFragmentsN * 4;
        UNROLL for (unsigned i = 0; i < 4; ++i)
            if (bits >> i & 1) sum[i] += mask.keep_scale * product[i];
    }
};
