// NF4 as kernels read it: the codebook, the scale of a block, and eight codes at a time. docs/math/nf4.md.
#pragma once

#include "bits.cuh"

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

// The scale of `block`: stored, or nested = dynamic_code[codes[block]] scale + offset with the pair of block / 256. The
// product is rounded before the sum, as on the host (no fused multiply-add).
DEVICE float nf4_absmax(const Nf4Weight& w, const float* dynamic_code, size_t block) {
    if (w.absmax) return w.absmax[block];
    const float* const pair = w.nested_absmax + block / NF4_NESTED_BLOCKSIZE * 2;
    return rounded_product(dynamic_code[w.nested_codes[block]], pair[0]) + pair[1];
}

// The 16 values of a block with scale `absmax`, each rounded to bf16 once, split into bytes: what eight codes at a time
// are looked up in, without memory. Four values a word.
struct Nf4Table {
    uint32_t low[4];   // low bytes
    uint32_t high[4];  // high bytes

    METHOD explicit Nf4Table(float absmax) {
        UNROLL for (unsigned i = 0; i < 4; ++i) {
            const uint32_t first = pack_bf16_pair(nf4_value(4 * i) * absmax, nf4_value(4 * i + 1) * absmax);
            const uint32_t second = pack_bf16_pair(nf4_value(4 * i + 2) * absmax, nf4_value(4 * i + 3) * absmax);
            low[i] = select_bytes(first, second, 0x6420);
            high[i] = select_bytes(first, second, 0x7531);
        }
    }

    // The values of eight codes, in order; `codes` holds two a byte, high half first.
    METHOD Words4 values(uint32_t codes) const {
        // Three bits choose among eight bytes of two words, the fourth between two such choices.
        const uint32_t choice = codes & 0x77777777u;
        const uint32_t between = ((codes & 0x88888888u) >> 1) + 0x32103210u;
        Words4 out;
        UNROLL for (unsigned half = 0; half < 2; ++half) {
            const uint32_t c = choice >> 16 * half, b = between >> 16 * half;
            // Byte i of each: the code in bits 4 i of this half. The first of a pair is the upper one.
            const uint32_t low4 = select_bytes(select_bytes(low[0], low[1], c), select_bytes(low[2], low[3], c), b);
            const uint32_t high4 = select_bytes(select_bytes(high[0], high[1], c), select_bytes(high[2], high[3], c), b);
            out.word[2 * half] = select_bytes(low4, high4, 0x4051);
            out.word[2 * half + 1] = select_bytes(low4, high4, 0x6273);
        }
        return out;
    }
};
