// Params of nf4.cu, and the constants of the format.
#pragma once
#include "rt/params.h"

#define NF4_BLOCKSIZE 64
#define NF4_NESTED_BLOCKSIZE 256
#define NF4_THREADS 256
// Elements that one block of threads writes.
#define NF4_ELEMENTS_PER_BLOCK 8192

// An NF4 matrix [out_features, in_features] in device memory. Scales are plain, or nested: 8-bit codes with a scale and an
// offset for each 256 of them.
struct Nf4Weight {
    PTR(const uint8_t) codes;         // [ceil(elements / 2)] two a byte, high half first, row-major
    PTR(const float) absmax;          // [blocks] of 64 elements; null: nested
    PTR(const uint8_t) nested_codes;  // [blocks]
    PTR(const float) nested_absmax;   // [ceil(blocks / 256), 2] scale, offset
    PTR(const float) dynamic_code;    // [256]
};

struct Nf4DequantizeParams {
    PTR(bf16) out;        // [num_elements]
    Nf4Weight weight;
    uint64_t num_elements;
};
