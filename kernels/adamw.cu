// adamw: global norm, clipping and AdamW over the adapter's flat arena; the gradient is zeroed.
//   norm = sqrt(sum g^2), c = min(1, max_grad_norm / (norm + 1e-6)); p <- p decay; m <- m + (1 - b1) (c g - m);
//   v <- b2 v + (1 - b2) (c g)^2; p <- p - step_size m / (sqrt(v) / root_bias + eps). Constants: AdamWStepDevice.
//
// Three launches: adamw_sums (partial sums of g^2 and of the losses), adamw_decide (one block: norm, clip, whether loss and
// norm are finite; if not, the next changes nothing), adamw_update or adamw8_update.
// p [n] f32, or bf16 rounded stochastically; g [n] f32; m, v [n] f32, or 8-bit codes with an f32 absmax per 256 elements;
// losses [rows] f32. grid (n / 8192, rounded up), block 256; a warp takes 256 elements at a time, a lane two groups of 4.
// Shared memory: 64 B, adamw8_update 10 KB.
// Sums in f64 in a fixed order, all else in f32 without contraction: deterministic, and equal to the CPU's bit for bit.
// Preconditions (the launcher checks): n a multiple of 256, all 16-byte aligned.
// Cost, bytes per element read + written: sums 4; update 16 + 16 (bf16 parameters 14 + 14); 8-bit moments 10 + 10 (8 + 8).
// Memory bound; the 8-bit update does about 120 instructions per element, nearly as long. docs/kernels/adamw.md.
// Reference: src/backend/cpu/adamw.rs; docs/math/adamw.md. Loshchilov and Hutter 2019; Dettmers et al. 2022.
#include "rt/philox.cuh"

#include "adamw.h"

namespace {

constexpr unsigned kThreads = ADAMW_THREADS;
constexpr unsigned kWarps = kThreads / kWarpSize;
constexpr unsigned kQuad = 4;
constexpr unsigned kBlocksize = ADAMW_BLOCKSIZE;
constexpr unsigned kCodes = 256;

struct alignas(16) Quad {
    float value[kQuad];
};
struct alignas(8) Bf16Quad {
    bf16 value[kQuad];
};
struct alignas(4) CodeQuad {
    uint8_t value[kQuad];
};

// 256 elements as a warp holds them: a lane has elements 4 lane .. 4 lane + 3 of each half, so that accesses of a warp are
// contiguous.
struct Fragment {
    float value[2 * kQuad];
};

DEVICE size_t quad_at(size_t block, unsigned half) {
    return block * kBlocksize + half * (kBlocksize / 2) + threadIdx.x % kWarpSize * kQuad;
}

DEVICE Fragment load_f32(const float* at, size_t block) {
    Fragment out;
    for (unsigned half = 0; half < 2; ++half) {
        const Quad quad = *reinterpret_cast<const Quad*>(at + quad_at(block, half));
        for (unsigned i = 0; i < kQuad; ++i) out.value[half * kQuad + i] = quad.value[i];
    }
    return out;
}

DEVICE void store_f32(float* at, size_t block, const Fragment& in) {
    for (unsigned half = 0; half < 2; ++half) {
        Quad quad;
        for (unsigned i = 0; i < kQuad; ++i) quad.value[i] = in.value[half * kQuad + i];
        *reinterpret_cast<Quad*>(at + quad_at(block, half)) = quad;
    }
}

DEVICE Fragment load_bf16(const bf16* at, size_t block) {
    Fragment out;
    for (unsigned half = 0; half < 2; ++half) {
        const Bf16Quad quad = *reinterpret_cast<const Bf16Quad*>(at + quad_at(block, half));
        for (unsigned i = 0; i < kQuad; ++i) out.value[half * kQuad + i] = to_f32(quad.value[i]);
    }
    return out;
}

// To the bf16 above or below in magnitude, the nearer one more often: 16 random bits are added below the last bit that stays.
DEVICE bf16 rounded_stochastically(float value, uint32_t random) {
    if (value != value) return to_bf16(value);
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t kept = static_cast<uint16_t>((bits + (random & 0xffff)) >> 16);
    bf16 out;
    memcpy(&out, &kept, sizeof out);
    return out;
}

// The draws of elements 4 q .. 4 q + 3 are those of counter [q, t].
DEVICE void store_bf16(bf16* at, size_t block, const Fragment& in, const AdamWStepDevice& step) {
    for (unsigned half = 0; half < 2; ++half) {
        const uint64_t quad = quad_at(block, half) / kQuad;
        const Philox4 counter = {{static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32), 0, step.step}};
        const Philox4 random = philox4x32(counter, step.rounding_key_low, step.rounding_key_high);
        Bf16Quad out;
        for (unsigned i = 0; i < kQuad; ++i) out.value[i] = rounded_stochastically(in.value[half * kQuad + i], random.word[i]);
        *reinterpret_cast<Bf16Quad*>(at + quad_at(block, half)) = out;
    }
}

