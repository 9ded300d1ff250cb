// Params of gated_delta.cu, gated_delta_scan.cu and gated_delta_backward.cu: one struct for all of them.
//
// T tokens, Hk key heads, Hv value heads, dk and dv their sizes, R the capacity in tokens, N = ceil(R / 64). Scratch lies head
// by head, so that a chunk of it is one piece.
#pragma once
#include "rt/step_state.h"

#define GATED_DELTA_CHUNK 64
#define GATED_DELTA_THREADS 128
#define GATED_DELTA_SCAN_THREADS 128
#define GATED_DELTA_SCAN_COLUMNS 64  // of dv, per block of a scan
#define GATED_DELTA_SCAN_LANES 8     // sequences at a time
#define GATED_DELTA_GRADIENT_THREADS 256
// Bytes of dynamic shared memory, for heads of up to 64 and up to 128.
#define GATED_DELTA_PREPARE_SHARED_64 55296
#define GATED_DELTA_PREPARE_SHARED_128 71680
#define GATED_DELTA_STATES_SHARED_64 56320
#define GATED_DELTA_STATES_SHARED_128 89088
#define GATED_DELTA_OUTPUT_SHARED_64 93696
#define GATED_DELTA_OUTPUT_SHARED_128 142848
#define GATED_DELTA_STATES_BACKWARD_SHARED_64 93696
#define GATED_DELTA_STATES_BACKWARD_SHARED_128 142848
#define GATED_DELTA_GRADIENT_SHARED_64 86560
#define GATED_DELTA_GRADIENT_SHARED_128 153120

struct GatedDeltaParams {
    PTR(bf16) o;               // [T, Hv dv]
    PTR(const bf16) u;         // [T, 2 Hk dk + Hv dv]: q of all heads, k, v
    PTR(const float) g;        // [T, Hv]
    PTR(const float) beta;     // [T, Hv]
    // Backward only.
    PTR(const bf16) d_o;       // [T, Hv dv]
    PTR(bf16) d_u;             // as u
    PTR(float) d_g;            // [T, Hv]
    PTR(float) d_beta;         // [T, Hv]
    // Scratch.
    PTR(float) gamma;          // [Hv, R] cumulative sum of g inside the chunk
    PTR(float) q_rstd;         // [Hk, R] 1 / |q|
    PTR(float) k_rstd;         // [Hk, R]
    PTR(bf16) scores;          // [Hv, R, 64] s tril(Qh Kh^T) o D
    PTR(bf16) w;               // [Hv, R, dk]
    PTR(bf16) values;          // [Hv, R, dv] U, then, in backward, V'
    // Scratch of backward only.
    PTR(bf16) states;          // [Hv, N, dv, dk] S^T before the chunk that begins in rows [64 n, 64 n + 64), none for S = 0
    PTR(bf16) inverse;         // [Hv, R, 64] (I + L)^-1; null: not wanted (forward)
    PTR(bf16) d_values;        // [Hv, R, dv]
    PTR(bf16) d_states;        // as states, gradients of them
    PTR(const StepStateDevice) step;
    uint32_t capacity;         // R
    uint32_t num_key_heads;
    uint32_t num_value_heads;
    uint32_t key_head_dim;
    uint32_t value_head_dim;
    uint32_t reserved;
};
