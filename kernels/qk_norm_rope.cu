// qk_norm_rope, per token and head of q and k: y = R (x rstd (w + offset)), rstd = 1 / sqrt(mean(x^2) + eps); without a norm y = R x.
// R rotates dimensions (i, i + half) by the token's angle i, i < half = rotary_dim / 2, and leaves those from rotary_dim on.
// backward: g = R^T d_y, d_x = rstd (g w' - xh mean(g w' xh)), xh = x rstd, w' = w + offset; without a norm d_x = g.
//
// q_proj [T, Hq, stride] (what follows the first hd of each head, the output gate, is left alone), k_proj [T, Hk, hd], q [T, Hq, hd],
// k [T, Hk, hd] bf16; rstd [T, Hq], [T, Hk], w [hd], cos, sin [positions, half] f32. T tokens, Hq and Hk heads of hd.
// grid (capacity in tokens), block 128: a block takes a token, a lane 8 dimensions of a head, lanes_per_head lanes a head. The
// token's angles and the weights stay in registers from head to head. Partners of a rotation, which may lie anywhere in
// their lanes, are exchanged by way of 4 KB of shared memory, element i of lane l at word 32 i + l: no bank conflicts.
// f32 throughout, rounded once: deterministic.
// Preconditions (the launcher checks): hd a multiple of 8, at most 256; rotary_dim even, at most hd; rows 16-byte aligned.
// Cost: 2 B read and 2 B written per element forward, 4 and 2 backward; memory bound.
// Reference: src/backend/cpu/rope.rs; docs/math/attention.md. Su et al. 2021; Zhang and Sennrich 2019.
#include "rt/vector.cuh"

#include "qk_norm_rope.h"

