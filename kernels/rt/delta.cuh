// What the kernels of the gated delta rule share: chunks of packed sequences, tiles in shared memory, products of tiles.
//
// A tile is row-major bf16 with 8 elements of padding per row, so that the eight rows of a matrix load lie in different banks.
// kDim, 64 or 128, is the width tiles are made for; columns beyond a head's size are zero.
#pragma once

#include "bits.cuh"
#include "mma.cuh"
#include "vector.cuh"

#include "../gated_delta.h"

#ifdef __CUDACC__
#define UNROLL_SOME _Pragma("unroll 4")
#else
#define UNROLL_SOME
#endif

constexpr unsigned kChunk = GATED_DELTA_CHUNK;
constexpr unsigned kTilePadding = 8;

// ---- chunks ----

// Up to 64 tokens of a sequence, counted from its start.
struct Chunk {
    unsigned start;  // row of its first token
    unsigned size;
    bool is_first;   // of its sequence
    bool is_last;
};

DEVICE Chunk chunk_at(const StepStateDevice* step, unsigned start) {
    const unsigned left = step->sequence_end[start] - start;
    return {start, left < kChunk ? left : kChunk, start == step->sequence_start[start], left <= kChunk};
}

// The chunks that begin in rows [64 window, 64 window + 64): mostly one. Each warp asks for itself, all lanes together.
struct ChunkStarts {
    unsigned first;
    uint64_t bits;

    METHOD bool next(unsigned& start) {
        if (!bits) return false;
        const auto low = static_cast<int>(bits), high = static_cast<int>(bits >> 32);
        start = first + static_cast<unsigned>(low ? __ffs(low) - 1 : __ffs(high) + 31);
        bits &= bits - 1;
        return true;
    }
};

DEVICE bool is_chunk_start(const StepStateDevice* step, unsigned row) {
    return row < step->num_tokens && (row - step->sequence_start[row]) % kChunk == 0;
}

DEVICE ChunkStarts chunk_starts(const StepStateDevice* step, unsigned window) {
    const unsigned first = window * kChunk, row = first + threadIdx.x % kWarpSize;
    const uint64_t low = __ballot_sync(kFullMask, is_chunk_start(step, row));
    const uint64_t high = __ballot_sync(kFullMask, is_chunk_start(step, row + kWarpSize));
    return {first, low | high << 32};
}

// e^(gamma_i - gamma_j) for j <= i < size, else 0. The difference is never positive: no overflow.
DEVICE float decay_between(const float* gamma, unsigned i, unsigned j, unsigned size) {
    return j <= i && i < size ? expf(gamma[i] - gamma[j]) : 0.0f;
}

// Where the scratch of a head's chunk begins.
DEVICE size_t chunk_offset(const GatedDeltaParams& p, unsigned head, unsigned row, unsigned width) {
    return (static_cast<size_t>(head) * p.capacity + row) * width;
}

// The state before the chunk that begins at `row`, which is not its sequence's first. Two such chunks begin at least 64
// rows apart, so that row / 64 tells them apart.
DEVICE size_t state_offset(const GatedDeltaParams& p, unsigned head, unsigned row) {
    const size_t slots = (p.capacity + kChunk - 1) / kChunk;
    return (head * slots + row / kChunk) * p.value_head_dim * p.key_head_dim;
}

// ---- shared memory ----

// Hands out dynamic shared memory piece by piece.
struct SharedPieces {
    unsigned char* at;

    template <class T>
    METHOD T* take(unsigned count) {
        T* const piece = reinterpret_cast<T*>(at);
        at += count * sizeof(T);
        return piece;
    }
};

// `values[i] = source[i]` for i < size, 0 up to 64.
DEVICE void load_vector(float* values, const float* source, unsigned size) {
    for (unsigned i = threadIdx.x; i < kChunk; i += blockDim.x) values[i] = i < size ? source[i] : 0.0f;
}

