// shared_expert_add: out[t] += s shared[t], s = sigmoid(logit[t]).
// backward: d_shared[t] = s d_out[t], d_logit[t] = <d_out[t], shared[t]> s (1 - s).
//
// out, shared, d_out, d_shared [T, D] bf16; logit, d_logit [T] f32. T tokens, D hidden_size.
// grid (capacity in tokens), block 256: a block per row, a thread every 256th group of 8 columns. 32 B of shared memory.
// f32 throughout, the row's sum in a fixed order, rounded once per result: deterministic.
// Preconditions (the launcher checks): D a multiple of 8, rows 16-byte aligned.
// Cost: 4 B read and 2 B written per element, forward and backward; memory bound.
// Reference: src/backend/cpu/elementwise.rs; docs/math/moe.md.
#include "rt/reduce.cuh"
#include "rt/vector.cuh"

#include "shared_expert.h"

namespace {
constexpr unsigned kThreads = SHARED_EXPERT_THREADS;

DEVICE float sigmoid(float value) { return 1.0f / (1.0f + expf(-value)); }
}  // namespace

KERNEL(shared_expert_add_forward, SharedExpertAddForwardParams, p, SHARED_EXPERT_THREADS) {
    if (blockIdx.x >= p.step->num_tokens) return;
    const size_t row = static_cast<size_t>(blockIdx.x) * p.hidden_size;
    const float gate = sigmoid(p.logit[blockIdx.x]);
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += kThreads * kVector) {
        float out[kVector], shared[kVector];
        load8(out, p.out + row + column);
        load8(shared, p.shared + row + column);
        for (unsigned i = 0; i < kVector; ++i) out[i] += gate * shared[i];
        store8(p.out + row + column, out);
    }
}

KERNEL(shared_expert_add_backward, SharedExpertAddBackwardParams, p, SHARED_EXPERT_THREADS) {
    SHARED(float, partial, kThreads / kWarpSize);
    if (blockIdx.x >= p.step->num_tokens) return;
    const size_t row = static_cast<size_t>(blockIdx.x) * p.hidden_size;
    const float gate = sigmoid(p.logit[blockIdx.x]);
    float dot = 0.0f;
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += kThreads * kVector) {
        float d_out[kVector], shared[kVector];
        load8(d_out, p.d_out + row + column);
        load8(shared, p.shared + row + column);
        for (unsigned i = 0; i < kVector; ++i) {
            dot += d_out[i] * shared[i];
            d_out[i] *= gate;
        }
        store8(p.d_shared + row + column, d_out);
    }
    dot = block_sum<kThreads>(dot, partial);
    if (threadIdx.x == 0) p.d_logit[blockIdx.x] = dot * gate * (1.0f - gate);
}
