// nf4_dequantize: out[i] = CODEBOOK[code(i)] absmax(i / 64), rounded to bf16.
//
// A matrix [out_features, in_features], flattened; codes two a byte, high half first; absmax f32 or nested (see nf4.h).
// grid (num_elements / 8192, rounded up), block 256: a thread writes 8 elements at a time, 16 B. 1088 B of shared memory.
// f32, one product per element, rounded once: equal to the host's value rounded to bf16, bit for bit.
// Preconditions (the launcher checks): out 16-byte aligned, codes 4-byte aligned.
// Cost: 0.5 B read and 2 B written per element, and 1/64 B of scales; memory bound.
// Reference: src/store/nf4.rs; docs/math/nf4.md. Dettmers et al. 2023.
#include "rt/nf4.cuh"
#include "rt/vector.cuh"

namespace {
constexpr unsigned kThreads = NF4_THREADS;
}

KERNEL(nf4_dequantize, Nf4DequantizeParams, p, NF4_THREADS) {
    SHARED(float, codebook, kNf4Codes);
    SHARED(float, dynamic_code, kDynamicCodes);
    if (threadIdx.x < kNf4Codes) codebook[threadIdx.x] = nf4_value(threadIdx.x);
    if (!p.weight.absmax) dynamic_code[threadIdx.x] = p.weight.dynamic_code[threadIdx.x];
    __syncthreads();
    const size_t start = static_cast<size_t>(blockIdx.x) * NF4_ELEMENTS_PER_BLOCK;
    for (unsigned group = threadIdx.x; group < NF4_ELEMENTS_PER_BLOCK / kVector; group += kThreads) {
        const size_t first = start + group * kVector;
        if (first >= p.num_elements) break;
        const float absmax = nf4_absmax(p.weight, dynamic_code, first / NF4_BLOCKSIZE);
        const unsigned count = p.num_elements - first < kVector ? static_cast<unsigned>(p.num_elements - first) : kVector;
        float values[kVector] = {};
        for (unsigned i = 0; i < count; ++i) {
            const unsigned byte = p.weight.codes[first / 2 + i / 2];
            values[i] = codebook[i % 2 ? byte & 15 : byte >> 4] * absmax;
        }
        if (count == kVector) {
            store8(p.out + first, values);
        } else {
            for (unsigned i = 0; i < count; ++i) p.out[first + i] = to_bf16(values[i]);
        }
    }
}
