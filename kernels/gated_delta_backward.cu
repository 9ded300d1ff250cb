// gated_delta_gradients: per chunk, from V', the state S before it, d_V' and the gradient d_S of the state after it, the rest
// of backward:
//   Y = Ti^T d_V';  P = tril(d_O V'^T) o D;  E = -tril_{-1}(Y V'^T) o D;  D_ij = e^(gamma_i - gamma_j)
//   d_Qh = s (diag(e^gamma) d_O S^T + P Kh);  d_V = diag(beta) Y
//   H = -diag(e^gamma) Y S^T + E Kh;  G = diag(e^(gamma_C - gamma)) V' d_S^T + s P^T Qh + E^T diag(beta) Kh
//   d_Kh = diag(beta) H + G
//   d_beta = <Y, V> + <H, Kh>;  d_gamma = <d_Qh, Qh> + beta <H, Kh> - <G, Kh>, at the end of the chunk also
//   e^gamma_C <S, d_S> + sum of <diag(e^(gamma_C - gamma)) V' d_S^T, Kh>;  d_g = reverse cumulative sum of d_gamma
// <,> by rows; Qh, Kh of unit rows, s = 1 / sqrt(dk). d_Qh and d_Kh are summed over the value heads of the key head, in order;
// then d_q = r (d_Qh - qh <qh, d_Qh>), r = 1 / |q|, and so for k. The derivation: docs/math/gated_delta.md.
//
// u, Ti, V', d_V', S, d_S, d_O, d_u bf16; the rest f32: see gated_delta.h.
// grid (ceil(R / 64), Hk), block 256: a block does the chunks that begin in its 64 rows, one value head after the other; a warp
// 16 rows and half of the columns. 151 KB of shared memory at head size 128; S and d_S share a tile.
// Numerics: operands bf16, f32 accumulation in a fixed order: deterministic. 1 / |q| and 1 / |k| scale P and E, so Q and K
// enter as stored.
// Preconditions (the launcher checks): as gated_delta.cu; all other kernels of the family ran before.
// Cost per chunk and value head at 128: 14.7 MFLOP, 120 KB read, 33 KB written; bound by memory latency (one block per SM).
// docs/kernels/gated_delta.md. Reference: src/backend/cpu/gated_delta/backward.rs.
#include "rt/delta.cuh"
#include "rt/reduce.cuh"

namespace {

constexpr unsigned kThreads = GATED_DELTA_GRADIENT_THREADS;
constexpr unsigned kSquare = kChunk + kTilePadding;  // stride of a 64 x 64 tile
constexpr unsigned kHalf = kChunk / 2;
constexpr unsigned kVectors = 4 + 2 * 4 + 2;  // of 64 floats
constexpr unsigned kPartials = kThreads / kWarpSize;  // of a block sum

template <unsigned kDim>
constexpr unsigned shared_bytes() {
    return (5 * kChunk + kDim) * (kDim + kTilePadding) * 2 + 3 * kChunk * kSquare * 2 + kVectors * kChunk * 4 + kPartials * 4;
}
static_assert(shared_bytes<64>() == GATED_DELTA_GRADIENT_SHARED_64, "as the launcher has it");
static_assert(shared_bytes<128>() == GATED_DELTA_GRADIENT_SHARED_128, "as the launcher has it");

template <unsigned kDim>
struct Shared {
    bf16 *q, *k, *d_o, *values, *y, *state;
    bf16 *p, *e, *beta_e;  // p holds Ti first
    float *gamma, *beta, *q_rstd, *k_rstd;
    // Dot products of rows, a half of the columns each: [2, 64].
    float *y_dot_v, *q_dot, *h_dot, *g_dot;
    float *q_total, *k_total;  // [64] over the value heads
    float *partial;

