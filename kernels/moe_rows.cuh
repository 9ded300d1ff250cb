// Helpers of the kernels over routed rows: one expert's part of what belongs to all.
#pragma once

#include "rt/operands.cuh"

#include "moe_rows.h"

// The adapter of `expert`.
DEVICE LoraModule expert_module(const MoeProjection& p, unsigned expert) {
    LoraModule module = p.expert0.lora;
    module.a += expert * p.lora_stride;
    module.b += expert * p.lora_stride;
    module.module += expert * p.module_stride;
    return module;
}

// The weight of `expert`. Its output and its adapter are taken from `p` where they are used: held through a product, they would
// take the registers of its sums.
DEVICE LinearProjection expert_weight(const MoeProjection& p, unsigned expert) {
    LinearProjection one = p.expert0;
    if (one.dense) {
        one.dense += expert * p.dense_stride;
        return one;
    }
    one.nf4.codes += expert * p.codes_stride;
    if (one.nf4.absmax) {
        one.nf4.absmax += expert * p.absmax_stride;
    } else {
        one.nf4.nested_codes += expert * p.nested_codes_stride;
        one.nf4.nested_absmax += expert * p.nested_absmax_stride;
    }
    return one;
}

// Routed rows [first, first + num_rows) of a [T, num_cols] matrix (is_gathered), or of a [R, num_cols] one.
DEVICE Rows routed_rows(const MoeRows& rows, const bf16* base, uint32_t num_cols, bool is_gathered, size_t first,
                        uint32_t num_rows) {
    if (is_gathered) return aligned_rows_of(base, num_cols, num_rows, num_cols, rows.token_of_row + first);
    return aligned_rows_of(base + first * num_cols, num_cols, num_rows, num_cols);
}
