// gated_delta_prepare: what the chunks of the gated delta rule need before the state is known. Per chunk and value head:
//   gamma = cumulative sum of g;  L = tril_{-1}(diag(beta) Kh Kh^T) o D, D_ij = e^(gamma_i - gamma_j);  Ti = (I + L)^-1
//   W = Ti diag(beta e^gamma) Kh,  U = Ti diag(beta) V,  P = s tril(Qh Kh^T) o D;  Qh, Kh with unit rows, s = 1 / sqrt(dk)
//
// u bf16, g and beta f32 in; gamma, q_rstd, k_rstd f32, W, U, P and, for backward, Ti bf16 out: see gated_delta.h.
// grid (ceil(R / 64), Hv), block 128: a block does the chunks that begin in its 64 rows (mostly one), a warp 16 rows of a
// chunk. 72 KB of shared memory at head size 128: K, V, L with Ti in place (f32), Q and then Ti diag(beta ..) for W and for U.
// What lies above the diagonal of P, L and Ti is not computed, 16 columns at a time.
// Numerics: products of bf16 with f32 accumulation; gamma, L and the inverse in f32 (two threads substitute a column); what
// scales columns of Ti (beta, e^gamma, 1 / |k|) is multiplied in before its one rounding, so K and V enter as stored.
// Deterministic.
// Preconditions (the launcher checks): dk and dv multiples of 16 up to 128, R the capacity of all tensors.
// Cost per chunk and head at 128: 6.3 MFLOP, 32 KB read (Q and K once for the value heads of a key head), 40 KB written; memory
// bound. docs/kernels/gated_delta.md.
// Reference: src/backend/cpu/gated_delta.rs; docs/math/gated_delta.md. Yang et al. 2024, Gated Delta Networks.
#include "rt/delta.cuh"

