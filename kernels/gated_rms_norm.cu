// gated_rms_norm, per token and value head: y = w o rstd silu(z), rstd = 1 / sqrt(mean(o^2) + eps).
// backward, with oh = o rstd and h = d_y w silu(z): d_o = rstd (h - oh mean(h oh)), d_z = d_y w oh sigma(z) (1 + z (1 -
// sigma(z))).
//
// y, o, d_y, d_o [T, Hv dv], qkvz, d_qkvz [T, W] bf16, of which z are the last columns of each key head's group; rstd [T, Hv],
// w [dv] f32.
// grid (ceil(R Hv / 16)), block 256: 16 threads per token and head, 8 columns each. R the capacity in tokens. No shared memory.
// f32 throughout, sums in a fixed order, rounded once per result: deterministic.
// Preconditions (the launcher checks): dk and dv multiples of 8, dv at most 128.
// Cost: 6 B per element forward, 10 B backward; memory bound. Reference: src/backend/cpu/norm.rs; docs/math/rms_norm.md.
#include "rt/vector.cuh"

#include "gated_rms_norm.h"

namespace {

constexpr unsigned kGroup = GATED_RMS_NORM_THREADS / GATED_RMS_NORM_HEADS;  // threads of a head

// Where a thread works. Threads beyond the tokens or the columns take part in the sums with zeros.
struct Place {
    size_t row;  // T Hv rows of dv
    size_t at;   // in o
    size_t z;    // in qkvz
    unsigned column;
    bool is_valid;
};

DEVICE Place find_place(const GatedRmsNormParams& p) {
    Place place;
    place.row = static_cast<size_t>(blockIdx.x) * GATED_RMS_NORM_HEADS + threadIdx.x / kGroup;
    place.column = threadIdx.x % kGroup * kVector;
    const size_t token = place.row / p.num_value_heads;
    const auto head = static_cast<unsigned>(place.row % p.num_value_heads);
    const unsigned dv = p.value_head_dim, ratio = p.num_value_heads / p.num_key_heads;
    const unsigned group = 2 * (p.key_head_dim + ratio * dv);
    place.at = place.row * dv + place.column;
    const size_t z = 2 * p.key_head_dim + (ratio + head % ratio) * dv;
    place.z = token * group * p.num_key_heads + head / ratio * group + z + place.column;
    place.is_valid = token < p.step->num_tokens && place.column < dv;
    return place;
}

// Sum over the 16 threads of a head, in each of them.
DEVICE float group_sum(float value) {
    for (unsigned offset = kGroup / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
    return value;
}

// A thread's 8 values, zeros where it has none.
DEVICE void load_valid(float (&out)[kVector], const bf16* at, bool is_valid) {
    for (unsigned i = 0; i < kVector; ++i) out[i] = 0.0f;
    if (is_valid) load8(out, at);
}

// Fast intrinsics: the result is rounded to bf16. 0 where e^-x overflows.
DEVICE float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }

// True where no thread of the warp has a token: whole blocks mostly.
DEVICE bool is_surplus(const GatedRmsNormParams& p) {
    const size_t first = static_cast<size_t>(blockIdx.x) * GATED_RMS_NORM_HEADS + threadIdx.x / kWarpSize * (kWarpSize / kGroup);
    return first >= static_cast<size_t>(p.step->num_tokens) * p.num_value_heads;
}

}  // namespace

KERNEL(gated_rms_norm_forward, GatedRmsNormParams, p, GATED_RMS_NORM_THREADS) {
    if (is_surplus(p)) return;
    const Place place = find_place(p);
    float o[kVector];
    load_valid(o, p.o + place.at, place.is_valid);
    float square_sum = 0.0f;
    for (unsigned i = 0; i < kVector; ++i) square_sum += o[i] * o[i];
    const float mean = group_sum(square_sum) / static_cast<float>(p.value_head_dim);
    const float rstd = 1.0f / sqrtf(mean + p.eps);
    if (!place.is_valid) return;
    if (place.column == 0) p.rstd[place.row] = rstd;
    float z[kVector], weight[kVector], y[kVector];
    load8(z, p.qkvz + place.z);
    load8(weight, p.weight + place.column);
    for (unsigned i = 0; i < kVector; ++i) y[i] = weight[i] * (o[i] * rstd) * (z[i] * sigmoid(z[i]));
    store8(p.y + place.at, y);
}

KERNEL(gated_rms_norm_backward, GatedRmsNormParams, p, GATED_RMS_NORM_THREADS) {
    if (is_surplus(p)) return;
    const Place place = find_place(p);
    float o[kVector], z[kVector], d_y[kVector], normed[kVector], d_normed[kVector], d_z[kVector];
    load_valid(o, p.o + place.at, place.is_valid);
    load_valid(z, p.qkvz + place.z, place.is_valid);
    load_valid(d_y, p.d_y + place.at, place.is_valid);
    const float rstd = place.is_valid ? p.rstd[place.row] : 0.0f;
    float dot = 0.0f;
    for (unsigned i = 0; i < kVector; ++i) {
        const float gate = sigmoid(z[i]), weighted = place.is_valid ? d_y[i] * p.weight[place.column + i] : 0.0f;
        normed[i] = o[i] * rstd;
        d_normed[i] = weighted * z[i] * gate;
        d_z[i] = weighted * normed[i] * gate * (1.0f + z[i] * (1.0f - gate));
        dot += d_normed[i] * normed[i];
    }
    const float mean = group_sum(dot) / static_cast<float>(p.value_head_dim);
    if (!place.is_valid) return;
    for (unsigned i = 0; i < kVector; ++i) d_normed[i] = rstd * (d_normed[i] - normed[i] * mean);
    store8(p.d_o + place.at, d_normed);
    store8(p.d_qkvz + place.z, d_z);
}
