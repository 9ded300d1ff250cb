// Helpers of the kernels over routed rows: one expert's part of what belongs to all.
#pragma once

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
