// What changes from one micro-batch to the next, in device memory: kernels read it there, so that one recorded launch
// serves batches of any length up to the capacity its grid was made for.
#pragma once
#include "params.h"

struct StepStateDevice {
    uint32_t num_tokens;     // T
    uint32_t num_sequences;
    uint32_t num_targets;
    float loss_scale;        // 1 / target tokens of the optimizer step
    uint32_t dropout_on;     // 0: no dropout (evaluation)
    uint32_t dropout_key_low;   // Philox key: the seed, the stream's number already in it
    uint32_t dropout_key_high;
    uint32_t optimizer_step;
    uint32_t first_token;    // of the micro-batch, in the optimizer step
    uint32_t reserved;
    PTR(const uint32_t) input_ids;       // [T]
    PTR(const uint32_t) position_ids;    // [T] within the sequence
    PTR(const uint32_t) sequence_start;  // [T] first row of the token's sequence
    PTR(const uint32_t) sequence_end;    // [T] one past its last row
    PTR(const uint32_t) cu_seqlens;      // [num_sequences + 1]
    PTR(const uint32_t) target_rows;     // [num_targets] rows that have a target, ascending
    PTR(const uint32_t) target_ids;      // [num_targets] what each must predict
};
