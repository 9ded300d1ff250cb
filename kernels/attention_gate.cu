// attention_gate: y = o s, s = sigmoid(gate), gate the second half of each head of q_proj.
// backward: d_o = d_y s, d_gate = d_y o s (1 - s).
//
// o, y [T, Hq, hd], q_proj [T, Hq, 2, hd] bf16. T tokens, Hq heads of hd.
// grid (elements of y at capacity / 2048, rounded up), block 256: a thread takes 8 elements. No shared memory.
// f32 throughout, rounded once per result: deterministic.
// Preconditions (the launcher checks): hd a multiple of 8, all 16-byte aligned.
// Cost: 4 B read and 2 B written per element forward, 6 and 4 backward; memory bound.
// Reference: src/backend/cpu/attention.rs; docs/math/attention.md.
#include "rt/vector.cuh"

#include "attention_gate.h"

namespace {

// Where a thread's 8 elements are.
struct Place {
    bool is_used;
    size_t packed;  // in [T, Hq, hd]
    size_t gate;    // in [T, Hq, 2, hd]
};

template <class Params>
DEVICE Place place(const Params& p) {
    const size_t elements = static_cast<size_t>(p.step->num_tokens) * p.num_attention_heads * p.head_dim;
    const size_t packed = (static_cast<size_t>(blockIdx.x) * ATTENTION_GATE_THREADS + threadIdx.x) * kVector;
    return {packed < elements, packed, packed + (packed / p.head_dim + 1) * p.head_dim};
}

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

}  // namespace

KERNEL(attention_gate_forward, AttentionGateForwardParams, p, ATTENTION_GATE_THREADS) {
    const Place at = place(p);
    if (!at.is_used) return;
    float o[kVector], gate[kVector];
    load8(o, p.o + at.packed);
    load8(gate, p.q_proj + at.gate);
    for (unsigned i = 0; i < kVector; ++i) o[i] *= sigmoid(gate[i]);
    store8(p.y + at.packed, o);
}

KERNEL(attention_gate_backward, AttentionGateBackwardParams, p, ATTENTION_GATE_THREADS) {
    const Place at = place(p);
    if (!at.is_used) return;
    float d_y[kVector], o[kVector], gate[kVector], d_o[kVector], d_gate[kVector];
    load8(d_y, p.d_y + at.packed);
    load8(o, p.o + at.packed);
    load8(gate, p.q_proj + at.gate);
    for (unsigned i = 0; i < kVector; ++i) {
        const float s = sigmoid(gate[i]);
        d_o[i] = d_y[i] * s;
        d_gate[i] = d_y[i] * o[i] * s * (1.0f - s);
    }
    store8(p.d_o + at.packed, d_o);
    store8(p.d_q_proj + at.gate, d_gate);
}
