// Params of nf4.cu, and the constants of the format.
#pragma once
#include "rt/params.h"

#define NF4_BLOCKSIZE 64
#define NF4_NESTED_BLOCKSIZE 256
#define NF4_THREADS 256
// Elements that one block of threads writes.
#define NF4_ELEMENTS_PER_BLOCK 8192

struct Nf4DequantizeParams {
    PTR(bf16) out;                   // [num_elements]
    PTR(const uint8_t) codes;        // [ceil(num_elements / 2)] two a byte, high half first
    PTR(const float) absmax;         // [num_blocks]; null: nested
    PTR(const uint8_t) nested_codes; // [num_blocks]
    PTR(const float) nested_absmax;  // [ceil(num_blocks / 256)]
    PTR(const float) dynamic_code;   // [256]
    uint64_t num_elements;
    float offset;
    uint32_t reserved;
};