namespace {

constexpr unsigned kThreads = GATED_DELTA_THREADS;
constexpr unsigned kBlock = 16, kHalf = 8;         // rows solved at a time, by two threads a column
constexpr unsigned kSolveRow = kChunk + 4;         // floats in a row of the solver: 16-byte aligned
constexpr unsigned kSquare = kChunk + kTilePadding;  // stride of a 64 x 64 tile
constexpr float kL2Eps = 1e-6f;

template <unsigned kDim>
constexpr unsigned shared_bytes() {
    return 2 * kChunk * (kDim + kTilePadding) * 2 + kChunk * kSolveRow * 4 + 2 * kChunk * kSquare * 2 + 4 * kChunk * 4;
}
static_assert(shared_bytes<64>() == GATED_DELTA_PREPARE_SHARED_64, "as the launcher has it");
static_assert(shared_bytes<128>() == GATED_DELTA_PREPARE_SHARED_128, "as the launcher has it");
// Q lies where the scaled inverses come later, and strips leave through the solver's memory when it is free.
static_assert(2 * kChunk * kSquare >= kChunk * (128 + kTilePadding), "a tile fits");
static_assert(kChunk * kSolveRow * 4 >= kChunk * (128 + kTilePadding) * 2, "a tile fits");

struct alignas(16) Float4 {
    float value[4];
};

struct alignas(8) Float2 {
    float value[2];
};
DEVICE Float2 load2(const float* at) { return *reinterpret_cast<const Float2*>(at); }

// Inverse lengths of the warp's rows [row, row + 16) of a tile, to `rstd`. Lanes l and l + 16 share a row: the eight that read
// together meet eight rows, and so different banks.
template <unsigned kRow>
DEVICE void row_rstd(float* rstd, const bf16* tile, unsigned row, unsigned width) {
    const unsigned lane = threadIdx.x % kWarpSize, own = row + lane % 16;
    float sum = 0.0f;
    UNROLL_SOME for (unsigned column = lane / 16 * kVector; column < width; column += 2 * kVector) {
        float x[kVector];
        load8(x, tile + own * kRow + column);
        for (unsigned i = 0; i < kVector; ++i) sum += x[i] * x[i];
    }
    sum += __shfl_xor_sync(kFullMask, sum, 16);
    if (lane < 16) rstd[own] = 1.0f / sqrtf(sum + kL2Eps);
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

// The warp's 16 columns of (I + L)^-1, by forward substitution, 16 rows at a time in registers: lanes l and l + 16 share a
// column, 8 rows each. solver[m][i] holds L_im where i > m; the inverse's element (m, j), j <= m, replaces what is at [m][j].
DEVICE void solve_columns(float* solver) {
    const unsigned lane = threadIdx.x % kWarpSize, half = lane / 16;
    const unsigned first = threadIdx.x / kWarpSize * kBlock, column = first + lane % 16;
    for (unsigned top = first; top < kChunk; top += kBlock) {
        const unsigned own = top + half * kHalf;
        float x[kHalf];
        UNROLL for (unsigned i = 0; i < kHalf; ++i) x[i] = own + i == column ? 1.0f : 0.0f;
        UNROLL_SOME for (unsigned m = first; m < top; ++m) {
            const float above = m < column ? 0.0f : solver[m * kSolveRow + column];
            UNROLL for (unsigned i = 0; i < kHalf; i += 4) {
                const Float4 l = *reinterpret_cast<const Float4*>(solver + m * kSolveRow + own + i);
                UNROLL for (unsigned k = 0; k < 4; ++k) x[i + k] -= l.value[k] * above;
            }
        }
        // The upper eight rows: in order for whoever has them, and then taken from the lower ones.
        UNROLL for (unsigned m = 0; m < kHalf; ++m) {
            const float above = __shfl_sync(kFullMask, x[m], lane % 16);
            UNROLL for (unsigned i = 0; i < kHalf; i += 4) {
                const Float4 l = *reinterpret_cast<const Float4*>(solver + (top + m) * kSolveRow + own + i);
                UNROLL for (unsigned k = 0; k < 4; ++k) {
                    if (half == 1 || i + k > m) x[i + k] -= l.value[k] * above;
                }
            }
        }
        if (half == 1) {
            UNROLL for (unsigned m = 0; m + 1 < kHalf; ++m) {
                UNROLL for (unsigned i = m / 4 * 4; i < kHalf; i += 4) {
                    const Float4 l = *reinterpret_cast<const Float4*>(solver + (own + m) * kSolveRow + own + i);
                    UNROLL for (unsigned k = 0; k < 4; ++k) {
                        if (i + k > m) x[i + k] -= l.value[k] * x[m];
                    }
                }
            }
        }
        UNROLL for (unsigned i = 0; i < kHalf; ++i) {
            if (column <= own + i) solver[(own + i) * kSolveRow + column] = x[i];
        }
        __syncwarp();
    }
}

template <unsigned kDim>
struct PrepareShared {
    bf16 *k, *v, *for_w, *for_u;
    bf16* q;  // until for_w and for_u are there
    float *solver, *gamma, *beta, *k_rstd, *q_rstd;

    METHOD explicit PrepareShared(unsigned char* memory) {
        SharedPieces pieces{memory};
        k = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        v = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        solver = pieces.take<float>(kChunk * kSolveRow);
        for_w = pieces.take<bf16>(kChunk * kSquare);
        for_u = pieces.take<bf16>(kChunk * kSquare);
        q = for_w;
        gamma = pieces.take<float>(kChunk);
        beta = pieces.take<float>(kChunk);
        k_rstd = pieces.take<float>(kChunk);
        q_rstd = pieces.take<float>(kChunk);
    }
};

// Columns [column, column + 16) of the warp's 16 rows of Q K^T and of K K^T.
template <unsigned kDim>
DEVICE void multiply_by_keys(Strip<16>& scores, Strip<16>& products, const PrepareShared<kDim>& s, unsigned row, unsigned column) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const Stored<kRow> q{s.q}, k{s.k};
    const Transposed<kRow> keys{s.k};
    UNROLL for (unsigned depth = 0; depth < kDim; depth += 16) {
        uint32_t q_part[4], k_part[4], pair[4];
        q.load_a(q_part, row, depth);
        k.load_a(k_part, row, depth);
        keys.load_b(pair, depth, column);
        const uint32_t first[2] = {pair[0], pair[1]}, second[2] = {pair[2], pair[3]};
        mma_16x8x16(scores.part[0], q_part, first);
        mma_16x8x16(scores.part[1], q_part, second);
        mma_16x8x16(products.part[0], k_part, first);
        mma_16x8x16(products.part[1], k_part, second);
    }
}

// The warp's 16 rows of the scores, to scratch, and of L, transposed to the solver. The decay of both is the same.
template <unsigned kDim>
DEVICE void write_scores(const GatedDeltaParams& p, const PrepareShared<kDim>& s, unsigned head, const Chunk& chunk, unsigned row) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned lane = threadIdx.x % kWarpSize;
    const float scale = 1.0f / sqrtf(static_cast<float>(p.key_head_dim));
    float gamma[2], q_rstd[2], k_scale[2];
    UNROLL for (unsigned half = 0; half < 2; ++half) {
        const unsigned i = row + lane / 4 + half * 8;
        gamma[half] = s.gamma[i];
        q_rstd[half] = s.q_rstd[i];
        k_scale[half] = s.beta[i] * s.k_rstd[i];
    }
    Strip<kChunk> scores{};
    UNROLL for (unsigned column = 0; column < kChunk; column += 16) {
        if (column > row) continue;
        Strip<16> raw{}, products{};
        if (row < chunk.size) multiply_by_keys(raw, products, s, row, column);
        UNROLL for (unsigned part = 0; part < 2; ++part) {
            const unsigned first = column + part * 8 + lane % 4 * 2;
            const Float2 gamma_j = load2(s.gamma + first), rstd_j = load2(s.k_rstd + first);
            UNROLL for (unsigned n = 0; n < 4; ++n) {
                const unsigned half = n / 2, i = row + lane / 4 + half * 8, j = first + n % 2;
                const float exponential = expf(gamma[half] - gamma_j.value[n % 2]);
                const float decay = j <= i && i < chunk.size ? exponential : 0.0f;
                scores.part[column / 8 + part][n] = raw.part[part][n] * (decay * q_rstd[half] * rstd_j.value[n % 2] * scale);
                if (j < i) s.solver[j * kSolveRow + i] = products.part[part][n] * (k_scale[half] * rstd_j.value[n % 2]) * decay;
            }
        }
    }
    // Through the warp's own rows of Q, which nobody else reads.
    if (row < chunk.size)
        write_strip<kRow>(p.scores + chunk_offset(p, head, chunk.start + row, kChunk), kChunk, s.q + row * kRow, scores,
                          chunk.size - row, kChunk);
}

