// swiglu_backward, of h = silu(gate) up: d_gate = d_h up s (1 + gate (1 - s)), d_up = d_h gate s, s = sigmoid(gate).
//
// All [R, I] bf16, R = T rows_per_token rows. T tokens, I width. d_gate may be gate, d_up may be up: a thread reads before it
// writes. grid (elements at capacity / 2048, rounded up), block 256: a thread takes 8 elements. No shared memory.
// f32 throughout, rounded once per result: deterministic.
// Preconditions (the launcher checks): I a multiple of 8, all 16-byte aligned.
// Cost: 6 B read and 4 B written per element; memory bound. Reference: src/backend/cpu/elementwise.rs. Shazeer 2020.
#include "rt/vector.cuh"

#include "swiglu.h"

KERNEL(swiglu_backward, SwigluBackwardParams, p, SWIGLU_THREADS) {
    const size_t elements = static_cast<size_t>(p.step->num_tokens) * p.rows_per_token * p.width;
    const size_t first = (static_cast<size_t>(blockIdx.x) * SWIGLU_THREADS + threadIdx.x) * kVector;
    if (first >= elements) return;
    float d_h[kVector], gate[kVector], up[kVector], d_gate[kVector], d_up[kVector];
    load8(d_h, p.d_h + first);
    load8(gate, p.gate + first);
    load8(up, p.up + first);
    for (unsigned i = 0; i < kVector; ++i) {
        const float s = 1.0f / (1.0f + expf(-gate[i]));
        d_gate[i] = d_h[i] * up[i] * s * (1.0f + gate[i] * (1.0f - s));
        d_up[i] = d_h[i] * gate[i] * s;
    }
    store8(p.d_gate + first, d_gate);
    store8(p.d_up + first, d_up);
}
