// Sums and maxima over a warp or a block, in a fixed order: the same bits on every run.
#pragma once

#include "kernel.cuh"

// Sum over the warp's 32 lanes, in every lane. All lanes call it.
DEVICE float warp_sum(float value) {
    for (unsigned offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
    return value;
}

// Sum over the block's kThreads threads, in every thread. All threads call it; `partial` holds kThreads / 32 floats of shared
// memory and may be used again after the next barrier.
template <unsigned kThreads>
DEVICE float block_sum(float value, float* partial) {
    static_assert(kThreads % kWarpSize == 0, "whole warps");
    constexpr unsigned kWarps = kThreads / kWarpSize;
    value = warp_sum(value);
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    float sum = 0.0f;
    for (unsigned warp = 0; warp < kWarps; ++warp) sum += partial[warp];
    __syncthreads();
    return sum;
}
