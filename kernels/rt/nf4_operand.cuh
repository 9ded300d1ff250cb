// An NF4 weight as an operand of gemm.cuh: each element is unpacked once per tile and used by all of its rows.
//
// A thread takes 64 (or 32) codes of one block of the weight, so it needs one scale: it makes the block's 16 values (Nf4Table,
// 32 instructions) and looks its codes up in registers, 21 instructions for 8: 3.1 an element, and no shared memory but for the
// stores. Codes and scale are loaded a step ahead.
// Preconditions: num_cols a multiple of 64, codes 16-byte aligned.
#pragma once

#include "nf4.cuh"
#include "operands.cuh"

// The weight [num_rows, num_cols], rows of out_features; `dynamic_code` in shared memory (load_dynamic_code).
struct Nf4Source {
    Nf4Weight weight;
    uint32_t num_rows;
    uint32_t num_cols;
};

// The dynamic map to shared memory, float[256]; the caller's next barrier makes it visible. Nothing if scales are plain.
template <unsigned kThreads>
DEVICE void load_dynamic_code(float* shared, const Nf4Weight& weight) {
    if (weight.absmax || !weight.dynamic_code) return;
    for (unsigned i = threadIdx.x; i < kDynamicCodes; i += kThreads) shared[i] = weight.dynamic_code[i];
}

template <class Tile, unsigned kExtent, bool kAlongRowsOfIt, unsigned kHalf = 0>
struct Nf4Rows : Stage<kExtent, kAlongRowsOfIt> {
    using S = Stage<kExtent, kAlongRowsOfIt>;
    static constexpr bool kStaged = true;
    // Codes of a thread, in one row and one block.
    static constexpr unsigned kPiece = S::kRows * S::kCols / Tile::kThreads;
    static_assert(kPiece == 64 || kPiece == 32, "a whole or half block for each thread");
    static_assert(kHalf == 0 || !S::kAlongRows, "rows are paired, not columns");
    Nf4Source source;
    const float* dynamic_code;
    unsigned first;
    // What was fetched.
    Words4 codes[kPiece / 32] = {};
    float scale = 0.0f, offset = 0.0f;
    uint32_t nested_code = 0;

    METHOD Nf4Rows(const Nf4Source& source, const float* dynamic_code, unsigned first)
        : source(source), dynamic_code(dynamic_code), first(first) {}

    // Which of two paired weights this thread unpacks.
    DEVICE bool takes_second() { return Pairing<kHalf>::is_second(threadIdx.x % S::kRows); }

    METHOD void fetch(unsigned step) {
        // Neighbouring threads take neighbouring rows: their stores meet different banks.
        const unsigned tile_row = threadIdx.x % S::kRows, tile_col = threadIdx.x / S::kRows * kPiece;
        const unsigned row = S::matrix_row(first, step, Pairing<kHalf>::row(tile_row));
        const unsigned col = S::matrix_col(first, step, tile_col);
        if (row >= source.num_rows || col >= source.num_cols) {
            scale = offset = 0.0f;  // whatever the codes
            return;
        }
        // In 32 bits: a weight has less than 2^38 elements.
        const uint32_t block = row * (source.num_cols / NF4_BLOCKSIZE) + col / NF4_BLOCKSIZE;
        const uint8_t* const block_codes = source.weight.codes + static_cast<size_t>(block) * (NF4_BLOCKSIZE / 2);
        const Words4* const at = reinterpret_cast<const Words4*>(block_codes + col % NF4_BLOCKSIZE / 2);
        UNROLL for (unsigned i = 0; i < kPiece / 32; ++i) codes[i] = at[i];
        if (source.weight.absmax) {
            scale = source.weight.absmax[block];
        } else {
            const float* const pair = source.weight.nested_absmax + block / NF4_NESTED_BLOCKSIZE * 2;
            nested_code = source.weight.nested_codes[block];
            scale = pair[0];
            offset = pair[1];
        }
    }
    METHOD void store(SharedAddress tile) const {
        // The parts' numbers begin at a multiple of their count: exclusive or tells them apart.
        const SharedAddress target = tile + S::place(threadIdx.x % S::kRows, threadIdx.x / S::kRows * (kPiece / 8));
        const bool is_plain = source.weight.absmax != nullptr;
        const Nf4Table table(is_plain ? scale : rounded_product(dynamic_code[nested_code], scale) + offset);
        UNROLL for (unsigned i = 0; i < kPiece / 8; ++i)
            store_shared_16(target ^ i * sizeof(Words4), table.values(codes[i / 4].word[i % 4]));
    }
};