// Rows [0, rows) and columns [0, columns) of a matrix to a tile of kRows x kColumns, zeros elsewhere. Does not wait. A thread
// of the block's kThreads keeps its column.
template <unsigned kThreads, unsigned kRows, unsigned kColumns>
DEVICE void load_tile(bf16* tile, const bf16* source, size_t stride, unsigned rows, unsigned columns) {
    constexpr unsigned kParts = kColumns / kVector, kStep = kThreads / kParts, kRow = kColumns + kTilePadding;
    static_assert(kThreads % kParts == 0 && kRows % kStep == 0, "whole rows at a time");
    const unsigned first = threadIdx.x / kParts, column = threadIdx.x % kParts * kVector;
    bf16* const target = tile + first * kRow + column;
    const bf16* const from = source + first * stride + column;
    UNROLL_SOME for (unsigned row = 0; row < kRows; row += kStep) {
        const bool valid = first + row < rows && column < columns;
        copy_async_16(target + row * kRow, valid ? from + row * stride : source, valid);
    }
}

// ---- products ----

// The halves of a bf16 pair.
DEVICE float low_half(uint32_t pair) { return f32_of_bits(pair << 16); }
DEVICE float high_half(uint32_t pair) { return f32_of_bits(pair & 0xffff0000u); }

// A matrix stored as a tile: element (r, c) at at[r kStride + c].
template <unsigned kStride>
struct Stored {
    const bf16* at;

    // A [16, 16] at (row, k).
    METHOD void load_a(uint32_t (&a)[4], unsigned row, unsigned k) const {
        const unsigned lane = threadIdx.x % kWarpSize;
        load_matrix_x4(a, at + (row + lane % 16) * kStride + k + lane / 16 * 8);
    }
    // B [16, 8] at (k, column), and the one beside it.
    METHOD void load_b(uint32_t (&b)[4], unsigned k, unsigned column) const {
        const unsigned lane = threadIdx.x % kWarpSize;
        load_matrix_x4_transposed(b, at + (k + lane % 16) * kStride + column + lane / 16 * 8);
    }
};

// The transpose of a stored matrix: element (r, c) at at[c kStride + r].
template <unsigned kStride>
struct Transposed {
    const bf16* at;

    METHOD void load_a(uint32_t (&a)[4], unsigned row, unsigned k) const {
        const unsigned lane = threadIdx.x % kWarpSize;
        load_matrix_x4_transposed(a, at + (k + lane / 16 * 8 + lane % 8) * kStride + row + lane / 8 % 2 * 8);
    }
    METHOD void load_b(uint32_t (&b)[4], unsigned k, unsigned column) const {
        const unsigned lane = threadIdx.x % kWarpSize;
        load_matrix_x4(b, at + (column + lane / 16 * 8 + lane % 8) * kStride + k + lane / 8 % 2 * 8);
    }
};

// A strip of 16 rows and kColumns columns in f32, spread over a warp as mma_16x8x16 leaves it.
template <unsigned kColumns>
struct Strip {
    float part[kColumns / 8][4];

    // f(value, row, column) for this lane's elements, row in [0, 16).
    template <class F>
    METHOD void each(F f) {
        const unsigned lane = threadIdx.x % kWarpSize;
        UNROLL for (unsigned tile = 0; tile < kColumns / 8; ++tile) {
            UNROLL for (unsigned i = 0; i < 4; ++i) f(part[tile][i], lane / 4 + i / 2 * 8, tile * 8 + lane % 4 * 2 + i % 2);
        }
    }

    // f(value, other's value) for this lane's elements.
    template <class F>
    METHOD void each_with(const Strip& other, F f) {
        UNROLL for (unsigned tile = 0; tile < kColumns / 8; ++tile) {
            UNROLL for (unsigned i = 0; i < 4; ++i) f(part[tile][i], other.part[tile][i]);
        }
    }

    // Columns [k, k + 16) as an A operand.
    METHOD void as_a(uint32_t (&a)[4], unsigned k) const {
        const float (&low)[4] = part[k / 8], (&high)[4] = part[k / 8 + 1];
        a[0] = pack_bf16_pair(low[0], low[1]);
        a[1] = pack_bf16_pair(low[2], low[3]);
        a[2] = pack_bf16_pair(high[0], high[1]);
        a[3] = pack_bf16_pair(high[2], high[3]);
    }
};