DEVICE void update(Fragment& param, Fragment& m, Fragment& v, const Fragment& grads, const AdamWStepDevice& step, float clip) {
    for (unsigned i = 0; i < 2 * kQuad; ++i) {
        const float grad = rounded_product(grads.value[i], clip);
        m.value[i] += rounded_product(grad - m.value[i], step.weight1);
        v.value[i] = rounded_product(v.value[i], step.beta2) + rounded_product(rounded_product(grad, grad), step.weight2);
        const float denominator = sqrtf(v.value[i]) / step.root_bias + step.epsilon;
        param.value[i] =
            rounded_product(param.value[i], step.decay) - rounded_product(step.step_size, m.value[i]) / denominator;
    }
}

// What both updates do around the moments: parameters and gradient in, parameters out, gradient zeroed.
template <class Params>
DEVICE void load_param_and_grad(const Params& p, size_t block, Fragment& param, Fragment& grads) {
    param = p.params ? load_f32(p.params, block) : load_bf16(p.params_bf16, block);
    grads = load_f32(p.grads, block);
}

template <class Params>
DEVICE void store_param_and_zero_grad(const Params& p, size_t block, const Fragment& param, const AdamWStepDevice& step) {
    if (p.params) {
        store_f32(p.params, block, param);
    } else {
        store_bf16(p.params_bf16, block, param, step);
    }
    store_f32(p.grads, block, Fragment{});
}

