// Params of adamw.cu.
#pragma once
#include "rt/params.h"

#define ADAMW_THREADS 256
// Elements of the arena that a block of threads takes; sums are partial sums over as many.
#define ADAMW_ELEMENTS_PER_BLOCK 8192
// Elements of the 8-bit moments that share a scale.
#define ADAMW_BLOCKSIZE 256
// Cells of a dynamic map, padded; the first one is that of magnitudes whose upper 16 bits are these.
#define ADAMW_CELLS 2960
#define ADAMW_FIRST_CELL 13312

// The constants of one update: in device memory, since they change with every step.
struct AdamWStepDevice {
    double max_grad_norm;  // 0: no clipping
    float decay;           // 1 - learning_rate weight_decay
    float weight1;         // 1 - beta1
    float beta2;
    float weight2;         // 1 - beta2
    float step_size;       // learning_rate / (1 - beta1^t)
    float root_bias;       // sqrt(1 - beta2^t)
    float epsilon;
    uint32_t step;         // t, from 1: counter of the rounding's draws
    uint32_t rounding_key_low;  // Philox key: the seed, the stream's number already in it
    uint32_t rounding_key_high;
};

// What became of an update; the host reads it once a step.
struct AdamWReportDevice {
    double loss_sum;
    double grad_norm;
    float clip;            // factor on the gradient
    uint32_t applied;      // 0: loss or norm is not finite, nothing is changed
};

struct AdamWSumsParams {
    PTR(double) partial_sums;    // [ceil(num_elements / 8192) + ceil(num_losses / 8192)]
    PTR(const float) grads;      // [num_elements]
    PTR(const float) token_loss; // [num_losses]
    uint64_t num_elements;
    uint64_t num_losses;
};

struct AdamWDecideParams {
    PTR(AdamWReportDevice) report;
    PTR(const double) partial_sums;
    PTR(const AdamWStepDevice) step;
    uint64_t num_square_sums;    // partial sums of squared gradients; those of losses follow them
    uint64_t num_loss_sums;
};

struct AdamWUpdateParams {
    PTR(float) params;           // [num_elements]; null: bf16
    PTR(bf16) params_bf16;       // [num_elements]; null: f32
    PTR(float) grads;            // [num_elements]
    PTR(float) exp_avg;          // [num_elements]
    PTR(float) exp_avg_sq;       // [num_elements]
    PTR(const AdamWStepDevice) step;
    PTR(const AdamWReportDevice) report;
    uint64_t num_elements;
};

struct AdamW8UpdateParams {
    PTR(float) params;           // [num_elements]; null: bf16
    PTR(bf16) params_bf16;       // [num_elements]; null: f32
    PTR(float) grads;            // [num_elements]
    PTR(uint8_t) exp_avg;        // [num_elements] codes of the signed dynamic map
    PTR(float) exp_avg_absmax;   // [num_elements / 256]
    PTR(uint8_t) exp_avg_sq;     // [num_elements] codes of the unsigned dynamic map
    PTR(float) exp_avg_sq_absmax;  // [num_elements / 256]
    PTR(const float) maps;       // [2, 2, 256] codes and borders, signed and unsigned
    PTR(const uint32_t) cells;   // [2, 2960] bytes
    PTR(const AdamWStepDevice) step;
    PTR(const AdamWReportDevice) report;
    uint64_t num_elements;
};
