// Eight bf16 at a time: 16 bytes, the widest load and store of a thread.
#pragma once

#include "kernel.cuh"

constexpr unsigned kVector = 8;

struct alignas(16) Packed8 {
    bf16 value[kVector];
};

// `at` is 16-byte aligned.
DEVICE void load8(float (&out)[kVector], const bf16* at) {
    const Packed8 packed = *reinterpret_cast<const Packed8*>(at);
    for (unsigned i = 0; i < kVector; ++i) out[i] = to_f32(packed.value[i]);
}

DEVICE void store8(bf16* at, const float (&values)[kVector]) {
    Packed8 packed;
    for (unsigned i = 0; i < kVector; ++i) packed.value[i] = to_bf16(values[i]);
    *reinterpret_cast<Packed8*>(at) = packed;
}

DEVICE void load8(float (&out)[kVector], const float* at) {
    for (unsigned i = 0; i < kVector; ++i) out[i] = at[i];
}