    METHOD explicit Shared(unsigned char* memory) {
        constexpr unsigned kTile = kChunk * (kDim + kTilePadding);
        SharedPieces pieces{memory};
        q = pieces.take<bf16>(kTile);
        k = pieces.take<bf16>(kTile);
        d_o = pieces.take<bf16>(kTile);
        values = pieces.take<bf16>(kTile);
        y = pieces.take<bf16>(kTile);
        state = pieces.take<bf16>(kDim * (kDim + kTilePadding));
        p = pieces.take<bf16>(kChunk * kSquare);
        e = pieces.take<bf16>(kChunk * kSquare);
        beta_e = pieces.take<bf16>(kChunk * kSquare);
        gamma = pieces.take<float>(kChunk);
        beta = pieces.take<float>(kChunk);
        q_rstd = pieces.take<float>(kChunk);
        k_rstd = pieces.take<float>(kChunk);
        y_dot_v = pieces.take<float>(2 * kChunk);
        q_dot = pieces.take<float>(2 * kChunk);
        h_dot = pieces.take<float>(2 * kChunk);
        g_dot = pieces.take<float>(2 * kChunk);
        q_total = pieces.take<float>(kChunk);
        k_total = pieces.take<float>(kChunk);
        partial = pieces.take<float>(kPartials);
    }
};

// The part of a warp: rows [row, row + 16), half the columns.
struct Part {
    unsigned row, half;

    METHOD Part() : row(threadIdx.x / kWarpSize % 4 * 16), half(threadIdx.x / kWarpSize / 4) {}
};

// dots[half, row + i] = sum over the strip's columns of strip[i] times tile[row + i], whose columns begin at `column`.
template <unsigned kStride, unsigned kColumns>
DEVICE void row_dots(float* dots, Strip<kColumns>& strip, const bf16* tile, unsigned column, const Part& part) {
    float sum[2] = {};
    strip.each([&](float value, unsigned row, unsigned c) {
        sum[row / 8] += value * to_f32(tile[(part.row + row) * kStride + column + c]);
    });
    UNROLL for (unsigned i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(kFullMask, sum[i], 1);
        sum[i] += __shfl_xor_sync(kFullMask, sum[i], 2);
    }
    const unsigned lane = threadIdx.x % kWarpSize;
    if (lane % 4 == 0) {
        dots[part.half * kChunk + part.row + lane / 4] = sum[0];
        dots[part.half * kChunk + part.row + lane / 4 + 8] = sum[1];
    }
}

// What the value head brings. Two groups of copies: all but the state, the state.
template <unsigned kDim>
DEVICE void load_head(const GatedDeltaParams& p, const Shared<kDim>& s, unsigned head, const Chunk& chunk) {
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim;
    const size_t stride = static_cast<size_t>(p.num_value_heads) * dv, values = chunk_offset(p, head, chunk.start, dv);
    load_tile<kThreads, kChunk, kChunk>(s.p, p.inverse + chunk_offset(p, head, chunk.start, kChunk), kChunk, chunk.size, kChunk);
    load_tile<kThreads, kChunk, kDim>(s.y, p.d_values + values, dv, chunk.size, dv);
    load_tile<kThreads, kChunk, kDim>(s.d_o, p.d_o + chunk.start * stride + head * dv, stride, chunk.size, dv);
    load_tile<kThreads, kChunk, kDim>(s.values, p.values + values, dv, chunk.size, dv);
    copy_async_commit();
    if (!chunk.is_first) load_tile<kThreads, kDim, kDim>(s.state, p.states + state_offset(p, head, chunk.start), dk, dv, dk);
    copy_async_commit();
    load_vector(s.gamma, p.gamma + chunk_offset(p, head, chunk.start, 1), chunk.size);
    for (unsigned i = threadIdx.x; i < kChunk; i += kThreads) {
        s.beta[i] = i < chunk.size ? p.beta[(chunk.start + i) * static_cast<size_t>(p.num_value_heads) + head] : 0.0f;
    }
}

// Y replaces d_V' in shared memory; d_V goes out.
template <unsigned kDim>
DEVICE void solve_values(const GatedDeltaParams& p, const Shared<kDim>& s, unsigned head, const Chunk& chunk, const Part& part) {
    constexpr unsigned kRow = kDim + kTilePadding, kColumns = kDim / 2;
    const unsigned dv = p.value_head_dim, first = part.half * kColumns;
    Strip<kColumns> y{};
    if (part.row < chunk.size) multiply<kChunk>(y, Transposed<kSquare>{s.p}, part.row, Stored<kRow>{s.y}, first);
    __syncthreads();  // all have read d_V'
    store_strip<kRow>(s.y + part.row * kRow, y, first);
    const unsigned key_dim = p.num_key_heads * p.key_head_dim;
    const size_t width = 2 * key_dim + p.num_value_heads * dv, at = chunk.start * width + 2 * key_dim + head * dv;
    // Pairs straight from and to memory: no tile is free for V.
    float sum[2] = {};
    const unsigned lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned i = 0; i < 2; ++i) {
        const unsigned row = part.row + lane / 4 + i * 8;
        if (row < chunk.size) {
            UNROLL for (unsigned tile = 0; tile < kColumns / 8; ++tile) {
                const unsigned column = first + tile * 8 + lane % 4 * 2;
                if (column >= dv) continue;
                const float low = y.part[tile][2 * i], high = y.part[tile][2 * i + 1];
                const uint32_t v = *reinterpret_cast<const uint32_t*>(p.u + at + row * width + column);
                sum[i] += low * low_half(v) + high * high_half(v);
                const uint32_t d_v = pack_bf16_pair(low * s.beta[row], high * s.beta[row]);
                *reinterpret_cast<uint32_t*>(p.d_u + at + row * width + column) = d_v;
            }
        }
        sum[i] += __shfl_xor_sync(kFullMask, sum[i], 1);
        sum[i] += __shfl_xor_sync(kFullMask, sum[i], 2);
        if (lane % 4 == 0) s.y_dot_v[part.half * kChunk + row] = sum[i];
    }
}

