// moe_route: p = softmax(logits); the K largest with their weights; slots sorted by expert. Three launches, no host.
//   moe_route_topk   p, topk_ids, topk_weights = p / (sum of the chosen | 1), and counts[chunk, e]: slots of expert e in the chunk
//   moe_route_scan   counts[chunk, e] <- slots of e in the chunks before; totals[e]
//   moe_route_place  expert_offsets; row of a slot = its expert's first + those of chunks before + those before it in its chunk
// moe_route_backward: d_logits from d_topk_weights, the chosen experts being constants.
//
// logits, d_logits [T, E] f32; topk_* [T, K]. T tokens, E experts, K per token; slot t K + j; a chunk is the slots of 32 tokens.
// topk: grid (capacity / 32), block 256: a warp takes 4 tokens; 36 E B of dynamic shared memory. place: same grid; (32 K + E + 8) 4 B.
// scan: grid (E / 32), block 256: lanes are experts, warps are ranges of chunks. backward: grid (capacity / 8), a warp per token.
// f32. The largest probability wins, ties the lower expert. Counts are integers, so the atomics' order does not show; the sort
// is stable by construction: deterministic.
// Preconditions (the launcher checks): K <= E <= 1024. NaN counts as larger than any number: ids stay in range.
// Cost: 4 T E B read; K rounds of 10 shuffles per token; counts 4 E T / 32 B written and read twice: latency bound, goal 40 us
// for T = 16k, E = 512. Reference: src/backend/cpu/route.rs; docs/math/moe.md. Shazeer et al. 2017.
#include "rt/reduce.cuh"

#include "moe_route.h"

namespace {
constexpr unsigned kThreads = MOE_ROUTE_THREADS;
constexpr unsigned kWarps = kThreads / kWarpSize;
constexpr unsigned kTokens = MOE_ROUTE_TOKENS;

DEVICE float warp_max(float value) {
    for (unsigned offset = kWarpSize / 2; offset > 0; offset /= 2) value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
    return value;
}

// Orders by probability, then by lower expert. Never 0 for an expert below 2^32 - 1.
DEVICE unsigned long long rank_of(float probability, unsigned expert) {
    uint32_t bits;
    memcpy(&bits, &probability, sizeof bits);  // not negative: ordered as integers are
    return static_cast<unsigned long long>(bits) << 32 | (0xffffffffu - expert);
}

DEVICE unsigned long long warp_max(unsigned long long value) {
    for (unsigned offset = kWarpSize / 2; offset > 0; offset /= 2) {
        const unsigned long long other = __shfl_xor_sync(kFullMask, value, offset);
        if (other > value) value = other;
    }
    return value;
}

struct Softmax {
    float max, sum;
};

// Of one row, by a warp; lane l sums the experts l, l + 32, ...
DEVICE Softmax softmax_of(const float* logits, unsigned num_experts, unsigned lane) {
    float max = -INFINITY, sum = 0.0f;
    for (unsigned e = lane; e < num_experts; e += kWarpSize) max = fmaxf(max, logits[e]);
    max = warp_max(max);
    for (unsigned e = lane; e < num_experts; e += kWarpSize) sum += expf(logits[e] - max);
    return {max, warp_sum(sum)};
}

// Chooses for one token; `p` holds E floats of this warp.
DEVICE void choose(const MoeRouteParams& params, size_t token, float* p, unsigned* counts, unsigned lane) {
    const unsigned num_experts = params.num_experts, k = params.num_experts_per_tok;
    const float* const logits = params.logits + token * num_experts;
    const Softmax softmax = softmax_of(logits, num_experts, lane);
    unsigned long long best = 0;
    for (unsigned e = lane; e < num_experts; e += kWarpSize) {
        p[e] = expf(logits[e] - softmax.max) / softmax.sum;
        const unsigned long long own = rank_of(p[e], e);
        if (own > best) best = own;
    }
    uint32_t* const ids = params.topk_ids + token * k;
    float* const weights = params.topk_weights + token * k;
    unsigned taken = 0;  // bit i: expert lane + 32 i is chosen
    float sum = 0.0f;
    for (unsigned j = 0; j < k; ++j) {
        const unsigned expert = 0xffffffffu - static_cast<unsigned>(warp_max(best));
        if (expert % kWarpSize == lane) {
            taken |= 1u << expert / kWarpSize;
            best = 0;
            for (unsigned e = lane; e < num_experts; e += kWarpSize) {
                const unsigned long long own = rank_of(p[e], e);
                if (!(taken >> e / kWarpSize & 1) && own > best) best = own;
            }
            ids[j] = expert;
            atomicAdd(counts + expert, 1u);
        }
        __syncwarp();
        sum += p[expert];
        if (lane == 0) weights[j] = p[expert];
    }
    __syncwarp();
    if (params.norm_topk_prob)
        for (unsigned j = lane; j < k; j += kWarpSize) weights[j] = weights[j] / sum;
}
}  // namespace

KERNEL(moe_route_topk, MoeRouteParams, p, MOE_ROUTE_THREADS) {
    DYNAMIC_SHARED(float, shared);
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const unsigned num_tokens = p.step->num_tokens, first = blockIdx.x * kTokens;
    if (first >= num_tokens) return;
    float* const probabilities = shared + warp * p.num_experts;
    unsigned* const counts = reinterpret_cast<unsigned*>(shared + kWarps * p.num_experts);
    for (unsigned e = threadIdx.x; e < p.num_experts; e += kThreads) counts[e] = 0;
    __syncthreads();
    for (unsigned token = first + warp; token < num_tokens && token < first + kTokens; token += kWarps) {
        choose(p, token, probabilities, counts, lane);
        __syncwarp();
    }
    __syncthreads();
    uint32_t* const out = p.counts + static_cast<size_t>(blockIdx.x) * p.num_experts;
    for (unsigned e = threadIdx.x; e < p.num_experts; e += kThreads) out[e] = counts[e];
}

