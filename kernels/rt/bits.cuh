// Words that hold several values: pairs of bf16, and bytes put together anew.
#pragma once

#include "kernel.cuh"

#include <string.h>

#ifdef __CUDACC__

#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
// Of a struct.
#define METHOD __device__ __forceinline__

// Both rounded to bf16, `low` in the lower half.
DEVICE uint32_t pack_bf16_pair(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// Byte i of the result is byte (selector >> 4 i & 7) of the eight bytes of `low` and `high`. Bit 3 of a selector is clear.
DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    uint32_t result;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(low), "r"(high), "r"(selector));
    return result;
}

// `value`, of which the compiler does not know that it is the same: what is made of it is made anew, and not held in
// registers in the meantime.
DEVICE unsigned made_anew(unsigned value) {
    asm volatile("" : "+r"(value));
    return value;
}

#else

#define UNROLL
#define NO_UNROLL
#define METHOD inline

DEVICE unsigned made_anew(unsigned value) { return value; }

DEVICE uint32_t pack_bf16_pair(float low, float high) {
    return to_bf16(low).bits | static_cast<uint32_t>(to_bf16(high).bits) << 16;
}

DEVICE uint32_t select_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t result = 0;
    for (unsigned i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

#endif

DEVICE float f32_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// 16 bytes in registers.
struct alignas(16) Words4 {
    uint32_t word[4];
};
