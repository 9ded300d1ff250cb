// Backward of attention_forward: with P = exp(scale q k^T - lse) where a query sees a key, dP = d_o v^T, dS = P (dP - delta),
//   attention_delta:                    delta = <d_o, o>
//   attention_backward_query_<columns>: d_q = scale dS k
//   attention_backward_key_<columns>:   d_k = scale dS^T q, d_v = P^T d_o, summed over the query heads that share them
//
// q, o, d_o, d_q [T, Hq, hd], k, v, d_k, d_v [T, Hk, hd] bf16; lse, delta [T, Hq] f32. T tokens, hd <= columns.
// grid delta (capacity Hq / 32), query (Hq, capacity / 64), key (Hk, capacity / 64), rounded up; block 256, else 128 (256 above 128
// columns). A block owns 64 rows (queries; keys) of a head and goes through the 64-row tiles that any of them sees (is seen by);
// 2 rows of 2 (4) warps share the 64 x 64 scores. Shared memory: 4 tiles of 64 rows of columns + 8 bf16, 64 rows of 72, 3 * 64
// words. Of the two tiles that come and go, each is copied while a product is computed that does not read it.
// Numerics: f32 sums, P and dS rounded to bf16 for their products; every result has one owner, which sums in order: deterministic.
// S and dP are computed in both kernels, 7 products instead of 5: the price of neither atomics nor an f32 d_q in memory.
// Preconditions (the launcher checks): hd a multiple of 16, Hq of Hk, rows 16-byte aligned.
// Cost: 14 hd FLOP for each query, head and visible key; compute bound. docs/kernels/attention.md.
// Reference: src/backend/cpu/attention.rs; docs/math/attention.md. Dao 2023.
#include "rt/attention.cuh"

#include "attention.h"

namespace attention {

constexpr unsigned kTile = ATTENTION_TILE;

// The part of a warp in scores [64, 64] and results [64, kHeadDim] of its block.
template <unsigned kHeadDim, unsigned kThreads>
struct Part {
    static constexpr unsigned kAcross = kThreads / kWarpSize / 2;
    static constexpr unsigned kRows = kTile / 2, kM = kRows / 16;
    static constexpr unsigned kScores = kTile / kAcross, kColumns = kHeadDim / kAcross;
    using Scores = float[kM][kScores / 8][4];
    using Results = float[kM][kColumns / 8][4];

    unsigned row = threadIdx.x / kWarpSize / kAcross * kRows;
    unsigned score = threadIdx.x / kWarpSize % kAcross * kScores;
    unsigned column = threadIdx.x / kWarpSize % kAcross * kColumns;
};

// Where tiles lie in shared memory: two of the block's own rows, two that come and go, then P or dS and the queries' numbers.
template <unsigned kHeadDim>
struct Tiles {
    static constexpr unsigned kElements = kTile * kRow<kHeadDim>;
    bf16 *own_first, *own_second, *first, *second, *scores;
    float *lse, *delta;
    uint32_t* sequence_start;
};

template <unsigned kHeadDim>
DEVICE Tiles<kHeadDim> tiles_in(bf16* shared) {
    constexpr unsigned kElements = Tiles<kHeadDim>::kElements;
    bf16* const scores = shared + 4 * kElements;
    float* const numbers = reinterpret_cast<float*>(scores + kTile * kScoreStride);
    return {shared,  shared + kElements, shared + 2 * kElements, shared + 3 * kElements, scores, numbers, numbers + kTile,
            reinterpret_cast<uint32_t*>(numbers + 2 * kTile)};
}

// The block's results, rounded, by way of a tile that nobody reads any more.
template <unsigned kHeadDim, unsigned kThreads>
DEVICE void store_results(bf16* head, bf16* tile, const typename Part<kHeadDim, kThreads>::Results& results, float factor, size_t stride,
                          unsigned first, unsigned end, unsigned head_dim) {
    const Part<kHeadDim, kThreads> part;
    write_fragments<kRow<kHeadDim>>(tile + part.row * kRow<kHeadDim> + part.column, results, factor);
    __syncthreads();
    store_tile<kTile, kHeadDim, kThreads>(head, tile, stride, first, end, head_dim, threadIdx.x);
}

// Minus infinity where a query does not see a key: rows are queries from `query0`, columns keys from `key0` (both the warp's). Few
// tiles need it.
template <unsigned kM, unsigned kN>
DEVICE void mask_query_rows(float (&s)[kM][kN][4], const AttentionBackwardParams& p, unsigned query0, unsigned key0, unsigned tokens) {
    const unsigned lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        const unsigned query = query0 + m * 16 + half * 8 + lane / 4;
        const unsigned first = first_key(query, p.step->sequence_start[min_of(query, tokens - 1)], p.window);
        UNROLL for (unsigned n = 0; n < kN; ++n) UNROLL for (unsigned i = 0; i < 2; ++i) {
            const unsigned key = key0 + n * 8 + lane % 4 * 2 + i;
            if (key < first || key > query) s[m][n][2 * half + i] = -INFINITY;
        }
    }
}

