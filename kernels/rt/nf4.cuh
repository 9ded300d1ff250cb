// NF4 as kernels read it: the codebook, and the scale of a block. docs/math/nf4.md.
#pragma once

#include "kernel.cuh"

#include "../nf4.h"

constexpr unsigned kNf4Codes = 16;
constexpr unsigned kDynamicCodes = 256;

// Value of each code. Copied to shared memory, where lanes read different entries at once.
DEVICE float nf4_value(unsigned code) {
    constexpr float kCodebook[kNf4Codes] = {
        -1.0f,         -0.6961928f,  -0.52507305f, -0.3949175f, -0.28444138f, -0.18477343f, -0.091050036f, 0.0f,
        0.0795803f,    0.1609302f,   0.2461123f,   0.33791524f, 0.44070983f,  0.562617f,    0.72295684f,   1.0f,
    };
    return kCodebook[code];
}

// The scale of `block`: stored, or nested = dynamic_code[codes[block]] nested_absmax[block / 256] + offset. The product is
// rounded before the sum, as on the host (no fused multiply-add).
DEVICE float nf4_absmax(const Nf4DequantizeParams& p, const float* dynamic_code, size_t block) {
    if (p.absmax) return p.absmax[block];
    const float scaled = rounded_product(dynamic_code[p.nested_codes[block]], p.nested_absmax[block / NF4_NESTED_BLOCKSIZE]);
    return scaled + p.offset;
}
