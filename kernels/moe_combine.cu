// What lies around the experts' products.
//   moe_tiles         the rows of each expert cut into tiles of at most tile_rows, an expert's one after the other; token_of_row
//   moe_combine       out[t] (+)= sum_j topk_weights[t, j] rows[row_of_slot[t K + j]], weights 1 where there are none
//   moe_weight_grads  d_topk_weights[t, j] = sum_i partial[row_of_slot[t K + j], i]
//
// out [T, D], rows [R, D] bf16; partial [R, parts] f32. T tokens, K per token, R = T K, D hidden_size, E experts.
// tiles: grid (R at capacity / 256), block 256, a thread per row; block 0 makes the tiles. combine: grid (capacity), a block of
// 256 per token, a thread every 256th group of 8 columns. weight_grads: grid (R at capacity / 256), block 256, a thread per slot.
// f32, sums in slot order, rounded once: deterministic.
// Preconditions (the launcher checks): D a multiple of 8, rows 16-byte aligned; room for ceil(R / tile_rows) + E tiles.
// Cost: combine reads 2 K D and writes 2 D bytes per token (accumulate: reads 2 D more): memory bound, 0.17 ms for T = 16k,
// K = 10, D = 2048 on 4.3 TB/s. Reference: src/backend/cpu/moe.rs; docs/math/moe.md.
#include "rt/vector.cuh"

#include "moe_combine.h"

namespace {
constexpr unsigned kThreads = MOE_COMBINE_THREADS;
constexpr unsigned kWarps = MOE_TILES_THREADS / kWarpSize;

DEVICE unsigned tiles_of(const MoeTilesParams& p, unsigned expert) {
    return (p.expert_offsets[expert + 1] - p.expert_offsets[expert] + p.tile_rows - 1) / p.tile_rows;
}
}  // namespace

KERNEL(moe_tiles, MoeTilesParams, p, MOE_TILES_THREADS) {
    SHARED(unsigned, warp_sums, kWarps);
    const size_t row = static_cast<size_t>(blockIdx.x) * MOE_TILES_THREADS + threadIdx.x;
    if (row < p.expert_offsets[p.num_experts]) p.token_of_row[row] = p.slot_of_row[row] / p.num_experts_per_tok;
    if (blockIdx.x > 0) return;
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const unsigned share = (p.num_experts + MOE_TILES_THREADS - 1) / MOE_TILES_THREADS, begin = threadIdx.x * share;
    const unsigned end = begin + share < p.num_experts ? begin + share : p.num_experts;
    unsigned own = 0;
    for (unsigned expert = begin; expert < end; ++expert) own += tiles_of(p, expert);
    unsigned through = own;
    for (unsigned delta = 1; delta < kWarpSize; delta *= 2) {
        const unsigned other = __shfl_up_sync(kFullMask, through, delta);
        if (lane >= delta) through += other;
    }
    if (lane == kWarpSize - 1) warp_sums[warp] = through;
    __syncthreads();
    unsigned next = through - own;
    for (unsigned i = 0; i < warp; ++i) next += warp_sums[i];
    if (threadIdx.x == MOE_TILES_THREADS - 1) *p.num_tiles = next + own;
    for (unsigned expert = begin; expert < end; ++expert) {
        const unsigned last = p.expert_offsets[expert + 1];
        for (unsigned row = p.expert_offsets[expert]; row < last; row += p.tile_rows)
            p.tiles[next++] = {expert, row, last - row < p.tile_rows ? last - row : p.tile_rows, 0};
    }
}

KERNEL(moe_combine, MoeCombineParams, p, MOE_COMBINE_THREADS) {
    const size_t token = blockIdx.x;
    if (token >= p.step->num_tokens) return;
    const uint32_t* const row_of_slot = p.row_of_slot + token * p.num_experts_per_tok;
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += kThreads * kVector) {
        bf16* const out = p.out + token * p.hidden_size + column;
        float sum[kVector] = {};
        if (p.accumulate) load8(sum, out);
        for (unsigned j = 0; j < p.num_experts_per_tok; ++j) {
            float values[kVector];
            load8(values, p.rows + static_cast<size_t>(row_of_slot[j]) * p.hidden_size + column);
            const float weight = p.topk_weights ? p.topk_weights[token * p.num_experts_per_tok + j] : 1.0f;
            for (unsigned i = 0; i < kVector; ++i) sum[i] += weight * values[i];
        }
        store8(out, sum);
    }
}

KERNEL(moe_weight_grads, MoeWeightGradsParams, p, MOE_COMBINE_THREADS) {
    const size_t slot = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (slot >= static_cast<size_t>(p.step->num_tokens) * p.num_experts_per_tok) return;
    const float* const partial = p.partial + static_cast<size_t>(p.row_of_slot[slot]) * p.num_parts;
    float sum = 0.0f;
    for (unsigned part = 0; part < p.num_parts; ++part) sum += partial[part];
    p.d_topk_weights[slot] = sum;
}