// s := dS, of rows that are queries.
template <unsigned kM, unsigned kN>
DEVICE void query_scores(float (&s)[kM][kN][4], const float (&d_p)[kM][kN][4], float log2_scale, const float (&lse)[kM][2],
                         const float (&delta)[kM][2]) {
    UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half)
        UNROLL for (unsigned n = 0; n < kN; ++n) UNROLL for (unsigned i = 2 * half; i < 2 * half + 2; ++i) {
            const float probability = exp2_approx(s[m][n][i] * log2_scale - lse[m][half]);
            s[m][n][i] = probability * (d_p[m][n][i] - delta[m][half]);
        }
}

template <unsigned kHeadDim, unsigned kThreads>
DEVICE void backward_query(const AttentionBackwardParams& p, bf16* shared) {
    using Warp = Part<kHeadDim, kThreads>;
    constexpr auto load = load_tile<kTile, kHeadDim, kThreads>;
    constexpr unsigned kStride = kRow<kHeadDim>;
    const unsigned tokens = p.step->num_tokens, head_dim = p.head_dim, heads = p.num_attention_heads;
    // The last queries of a sequence see the most keys: they start first.
    const unsigned query0 = (gridDim.y - 1 - blockIdx.y) * kTile;
    if (query0 >= tokens) return;

    const unsigned end = min_of(query0 + kTile, tokens), kv_head = blockIdx.x / (heads / p.num_key_value_heads);
    const unsigned begin = first_key(query0, p.step->sequence_start[query0], p.window);
    const unsigned all_see = first_key(end - 1, p.step->sequence_start[end - 1], p.window);
    const unsigned q_stride = heads * head_dim, k_stride = p.num_key_value_heads * head_dim;
    const bf16* const k = p.k + kv_head * head_dim;
    const bf16* const v = p.v + kv_head * head_dim;
    const Tiles<kHeadDim> tiles = tiles_in<kHeadDim>(shared);
    load(tiles.own_first, p.q + blockIdx.x * head_dim, q_stride, query0, end, head_dim);
    load(tiles.own_second, p.d_o + blockIdx.x * head_dim, q_stride, query0, end, head_dim);
    load(tiles.second, v, k_stride, begin, end, head_dim);
    copy_async_commit();
    load(tiles.first, k, k_stride, begin, end, head_dim);
    copy_async_commit();

    const Warp part;
    float lse[Warp::kM][2], delta[Warp::kM][2];
    UNROLL for (unsigned m = 0; m < Warp::kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
        const size_t query = query0 + part.row + m * 16 + half * 8 + threadIdx.x % kWarpSize / 4;
        lse[m][half] = query < tokens ? p.lse[query * heads + blockIdx.x] * kLog2E : 0.0f;
        delta[m][half] = query < tokens ? p.delta[query * heads + blockIdx.x] : 0.0f;
    }
    typename Warp::Results d_q = {};
    for (unsigned key = begin; key < end; key += kTile) {
        copy_async_wait<1>();
        __syncthreads();  // V is here
        typename Warp::Scores d_p = {}, s = {};
        multiply_rows<kHeadDim>(d_p, tiles.own_second + part.row * kStride, tiles.second + part.score * kStride);
        copy_async_wait<0>();
        __syncthreads();  // K is here, V has been read
        if (key + kTile < end) load(tiles.second, v, k_stride, key + kTile, end, head_dim);
        copy_async_commit();
        multiply_rows<kHeadDim>(s, tiles.own_first + part.row * kStride, tiles.first + part.score * kStride);
        const bool is_border = key < all_see || key + kTile - 1 > query0;
        if (is_border) mask_query_rows(s, p, query0 + part.row, key + part.score, tokens);
        query_scores(s, d_p, p.scale * kLog2E, lse, delta);
        write_fragments<kScoreStride>(tiles.scores + part.row * kScoreStride + part.score, s, 1.0f);
        __syncthreads();  // dS is here
        multiply_scores<kHeadDim>(d_q, tiles.scores + part.row * kScoreStride, tiles.first + part.column);
        __syncthreads();  // K and dS have been read
        if (key + kTile < end) load(tiles.first, k, k_stride, key + kTile, end, head_dim);
        copy_async_commit();
    }
    store_results<kHeadDim, kThreads>(p.d_q + blockIdx.x * head_dim, tiles.own_first, d_q, p.scale, q_stride, query0, end, head_dim);
}

