// gated_delta_prepare: what the chunks of the gated delta rule need before the state is known. Per chunk and value head:
//   gamma = cumulative sum of g;  L = tril_{-1}(diag(beta) Kh Kh^T) o D, D_ij = e^(gamma_i - gamma_j);  Ti = (I + L)^-1
//   W = Ti diag(beta e^gamma) Kh,  U = Ti diag(beta) V,  P = s tril(Qh Kh^T) o D;  Qh, Kh with unit rows, s = 1 / sqrt(dk)
//
// u bf16, g and beta f32 in; gamma, q_rstd, k_rstd f32, W, U, P and, for backward, Ti bf16 out: see gated_delta.h.
// grid (ceil(R / 64), Hv), block 128: a block does the chunks that begin in its 64 rows (mostly one), a warp 16 rows of a
// chunk. 72 KB of shared memory at head size 128: K, V, Q and then L with Ti in place (f32), Ti diag(beta ..) for W and for U.
// Numerics: products of bf16 with f32 accumulation; gamma, L and the inverse in f32 (a thread substitutes a column); what
// scales columns of Ti (beta, e^gamma, 1 / |k|) is multiplied in before its one rounding, so K and V enter as stored.
// Deterministic.
// Preconditions (the launcher checks): dk and dv multiples of 16 up to 128, R the capacity of all tensors.
// Cost per chunk and head at 128: 6.3 MFLOP, 32 KB read (Q and K once for the value heads of a key head), 40 KB written; memory
// bound. docs/kernels/gated_delta.md.
// Reference: src/backend/cpu/gated_delta.rs; docs/math/gated_delta.md. Yang et al. 2024, Gated Delta Networks.
#include "rt/delta.cuh"

namespace {

constexpr unsigned kThreads = GATED_DELTA_THREADS;
constexpr unsigned kBlock = 16;                    // rows solved at a time
constexpr unsigned kSolveRow = kChunk + 4;         // floats in a row of the solver: 16-byte aligned
constexpr unsigned kSquare = kChunk + kTilePadding;  // stride of a 64 x 64 tile
constexpr float kL2Eps = 1e-6f;

template <unsigned kDim>
constexpr unsigned shared_bytes() {
    return 2 * kChunk * (kDim + kTilePadding) * 2 + kChunk * kSolveRow * 4 + 2 * kChunk * kSquare * 2 + 4 * kChunk * 4;
}
static_assert(shared_bytes<64>() == GATED_DELTA_PREPARE_SHARED_64, "as the launcher has it");
static_assert(shared_bytes<128>() == GATED_DELTA_PREPARE_SHARED_128, "as the launcher has it");
// Q lies in the solver's memory before it is needed, and strips leave through it when it is free again.
static_assert(kChunk * kSolveRow * 4 >= kChunk * (128 + kTilePadding) * 2, "a tile fits");

struct alignas(16) Float4 {
    float value[4];
};

// Inverse length of the row that two neighbouring threads share; all lanes of the warp call it.
DEVICE float row_rstd(const bf16* row, unsigned width, bool valid) {
    float sum = 0.0f;
    for (unsigned column = threadIdx.x % 2 * kVector; valid && column < width; column += 2 * kVector) {
        float x[kVector];
        load8(x, row + column);
        for (unsigned i = 0; i < kVector; ++i) sum += x[i] * x[i];
    }
    sum += __shfl_xor_sync(kFullMask, sum, 1);
    return 1.0f / sqrtf(sum + kL2Eps);
}

// The first warp: gamma (inclusive sums, 0 beyond the chunk) and beta of the chunk, to shared memory and gamma to scratch.
DEVICE void chunk_gates(const GatedDeltaParams& p, float* gamma, float* beta, unsigned head, const Chunk& chunk) {
    if (threadIdx.x >= kWarpSize) return;
    const unsigned row = 2 * threadIdx.x;
    const size_t at = static_cast<size_t>(chunk.start + row) * p.num_value_heads + head;
    float value[2];
    UNROLL for (unsigned i = 0; i < 2; ++i) {
        const bool valid = row + i < chunk.size;
        value[i] = valid ? p.g[at + i * p.num_value_heads] : 0.0f;
        beta[row + i] = valid ? p.beta[at + i * p.num_value_heads] : 0.0f;
    }
    float sum = value[0] + value[1];
    for (unsigned offset = 1; offset < kWarpSize; offset *= 2) {
        const float before = __shfl_up_sync(kFullMask, sum, offset);
        if (threadIdx.x >= offset) sum += before;
    }
    // Added up from the pair before, so that a large second value takes no digits from the first.
    const float before = __shfl_up_sync(kFullMask, sum, 1);
    const float first = (threadIdx.x > 0 ? before : 0.0f) + value[0];
    const float sums[2] = {first, first + value[1]};
    UNROLL for (unsigned i = 0; i < 2; ++i) {
        gamma[row + i] = row + i < chunk.size ? sums[i] : 0.0f;
        if (row + i < chunk.size) p.gamma[chunk_offset(p, head, chunk.start, 1) + row + i] = sums[i];
    }
}

// Column threadIdx.x of (I + L)^-1, by forward substitution, 16 rows at a time in registers. solver[m][i] holds L_im where
// i > m; the inverse's element (m, j), j <= m, replaces what is at [m][j].
DEVICE void solve_column(float* solver) {
    const unsigned column = threadIdx.x, first = threadIdx.x / kWarpSize * kWarpSize;
    for (unsigned top = first; top < kChunk; top += kBlock) {
        float x[kBlock];
        UNROLL for (unsigned i = 0; i < kBlock; ++i) x[i] = top + i == column ? 1.0f : 0.0f;
        // 16 independent sums are enough to hide latency; unrolled, the loop takes registers that the products need.
        NO_UNROLL for (unsigned m = first; m < top; ++m) {
            const float above = m < column ? 0.0f : solver[m * kSolveRow + column];
            UNROLL for (unsigned i = 0; i < kBlock; i += 4) {
                const Float4 l = *reinterpret_cast<const Float4*>(solver + m * kSolveRow + top + i);
                UNROLL for (unsigned k = 0; k < 4; ++k) x[i + k] -= l.value[k] * above;
            }
        }
        UNROLL for (unsigned m = 0; m + 1 < kBlock; ++m) {
            UNROLL for (unsigned i = m / 4 * 4; i < kBlock; i += 4) {
                const Float4 l = *reinterpret_cast<const Float4*>(solver + (top + m) * kSolveRow + top + i);
                UNROLL for (unsigned k = 0; k < 4; ++k) {
                    if (i + k > m) x[i + k] -= l.value[k] * x[m];
                }
            }
        }
        UNROLL for (unsigned i = 0; i < kBlock; ++i) {
            if (column <= top + i) solver[(top + i) * kSolveRow + column] = x[i];
        }
    }
}

template <unsigned kDim>
struct PrepareShared {
    bf16 *k, *v, *for_w, *for_u;
    float *solver, *gamma, *beta, *k_rstd, *q_rstd;