// The inverse, times what scales the rows of K and V, as operands. A thread has two columns.
template <unsigned kDim>
DEVICE void scale_inverse(const GatedDeltaParams& p, const PrepareShared<kDim>& s, unsigned head, const Chunk& chunk) {
    const unsigned j = threadIdx.x % kWarpSize * 2;
    const Float2 beta = load2(s.beta + j), gamma = load2(s.gamma + j), rstd = load2(s.k_rstd + j);
    const float decay[2] = {expf(gamma.value[0]), expf(gamma.value[1])};
    bf16* const inverse = p.inverse ? p.inverse + chunk_offset(p, head, chunk.start, kChunk) + j : nullptr;
    UNROLL_SOME for (unsigned i = threadIdx.x / kWarpSize; i < kChunk; i += kThreads / kWarpSize) {
        Float2 value = load2(s.solver + i * kSolveRow + j);
        float u[2], w[2];
        UNROLL for (unsigned k = 0; k < 2; ++k) {
            value.value[k] = j + k <= i && i < chunk.size ? value.value[k] : 0.0f;
            u[k] = value.value[k] * beta.value[k];
            w[k] = u[k] * decay[k] * rstd.value[k];
        }
        *reinterpret_cast<uint32_t*>(s.for_u + i * kSquare + j) = pack_bf16_pair(u[0], u[1]);
        *reinterpret_cast<uint32_t*>(s.for_w + i * kSquare + j) = pack_bf16_pair(w[0], w[1]);
        if (inverse && i < chunk.size)
            *reinterpret_cast<uint32_t*>(inverse + i * kChunk) = pack_bf16_pair(value.value[0], value.value[1]);
    }
}

// strip += the warp's 16 rows of a lower triangular A, from `row` on, times B.
template <unsigned kColumns, class A, class B>
DEVICE void multiply_lower(Strip<kColumns>& strip, A a, unsigned row, B b) {
    UNROLL for (unsigned k = 0; k < kChunk; k += 16) {
        if (k > row) continue;
        uint32_t a_part[4];
        a.load_a(a_part, row, k);
        multiply_step(strip, a_part, b, k, 0);
    }
}

template <unsigned kDim>
DEVICE void prepare_chunk(const GatedDeltaParams& p, const PrepareShared<kDim>& s, unsigned head, const Chunk& chunk) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim, ratio = p.num_value_heads / p.num_key_heads;
    const unsigned key_head = head / ratio, key_dim = p.num_key_heads * dk;
    const size_t width = 2 * key_dim + p.num_value_heads * dv;
    const bf16* const q = p.u + chunk.start * width + key_head * dk;
    load_tile<kThreads, kChunk, kDim>(s.q, q, width, chunk.size, dk);
    load_tile<kThreads, kChunk, kDim>(s.k, q + key_dim, width, chunk.size, dk);
    load_tile<kThreads, kChunk, kDim>(s.v, p.u + chunk.start * width + 2 * key_dim + head * dv, width, chunk.size, dv);
    copy_async_commit();
    chunk_gates(p, s.gamma, s.beta, head, chunk);
    copy_async_wait<0>();
    __syncthreads();
    const unsigned row = threadIdx.x / kWarpSize * 16;
    row_rstd<kRow>(s.q_rstd, s.q, row, dk);
    row_rstd<kRow>(s.k_rstd, s.k, row, dk);
    __syncthreads();
    if (head % ratio == 0 && threadIdx.x < chunk.size) {
        const size_t at = chunk_offset(p, key_head, chunk.start, 1) + threadIdx.x;
        p.q_rstd[at] = s.q_rstd[threadIdx.x];
        p.k_rstd[at] = s.k_rstd[threadIdx.x];
    }
    write_scores(p, s, head, chunk, row);
    __syncthreads();
    solve_columns(s.solver);
    __syncthreads();
    scale_inverse(p, s, head, chunk);
    __syncthreads();
    if (row < chunk.size) {
        bf16* const own_rows = reinterpret_cast<bf16*>(s.solver) + row * kRow;
        Strip<kDim> w{}, u{};
        multiply_lower(w, Stored<kSquare>{s.for_w}, row, Stored<kRow>{s.k});
        write_strip<kRow>(p.w + chunk_offset(p, head, chunk.start + row, dk), dk, own_rows, w, chunk.size - row, dk);
        multiply_lower(u, Stored<kSquare>{s.for_u}, row, Stored<kRow>{s.v});
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
