// rms_norm: out = x rstd (w + offset), rstd = 1 / sqrt(mean(x^2) + eps); optionally of sum = x + delta.
// backward: d_x (+)= rstd (d_out w' - xh mean(d_out w' xh)), xh = x rstd, w' = w + offset.
//
// x, delta, sum, out, d_out, d_x [T, D] bf16; rstd [T] f32; w [D] f32. T tokens, D hidden_size.
// grid (capacity in tokens), block 256: a block per row, a thread every 256th group of 8 columns. 32 B of shared memory.
// Rows of at most 512 columns (narrow): block 32, so that no thread is without columns.
// f32 throughout, sums in a fixed order: deterministic. The sum of x and delta is rounded to bf16 before it is normed, as it is stored.
// Preconditions (the launcher checks): D a multiple of 8, rows 16-byte aligned.
// Cost: 2 B read and 2 B written per element forward (add: 4 and 4), 4 and 2 backward (accumulate: 6 and 2); memory bound.
// Reference: src/backend/cpu/norm.rs; docs/math/rms_norm.md. Zhang and Sennrich 2019.
#include "rt/reduce.cuh"
#include "rt/vector.cuh"

#include "rms_norm.h"

namespace {

template <unsigned kThreads>
DEVICE void forward_row(const RmsNormForwardParams& p, float* partial) {
    if (blockIdx.x >= p.step->num_tokens) return;
    const size_t row = static_cast<size_t>(blockIdx.x) * p.hidden_size;
    float square_sum = 0.0f;
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += kThreads * kVector) {
        float x[kVector];
        load8(x, p.x + row + column);
        if (p.delta) {
            float delta[kVector];
            load8(delta, p.delta + row + column);
            for (unsigned i = 0; i < kVector; ++i) x[i] = to_f32(to_bf16(x[i] + delta[i]));
            store8(p.sum + row + column, x);
        }
        for (unsigned i = 0; i < kVector; ++i) square_sum += x[i] * x[i];
    }
    const float mean = block_sum<kThreads>(square_sum, partial) / static_cast<float>(p.hidden_size);
    const float rstd = 1.0f / sqrtf(mean + p.eps);
    if (threadIdx.x == 0) p.rstd[blockIdx.x] = rstd;
    // A thread reads back what it wrote itself: the row is still in the cache.
    const bf16* const normed = p.delta ? p.sum : p.x;
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += kThreads * kVector) {
        float x[kVector], weight[kVector], out[kVector];
        load8(x, normed + row + column);
        load8(weight, p.weight + column);
        for (unsigned i = 0; i < kVector; ++i) out[i] = x[i] * rstd * (weight[i] + p.weight_offset);
        store8(p.out + row + column, out);
    }
}

template <unsigned kThreads>
DEVICE void backward_row(const RmsNormBackwardParams& p, float* partial) {
    if (blockIdx.x >= p.step->num_tokens) return;
    const size_t row = static_cast<size_t>(blockIdx.x) * p.hidden_size;
    const float rstd = p.rstd[blockIdx.x];
    float dot = 0.0f;
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += kThreads * kVector) {
        float x[kVector], d_out[kVector], weight[kVector];
        load8(x, p.x + row + column);
        load8(d_out, p.d_out + row + column);
        load8(weight, p.weight + column);
        for (unsigned i = 0; i < kVector; ++i) dot += d_out[i] * (weight[i] + p.weight_offset) * x[i] * rstd;
    }
    const float mean = block_sum<kThreads>(dot, partial) / static_cast<float>(p.hidden_size);
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += kThreads * kVector) {
        float x[kVector], d_out[kVector], weight[kVector], d_x[kVector];
        load8(x, p.x + row + column);
        load8(d_out, p.d_out + row + column);
        load8(weight, p.weight + column);
        for (unsigned i = 0; i < kVector; ++i)
            d_x[i] = rstd * (d_out[i] * (weight[i] + p.weight_offset) - x[i] * rstd * mean);
        if (p.accumulate) {
            float before[kVector];
            load8(before, p.d_x + row + column);
            for (unsigned i = 0; i < kVector; ++i) d_x[i] += before[i];
        }
        store8(p.d_x + row + column, d_x);
    }
}

}  // namespace

KERNEL(rms_norm_forward, RmsNormForwardParams, p, RMS_NORM_THREADS) {
    SHARED(float, partial, RMS_NORM_THREADS / kWarpSize);
    forward_row<RMS_NORM_THREADS>(p, partial);
}

KERNEL(rms_norm_forward_narrow, RmsNormForwardParams, p, RMS_NORM_NARROW_THREADS) {
    SHARED(float, partial, 1);
    forward_row<RMS_NORM_NARROW_THREADS>(p, partial);
}

KERNEL(rms_norm_backward, RmsNormBackwardParams, p, RMS_NORM_THREADS) {
    SHARED(float, partial, RMS_NORM_THREADS / kWarpSize);
    backward_row<RMS_NORM_THREADS>(p, partial);
}

KERNEL(rms_norm_backward_narrow, RmsNormBackwardParams, p, RMS_NORM_NARROW_THREADS) {
    SHARED(float, partial, 1);
    backward_row<RMS_NORM_NARROW_THREADS>(p, partial);
}
