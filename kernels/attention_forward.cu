// attention_forward_<columns>: o = softmax(scale q k^T + mask) v and lse = log sum exp, per head. Causal, inside each packed
// sequence, optionally inside a window: query i sees the keys max(sequence_start[i], i - window + 1) <= j <= i.
//
// q, o [T, Hq, hd], k, v [T, Hk, hd] bf16; lse [T, Hq] f32. T tokens, Hq and Hk heads (Hq / Hk share a k and v), hd <= columns.
// grid (Hq, capacity / 128 rounded up), block 128 threads (256 above 128 columns): 128 queries of one head, 32 a warp (16). Keys
// come 64 at a time, from the first that the first query sees to the last query. Shared memory: 128 + 2 * 64 rows of columns + 8
// bf16. K of the next step is copied while P V is computed, V while Q K^T is.
// Numerics: scores and sums in f32, softmax online in powers of two, P rounded to bf16 for P V; keys in order: deterministic.
// Preconditions (the launcher checks): hd a multiple of 16, Hq of Hk, rows 16-byte aligned.
// Cost: 4 hd FLOP for each query, head and visible key; compute bound. docs/kernels/attention.md.
// Reference: src/backend/cpu/attention.rs; docs/math/attention.md. Dao 2023; Milakov and Gimelshein 2018.
#include "rt/attention.cuh"

#include "attention.h"

namespace attention {

constexpr unsigned kQueries = ATTENTION_QUERIES;
constexpr unsigned kKeys = ATTENTION_KEYS;

// What a thread keeps of its rows: g and g + 8 of each 16 of its warp's, so [m][half].
template <unsigned kM>
struct Rows {
    float max[kM][2];  // of the scores before scaling
    float sum[kM][2];  // of exp(score - max) over this thread's columns
};

// First key that `query` sees. One beyond the tokens is taken for one of the last sequence: it is not stored.
DEVICE unsigned first_seen(const AttentionForwardParams& p, unsigned query, unsigned tokens) {
    return first_key(query, p.step->sequence_start[min_of(query, tokens - 1)], p.window);
}

// Minus infinity where a query does not see a key. Columns are the keys from `key`, rows the warp's queries. Few steps need it.
template <unsigned kM>
DEVICE void mask(float (&s)[kM][kKeys / 8][4], const AttentionForwardParams& p, unsigned warp_query, unsigned key, unsigned tokens) {
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        const unsigned query = warp_query + m * 16 + half * 8 + threadIdx.x % kWarpSize / 4;
        const unsigned first = first_seen(p, query, tokens);
        UNROLL for (unsigned n = 0; n < kKeys / 8; ++n) UNROLL for (unsigned i = 0; i < 2; ++i) {
            const unsigned column = key + n * 8 + threadIdx.x % 4 * 2 + i;
            if (column < first || column > query) s[m][n][2 * half + i] = -INFINITY;
        }
    }
}

// Scores to exp(score - max), with the new maximum; what was summed before shrinks to it.
template <unsigned kM, unsigned kN>
DEVICE void softmax_step(float (&s)[kM][kKeys / 8][4], float (&o)[kM][kN][4], Rows<kM>& rows, float log2_scale) {
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        float max = rows.max[m][half];
        UNROLL for (unsigned n = 0; n < kKeys / 8; ++n) max = fmaxf(max, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, 1));
        max = fmaxf(max, __shfl_xor_sync(kFullMask, max, 2));
        // Where a row has seen no key yet, all its terms are exp(-inf) = 0.
        const float base = max == -INFINITY ? 0.0f : max * log2_scale;
        const float shrink = exp2_approx(rows.max[m][half] * log2_scale - base);
        float sum = 0.0f;
        UNROLL for (unsigned n = 0; n < kKeys / 8; ++n) UNROLL for (unsigned i = 2 * half; i < 2 * half + 2; ++i) {
            s[m][n][i] = exp2_approx(s[m][n][i] * log2_scale - base);
            sum += s[m][n][i];
        }
        UNROLL for (unsigned n = 0; n < kN; ++n) {
            o[m][n][2 * half] *= shrink;
            o[m][n][2 * half + 1] *= shrink;
        }
        rows.max[m][half] = max;
        rows.sum[m][half] = rows.sum[m][half] * shrink + sum;
    }
}

// o += P V: a product's result has the layout of the next one's operand.
template <unsigned kHeadDim, unsigned kM>
DEVICE void add_values(float (&o)[kM][kHeadDim / 8][4], const float (&s)[kM][kKeys / 8][4], const bf16* v_tile) {
    UNROLL for (unsigned k = 0; k < kKeys / 16; ++k) {
        uint32_t p_part[kM][4];
        UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned i = 0; i < 4; ++i) {
            const float* const pair = &s[m][2 * k + i / 2][i % 2 * 2];
            p_part[m][i] = pack_bf16(pair[0], pair[1]);
        }
        multiply_step<kRow<kHeadDim>>(o, p_part, v_tile + k * 16 * kRow<kHeadDim>);
    }
}

