// nf4_quantize: absmax[b] = max_i |w_i|, code_i = the code nearest to w_i / absmax[b]; b = i / 64.
// nf4_absmax_sums, nf4_quantize_absmax: the scales in 8 bits, offset = mean(absmax), n = max |absmax - offset| of 256,
// code = the dynamic code nearest to (absmax - offset) / n.
//
// Weights bf16 or f32, a matrix flattened; codes two a byte, high half first; absmax f32 or codes u8 and pairs
// (n, offset) f32. Exactly the host's arithmetic: divisions, products and comparisons in f32, each rounded once; the mean
// summed in f64 in a fixed order and rounded once. So codes and scales are the host's, bit for bit (the two sums run in
// different orders but are exact while log2(num_blocks) plus the spread of the scales' exponents is at most 29).
// nf4_quantize: grid (num_elements / 2048, rounded up), block 256, a thread takes 8 elements and 8 threads a block of 64.
// nf4_absmax_sums: grid (256), block 256. nf4_quantize_absmax: grid (num_blocks / 256, rounded up), block 256.
// Preconditions (the launcher checks): weights 16-byte, codes 4-byte aligned; is_not_finite zeroed before.
// Cost: 2 B (f32: 4 B) read, 0.5 B written per element and 15 compares: memory bound; the scales add 1/64 of 13 B.
// Reference: src/store/nf4.rs, src/store/nf4/dynamic.rs; docs/math/nf4.md. Dettmers et al. 2023.
#include "rt/kernel.cuh"
#include "rt/vector.cuh"

#include "nf4_quantize.h"

namespace {
constexpr unsigned kThreads = NF4_QUANTIZE_THREADS;
constexpr unsigned kLanesPerBlock = NF4_BLOCKSIZE / kVector;
constexpr unsigned kDynamicCodes = 256;
// Cells of the interval [-1, 1] that a scale is rounded to before its nearest code is taken.
constexpr double kLastCell = 65535.0;
constexpr uint32_t kInfinityBits = 0x7f800000;

DEVICE uint32_t magnitude_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits & 0x7fffffff;
}

DEVICE float from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

// Midpoints that `scaled` lies above.
DEVICE unsigned nf4_code(float scaled) {
    constexpr float kMidpoints[15] = {
        -0.8480964f, -0.6106329f, -0.45999527f, -0.33967942f, -0.2346074f, -0.13791174f, -0.045525018f, 0.03979015f,
        0.12025525f, 0.20352125f, 0.29201376f,  0.38931254f,  0.50166345f, 0.6427869f,   0.86147845f,
    };
    unsigned code = 0;
    for (const float midpoint : kMidpoints) code += scaled > midpoint;
    return code;
}

// Eight weights from `first` on, zero beyond the end.
DEVICE void load_weights(float (&out)[kVector], const Nf4QuantizeParams& p, size_t first) {
    if (first + kVector <= p.num_elements) {
        if (p.weights) {
            load8(out, p.weights + first);
        } else {
            load8(out, p.weights_f32 + first);
        }
        return;
    }
    for (unsigned i = 0; i < kVector; ++i) {
        const bool exists = first + i < p.num_elements;
        out[i] = !exists ? 0.0f : p.weights ? to_f32(p.weights[first + i]) : p.weights_f32[first + i];
    }
}

// In every thread.
DEVICE double block_sum_f64(double value, double* partial) {
    for (unsigned offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    double sum = 0.0;
    for (unsigned warp = 0; warp < kThreads / kWarpSize; ++warp) sum += partial[warp];
    return sum;
}

// The dynamic code nearest to `value` in [-1, 1], by way of the nearest of 65,536 cells; the lower of two that are equally near.
DEVICE unsigned nearest_dynamic_code(float value, const float* dynamic_code) {
    double cell = round((static_cast<double>(value) + 1.0) * 0.5 * kLastCell);
    if (cell > kLastCell) cell = kLastCell;
    const double centre = cell / kLastCell * 2.0 - 1.0;
    // Codes [0, above) are at most `centre`.
    unsigned above = 0;
    for (unsigned step = kDynamicCodes / 2; step > 0; step /= 2)
        if (dynamic_code[above + step - 1] <= centre) above += step;
    if (above == kDynamicCodes - 1 && dynamic_code[above] <= centre) ++above;
    if (above == 0) return 0;
    if (above == kDynamicCodes) return kDynamicCodes - 1;
    const double to_above = fabs(centre - dynamic_code[above]), to_below = fabs(centre - dynamic_code[above - 1]);
    return to_above < to_below ? above : above - 1;
}
}  // namespace

