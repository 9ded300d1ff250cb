// attention_forward_<columns>: o = softmax(scale q k^T + mask) v and lse = log sum exp, per head. Causal, inside each packed
// sequence, optionally inside a window: query i sees the keys max(sequence_start[i], i - window + 1) <= j <= i.
//
// q, o [T, Hq, hd], k, v [T, Hk, hd] bf16; lse [T, Hq] f32. T tokens, Hq and Hk heads (Hq / Hk share a k and v), hd <= columns.
// grid (Hq, capacity / 128 rounded up), block 128 threads (256 above 128 columns): 128 queries of one head, 32 a warp. Keys come 64
// at a time, from the first that the first query sees to the last query. K of the next step is copied while P V is computed, V
// while Q K^T is. Above 128 columns two warps share 32 queries, each with half of the scores and of the columns of o: the
// registers of one cannot hold them. They exchange maxima, and P, by way of shared memory.
// Shared memory: 128 + 2 * 64 rows of columns + 8 bf16; where warps share, P (128 rows of 72) and 2 * 128 f32.
// Numerics: scores and sums in f32, softmax online in powers of two, P rounded to bf16 for P V; keys in order: deterministic.
// Preconditions (the launcher checks): hd a multiple of 16, Hq of Hk, rows 16-byte aligned.
// Cost: 4 hd FLOP for each query, head and visible key; compute bound. docs/kernels/attention.md.
// Reference: src/backend/cpu/attention.rs; docs/math/attention.md. Dao 2023; Milakov and Gimelshein 2018.
#include "rt/attention.cuh"

#include "attention.h"

namespace attention {

constexpr unsigned kQueries = ATTENTION_QUERIES;
constexpr unsigned kKeys = ATTENTION_KEYS;
constexpr unsigned kWarpRows = 32, kM = kWarpRows / 16;

// The part of a warp: 32 queries, and of their scores [32, 64] and results [32, kHeadDim] the columns of one of kAcross warps.
template <unsigned kHeadDim, unsigned kThreads>
struct Part {
    static constexpr unsigned kAcross = kThreads / kWarpSize / (kQueries / kWarpRows);
    static constexpr unsigned kScoreTiles = kKeys / kAcross / 8, kColumnTiles = kHeadDim / kAcross / 8;

    unsigned side = threadIdx.x / kWarpSize % kAcross;
    unsigned row = threadIdx.x / kWarpSize / kAcross * kWarpRows;
    unsigned score = side * kScoreTiles * 8;
    unsigned column = side * kColumnTiles * 8;
};

// What a thread keeps of its rows: g and g + 8 of each 16 of its warp's, so [m][half].
struct Rows {
    float max[kM][2];   // of the scores before scaling, up to the step before
    float next[kM][2];  // and with this step's
    float sum[kM][2];   // of exp(score - max) over this thread's columns
};

// Place of a row in what warps that share rows tell each other, [kAcross, 128].
DEVICE unsigned number_at(unsigned side, unsigned row, unsigned m, unsigned half) {
    return side * kQueries + row + m * 16 + half * 8 + threadIdx.x % kWarpSize / 4;
}

// First key that `query` sees. One beyond the tokens is taken for one of the last sequence: it is not stored.
DEVICE unsigned first_seen(const AttentionForwardParams& p, unsigned query, unsigned tokens) {
    return first_key(query, p.step->sequence_start[min_of(query, tokens - 1)], p.window);
}

// Minus infinity where a query does not see a key. Columns are the keys from `key`, rows the warp's queries. Few steps need it.
template <unsigned kN>
DEVICE void mask(float (&s)[kM][kN][4], const AttentionForwardParams& p, unsigned warp_query, unsigned key, unsigned tokens) {
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        const unsigned query = warp_query + m * 16 + half * 8 + threadIdx.x % kWarpSize / 4;
        const unsigned first = first_seen(p, query, tokens);
        UNROLL for (unsigned n = 0; n < kN; ++n) UNROLL for (unsigned i = 0; i < 2; ++i) {
            const unsigned column = key + n * 8 + threadIdx.x % 4 * 2 + i;
            if (column < first || column > query) s[m][n][2 * half + i] = -INFINITY;
        }
    }
}

// The maximum with this step's scores, of the warp's columns.
template <unsigned kN>
DEVICE void find_max(Rows& rows, const float (&s)[kM][kN][4]) {
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        float max = rows.max[m][half];
        UNROLL for (unsigned n = 0; n < kN; ++n) max = fmaxf(max, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, 1));
        rows.next[m][half] = fmaxf(max, __shfl_xor_sync(kFullMask, max, 2));
    }
}

