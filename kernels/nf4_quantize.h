// Params of nf4_quantize.cu.
#pragma once
#include "nf4.h"

#define NF4_QUANTIZE_THREADS 256
// Elements that one block of threads quantises.
#define NF4_QUANTIZE_ELEMENTS_PER_BLOCK 2048
// Partial sums of the mean of the scales.
#define NF4_QUANTIZE_PARTIALS 256

struct Nf4QuantizeParams {
    PTR(uint8_t) codes;           // [ceil(num_elements / 2)] two a byte, high half first
    PTR(float) absmax;            // [ceil(num_elements / 64)]
    PTR(uint32_t) is_not_finite;  // set to 1 where a weight is NaN or infinite
    PTR(const bf16) weights;      // [num_elements]; null: they are f32
    PTR(const float) weights_f32; // [num_elements]
    uint64_t num_elements;
};

struct Nf4AbsmaxSumsParams {
    PTR(double) sums;         // [NF4_QUANTIZE_PARTIALS]
    PTR(const float) absmax;  // [num_blocks]
    uint64_t num_blocks;
};

struct Nf4QuantizeAbsmaxParams {
    PTR(uint8_t) codes;             // [num_blocks]
    PTR(float) nested_absmax;       // [ceil(num_blocks / 256), 2] scale and offset
    PTR(const float) absmax;        // [num_blocks]
    PTR(const double) sums;         // [NF4_QUANTIZE_PARTIALS]
    PTR(const float) dynamic_code;  // [256] ascending
    uint64_t num_blocks;
};