// o / sum and lse of the warp's rows. `warp_tile` is where its queries were, which no other warp reads.
template <unsigned kHeadDim, unsigned kM>
DEVICE void store_rows(const AttentionForwardParams& p, float (&o)[kM][kHeadDim / 8][4], const Rows<kM>& rows, bf16* warp_tile,
                       unsigned warp_query, unsigned tokens) {
    const unsigned lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        float sum = rows.sum[m][half];
        sum += __shfl_xor_sync(kFullMask, sum, 1);
        sum += __shfl_xor_sync(kFullMask, sum, 2);
        const float inverse = 1.0f / sum;
        UNROLL for (unsigned n = 0; n < kHeadDim / 8; ++n) {
            o[m][n][2 * half] *= inverse;
            o[m][n][2 * half + 1] *= inverse;
        }
        const size_t query = warp_query + m * 16 + half * 8 + lane / 4;
        if (lane % 4 == 0 && query < tokens)
            p.lse[query * p.num_attention_heads + blockIdx.x] = rows.max[m][half] * p.scale + logf(sum);
    }
    __syncwarp();
    write_fragments<kRow<kHeadDim>>(warp_tile, o, 1.0f);
    __syncwarp();
    const size_t stride = static_cast<size_t>(p.num_attention_heads) * p.head_dim;
    store_tile<16 * kM, kHeadDim, kWarpSize>(p.o + blockIdx.x * p.head_dim, warp_tile, stride, warp_query, tokens, p.head_dim, lane);
}

template <unsigned kHeadDim, unsigned kThreads>
DEVICE void forward(const AttentionForwardParams& p, bf16* shared) {
    constexpr unsigned kWarpRows = kQueries / (kThreads / kWarpSize), kM = kWarpRows / 16;
    constexpr auto load_keys = load_tile<kKeys, kHeadDim, kThreads>;
    const unsigned tokens = p.step->num_tokens, head_dim = p.head_dim;
    // The last queries of a sequence see the most keys: they start first.
    const unsigned query0 = (gridDim.y - 1 - blockIdx.y) * kQueries;
    if (query0 >= tokens) return;

    const unsigned kv_head = blockIdx.x / (p.num_attention_heads / p.num_key_value_heads);
    const size_t q_stride = static_cast<size_t>(p.num_attention_heads) * head_dim;
    const size_t k_stride = static_cast<size_t>(p.num_key_value_heads) * head_dim;
    const bf16* const q = p.q + blockIdx.x * head_dim;
    const bf16* const k = p.k + kv_head * head_dim;
    const bf16* const v = p.v + kv_head * head_dim;
    const unsigned keys_end = min_of(query0 + kQueries, tokens);
    const unsigned keys_begin = first_key(query0, p.step->sequence_start[query0], p.window);

    bf16* const q_tile = shared;
    bf16* const k_tile = q_tile + kQueries * kRow<kHeadDim>;
    bf16* const v_tile = k_tile + kKeys * kRow<kHeadDim>;
    load_tile<kQueries, kHeadDim, kThreads>(q_tile, q, q_stride, query0, keys_end, head_dim);
    load_keys(k_tile, k, k_stride, keys_begin, keys_end, head_dim);
    copy_async_commit();

    const unsigned warp_row = threadIdx.x / kWarpSize * kWarpRows, warp_query = query0 + warp_row;
    const unsigned warp_last = min_of(warp_query + kWarpRows, tokens) - 1;
    // Keys that some of the warp's queries see begin here, and those that all of them see.
    const unsigned some_see = first_seen(p, warp_query, tokens), all_see = first_seen(p, warp_last, tokens);
    Rows<kM> rows;
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        rows.max[m][half] = -INFINITY;
        rows.sum[m][half] = 0.0f;
    }
    float o[kM][kHeadDim / 8][4] = {};
    for (unsigned key = keys_begin; key < keys_end; key += kKeys) {
        copy_async_wait<0>();
        __syncthreads();  // K is here, and the V of the step before has been read
        load_keys(v_tile, v, k_stride, key, keys_end, head_dim);
        copy_async_commit();
        const bool sees = warp_query < tokens && key <= warp_last && key + kKeys > some_see;
        float s[kM][kKeys / 8][4] = {};
        if (sees) {
            multiply_rows<kHeadDim>(s, q_tile + warp_row * kRow<kHeadDim>, k_tile);
            if (key < all_see || key + kKeys - 1 > warp_query) mask(s, p, warp_query, key, tokens);
            softmax_step(s, o, rows, p.scale * kLog2E);
        }
        copy_async_wait<0>();
        __syncthreads();  // V is here, and K has been read
        if (key + kKeys < keys_end) load_keys(k_tile, k, k_stride, key + kKeys, keys_end, head_dim);
        copy_async_commit();
        if (sees) add_values<kHeadDim>(o, s, v_tile);
    }
    if (warp_query < tokens) store_rows<kHeadDim>(p, o, rows, q_tile + warp_row * kRow<kHeadDim>, warp_query, tokens);
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