// The column in its tile of element (n, i) of a row of fragments that begins at `column`.
DEVICE unsigned column_of(unsigned column, unsigned n, unsigned i) { return column + n * 8 + threadIdx.x % 4 * 2 + i; }

// Minus infinity where a query does not see a key: rows are keys from `key0` (the warp's), columns those from `column` on of the
// tile of queries at `query0`. Few tiles need it.
template <unsigned kHeadDim, unsigned kM, unsigned kN>
DEVICE void mask_query_columns(float (&s)[kM][kN][4], unsigned window, const Tiles<kHeadDim>& tiles, unsigned key0, unsigned query0,
                               unsigned column) {
    UNROLL for (unsigned n = 0; n < kN; ++n) UNROLL for (unsigned i = 0; i < 2; ++i) {
        const unsigned at = column_of(column, n, i), query = query0 + at;
        const unsigned first = first_key(query, tiles.sequence_start[at], window);
        UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
            const unsigned key = key0 + m * 16 + half * 8 + threadIdx.x % kWarpSize / 4;
            if (key < first || key > query) s[m][n][2 * half + i] = -INFINITY;
        }
    }
}

// s := P, d_p := dS, of columns that are queries. Those beyond the last are rows of zeros: whatever their P, they add nothing.
template <unsigned kHeadDim, unsigned kM, unsigned kN>
DEVICE void key_scores(float (&s)[kM][kN][4], float (&d_p)[kM][kN][4], float log2_scale, const Tiles<kHeadDim>& tiles, unsigned column) {
    UNROLL for (unsigned n = 0; n < kN; ++n) UNROLL for (unsigned i = 0; i < 2; ++i) {
        const unsigned at = column_of(column, n, i);
        const float lse = tiles.lse[at] * kLog2E, delta = tiles.delta[at];
        UNROLL for (unsigned m = 0; m < kM; ++m) UNROLL for (unsigned half = 0; half < 2; ++half) {
            float &score = s[m][n][2 * half + i], &gradient = d_p[m][n][2 * half + i];
            score = exp2_approx(score * log2_scale - lse);
            gradient = score * (gradient - delta);
        }
    }
}

// lse, delta and sequence_start of a tile of queries to shared memory; zeros where there is no query.
template <unsigned kHeadDim>
DEVICE void load_numbers(const AttentionBackwardParams& p, const Tiles<kHeadDim>& tiles, unsigned head, unsigned query0, unsigned end) {
    if (threadIdx.x >= kTile) return;
    const bool valid = query0 + threadIdx.x < end;
    const size_t query = valid ? query0 + threadIdx.x : 0, at = query * p.num_attention_heads + head;
    copy_async_4(tiles.lse + threadIdx.x, p.lse + at, valid);
    copy_async_4(tiles.delta + threadIdx.x, p.delta + at, valid);
    copy_async_4(tiles.sequence_start + threadIdx.x, p.step->sequence_start + query, valid);
}