namespace {

constexpr unsigned kThreads = QK_NORM_ROPE_THREADS;
constexpr unsigned kWarps = kThreads / kWarpSize;
constexpr unsigned kExchange = kVector * kWarpSize;  // floats of a warp

// What a lane knows of its 8 dimensions, the same in every head.
struct Lane {
    unsigned column;
    bool is_used;                // within hd
    float cos[kVector];          // 1 where nothing rotates
    float sin[kVector];          // with its sign: y = x cos + partner sin
    unsigned partner[kVector];   // place in the exchange
    float q_weight[kVector], k_weight[kVector];
};

template <class Params>
DEVICE Lane begin_lane(const Params& p) {
    const unsigned lane = threadIdx.x % kWarpSize, half = p.rotary_dim / 2;
    const unsigned first_lane = lane / p.lanes_per_head * p.lanes_per_head;
    const size_t row = static_cast<size_t>(p.step->position_ids[blockIdx.x]) * half;
    Lane own;
    own.column = (lane - first_lane) * kVector;
    own.is_used = own.column < p.head_dim;
    for (unsigned i = 0; i < kVector; ++i) {
        const unsigned column = own.column + i;
        const bool is_first = column < half, rotates = column < 2 * half;
        const unsigned angle = is_first ? column : column - half;
        const unsigned partner = is_first ? column + half : rotates ? column - half : column;
        own.cos[i] = rotates ? p.cos[row + angle] : 1.0f;
        own.sin[i] = rotates ? (is_first ? -p.sin[row + angle] : p.sin[row + angle]) : 0.0f;
        own.partner[i] = partner % kVector * kWarpSize + first_lane + partner / kVector;
        own.q_weight[i] = own.is_used && p.q_weight ? p.q_weight[column] + p.weight_offset : 0.0f;
        own.k_weight[i] = own.is_used && p.k_weight ? p.k_weight[column] + p.weight_offset : 0.0f;
    }
    return own;
}

// x := x cos + partner (sign sin). All lanes of the warp call it.
DEVICE void rotate(float (&x)[kVector], const Lane& own, float sign, float* exchange) {
    const unsigned lane = threadIdx.x % kWarpSize;
    for (unsigned i = 0; i < kVector; ++i) exchange[i * kWarpSize + lane] = x[i];
    __syncwarp();  // written
    for (unsigned i = 0; i < kVector; ++i)
        if (own.is_used) x[i] = x[i] * own.cos[i] + exchange[own.partner[i]] * (sign * own.sin[i]);
    __syncwarp();  // read
}

// Sum over the lanes of a head, in each of them. All lanes of the warp call it.
DEVICE float head_sum(float value, unsigned lanes) {
    for (unsigned offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
    return value;
}

// A head of the token: of q, then of k.
struct Head {
    bool is_query, is_used;
    size_t index;   // [T, H]
    size_t proj;    // place of the lane's elements in q_proj or k_proj
    size_t packed;  // and in q or k
};

template <class Params>
DEVICE Head head_at(const Params& p, unsigned number, const Lane& own) {
    const bool is_query = number < p.num_attention_heads;
    const unsigned heads = is_query ? p.num_attention_heads : p.num_key_value_heads;
    const size_t index = static_cast<size_t>(blockIdx.x) * heads + (is_query ? number : number - p.num_attention_heads);
    const bool is_used = own.is_used && number < p.num_attention_heads + p.num_key_value_heads;
    return {is_query, is_used, index, index * (is_query ? p.q_head_stride : p.head_dim) + own.column, index * p.head_dim + own.column};
}

}  // namespace

KERNEL(qk_norm_rope_forward, QkNormRopeForwardParams, p, QK_NORM_ROPE_THREADS) {
    SHARED(float, exchanges, kWarps * kExchange);
    if (blockIdx.x >= p.step->num_tokens) return;
    const unsigned heads_per_warp = kWarpSize / p.lanes_per_head;
    const Lane own = begin_lane(p);
    // The whole warp goes on as long as any of its heads is one.
    for (unsigned first = threadIdx.x / kWarpSize * heads_per_warp; first < p.num_attention_heads + p.num_key_value_heads;
         first += kWarps * heads_per_warp) {
        const Head head = head_at(p, first + threadIdx.x % kWarpSize / p.lanes_per_head, own);
        float x[kVector] = {};
        if (head.is_used) load8(x, (head.is_query ? p.q_proj : p.k_proj) + head.proj);
        float square_sum = 0.0f;
        for (unsigned i = 0; i < kVector; ++i) square_sum += x[i] * x[i];
        const float rstd = 1.0f / sqrtf(head_sum(square_sum, p.lanes_per_head) / static_cast<float>(p.head_dim) + p.eps);
        if (head.is_query ? p.q_weight != nullptr : p.k_weight != nullptr) {
            for (unsigned i = 0; i < kVector; ++i) x[i] *= rstd * (head.is_query ? own.q_weight[i] : own.k_weight[i]);
            if (head.is_used && own.column == 0) (head.is_query ? p.q_rstd : p.k_rstd)[head.index] = rstd;
        }
        rotate(x, own, 1.0f, exchanges + threadIdx.x / kWarpSize * kExchange);
        if (head.is_used) store8((head.is_query ? p.q : p.k) + head.packed, x);
    }
}

KERNEL(qk_norm_rope_backward, QkNormRopeBackwardParams, p, QK_NORM_ROPE_THREADS) {
    SHARED(float, exchanges, kWarps * kExchange);
    if (blockIdx.x >= p.step->num_tokens) return;
    const unsigned heads_per_warp = kWarpSize / p.lanes_per_head;
    const Lane own = begin_lane(p);
    for (unsigned first = threadIdx.x / kWarpSize * heads_per_warp; first < p.num_attention_heads + p.num_key_value_heads;
         first += kWarps * heads_per_warp) {
        const Head head = head_at(p, first + threadIdx.x % kWarpSize / p.lanes_per_head, own);
        const bool has_norm = head.is_query ? p.q_weight != nullptr : p.k_weight != nullptr;
        float d[kVector] = {}, x[kVector] = {}, dot = 0.0f, rstd = 0.0f;
        if (head.is_used) load8(d, (head.is_query ? p.d_q : p.d_k) + head.packed);
        rotate(d, own, -1.0f, exchanges + threadIdx.x / kWarpSize * kExchange);
        if (head.is_used && has_norm) {
            load8(x, (head.is_query ? p.q_proj : p.k_proj) + head.proj);
            rstd = (head.is_query ? p.q_rstd : p.k_rstd)[head.index];
            for (unsigned i = 0; i < kVector; ++i) {
                d[i] *= head.is_query ? own.q_weight[i] : own.k_weight[i];
                dot += d[i] * x[i] * rstd;
            }
        }
        const float mean = head_sum(dot, p.lanes_per_head) / static_cast<float>(p.head_dim);
        if (has_norm)
            for (unsigned i = 0; i < kVector; ++i) d[i] = rstd * (d[i] - x[i] * rstd * mean);
        if (head.is_used) store8((head.is_query ? p.d_q_proj : p.d_k_proj) + head.proj, d);
    }
}