    METHOD explicit PrepareShared(unsigned char* memory) {
        SharedPieces pieces{memory};
        k = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        v = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        solver = pieces.take<float>(kChunk * kSolveRow);
        for_w = pieces.take<bf16>(kChunk * kSquare);
        for_u = pieces.take<bf16>(kChunk * kSquare);
        gamma = pieces.take<float>(kChunk);
        beta = pieces.take<float>(kChunk);
        k_rstd = pieces.take<float>(kChunk);
        q_rstd = pieces.take<float>(kChunk);
    }
};

// The warp's 16 rows of the scores, to scratch.
template <unsigned kDim>
DEVICE void write_scores(const GatedDeltaParams& p, const PrepareShared<kDim>& s, unsigned head, const Chunk& chunk,
                         unsigned row) {
    constexpr unsigned kRow = kDim + kTilePadding;
    if (row >= chunk.size) return;
    Strip<kChunk> scores{};
    multiply<kDim>(scores, Stored<kRow>{reinterpret_cast<const bf16*>(s.solver)}, row, Transposed<kRow>{s.k}, 0);
    const float scale = 1.0f / sqrtf(static_cast<float>(p.key_head_dim));
    scores.each([&](float& value, unsigned i, unsigned j) {
        i += row;
        value *= decay_between(s.gamma, i, j, chunk.size) * s.q_rstd[i] * s.k_rstd[j] * scale;
    });
    write_strip<kSquare>(p.scores + chunk_offset(p, head, chunk.start + row, kChunk), kChunk, s.for_u + row * kSquare, scores,
                         chunk.size - row, kChunk);
}

// L to the solver, transposed: the warp's 16 rows of it.
template <unsigned kDim>
DEVICE void fill_solver(const PrepareShared<kDim>& s, unsigned row, unsigned size) {
    constexpr unsigned kRow = kDim + kTilePadding;
    Strip<kChunk> products{};
    if (row < size) multiply<kDim>(products, Stored<kRow>{s.k}, row, Transposed<kRow>{s.k}, 0);
    products.each([&](float value, unsigned i, unsigned j) {
        i += row;
        if (j >= i) return;
        const float scale = s.beta[i] * s.k_rstd[i] * s.k_rstd[j];
        s.solver[j * kSolveRow + i] = i < size ? value * scale * decay_between(s.gamma, i, j, size) : 0.0f;
    });
}

// The inverse, times what scales the rows of K and V, as operands.
template <unsigned kDim>
DEVICE void scale_inverse(const GatedDeltaParams& p, const PrepareShared<kDim>& s, unsigned head, const Chunk& chunk) {
    for (unsigned at = threadIdx.x; at < kChunk * kChunk; at += kThreads) {
        const unsigned i = at / kChunk, j = at % kChunk;
        const float value = j <= i && i < chunk.size ? s.solver[i * kSolveRow + j] : 0.0f;
        s.for_u[i * kSquare + j] = to_bf16(value * s.beta[j]);
        s.for_w[i * kSquare + j] = to_bf16(value * s.beta[j] * expf(s.gamma[j]) * s.k_rstd[j]);
        if (p.inverse && i < chunk.size) p.inverse[chunk_offset(p, head, chunk.start, kChunk) + at] = to_bf16(value);
    }
}

template <unsigned kDim>
DEVICE void prepare_chunk(const GatedDeltaParams& p, const PrepareShared<kDim>& s, unsigned head, const Chunk& chunk) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim, ratio = p.num_value_heads / p.num_key_heads;
    const unsigned key_head = head / ratio, key_dim = p.num_key_heads * dk;
    const size_t width = 2 * key_dim + p.num_value_heads * dv;
    const bf16* const q = p.u + chunk.start * width + key_head * dk;
    load_tile<kThreads, kChunk, kDim>(reinterpret_cast<bf16*>(s.solver), q, width, chunk.size, dk);
    load_tile<kThreads, kChunk, kDim>(s.k, q + key_dim, width, chunk.size, dk);
    load_tile<kThreads, kChunk, kDim>(s.v, p.u + chunk.start * width + 2 * key_dim + head * dv, width, chunk.size, dv);
    copy_async_commit();
    chunk_gates(p, s.gamma, s.beta, head, chunk);
    // Lengths of the rows: a thread has half a row.
    const unsigned own = threadIdx.x / 2;
    const float q_rstd = row_rstd(q + own * width, dk, own < chunk.size);
    const float k_rstd = row_rstd(q + key_dim + own * width, dk, own < chunk.size);
    if (threadIdx.x % 2 == 0) {
        s.q_rstd[own] = q_rstd;
        s.k_rstd[own] = k_rstd;
        const size_t at = chunk_offset(p, key_head, chunk.start, 1) + own;
        if (head % ratio == 0 && own < chunk.size) {
            p.q_rstd[at] = q_rstd;
            p.k_rstd[at] = k_rstd;
        }
    }
    copy_async_wait<0>();
    __syncthreads();
    const unsigned row = threadIdx.x / kWarpSize * 16;
    write_scores(p, s, head, chunk, row);
    __syncthreads();
    fill_solver(s, row, chunk.size);
    __syncthreads();
    if (threadIdx.x < kChunk) solve_column(s.solver);
    __syncthreads();
    scale_inverse(p, s, head, chunk);
    __syncthreads();
    if (row < chunk.size) {
        bf16* const own_rows = reinterpret_cast<bf16*>(s.solver) + row * kRow;
        Strip<kDim> w{}, u{};
        multiply<kChunk>(w, Stored<kSquare>{s.for_w}, row, Stored<kRow>{s.k}, 0);
        write_strip<kRow>(p.w + chunk_offset(p, head, chunk.start + row, dk), dk, own_rows, w, chunk.size - row, dk);
        multiply<kChunk>(u, Stored<kSquare>{s.for_u}, row, Stored<kRow>{s.v}, 0);
        write_strip<kRow>(p.values + chunk_offset(p, head, chunk.start + row, dv), dv, own_rows, u, chunk.size - row, dv);
    }
}

template <unsigned kDim>
DEVICE void prepare(const GatedDeltaParams& p, unsigned char* memory) {
    const PrepareShared<kDim> shared(memory);
    ChunkStarts starts = chunk_starts(p.step, blockIdx.x);
    for (unsigned start; starts.next(start);) {
        prepare_chunk(p, shared, blockIdx.y, chunk_at(p.step, start));
        __syncthreads();
    }
}

}  // namespace

KERNEL(gated_delta_prepare_64, GatedDeltaParams, p, GATED_DELTA_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    prepare<64>(p, memory);
}

KERNEL(gated_delta_prepare_128, GatedDeltaParams, p, GATED_DELTA_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    prepare<128>(p, memory);
}