KERNEL(moe_route_scan, MoeRouteParams, p, MOE_ROUTE_THREADS) {
    SHARED(unsigned, sums, kThreads);
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const unsigned num_chunks = (p.step->num_tokens + kTokens - 1) / kTokens;
    const unsigned expert = blockIdx.x * MOE_ROUTE_SCAN_EXPERTS + lane;
    const bool valid = expert < p.num_experts;
    const unsigned share = (num_chunks + kWarps - 1) / kWarps;
    const unsigned begin = warp * share, end = begin + share < num_chunks ? begin + share : num_chunks;
    uint32_t* const column = p.counts + expert;
    unsigned sum = 0;
    for (unsigned chunk = begin; valid && chunk < end; ++chunk) sum += column[static_cast<size_t>(chunk) * p.num_experts];
    sums[threadIdx.x] = sum;
    __syncthreads();
    unsigned before = 0;
    for (unsigned i = 0; i < warp; ++i) before += sums[i * kWarpSize + lane];
    if (valid && warp == kWarps - 1) p.totals[expert] = before + sum;
    for (unsigned chunk = begin; valid && chunk < end; ++chunk) {
        uint32_t& count = column[static_cast<size_t>(chunk) * p.num_experts];
        const unsigned own = count;
        count = before;
        before += own;
    }
}

namespace {
// firsts[e] = sum of totals before e, for all E, by the block; returns the sum of all.
DEVICE unsigned scan_totals(unsigned* firsts, unsigned* warp_sums, const uint32_t* totals, unsigned num_experts) {
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const unsigned share = (num_experts + kThreads - 1) / kThreads, begin = threadIdx.x * share;
    unsigned own = 0;
    for (unsigned e = begin; e < begin + share && e < num_experts; ++e) own += totals[e];
    unsigned through = own;
    for (unsigned delta = 1; delta < kWarpSize; delta *= 2) {
        const unsigned other = __shfl_up_sync(kFullMask, through, delta);
        if (lane >= delta) through += other;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = through;
    __syncthreads();
    unsigned before = through - own, all = 0;
    for (unsigned i = 0; i < kWarps; ++i) {
        if (i < warp) before += warp_sums[i];
        all += warp_sums[i];
    }
    for (unsigned e = begin; e < begin + share && e < num_experts; ++e) {
        firsts[e] = before;
        before += totals[e];
    }
    return all;
}
}  // namespace

KERNEL(moe_route_place, MoeRouteParams, p, MOE_ROUTE_THREADS) {
    SHARED(unsigned, warp_sums, kWarps);
    DYNAMIC_SHARED(unsigned, shared);
    const unsigned k = p.num_experts_per_tok, num_slots = p.step->num_tokens * k;
    const unsigned first = blockIdx.x * kTokens * k;
    // Block 0 writes the offsets even where there is no token.
    if (first >= num_slots && blockIdx.x > 0) return;
    unsigned* const firsts = shared;
    unsigned* const ids = shared + p.num_experts;
    const unsigned count = num_slots - first < kTokens * k ? num_slots - first : kTokens * k;
    for (unsigned i = threadIdx.x; i < count; i += kThreads) ids[i] = p.topk_ids[first + i];
    const unsigned all = scan_totals(firsts, warp_sums, p.totals, p.num_experts);
    __syncthreads();
    if (blockIdx.x == 0) {
        for (unsigned e = threadIdx.x; e < p.num_experts; e += kThreads) p.expert_offsets[e] = firsts[e];
        if (threadIdx.x == 0) p.expert_offsets[p.num_experts] = all;
    }
    const uint32_t* const before = p.counts + static_cast<size_t>(blockIdx.x) * p.num_experts;
    for (unsigned i = threadIdx.x; i < count; i += kThreads) {
        const unsigned expert = ids[i];
        unsigned row = firsts[expert] + before[expert];
        for (unsigned earlier = 0; earlier < i; ++earlier) row += ids[earlier] == expert;
        p.slot_of_row[row] = first + i;
        p.row_of_slot[first + i] = row;
    }
}

KERNEL(moe_route_backward, MoeRouteBackwardParams, p, MOE_ROUTE_THREADS) {
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const size_t token = blockIdx.x * kWarps + warp;
    if (token >= p.step->num_tokens) return;
    const unsigned num_experts = p.num_experts, k = p.num_experts_per_tok;
    const float* const logits = p.logits + token * num_experts;
    const float* const d_weights = p.d_topk_weights + token * k;
    const float* const weights = p.topk_weights + token * k;
    const uint32_t* const ids = p.topk_ids + token * k;
    float* const d_logits = p.d_logits + token * num_experts;
    float dot = 0.0f;
    for (unsigned j = 0; j < k; ++j) dot += weights[j] * d_weights[j];
    if (p.norm_topk_prob) {
        // A softmax over the chosen logits alone.
        for (unsigned e = lane; e < num_experts; e += kWarpSize) d_logits[e] = 0.0f;
    } else {
        const Softmax softmax = softmax_of(logits, num_experts, lane);
        for (unsigned e = lane; e < num_experts; e += kWarpSize) d_logits[e] = -(expf(logits[e] - softmax.max) / softmax.sum) * dot;
    }
    // The lane that wrote an expert's element adds to it.
    for (unsigned j = 0; j < k; ++j) {
        if (ids[j] % kWarpSize != lane) continue;
        const float own = p.norm_topk_prob ? d_weights[j] - dot : d_weights[j];
        d_logits[ids[j]] += weights[j] * own;
    }
}