// Sum over the block's threads of their four lanes, in thread 0: the same tree as the CPU's.
DEVICE double block_sum(const double (&lane)[kQuad], double* partial) {
    double sum = (lane[0] + lane[1]) + (lane[2] + lane[3]);
    for (unsigned offset = kWarpSize / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    if (threadIdx.x % kWarpSize == 0) partial[threadIdx.x / kWarpSize] = sum;
    __syncthreads();  // All warps' sums are there.
    sum = 0.0;
    for (unsigned warp = 0; warp < kWarps; ++warp) sum += partial[warp];
    __syncthreads();
    return sum;
}

// Lane l of the block's 1024 sums elements l, l + 1024, ...
template <class T>
DEVICE double ordered_sum(const T* values, size_t count, double* partial) {
    double lane[kQuad] = {};
    for (size_t first = threadIdx.x * kQuad; first < count; first += kThreads * kQuad)
        for (unsigned i = 0; i < kQuad; ++i)
            if (first + i < count) lane[i] += static_cast<double>(values[first + i]);
    return block_sum(lane, partial);
}

// `count` is a multiple of 4. The square of an f32 is exact in f64.
DEVICE double ordered_square_sum(const float* values, size_t count, double* partial) {
    double lane[kQuad] = {};
    for (size_t first = threadIdx.x * kQuad; first < count; first += kThreads * kQuad) {
        const Quad quad = *reinterpret_cast<const Quad*>(values + first);
        for (unsigned i = 0; i < kQuad; ++i) lane[i] += static_cast<double>(quad.value[i]) * static_cast<double>(quad.value[i]);
    }
    return block_sum(lane, partial);
}

// A dynamic map in shared memory, as src/ops/dynamic_map.rs describes it: a rank counts magnitudes from 0 up, and stands for what
// is at most its border; a cell, the upper 16 bits of a magnitude, has the rank of its lower end, and at most one border.
struct Map {
    const float* code;
    const float* border;
    const uint8_t* cell;
};
constexpr unsigned kMapFloats = 2 * kCodes;
constexpr unsigned kCellWords = 2 * ADAMW_CELLS / 4;

template <bool kSigned>
DEVICE Map map_at(const float* maps, const uint32_t* cells) {
    const float* const code = maps + (kSigned ? 0 : kMapFloats);
    const uint8_t* const cell = reinterpret_cast<const uint8_t*>(cells) + (kSigned ? 0 : ADAMW_CELLS);
    return Map{code, code + kCodes, cell};
}

// The code nearest to `ratio` in [-1, 1]. A second moment above 0 does not become 0, as it divides.
template <bool kSigned>
DEVICE uint8_t nearest_code(float ratio, const Map& map) {
    const float magnitude = fabsf(ratio);
    uint32_t top;
    memcpy(&top, &magnitude, sizeof top);
    top >>= 16;
    const unsigned cell = top < ADAMW_FIRST_CELL ? 0 : top - ADAMW_FIRST_CELL;
    unsigned rank = map.cell[cell < ADAMW_CELLS ? cell : ADAMW_CELLS - 1];
    rank += magnitude > map.border[rank];
    if (!kSigned) return static_cast<uint8_t>(rank == 0 && ratio > 0.0f ? 1 : rank);
    return static_cast<uint8_t>(ratio < 0.0f ? 127 - (rank < 127 ? rank : 127) : 127 + rank);
}

DEVICE Fragment decode(const uint8_t* codes, float absmax, const Map& map, size_t block) {
    Fragment out;
    for (unsigned half = 0; half < 2; ++half) {
        const CodeQuad quad = *reinterpret_cast<const CodeQuad*>(codes + quad_at(block, half));
        for (unsigned i = 0; i < kQuad; ++i) out.value[half * kQuad + i] = rounded_product(map.code[quad.value[i]], absmax);
    }
    return out;
}

// Writes codes and absmax of the warp's 256 elements.
template <bool kSigned>
DEVICE void encode(uint8_t* codes, float* absmaxes, const Fragment& in, const Map& map, size_t block) {
    float absmax = 0.0f;
    for (unsigned i = 0; i < 2 * kQuad; ++i) absmax = fmaxf(absmax, fabsf(in.value[i]));
    for (unsigned offset = kWarpSize / 2; offset > 0; offset /= 2)
        absmax = fmaxf(absmax, __shfl_xor_sync(kFullMask, absmax, offset));
    if (threadIdx.x % kWarpSize == 0) absmaxes[block] = absmax;
    const float inverse = absmax >= 0x1p-126f ? 1.0f / absmax : 0.0f;
    for (unsigned half = 0; half < 2; ++half) {
        CodeQuad quad;
        for (unsigned i = 0; i < kQuad; ++i) quad.value[i] = nearest_code<kSigned>(in.value[half * kQuad + i] * inverse, map);
        *reinterpret_cast<CodeQuad*>(codes + quad_at(block, half)) = quad;
    }
}

constexpr unsigned kTrips = ADAMW_ELEMENTS_PER_BLOCK / kBlocksize / kWarps;

// The 256 elements that this warp takes on trip `trip`.
DEVICE size_t block_of_trip(unsigned trip) {
    return (static_cast<size_t>(blockIdx.x) * kTrips + trip) * kWarps + threadIdx.x / kWarpSize;
}

}  // namespace