KERNEL(nf4_quantize, Nf4QuantizeParams, p, NF4_QUANTIZE_THREADS) {
    const size_t first = static_cast<size_t>(blockIdx.x) * NF4_QUANTIZE_ELEMENTS_PER_BLOCK + threadIdx.x * kVector;
    float weights[kVector];
    load_weights(weights, p, first);
    // As bits, NaN is above infinity and infinity above the rest.
    uint32_t bits = 0;
    for (unsigned i = 0; i < kVector; ++i) bits = larger(bits, magnitude_bits(weights[i]));
    for (unsigned lanes = kLanesPerBlock / 2; lanes > 0; lanes /= 2) bits = larger(bits, __shfl_xor_sync(kFullMask, bits, lanes));
    if (first >= p.num_elements) return;
    const float absmax = from_bits(bits);
    if (threadIdx.x % kLanesPerBlock == 0) {
        p.absmax[first / NF4_BLOCKSIZE] = absmax;
        if (bits >= kInfinityBits) atomicOr(p.is_not_finite, 1u);
    }
    const float scale = 1.0f / absmax;
    // The reciprocal of a subnormal overflows; zero over zero stays zero.
    const bool divides = magnitude_bits(scale) == kInfinityBits;
    uint32_t packed = 0;
    for (unsigned i = 0; i < kVector; ++i) {
        const float scaled = absmax == 0.0f ? 0.0f : divides ? weights[i] / absmax : weights[i] * scale;
        packed |= nf4_code(scaled) << (i / 2 * 8 + (i % 2 ? 0 : 4));
    }
    if (first + kVector <= p.num_elements) {
        *reinterpret_cast<uint32_t*>(p.codes + first / 2) = packed;
    } else {
        for (size_t at = first / 2; at < (p.num_elements + 1) / 2; ++at)
            p.codes[at] = static_cast<uint8_t>(packed >> (at - first / 2) * 8);
    }
}

KERNEL(nf4_absmax_sums, Nf4AbsmaxSumsParams, p, NF4_QUANTIZE_THREADS) {
    SHARED(double, partial, kThreads / kWarpSize);
    double sum = 0.0;
    const size_t first = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
    const size_t stride = static_cast<size_t>(NF4_QUANTIZE_PARTIALS) * kThreads;
    for (size_t at = first; at < p.num_blocks; at += stride) sum += p.absmax[at];
    sum = block_sum_f64(sum, partial);
    if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

KERNEL(nf4_quantize_absmax, Nf4QuantizeAbsmaxParams, p, NF4_QUANTIZE_THREADS) {
    static_assert(kThreads == NF4_NESTED_BLOCKSIZE && kThreads == NF4_QUANTIZE_PARTIALS && kThreads == kDynamicCodes,
                  "a thread for each");
    SHARED(double, partial, kThreads / kWarpSize);
    SHARED(float, dynamic_code, kDynamicCodes);
    SHARED(uint32_t, warp_max, kThreads / kWarpSize);
    dynamic_code[threadIdx.x] = p.dynamic_code[threadIdx.x];
    // Every block sums the partial sums itself, in the same order.
    const double sum = block_sum_f64(p.sums[threadIdx.x], partial);
    const float offset = static_cast<float>(sum / static_cast<double>(p.num_blocks));
    const size_t block = static_cast<size_t>(blockIdx.x) * NF4_NESTED_BLOCKSIZE + threadIdx.x;
    const bool exists = block < p.num_blocks;
    const float difference = exists ? p.absmax[block] - offset : 0.0f;
    uint32_t bits = magnitude_bits(difference);
    for (unsigned lanes = kWarpSize / 2; lanes > 0; lanes /= 2) bits = larger(bits, __shfl_xor_sync(kFullMask, bits, lanes));
    if (threadIdx.x % kWarpSize == 0) warp_max[threadIdx.x / kWarpSize] = bits;
    __syncthreads();
    for (unsigned warp = 0; warp < kThreads / kWarpSize; ++warp) bits = larger(bits, warp_max[warp]);
    const float scale = from_bits(bits);
    if (threadIdx.x == 0) {
        p.nested_absmax[2 * static_cast<size_t>(blockIdx.x)] = scale;
        p.nested_absmax[2 * static_cast<size_t>(blockIdx.x) + 1] = offset;
    }
    // The codes of a block without spread are 0, times a scale of 0.
    if (exists) p.codes[block] = static_cast<uint8_t>(scale > 0.0f ? nearest_dynamic_code(difference / scale, dynamic_code) : 0);
}