// P, E and diag(beta) E, with 1 / |q|, s and 1 / |k| of their rows and columns.
template <unsigned kDim>
DEVICE void score_gradients(const Shared<kDim>& s, unsigned size, float scale, const Part& part) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned first = part.half * kHalf;
    Strip<kHalf> d_scores{}, d_lower{};
    if (part.row < size) {
        multiply<kDim>(d_scores, Stored<kRow>{s.d_o}, part.row, Transposed<kRow>{s.values}, first);
        multiply<kDim>(d_lower, Stored<kRow>{s.y}, part.row, Transposed<kRow>{s.values}, first);
    }
    Strip<kHalf> d_lower_beta;
    UNROLL for (unsigned tile = 0; tile < kHalf / 8; ++tile) {
        UNROLL for (unsigned part_index = 0; part_index < 4; ++part_index) {
            const unsigned lane = threadIdx.x % kWarpSize;
            const unsigned i = part.row + lane / 4 + part_index / 2 * 8, j = first + tile * 8 + lane % 4 * 2 + part_index % 2;
            const float decay = decay_between(s.gamma, i, j, size) * s.k_rstd[j];
            d_scores.part[tile][part_index] *= decay * s.q_rstd[i] * scale;
            const float e = j < i ? -d_lower.part[tile][part_index] * decay * s.k_rstd[i] : 0.0f;
            d_lower.part[tile][part_index] = e;
            d_lower_beta.part[tile][part_index] = e * s.beta[i];
        }
    }
    store_strip<kSquare>(s.p + part.row * kSquare, d_scores, first);
    store_strip<kSquare>(s.e + part.row * kSquare, d_lower, first);
    store_strip<kSquare>(s.beta_e + part.row * kSquare, d_lower_beta, first);
}

// This thread's part of <S, d_S>: S again from memory, d_S from shared memory.
template <unsigned kDim>
DEVICE float state_dot(const GatedDeltaParams& p, const bf16* d_state, unsigned head, unsigned start) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const bf16* const state = p.states + state_offset(p, head, start);
    const unsigned parts = p.key_head_dim / kVector;
    float sum = 0.0f;
    for (unsigned i = threadIdx.x; i < p.value_head_dim * parts; i += kThreads) {
        float value[kVector], gradient[kVector];
        load8(value, state + i * kVector);
        load8(gradient, d_state + i / parts * kRow + i % parts * kVector);
        for (unsigned k = 0; k < kVector; ++k) sum += value[k] * gradient[k];
    }
    return sum;
}