template <unsigned kHeadDim, unsigned kThreads>
DEVICE void backward_key(const AttentionBackwardParams& p, bf16* shared) {
    using Warp = Part<kHeadDim, kThreads>;
    constexpr auto load = load_tile<kTile, kHeadDim, kThreads>;
    constexpr unsigned kStride = kRow<kHeadDim>;
    const unsigned tokens = p.step->num_tokens, head_dim = p.head_dim, group = p.num_attention_heads / p.num_key_value_heads;
    // The first keys of a sequence are seen by the most queries; they start first.
    const unsigned key0 = blockIdx.y * kTile;
    if (key0 >= tokens) return;

    const unsigned key_end = min_of(key0 + kTile, tokens), sequence_end = p.step->sequence_end[key_end - 1];
    // Queries from key0 to here: those of the last key's sequence that its window reaches.
    const unsigned query_end = p.window < sequence_end - (key_end - 1) ? key_end - 1 + p.window : sequence_end;
    const unsigned q_stride = p.num_attention_heads * head_dim, k_stride = p.num_key_value_heads * head_dim;
    const Tiles<kHeadDim> tiles = tiles_in<kHeadDim>(shared);
    // The tile of queries that comes next: those of a head in order, then those of the next head that shares the keys.
    const unsigned head_end = (blockIdx.x + 1) * group;
    unsigned head = blockIdx.x * group, query0 = key0;
    const auto load_d_o = [&] {
        if (head < head_end) load(tiles.second, p.d_o + head * head_dim, q_stride, query0, query_end, head_dim);
        copy_async_commit();
    };
    const auto load_q = [&] {
        if (head < head_end) {
            load(tiles.first, p.q + head * head_dim, q_stride, query0, query_end, head_dim);
            load_numbers(p, tiles, head, query0, query_end);
        }
        copy_async_commit();
    };
    load(tiles.own_first, p.k + blockIdx.x * head_dim, k_stride, key0, key_end, head_dim);
    load(tiles.own_second, p.v + blockIdx.x * head_dim, k_stride, key0, key_end, head_dim);
    load_d_o();
    load_q();

    const Warp part;
    bf16* const own_scores = tiles.scores + part.row * kScoreStride;
    typename Warp::Results d_k = {}, d_v = {};
    while (head < head_end) {
        copy_async_wait<1>();
        __syncthreads();  // d_o is here
        typename Warp::Scores s = {}, d_p = {};
        multiply_rows<kHeadDim>(d_p, tiles.own_second + part.row * kStride, tiles.second + part.score * kStride);
        copy_async_wait<0>();
        __syncthreads();  // q and its numbers are here
        multiply_rows<kHeadDim>(s, tiles.own_first + part.row * kStride, tiles.first + part.score * kStride);
        const bool is_border = query0 < key0 + kTile - 1 || query0 + kTile > query_end ||
                               first_key(query0 + kTile - 1, tiles.sequence_start[kTile - 1], p.window) > key0;
        if (is_border) mask_query_columns(s, p.window, tiles, key0 + part.row, query0, part.score);
        key_scores(s, d_p, p.scale * kLog2E, tiles, part.score);
        query0 += kTile;
        if (query0 >= query_end) query0 = key0, ++head;
        write_fragments<kScoreStride>(own_scores + part.score, s, 1.0f);
        __syncthreads();  // P is here
        multiply_scores<kHeadDim>(d_v, own_scores, tiles.second + part.column);
        __syncthreads();  // d_o and P have been read
        load_d_o();
        write_fragments<kScoreStride>(own_scores + part.score, d_p, 1.0f);
        __syncthreads();  // dS is here
        multiply_scores<kHeadDim>(d_k, own_scores, tiles.first + part.column);
        __syncthreads();  // q and dS have been read
        load_q();
    }
    const size_t column = blockIdx.x * head_dim;
    store_results<kHeadDim, kThreads>(p.d_k + column, tiles.own_first, d_k, p.scale, k_stride, key0, key_end, head_dim);
    store_results<kHeadDim, kThreads>(p.d_v + column, tiles.own_second, d_v, 1.0f, k_stride, key0, key_end, head_dim);
}

}  // namespace attention

// Eight lanes take a row; a warp, four.
KERNEL(attention_delta, AttentionBackwardParams, p, ATTENTION_DELTA_THREADS) {
    constexpr unsigned kLanes = ATTENTION_DELTA_THREADS / ATTENTION_DELTA_ROWS;
    const size_t row = static_cast<size_t>(blockIdx.x) * ATTENTION_DELTA_ROWS + threadIdx.x / kLanes;
    const bool valid = row < static_cast<size_t>(p.step->num_tokens) * p.num_attention_heads;
    float sum = 0.0f;
    for (unsigned column = threadIdx.x % kLanes * kVector; valid && column < p.head_dim; column += kLanes * kVector) {
        float d_o[kVector], o[kVector];
        load8(d_o, p.d_o + row * p.head_dim + column);
        load8(o, p.o + row * p.head_dim + column);
        for (unsigned i = 0; i < kVector; ++i) sum += d_o[i] * o[i];
    }
    for (unsigned lanes = kLanes / 2; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullMask, sum, lanes);
    if (valid && threadIdx.x % kLanes == 0) p.delta[row] = sum;
}

#define ATTENTION_BACKWARD(columns, threads)                                            \
    KERNEL(attention_backward_query_##columns, AttentionBackwardParams, p, threads) {   \
        DYNAMIC_SHARED(bf16, shared);                                                   \
        attention::backward_query<columns, threads>(p, shared);                         \
    }                                                                                   \
    KERNEL(attention_backward_key_##columns, AttentionBackwardParams, p, threads) {     \
        DYNAMIC_SHARED(bf16, shared);                                                   \
        attention::backward_key<columns, threads>(p, shared);                           \
    }

ATTENTION_BACKWARD(32, ATTENTION_THREADS)
ATTENTION_BACKWARD(64, ATTENTION_THREADS)
ATTENTION_BACKWARD(96, ATTENTION_THREADS)
ATTENTION_BACKWARD(128, ATTENTION_THREADS)
ATTENTION_BACKWARD(256, ATTENTION_WIDE_THREADS)
