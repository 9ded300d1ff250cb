// Params of selftest.cu.
#pragma once
#include "rt/params.h"

#define SELFTEST_THREADS 128

struct SelftestParams {
    PTR(float) out;
    PTR(const bf16) a;
    PTR(const bf16) b;
    uint32_t rows;
    uint32_t cols;
    uint32_t depth;
    uint32_t fault;  // 0: none; see the kernels
};