// d_g and d_beta of the chunk, by the first 64 threads; `d_last` is the rest of the last row's d_gamma.
template <unsigned kDim>
DEVICE void write_gates(const GatedDeltaParams& p, const Shared<kDim>& s, unsigned head, const Chunk& chunk, float d_last) {
    const unsigned lane = threadIdx.x;
    if (lane >= kWarpSize) return;
    // Lane l has rows 2 l and 2 l + 1; each sum runs from the last row up to its own.
    float d_gamma[2];
    UNROLL for (unsigned i = 0; i < 2; ++i) {
        const unsigned row = 2 * lane + i;
        const float h = s.h_dot[row] + s.h_dot[kChunk + row], g = s.g_dot[row] + s.g_dot[kChunk + row];
        const float q = s.q_dot[row] + s.q_dot[kChunk + row];
        s.q_total[row] += q;
        s.k_total[row] += s.beta[row] * h + g;
        d_gamma[i] = row < chunk.size ? q + s.beta[row] * h - g + (row + 1 == chunk.size ? d_last : 0.0f) : 0.0f;
        if (row < chunk.size) {
            p.d_beta[(chunk.start + row) * static_cast<size_t>(p.num_value_heads) + head] =
                s.y_dot_v[row] + s.y_dot_v[kChunk + row] + h;
        }
    }
    float sum = d_gamma[0] + d_gamma[1];
    for (unsigned offset = 1; offset < kWarpSize; offset *= 2) {
        const float after = __shfl_down_sync(kFullMask, sum, offset);
        if (lane + offset < kWarpSize) sum += after;
    }
    const float d_g[2] = {sum, sum - d_gamma[0]};
    UNROLL for (unsigned i = 0; i < 2; ++i) {
        const unsigned row = 2 * lane + i;
        if (row < chunk.size) p.d_g[(chunk.start + row) * static_cast<size_t>(p.num_value_heads) + head] = d_g[i];
    }
}

// One value head: adds to d_q and d_k, which are r d_Qh and r d_Kh in the end, and writes d_v, d_g and d_beta.
template <unsigned kDim>
DEVICE void head_gradients(const GatedDeltaParams& p, const Shared<kDim>& s, unsigned head, const Chunk& chunk, const Part& part,
                           Strip<kDim / 2>& d_q, Strip<kDim / 2>& d_k) {
    constexpr unsigned kRow = kDim + kTilePadding, kColumns = kDim / 2;
    const unsigned first = part.half * kColumns, dk = p.key_head_dim, dv = p.value_head_dim;
    const bool has_rows = part.row < chunk.size;
    const float scale = 1.0f / sqrtf(static_cast<float>(dk));
    load_head(p, s, head, chunk);
    copy_async_wait<1>();
    __syncthreads();
    solve_values(p, s, head, chunk, part);
    __syncthreads();
    score_gradients(s, chunk.size, scale, part);
    copy_async_wait<0>();
    __syncthreads();

    // d_Qh, with r s.
    Strip<kColumns> sum{};
    if (has_rows) {
        if (!chunk.is_first) {
            multiply<kDim>(sum, Stored<kRow>{s.d_o}, part.row, Stored<kRow>{s.state}, first);
            sum.each([&](float& value, unsigned i, unsigned) {
                value *= expf(s.gamma[part.row + i]) * s.q_rstd[part.row + i] * scale;
            });
        }
        multiply<kChunk>(sum, Stored<kSquare>{s.p}, part.row, Stored<kRow>{s.k}, first);
        d_q.each_with(sum, [](float& value, float sum) { value += sum; });
    }
    row_dots<kRow>(s.q_dot, sum, s.q, first, part);
    // H, with r.
    sum = {};
    if (has_rows) {
        if (!chunk.is_first) {
            multiply<kDim>(sum, Stored<kRow>{s.y}, part.row, Stored<kRow>{s.state}, first);
            sum.each([&](float& value, unsigned i, unsigned) {
                value *= -expf(s.gamma[part.row + i]) * s.k_rstd[part.row + i];
            });
        }
        multiply<kChunk>(sum, Stored<kSquare>{s.e}, part.row, Stored<kRow>{s.k}, first);
    }
    row_dots<kRow>(s.h_dot, sum, s.k, first, part);
    sum.each([&](float& value, unsigned i, unsigned) { value *= s.beta[part.row + i]; });
    d_k.each_with(sum, [](float& value, float sum) { value += sum; });
    __syncthreads();  // all have read S

    // G, with r: S is no longer needed, d_S takes its place while the products that do not need it go on.
    if (!chunk.is_last) {
        load_tile<kThreads, kDim, kDim>(s.state, p.d_states + state_offset(p, head, chunk.start + kChunk), dk, dv, dk);
    }
    copy_async_commit();
    sum = {};
    if (has_rows) {
        multiply<kChunk>(sum, Transposed<kSquare>{s.p}, part.row, Stored<kRow>{s.q}, first);
        multiply<kChunk>(sum, Transposed<kSquare>{s.beta_e}, part.row, Stored<kRow>{s.k}, first);
    }
    copy_async_wait<0>();
    __syncthreads();
    float d_last = 0.0f;
    if (!chunk.is_last) {
        const float last = s.gamma[chunk.size - 1];
        Strip<kColumns> written{};
        multiply<kDim>(written, Stored<kRow>{s.values}, part.row, Stored<kRow>{s.state}, first);
        written.each([&](float& value, unsigned i, unsigned) {
            value *= expf(last - s.gamma[part.row + i]) * s.k_rstd[part.row + i];
        });
        written.each([&](float value, unsigned i, unsigned column) {
            d_last += value * to_f32(s.k[(part.row + i) * kRow + first + column]);
        });
        sum.each_with(written, [](float& value, float written) { value += written; });
        if (!chunk.is_first) d_last += expf(last) * state_dot<kDim>(p, s.state, head, chunk.start);
        d_last = block_sum<kThreads>(d_last, s.partial);
    }
    row_dots<kRow>(s.g_dot, sum, s.k, first, part);
    d_k.each_with(sum, [](float& value, float sum) { value += sum; });
    __syncthreads();
    write_gates(p, s, head, chunk, d_last);
    __syncthreads();
}

