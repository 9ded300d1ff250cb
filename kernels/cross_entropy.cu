// The loss of a chunk of rows from the statistics of its logits, and the gradient of the logits in place of them.
//
//   lse = log sum_v exp(z_v),  token_loss[row] += lse - z_target,  d_z_v = loss_scale (exp(z_v - lse) - [v = target])
//
// cross_entropy_head.cu leaves of each group of 64 columns the maximum m and the sum of exp(z - m), in f32, and the logit of
// the target in f32; of the logits themselves z - m in bf16. So the loss knows nothing of bf16, and the error of a
// softmax p = exp(z - lse) from the rounding of z - m is at most 2^-9 |z - m| p, below 2^-9 / e of the group's largest p: a logit
// stored as such would err by 2^-9 |z| p.
// logits [C, Vp] bf16, Vp = V rounded up to 64, what lies beyond V becomes 0; group_max, group_sum [C, G] f32,
// G = Vp / 64; target_logit [C], token_loss [T] f32. T tokens, V vocab_size, C rows of the chunk.
// cross_entropy_loss: grid (C), block 256: a block per row, a thread every 256th group of 8 columns; 64 B of shared memory.
// cross_entropy_clear: d_x [T, D] bf16 = 0. grid (capacity in tokens), block 256.
// f32, sums in a fixed order: deterministic. Preconditions (the launcher checks): Vp a multiple of 64, D of 8, rows 16-byte
// aligned.
// Cost: 2 B read and 2 B written per logit, and 1/8 B of statistics; memory bound.
// Reference: src/backend/cpu/cross_entropy.rs; docs/math/cross_entropy.md.
#include "rt/reduce.cuh"
#include "rt/vector.cuh"

#include "cross_entropy.h"

namespace {
constexpr unsigned kThreads = CROSS_ENTROPY_THREADS;
constexpr unsigned kGroup = CROSS_ENTROPY_GROUP;

// The largest value of the block, in every thread.
DEVICE float block_max(float value, float* partial) {
    for (unsigned offset = kWarpSize / 2; offset > 0; offset /= 2)
        value = fmaxf(value, __shfl_xor_sync(kFullMask, value, offset));
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    for (unsigned warp = 0; warp < kThreads / kWarpSize; ++warp) value = fmaxf(value, partial[warp]);
    return value;
}
}  // namespace

KERNEL(cross_entropy_loss, CrossEntropyLossParams, p, CROSS_ENTROPY_THREADS) {
    SHARED(float, max_partial, kThreads / kWarpSize);
    SHARED(float, sum_partial, kThreads / kWarpSize);
    const unsigned target = p.first_target + blockIdx.x;
    if (target >= p.step->num_targets) return;
    const unsigned num_groups = (p.vocab_size + kGroup - 1) / kGroup;
    const float* const group_max = p.group_max + static_cast<size_t>(blockIdx.x) * num_groups;
    const float* const group_sum = p.group_sum + static_cast<size_t>(blockIdx.x) * num_groups;
    float largest = -INFINITY, sum = 0.0f;
    for (unsigned group = threadIdx.x; group < num_groups; group += kThreads) largest = fmaxf(largest, group_max[group]);
    largest = block_max(largest, max_partial);
    for (unsigned group = threadIdx.x; group < num_groups; group += kThreads)
        sum += group_sum[group] * expf(group_max[group] - largest);
    const float lse = largest + logf(block_sum<kThreads>(sum, sum_partial));
    const unsigned target_column = p.step->target_ids[target];
    if (threadIdx.x == 0) {
        // A target beyond the vocabulary has no logit: the loss tells.
        const float at_target = target_column < p.vocab_size ? p.target_logit[blockIdx.x] : NAN;
        p.token_loss[p.step->target_rows[target]] += lse - at_target;
    }
    if (!p.logits) return;

    const float scale = p.step->loss_scale;
    bf16* const logits = p.logits + static_cast<size_t>(blockIdx.x) * num_groups * kGroup;
    for (unsigned column = threadIdx.x * kVector; column < num_groups * kGroup; column += kThreads * kVector) {
        const float shift = group_max[column / kGroup] - lse;
        float values[kVector];
        load8(values, logits + column);
        for (unsigned i = 0; i < kVector; ++i) {
            const float onehot = column + i == target_column ? 1.0f : 0.0f;
            values[i] = column + i < p.vocab_size ? scale * (__expf(values[i] + shift) - onehot) : 0.0f;
        }
        store8(logits + column, values);
    }
}

KERNEL(cross_entropy_clear, CrossEntropyClearParams, p, CROSS_ENTROPY_CLEAR_THREADS) {
    if (blockIdx.x >= p.step->num_tokens) return;
    bf16* const row = p.d_x + static_cast<size_t>(blockIdx.x) * p.hidden_size;
    const float zeros[kVector] = {};
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += CROSS_ENTROPY_CLEAR_THREADS * kVector)
        store8(row + column, zeros);
}