// Scores to exp(score - max) with the new maximum; what was summed before shrinks to it. Late in a row of keys most maxima are
// old ones: then nothing shrinks.
template <unsigned kN, unsigned kColumns>
DEVICE void softmax_step(float (&s)[kM][kN][4], float (&o)[kM][kColumns][4], Rows& rows, float log2_scale) {
    UNROLL for (unsigned m = 0; m < kM; ++m) {
        float shrink[2];
        UNROLL for (unsigned half = 0; half < 2; ++half) {
            const float max = rows.next[m][half];
            // Where a row has seen no key yet, all its terms are exp(-inf) = 0.
            const float base = max == -INFINITY ? 0.0f : max * log2_scale;
            shrink[half] = exp2_approx(rows.max[m][half] * log2_scale - base);
            float sum = 0.0f;
            UNROLL for (unsigned n = 0; n < kN; ++n) UNROLL for (unsigned i = 2 * half; i < 2 * half + 2; ++i) {
                s[m][n][i] = exp2_approx(s[m][n][i] * log2_scale - base);
                sum += s[m][n][i];
            }
            rows.max[m][half] = max;
            rows.sum[m][half] = rows.sum[m][half] * shrink[half] + sum;
        }
        // At 128 columns the vote would cost registers that are not there.
        if constexpr (kN + kColumns <= 20)
            if (!__any_sync(kFullMask, shrink[0] != 1.0f || shrink[1] != 1.0f)) continue;
        UNROLL for (unsigned n = 0; n < kColumns; ++n) UNROLL for (unsigned i = 0; i < 4; ++i) o[m][n][i] *= shrink[i / 2];
    }
}

// o += P V where the warp has all of its rows' P: a product's result has the layout of the next one's operand.
template <unsigned kHeadDim, unsigned kColumns>
DEVICE void add_values(float (&o)[kM][kColumns][4], const float (&s)[kM][kKeys / 8][4], const bf16* v_tile) {
    UNROLL for (unsigned k = 0; k < kKeys / 16; ++k) {
        uint32_t p_part[kM][4];
        UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned i = 0; i < 4; ++i) {
            const float* const pair = &s[m][2 * k + i / 2][i % 2 * 2];
            p_part[m][i] = pack_bf16_pair(pair[0], pair[1]);
        }
        multiply_step<kRow<kHeadDim>>(o, p_part, v_tile + k * 16 * kRow<kHeadDim>);
    }
}

// A number of each of the warp's rows, to the warp that shares them.
DEVICE void tell(float* numbers, const float (&own)[kM][2], unsigned side, unsigned row) {
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half)
        if (threadIdx.x % 4 == 0) numbers[number_at(side, row, m, half)] = own[m][half];
}

// o / sum and lse, by way of the tile of queries, which nobody reads any more.
template <unsigned kHeadDim, unsigned kThreads, unsigned kColumns>
DEVICE void store_results(const AttentionForwardParams& p, float (&o)[kM][kColumns][4], Rows& rows, bf16* tile, float* numbers,
                          unsigned query0, unsigned tokens) {
    const Part<kHeadDim, kThreads> part;
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        float& sum = rows.sum[m][half];
        sum += __shfl_xor_sync(kFullMask, sum, 1);
        sum += __shfl_xor_sync(kFullMask, sum, 2);
    }
    if constexpr (part.kAcross > 1) {
        tell(numbers, rows.sum, part.side, part.row);
        __syncthreads();
    }
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        float sum = rows.sum[m][half];
        if constexpr (part.kAcross > 1) sum += numbers[number_at(1 - part.side, part.row, m, half)];
        const float inverse = 1.0f / sum;
        UNROLL for (unsigned n = 0; n < kColumns; ++n) {
            o[m][n][2 * half] *= inverse;
            o[m][n][2 * half + 1] *= inverse;
        }
        const size_t query = query0 + part.row + m * 16 + half * 8 + threadIdx.x % kWarpSize / 4;
        if (part.side == 0 && threadIdx.x % 4 == 0 && query < tokens)
            p.lse[query * p.num_attention_heads + blockIdx.x] = rows.max[m][half] * p.scale + logf(sum);
    }
    write_fragments<kRow<kHeadDim>>(tile + part.row * kRow<kHeadDim> + part.column, o, 1.0f);
    __syncthreads();
    const size_t stride = static_cast<size_t>(p.num_attention_heads) * p.head_dim;
    store_tile<kQueries, kHeadDim, kThreads>(p.o + blockIdx.x * p.head_dim, tile, stride, query0, tokens, p.head_dim, threadIdx.x);
}

