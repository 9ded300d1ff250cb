// What every other kernel relies on, each used once: warp operations, barriers, shared memory, asynchronous copies, matrix
// loads and products. `fault` breaks a kernel on purpose: the emulated device must tell, a real one need not.
// Reference: loops in tests/emu.rs.
#include "rt/mma.cuh"
#include "rt/reduce.cuh"

#include "selftest.h"

namespace {
constexpr unsigned kThreads = SELFTEST_THREADS;
constexpr unsigned kTile = 64;   // of rows and columns
constexpr unsigned kDepth = 32;  // columns of A and B in a stage
constexpr unsigned kStages = 2;
// A row of a stage: 64 bytes and 16 of padding, so that the eight rows of a matrix load lie in different banks.
constexpr unsigned kRow = kDepth + 8;

// Rows [first, first + 64) of a [rows, depth] matrix, columns [column, column + 32), to shared memory.
DEVICE void load_stage(bf16* stage, const bf16* matrix, unsigned first, unsigned rows, unsigned column, unsigned depth) {
    for (unsigned i = threadIdx.x; i < kTile * (kDepth / 8); i += kThreads) {
        const unsigned row = i / (kDepth / 8), part = i % (kDepth / 8) * 8;
        const bool valid = first + row < rows && column + part < depth;
        const size_t at = valid ? static_cast<size_t>(first + row) * depth + column + part : 0;
        copy_async_16(stage + row * kRow + part, matrix + at, valid);
    }
}
}  // namespace

// out [rows, cols] f32 = A [rows, depth] B [cols, depth]^T, bf16; depth a multiple of 8. grid (cols / 64, rows / 64), rounded up.
// fault 1: no wait for the copies; 2: no barrier after the products of a stage.
KERNEL(selftest_matmul, SelftestParams, p, SELFTEST_THREADS) {
    SHARED(bf16, a_stages, kStages * kTile * kRow);
    SHARED(bf16, b_stages, kStages * kTile * kRow);
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const unsigned row0 = blockIdx.y * kTile, col0 = blockIdx.x * kTile;
    const unsigned num_stages = (p.depth + kDepth - 1) / kDepth;
    float d[8][4] = {};
    load_stage(a_stages, p.a, row0, p.rows, 0, p.depth);
    load_stage(b_stages, p.b, col0, p.cols, 0, p.depth);
    copy_async_commit();
    for (unsigned stage = 0; stage < num_stages; ++stage) {
        const unsigned next = (stage + 1) % kStages * kTile * kRow;
        if (stage + 1 < num_stages) {
            load_stage(a_stages + next, p.a, row0, p.rows, (stage + 1) * kDepth, p.depth);
            load_stage(b_stages + next, p.b, col0, p.cols, (stage + 1) * kDepth, p.depth);
        }
        copy_async_commit();
        if (p.fault != 1) copy_async_wait<1>();
        __syncthreads();
        const bf16* const a = a_stages + stage % kStages * kTile * kRow;
        const bf16* const b = b_stages + stage % kStages * kTile * kRow;
        for (unsigned k = 0; k < kDepth; k += 16) {
            uint32_t a_part[4];
            load_matrix_x4(a_part, a + (warp * 16 + lane % 16) * kRow + k + lane / 16 * 8);
            for (unsigned column = 0; column < 8; column += 2) {
                // Two 8-column parts of B at once: matrices (part, half of k) in the order part 0 low, high, part 1 low, high.
                uint32_t b_part[4];
                const unsigned row = (column + lane / 16) * 8 + lane % 8;
                load_matrix_x4(b_part, b + row * kRow + k + lane / 8 % 2 * 8);
                const uint32_t b_first[2] = {b_part[0], b_part[1]}, b_second[2] = {b_part[2], b_part[3]};
                mma_16x8x16(d[column], a_part, b_first);
                mma_16x8x16(d[column + 1], a_part, b_second);
            }
        }
        if (p.fault != 2) __syncthreads();
    }
    for (unsigned column = 0; column < 8; ++column) {
        for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = row0 + warp * 16 + lane / 4 + i / 2 * 8;
            const unsigned col = col0 + column * 8 + lane % 4 * 2 + i % 2;
            if (row < p.rows && col < p.cols) p.out[static_cast<size_t>(row) * p.cols + col] = d[column][i];
        }
    }
}

// out[block] = sum of the block's 128 values 0.5 thread + block. fault 1: a thread leaves before the barrier; 2: half a warp is
// at another operation; 3: writes beyond its shared memory; 4: reads shared memory that nobody wrote; 5: no barrier between
// a write and the reads of others.
KERNEL(selftest_block, SelftestParams, p, SELFTEST_THREADS) {
    SHARED(float, partial, kThreads / kWarpSize);
    SHARED(float, values, kThreads);
    const float own = 0.5f * static_cast<float>(threadIdx.x) + static_cast<float>(blockIdx.x);
    if (p.fault == 1 && threadIdx.x == 77) return;
    if (p.fault == 2 && threadIdx.x % kWarpSize < 16) __syncwarp();
    if (p.fault == 3 && threadIdx.x == 0) values[kThreads] = 1.0f;
    if (p.fault != 4 || threadIdx.x != 5) values[threadIdx.x] = own;
    if (p.fault != 5) __syncthreads();
    const float sum = block_sum<kThreads>(values[kThreads - 1 - threadIdx.x], partial);
    const unsigned votes = __ballot_sync(kFullMask, threadIdx.x % 3 == 0);
    const float first = __shfl_sync(kFullMask, own, 0);
    if (threadIdx.x == 0) {
        p.out[3 * blockIdx.x] = sum;
        p.out[3 * blockIdx.x + 1] = static_cast<float>(votes);
        p.out[3 * blockIdx.x + 2] = first;
    }
}