// r (d - xh <xh, d>) of a strip that holds r d, over x in shared memory and out from there; `total` is <x, r d>.
template <unsigned kDim>
DEVICE void normalize_backward(bf16* target, size_t stride, bf16* x, const Strip<kDim / 2>& strip, const float* rstd,
                               const float* total, const Part& part, unsigned size, unsigned columns) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned first = part.half * (kDim / 2);
    Strip<kDim / 2> d_x = strip;
    d_x.each([&](float& value, unsigned i, unsigned column) {
        const unsigned row = part.row + i;
        value -= rstd[row] * rstd[row] * total[row] * to_f32(x[row * kRow + first + column]);
    });
    store_strip<kRow>(x + part.row * kRow, d_x, first);
    __syncthreads();
    copy_out<kRow, kDim, kThreads>(target, stride, x, size, columns, threadIdx.x);
}

template <unsigned kDim>
DEVICE void chunk_gradients(const GatedDeltaParams& p, const Shared<kDim>& s, unsigned key_head, const Chunk& chunk) {
    const unsigned dk = p.key_head_dim, key_dim = p.num_key_heads * dk, ratio = p.num_value_heads / p.num_key_heads;
    const size_t width = 2 * key_dim + p.num_value_heads * p.value_head_dim, at = chunk.start * width + key_head * dk;
    const Part part;
    load_tile<kThreads, kChunk, kDim>(s.q, p.u + at, width, chunk.size, dk);
    load_tile<kThreads, kChunk, kDim>(s.k, p.u + at + key_dim, width, chunk.size, dk);
    load_vector(s.q_rstd, p.q_rstd + chunk_offset(p, key_head, chunk.start, 1), chunk.size);
    load_vector(s.k_rstd, p.k_rstd + chunk_offset(p, key_head, chunk.start, 1), chunk.size);
    for (unsigned i = threadIdx.x; i < kChunk; i += kThreads) s.q_total[i] = s.k_total[i] = 0.0f;
    Strip<kDim / 2> d_q{}, d_k{};
    for (unsigned member = 0; member < ratio; ++member) head_gradients(p, s, key_head * ratio + member, chunk, part, d_q, d_k);
    normalize_backward<kDim>(p.d_u + at, width, s.q, d_q, s.q_rstd, s.q_total, part, chunk.size, dk);
    normalize_backward<kDim>(p.d_u + at + key_dim, width, s.k, d_k, s.k_rstd, s.k_total, part, chunk.size, dk);
}

template <unsigned kDim>
DEVICE void gradients(const GatedDeltaParams& p, unsigned char* memory) {
    const Shared<kDim> shared(memory);
    ChunkStarts starts = chunk_starts(p.step, blockIdx.x);
    for (unsigned start; starts.next(start);) {
        chunk_gradients(p, shared, blockIdx.y, chunk_at(p.step, start));
        __syncthreads();
    }
}

}  // namespace

KERNEL(gated_delta_gradients_64, GatedDeltaParams, p, GATED_DELTA_GRADIENT_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    gradients<64>(p, memory);
}

KERNEL(gated_delta_gradients_128, GatedDeltaParams, p, GATED_DELTA_GRADIENT_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    gradients<128>(p, memory);
}