template <unsigned kHeadDim, unsigned kThreads>
DEVICE void forward(const AttentionForwardParams& p, bf16* shared) {
    using Warp = Part<kHeadDim, kThreads>;
    constexpr bool kShares = Warp::kAcross > 1;
    constexpr unsigned kStride = kRow<kHeadDim>;
    // At 128 columns o and the scores leave few registers.
    constexpr auto load_keys = load_tile<kKeys, kHeadDim, kThreads, kHeadDim == 128 ? 4 : 8>;
    const unsigned tokens = p.step->num_tokens, head_dim = p.head_dim;
    // The last queries of a sequence see the most keys: they start first.
    const unsigned query0 = (gridDim.y - 1 - blockIdx.y) * kQueries;
    if (query0 >= tokens) return;

    const unsigned kv_head = blockIdx.x / (p.num_attention_heads / p.num_key_value_heads);
    const unsigned q_stride = p.num_attention_heads * head_dim, k_stride = p.num_key_value_heads * head_dim;
    const bf16* const k = p.k + kv_head * head_dim;
    const bf16* const v = p.v + kv_head * head_dim;
    const unsigned keys_end = min_of(query0 + kQueries, tokens);
    const unsigned keys_begin = first_seen(p, query0, tokens);

    bf16* const q_tile = shared;
    bf16* const k_tile = q_tile + kQueries * kStride;
    bf16* const v_tile = k_tile + kKeys * kStride;
    bf16* const scores = v_tile + kKeys * kStride;  // where warps share rows
    float* const numbers = reinterpret_cast<float*>(scores + kQueries * kScoreStride);
    load_tile<kQueries, kHeadDim, kThreads>(q_tile, p.q + blockIdx.x * head_dim, q_stride, query0, keys_end, head_dim);
    load_keys(k_tile, k, k_stride, keys_begin, keys_end, head_dim);
    copy_async_commit();

    const Warp part;
    const unsigned warp_query = query0 + part.row, warp_last = min_of(warp_query + kWarpRows, tokens) - 1;
    // Keys that some of the warp's queries see begin here, and those that all of them see.
    const unsigned some_see = first_seen(p, warp_query, tokens), all_see = first_seen(p, warp_last, tokens);
    Rows rows;
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        rows.max[m][half] = -INFINITY;
        rows.sum[m][half] = 0.0f;
    }
    float o[kM][Warp::kColumnTiles][4] = {};
    for (unsigned key = keys_begin; key < keys_end; key += kKeys) {
        copy_async_wait<0>();
        __syncthreads();  // K is here, and the V of the step before has been read
        load_keys(v_tile, v, k_stride, key, keys_end, head_dim);
        copy_async_commit();
        const bool sees = warp_query < tokens && key <= warp_last && key + kKeys > some_see;
        float s[kM][Warp::kScoreTiles][4] = {};
        if (sees) {
            multiply_rows<kHeadDim>(s, q_tile + part.row * kStride, k_tile + part.score * kStride);
            if (key < all_see || key + kKeys - 1 > warp_query) mask(s, p, warp_query, key + part.score, tokens);
            find_max(rows, s);
        }
        if constexpr (kShares) {
            if (sees) tell(numbers, rows.next, part.side, part.row);
            __syncthreads();  // the other warp's maximum is here
            UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half)
                if (sees) rows.next[m][half] = fmaxf(rows.next[m][half], numbers[number_at(1 - part.side, part.row, m, half)]);
        }
        if (sees) {
            softmax_step(s, o, rows, p.scale * kLog2E);
            if constexpr (kShares) write_fragments<kScoreStride>(scores + part.row * kScoreStride + part.score, s, 1.0f);
        }
        copy_async_wait<0>();
        __syncthreads();  // V and P are here, and K has been read
        if (key + kKeys < keys_end) load_keys(k_tile, k, k_stride, key + kKeys, keys_end, head_dim);
        copy_async_commit();
        if (!sees) continue;
        if constexpr (kShares) {
            multiply_scores<kHeadDim>(o, scores + part.row * kScoreStride, v_tile + part.column);
        } else {
            add_values<kHeadDim>(o, s, v_tile);
        }
    }
    store_results<kHeadDim, kThreads>(p, o, rows, q_tile, numbers, query0, tokens);
}

}  // namespace attention

#define ATTENTION_FORWARD(columns, threads)                                       \
    KERNEL(attention_forward_##columns, AttentionForwardParams, p, threads) {     \
        DYNAMIC_SHARED(bf16, shared);                                             \
        attention::forward<columns, threads>(p, shared);                          \
    }

ATTENTION_FORWARD(32, ATTENTION_THREADS)
ATTENTION_FORWARD(64, ATTENTION_THREADS)
ATTENTION_FORWARD(96, ATTENTION_THREADS)
ATTENTION_FORWARD(128, ATTENTION_THREADS)
ATTENTION_FORWARD(256, ATTENTION_WIDE_THREADS)