KERNEL(adamw_sums, AdamWSumsParams, p, ADAMW_THREADS) {
    SHARED(double, partial, kWarps);
    constexpr uint64_t kChunk = ADAMW_ELEMENTS_PER_BLOCK;
    const uint64_t num_square_sums = (p.num_elements + kChunk - 1) / kChunk;
    const bool squares = blockIdx.x < num_square_sums;
    const uint64_t first = (squares ? blockIdx.x : blockIdx.x - num_square_sums) * kChunk;
    const uint64_t left = (squares ? p.num_elements : p.num_losses) - first;
    const uint64_t count = left < kChunk ? left : kChunk;
    const double sum =
        squares ? ordered_square_sum(p.grads + first, count, partial) : ordered_sum(p.token_loss + first, count, partial);
    if (threadIdx.x == 0) p.partial_sums[blockIdx.x] = sum;
}

KERNEL(adamw_decide, AdamWDecideParams, p, ADAMW_THREADS) {
    SHARED(double, partial, kWarps);
    const double norm = sqrt(ordered_sum(p.partial_sums, p.num_square_sums, partial));
    const double loss_sum = ordered_sum(p.partial_sums + p.num_square_sums, p.num_loss_sums, partial);
    if (threadIdx.x != 0) return;
    const double limit = p.step->max_grad_norm;
    // PyTorch's clip_grad_norm_ has the 1e-6.
    const double clip = limit > 0.0 ? limit / (norm + 1e-6) : 1.0;
    p.report->loss_sum = loss_sum;
    p.report->grad_norm = norm;
    p.report->clip = static_cast<float>(clip < 1.0 ? clip : 1.0);
    p.report->applied = isfinite(norm) && isfinite(loss_sum);
}

KERNEL(adamw_update, AdamWUpdateParams, p, ADAMW_THREADS) {
    if (!p.report->applied) return;
    const AdamWStepDevice step = *p.step;
    const float clip = p.report->clip;
    for (unsigned trip = 0; trip < kTrips; ++trip) {
        const size_t block = block_of_trip(trip);
        if (block * kBlocksize >= p.num_elements) return;
        Fragment param, grads;
        load_param_and_grad(p, block, param, grads);
        Fragment m = load_f32(p.exp_avg, block), v = load_f32(p.exp_avg_sq, block);
        update(param, m, v, grads, step, clip);
        store_f32(p.exp_avg, block, m);
        store_f32(p.exp_avg_sq, block, v);
        store_param_and_zero_grad(p, block, param, step);
    }
}

KERNEL(adamw8_update, AdamW8UpdateParams, p, ADAMW_THREADS) {
    SHARED(float, maps, 2 * kMapFloats);
    SHARED(uint32_t, cells, kCellWords);
    if (!p.report->applied) return;
    for (unsigned i = threadIdx.x; i < 2 * kMapFloats; i += kThreads) maps[i] = p.maps[i];
    for (unsigned i = threadIdx.x; i < kCellWords; i += kThreads) cells[i] = p.cells[i];
    const Map signed_map = map_at<true>(maps, cells), unsigned_map = map_at<false>(maps, cells);
    __syncthreads();  // The maps are there.
    const AdamWStepDevice step = *p.step;
    const float clip = p.report->clip;
    for (unsigned trip = 0; trip < kTrips; ++trip) {
        const size_t block = block_of_trip(trip);
        if (block * kBlocksize >= p.num_elements) return;
        Fragment param, grads;
        load_param_and_grad(p, block, param, grads);
        Fragment m = decode(p.exp_avg, p.exp_avg_absmax[block], signed_map, block);
        Fragment v = decode(p.exp_avg_sq, p.exp_avg_sq_absmax[block], unsigned_map, block);
        update(param, m, v, grads, step, clip);
        encode<true>(p.exp_avg, p.exp_avg_absmax, m, signed_map, block);
        encode<false>(p.exp_avg_sq, p.exp_avg_sq_absmax, v, unsigned_map, block);
        store_param_and_zero_grad(p, block, param, step);
    }
}
