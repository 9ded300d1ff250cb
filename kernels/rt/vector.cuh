// Eight elements at a time: 16 bytes of bf16, the widest load and store of a thread, or twice that of f32.
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

struct alignas(16) Packed4F32 {
    float value[kVector / 2];
};

// `at` is 16-byte aligned.
DEVICE void load8(float (&out)[kVector], const float* at) {
    const Packed4F32* const packed = reinterpret_cast<const Packed4F32*>(at);
    const Packed4F32 low = packed[0], high = packed[1];
    for (unsigned i = 0; i < kVector / 2; ++i) {
        out[i] = low.value[i];
        out[i + kVector / 2] = high.value[i];
    }
}
