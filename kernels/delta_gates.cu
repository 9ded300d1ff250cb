// delta_gates: beta = sigma(b), g = -exp(a_log) softplus(a + dt_bias).
// backward: d_b = d_beta beta (1 - beta), d_a = -d_g exp(a_log) sigma(a + dt_bias).
//
// g, beta, d_g, d_beta [T, Hv] f32; ba, d_ba [T, 2 Hv] bf16; a_log, dt_bias [Hv] f32.
// grid (ceil(R Hv / 256)), block 256: a thread per token and head. R the capacity in tokens. No shared memory.
// f32 throughout, ba read and written as bf16: deterministic. No preconditions beyond the shapes, which the launcher checks.
// Cost: 12 B per token and head forward, 16 B backward: a few microseconds. Reference: src/backend/cpu/delta_inputs.rs.
#include "rt/kernel.cuh"

#include "delta_gates.h"

namespace {

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// ln(1 + e^x) without overflow.
DEVICE float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// The thread's token and head, and where its b and a lie. False beyond the tokens.
struct Place {
    size_t at, b, a;
    unsigned head;
};
DEVICE bool find_place(const DeltaGatesParams& p, Place& place) {
    place.at = static_cast<size_t>(blockIdx.x) * DELTA_GATES_THREADS + threadIdx.x;
    const size_t row = place.at / p.num_value_heads;
    place.head = static_cast<unsigned>(place.at % p.num_value_heads);
    place.b = (row * p.num_value_heads + place.head / p.ratio * p.ratio) * 2 + place.head % p.ratio;
    place.a = place.b + p.ratio;
    return row < p.step->num_tokens;
}

}  // namespace

KERNEL(delta_gates_forward, DeltaGatesParams, p, DELTA_GATES_THREADS) {
    Place place;
    if (!find_place(p, place)) return;
    p.beta[place.at] = sigmoid(to_f32(p.ba[place.b]));
    p.g[place.at] = -expf(p.a_log[place.head]) * softplus(to_f32(p.ba[place.a]) + p.dt_bias[place.head]);
}

KERNEL(delta_gates_backward, DeltaGatesParams, p, DELTA_GATES_THREADS) {
    Place place;
    if (!find_place(p, place)) return;
    const float beta = sigmoid(to_f32(p.ba[place.b]));
    const float slope = -expf(p.a_log[place.head]) * sigmoid(to_f32(p.ba[place.a]) + p.dt_bias[place.head]);
    p.d_ba[place.b] = to_bf16(p.d_beta[place.at] * beta * (1.0f - beta));
    p.d_ba[place.a] = to_bf16(p.d_g[place.at] * slope);
}
