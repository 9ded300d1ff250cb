// What the attention kernels share: tiles of rows in shared memory, products of tiles, and the keys that a query sees.
//
// A tile holds rows of one head, kHeadDim columns and 8 of padding each: an odd number of 16-byte pieces, so that the eight
// rows of a matrix load lie in different banks. Columns beyond the model's head_dim, and rows beyond the end, are zeros.
#pragma once

#include "bits.cuh"
#include "mma.cuh"
#include "step_state.h"
#include "vector.cuh"

#ifdef __CUDACC__

#define UNROLL_TWICE _Pragma("unroll 2")

// 2^x within two units in the last place; 0 where the result is below 2^-126.
DEVICE float exp2_approx(float x) {
    float result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

#else

#define UNROLL_TWICE

DEVICE float exp2_approx(float x) {
    const float result = exp2f(x);
    return result < 1.17549435e-38f ? 0.0f : result;
}

#endif

namespace attention {

constexpr float kLog2E = 1.4426950408889634f;

DEVICE unsigned min_of(unsigned a, unsigned b) { return a < b ? a : b; }

// The first key that `query` sees: of its sequence, and of the window's last `window` keys (all: 0xffffffff). The last is itself.
DEVICE unsigned first_key(unsigned query, unsigned sequence_start, unsigned window) {
    const unsigned reach = query + 1 > window ? query + 1 - window : 0;
    return reach > sequence_start ? reach : sequence_start;
}

template <unsigned kHeadDim>
constexpr unsigned kRow = kHeadDim + 8;
// Scores (P or dS) of a tile, 64 columns, are padded likewise.
constexpr unsigned kScores = 64, kScoreStride = kScores + 8;

// Rows [first, end) of a head to shared memory, kRows at most. `head` is the head's column in row 0. Where the threads make whole
// rows each keeps its column: one address, and rows at equal steps from it. kAtOnce of them are unrolled: fewer hold fewer registers.
template <unsigned kRows, unsigned kHeadDim, unsigned kThreads, unsigned kAtOnce = 8>
DEVICE void load_tile(bf16* tile, const bf16* head, uint32_t stride, unsigned first, unsigned end, unsigned head_dim) {
    constexpr unsigned kPieces = kHeadDim / 8, kStride = kRow<kHeadDim>;
    if constexpr (kThreads % kPieces == 0) {
        constexpr unsigned kStep = kThreads / kPieces, kTurns = kRows / kStep;
        const unsigned thread = kAtOnce < kTurns ? made_anew(threadIdx.x) : threadIdx.x;
        const unsigned row = thread / kPieces, column = thread % kPieces * 8;
        const unsigned rows = first + row < end && column < head_dim ? end - first - row : 0;
        const bf16* const from = head + static_cast<size_t>(first + row) * stride + column;
        const SharedAddress target = shared_address(tile + row * kStride + column);
        NO_UNROLL for (unsigned turn = 0; turn < kTurns; turn += kAtOnce) {
            UNROLL for (unsigned i = turn; i < turn + kAtOnce && i < kTurns; ++i)
                copy_async_16(target + i * kStep * kStride * sizeof(bf16), from + static_cast<size_t>(stride) * (i * kStep), i * kStep < rows);
        }
    } else {
        UNROLL_TWICE for (unsigned i = threadIdx.x; i < kRows * kPieces; i += kThreads) {
            const unsigned row = i / kPieces, column = i % kPieces * 8;
            const bool valid = first + row < end && column < head_dim;
            const bf16* const from = head + (valid ? static_cast<size_t>(first + row) * stride + column : 0);
            copy_async_16(tile + row * kStride + column, from, valid);
        }
    }
}

// The way back, from a tile that a barrier has completed, by `kThreads` threads of which this is `thread`.
template <unsigned kRows, unsigned kHeadDim, unsigned kThreads>
DEVICE void store_tile(bf16* head, const bf16* tile, size_t stride, unsigned first, unsigned end, unsigned head_dim, unsigned thread) {
    constexpr unsigned kPieces = kHeadDim / 8;
    for (unsigned i = thread; i < kRows * kPieces; i += kThreads) {
        const unsigned row = i / kPieces, column = i % kPieces * 8;
        if (first + row >= end || column >= head_dim) continue;
        *reinterpret_cast<Packed8*>(head + (first + row) * stride + column) =
            *reinterpret_cast<const Packed8*>(tile + row * kRow<kHeadDim> + column);
    }
}

// Fragments [16 kM, 8 kN] times `factor`, rounded, to shared memory at `tile`, whose rows are `kStride` apart.
template <unsigned kStride, unsigned kM, unsigned kN>
DEVICE void write_fragments(bf16* tile, const float (&d)[kM][kN][4], float factor) {
    const unsigned lane = threadIdx.x % kWarpSize;
    bf16* const at = tile + lane / 4 * kStride + lane % 4 * 2;
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned n = 0; n < kN; ++n) UNROLL for (unsigned half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(at + (m * 16 + half * 8) * kStride + n * 8) =
            pack_bf16_pair(d[m][n][2 * half] * factor, d[m][n][2 * half + 1] * factor);
}

// d [16 kM, 8 kN] += a [16 kM, kDepth] b [8 kN, kDepth]^T, of tiles kHeadDim wide.
template <unsigned kDepth, unsigned kM, unsigned kN>
DEVICE void multiply_rows(float (&d)[kM][kN][4], const bf16* a, const bf16* b) {
    constexpr unsigned kStride = kRow<kDepth>;
    const unsigned lane = threadIdx.x % kWarpSize;
    const bf16* const a_lane = a + lane % 16 * kStride + lane / 16 * 8;
    const bf16* const b_lane = b + (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
    UNROLL for (unsigned k = 0; k < kDepth; k += 16) {
        uint32_t a_part[kM][4];
        UNROLL for (unsigned m = 0; m < kM; ++m) load_matrix_x4(a_part[m], a_lane + m * 16 * kStride + k);
        UNROLL for (unsigned n = 0; n < kN; n += 2) {
            uint32_t b_part[4];
            load_matrix_x4(b_part, b_lane + n * 8 * kStride + k);
            const uint32_t b_first[2] = {b_part[0], b_part[1]}, b_second[2] = {b_part[2], b_part[3]};
            UNROLL for (unsigned m = 0; m < kM; ++m) {
                mma_16x8x16(d[m][n], a_part[m], b_first);
                mma_16x8x16(d[m][n + 1], a_part[m], b_second);
            }
        }
    }
}

// d [16 kM, 8 kN] += a [16 kM, 16] b [16, 8 kN]: `b` is a tile's columns, its rows kStride apart.
template <unsigned kStride, unsigned kM, unsigned kN>
DEVICE void multiply_step(float (&d)[kM][kN][4], const uint32_t (&a)[kM][4], const bf16* b) {
    const unsigned lane = threadIdx.x % kWarpSize;
    const bf16* const b_lane = b + lane % 16 * kStride + lane / 16 * 8;
    UNROLL for (unsigned n = 0; n < kN; n += 2) {
        uint32_t b_part[4];
        load_matrix_x4_transposed(b_part, b_lane + n * 8);
        const uint32_t b_first[2] = {b_part[0], b_part[1]}, b_second[2] = {b_part[2], b_part[3]};
        UNROLL for (unsigned m = 0; m < kM; ++m) {
            mma_16x8x16(d[m][n], a[m], b_first);
            mma_16x8x16(d[m][n + 1], a[m], b_second);
        }
    }
}

// d += scores [rows of the warp, 64] tile [64, columns of the warp].
template <unsigned kHeadDim, unsigned kM, unsigned kN>
DEVICE void multiply_scores(float (&d)[kM][kN][4], const bf16* scores, const bf16* tile) {
    const unsigned lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned k = 0; k < kScores; k += 16) {
        uint32_t part[kM][4];
        UNROLL for (unsigned m = 0; m < kM; ++m)
            load_matrix_x4(part[m], scores + (m * 16 + lane % 16) * kScoreStride + k + lane / 16 * 8);
        multiply_step<kRow<kHeadDim>>(d, part, tile + k * kRow<kHeadDim>);
    }
}

}  // namespace attention
