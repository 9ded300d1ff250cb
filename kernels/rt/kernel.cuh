// How a kernel is written, once for CUDA and for the emulated device.
//
//   KERNEL(add_forward, AddParams, p, 256) { ... p.out[i] = ...; }
//
// One by-value params struct; the last argument is the block size it is launched with. SHARED and DYNAMIC_SHARED declare
// shared memory; on the emulated device it starts as NaN. Everything that differs between the two is behind rt/.
#pragma once

#include "params.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>

#define KERNEL(name, Params, p, threads) extern "C" __global__ void __launch_bounds__(threads) name(const Params p)
#define SHARED(T, name, count) __shared__ __align__(128) T name[count]
#define DYNAMIC_SHARED(T, name)                                        \
    extern __shared__ __align__(128) unsigned char dynamic_shared[];   \
    T* const name = reinterpret_cast<T*>(dynamic_shared)
#define DEVICE static __device__ __forceinline__

using bf16 = __nv_bfloat16;
DEVICE float to_f32(bf16 value) { return __bfloat162float(value); }
DEVICE float to_f32(float value) { return value; }
DEVICE bf16 to_bf16(float value) { return __float2bfloat16_rn(value); }
// A product that is not fused into a following sum.
DEVICE float rounded_product(float a, float b) { return __fmul_rn(a, b); }

#else

#include "emu.h"

#endif

constexpr unsigned kFullMask = 0xffffffffu;
constexpr unsigned kWarpSize = 32;