// strip += a b, over columns [column, column + kColumns) of b; a is an operand [16, 16], b rows [k, k + 16).
template <unsigned kColumns, class B>
DEVICE void multiply_step(Strip<kColumns>& strip, const uint32_t (&a)[4], B b, unsigned k, unsigned column) {
    UNROLL for (unsigned tile = 0; tile < kColumns / 8; tile += 2) {
        uint32_t pair[4];
        b.load_b(pair, k, column + tile * 8);
        const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
        mma_16x8x16(strip.part[tile], a, first);
        mma_16x8x16(strip.part[tile + 1], a, second);
    }
}

// strip += rows [row, row + 16) of A times columns [column, column + kColumns) of B, over a depth of kDepth.
template <unsigned kDepth, unsigned kColumns, class A, class B>
DEVICE void multiply(Strip<kColumns>& strip, A a, unsigned row, B b, unsigned column) {
    UNROLL for (unsigned k = 0; k < kDepth; k += 16) {
        uint32_t a_part[4];
        a.load_a(a_part, row, k);
        multiply_step(strip, a_part, b, k, column);
    }
}

// The same with A = `left`, rounded to bf16.
template <unsigned kDepth, unsigned kColumns, class B>
DEVICE void multiply(Strip<kColumns>& strip, const Strip<kDepth>& left, B b, unsigned column) {
    UNROLL for (unsigned k = 0; k < kDepth; k += 16) {
        uint32_t a_part[4];
        left.as_a(a_part, k);
        multiply_step(strip, a_part, b, k, column);
    }
}

// Writes a strip, rounded, to rows [0, 16) of `tile` from column `column` on.
template <unsigned kStride, unsigned kColumns>
DEVICE void store_strip(bf16* tile, const Strip<kColumns>& strip, unsigned column) {
    const unsigned lane = threadIdx.x % kWarpSize;
    bf16* const at = tile + lane / 4 * kStride + column + lane % 4 * 2;
    UNROLL for (unsigned part = 0; part < kColumns / 8; ++part) {
        const float (&values)[4] = strip.part[part];
        *reinterpret_cast<uint32_t*>(at + part * 8) = pack_bf16_pair(values[0], values[1]);
        *reinterpret_cast<uint32_t*>(at + part * 8 + 8 * kStride) = pack_bf16_pair(values[2], values[3]);
    }
}

// Copies rows [0, rows) and columns [0, columns) of a tile, which has kColumns, to global memory, by kThreads threads of which
// this is `thread`. Each keeps its column.
template <unsigned kStride, unsigned kColumns, unsigned kThreads>
DEVICE void copy_out(bf16* target, size_t stride, const bf16* tile, unsigned rows, unsigned columns, unsigned thread) {
    constexpr unsigned kParts = kColumns / kVector;
    static_assert(kThreads % kParts == 0, "whole rows at a time");
    const unsigned column = thread % kParts * kVector;
    if (column >= columns) return;
    UNROLL_SOME for (unsigned row = thread / kParts; row < rows; row += kThreads / kParts)
        *reinterpret_cast<Packed8*>(target + row * stride + column) =
            *reinterpret_cast<const Packed8*>(tile + row * kStride + column);
}

// A warp's strip of 16 rows through its own 16 rows of shared memory to global memory, 16 bytes at a time: those of `rows`, the
// chunk's rows left from the strip's first on.
template <unsigned kStride, unsigned kColumns>
DEVICE void write_strip(bf16* target, size_t stride, bf16* own_rows, const Strip<kColumns>& strip, unsigned rows,
                        unsigned columns) {
    __syncwarp();
    store_strip<kStride>(own_rows, strip, 0);
    __syncwarp();
    copy_out<kStride, kColumns, kWarpSize>(target, stride, own_rows, rows < 16 ? rows : 16, columns, threadIdx.x % kWarpSize);
}
