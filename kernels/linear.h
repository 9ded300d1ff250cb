// Params of linear_forward.cu, linear_swiglu.cu and linear_backward.cu.
#pragma once
#include "nf4.h"
#include "rt/step_state.h"

#define LINEAR_THREADS 128
#define LINEAR_WIDE_THREADS 256
#define LINEAR_MAX_PROJECTIONS 4
// Rows and columns of a block's tile. _wide: 128 x 256 by 256 threads; the plain one where that has too few tiles, or does not fit
// into shared memory (99 KB on GPUs for desktops); _small where the capacity is at most LINEAR_SMALL_ROWS.
#define LINEAR_WIDE_COLS 256
#define LINEAR_TILE 128
#define LINEAR_SMALL_TILE 64
#define LINEAR_SMALL_ROWS 256
// Dynamic shared memory of a block: the dynamic map, and stages of 64 in depth. Weights are all NF4, or some dense.
#define LINEAR_WIDE_SHARED_NF4 115712
#define LINEAR_WIDE_SHARED_DENSE 148480
#define LINEAR_SHARED_NF4 82944
#define LINEAR_SHARED_DENSE 99328
#define LINEAR_SMALL_SHARED_NF4 41984
#define LINEAR_SMALL_SHARED_DENSE 50176

// A pair A [rank, K], B [N, rank] in the adapter's arena.
struct LoraModule {
    uint64_t a;                  // first element of A
    uint64_t b;                  // first element of B
    uint32_t rank;               // 0: no adapter
    uint32_t first_column;       // of its part of xa and d_xa
    float scaling;
    uint32_t module;             // number, for the dropout mask
    uint32_t dropout_threshold;  // 2^32 p; 0: no dropout
    float keep_scale;            // 1 / (1 - p)
};

// A weight [N, K], with what it makes of x, or what its result's gradient is.
struct LinearProjection {
    PTR(void) out;          // [T, N] bf16 or f32; backward: d_out
    PTR(const bf16) dense;  // null: NF4
    Nf4Weight nf4;
    PTR(const float) bias;  // [N]; null: none
    LoraModule lora;
    uint32_t out_features;  // N
    uint32_t first_tile;    // forward: the first of its column tiles in the grid
    uint32_t out_is_f32;    // forward
    uint32_t out_stride;    // backward: elements from row to row of d_out, a multiple of 8; zeros beyond N
};

// A gradient as bf16 rows that start at 16-byte borders, for one that is f32 or whose rows do not.
struct LinearAlignParams {
    PTR(bf16) out;          // [T, stride] zeros from column N on
    PTR(const void) d_out;  // [T, N] bf16 or f32
    PTR(const StepStateDevice) step;
    uint32_t num_cols;    // N
    uint32_t stride;      // a multiple of 8
    uint32_t is_f32;
    uint32_t reserved;
};

struct LinearParams {
    LinearProjection projections[LINEAR_MAX_PROJECTIONS];
    PTR(bf16) h;            // [T, N] linear_swiglu_forward: silu(gate) up
    PTR(bf16) d_x;          // [T, K] linear_backward_input
    PTR(const bf16) x;      // [T, K] forward
    PTR(const bf16) xa;     // [T, xa_width] forward; backward: d_xa
    PTR(const void) lora;   // the arena
    PTR(const StepStateDevice) step;
    uint32_t num_projections;
    uint32_t in_features;   // K
    uint32_t xa_width;
    uint32_t lora_is_bf16;
    uint32_t row_tiles;     // of the capacity
    uint32_t col_tiles;     // of all projections; backward: of K
    uint32_t accumulate;    // backward: d_x += ...
    uint32_t reserved;
};
