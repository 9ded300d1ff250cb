// Per-expert low-rank products over routed rows, and their gradients.
//   moe_lora_project  xa[r] = dropout(x[r]) A_e^T; backward: d_xa[r] = scaling d_out[r] B_e. Up to two jobs (gate and up)
//   moe_lora_grads    d_a += d_xa^T dropout(x), d_b += scaling d_out^T xa, over the expert's rows in order; up to four jobs
//
// x, d_out [T, depth] (gathered by token) or [R, depth] bf16; xa, d_xa [R, ranks] bf16; A [rank, in], B [out, rank] in the arena
// (f32 or bf16, rounded to bf16 here); d_lora f32, accumulated. R routed rows sorted by expert; topk_weights may scale the rows.
// project: grid (jobs rank_blocks, tiles), block 128: a warp takes 16 rows and 32 ranks, 64 columns a stage, two stages; 27 KB.
// grads: grid (jobs column_blocks, E, rank blocks), block 128: a warp takes 32 columns and 32 ranks, 32 rows a stage; 22 KB.
// f32 accumulation; a sum over rows is made by one block in their order: deterministic. An expert without rows is left alone.
// Dropout zeroes elements on their way through shared memory; 1 / (1 - p) multiplies the sum.
// Preconditions (the launcher checks): depths and widths multiples of 8, rows of x and d_out 16-byte aligned.
// Cost: project reads x once per job (from the second-level cache for the second job), 2 R depth rank FLOPs; memory bound. grads
// reads wide and narrow once. Reference: src/backend/cpu/lora.rs; docs/math/moe.md, linear.md. Hu et al. 2021.
#include "rt/mma.cuh"

#include "moe_rows.cuh"

#include "moe_lora.h"

namespace {
constexpr unsigned kThreads = MOE_LORA_THREADS;
constexpr unsigned kRanks = MOE_LORA_RANKS;
constexpr unsigned kStages = 2;

// moe_lora_project. Rows of shared memory are padded by 16 bytes, so that the eight of a matrix load lie in different banks.
constexpr unsigned kRows = 64;
constexpr unsigned kDepth = 64;
constexpr unsigned kDepthRow = kDepth + 8;

// moe_lora_grads.
constexpr unsigned kGradRows = 32;
constexpr unsigned kColumns = MOE_LORA_GRAD_COLUMNS;
constexpr unsigned kWideRow = kColumns + 8;
constexpr unsigned kNarrowRow = kRanks + 8;

DEVICE bf16 arena_value(const void* lora, uint32_t is_bf16, uint64_t at) {
    return is_bf16 ? static_cast<const bf16*>(lora)[at] : to_bf16(static_cast<const float*>(lora)[at]);
}

// Columns [column, column + 64) of rows [first, first + 64) of x, those beyond `num_rows` zero.
DEVICE void load_rows(bf16* stage, const MoeLoraProjectParams& p, const bf16* x, const uint32_t* tokens, size_t first,
                      unsigned num_rows, unsigned column) {
    for (unsigned i = threadIdx.x; i < kRows * kDepth / kVector; i += kThreads) {
        const unsigned row = i / (kDepth / kVector), part = column + i % (kDepth / kVector) * kVector;
        const bool valid = row < num_rows && part < p.depth;
        const size_t source = p.gathered ? tokens[row] : first + row;
        copy_async_16(stage + row * kDepthRow + part - column, valid ? x + source * p.depth + part : x, valid);
    }
}

// What load_rows of this thread brought, dropped out.
DEVICE void drop_rows(bf16* stage, const DropoutMask& mask, const uint32_t* tokens, unsigned num_rows, unsigned column) {
    for (unsigned i = threadIdx.x; i < num_rows * kDepth / kVector; i += kThreads) {
        const unsigned row = i / (kDepth / kVector), part = i % (kDepth / kVector) * kVector;
        drop8(stage + row * kDepthRow + part, mask, tokens[row], column + part);
    }
}

// The factor's 32 ranks, each a row of 64 columns of the depth; zero beyond either. Forward A [rank, depth], backward
// B [depth, rank]; neighbouring threads read neighbouring elements of either.
DEVICE void load_factor(bf16* stage, const MoeLoraProjectParams& p, const MoePair& pair, uint64_t factor, unsigned first_rank,
                        unsigned column) {
    for (unsigned i = threadIdx.x; i < kRanks * kDepth; i += kThreads) {
        const unsigned rank = p.backward ? i % kRanks : i / kDepth, part = p.backward ? i / kRanks : i % kDepth;
        const unsigned n = first_rank + rank, k = column + part;
        bf16 value = to_bf16(0.0f);
        if (n < pair.rank && k < p.depth) {
            const uint64_t at = p.backward ? static_cast<uint64_t>(k) * pair.rank + n : static_cast<uint64_t>(n) * p.depth + k;
            value = arena_value(p.lora, p.lora_is_bf16, factor + at);
        }
        stage[rank * kDepthRow + part] = value;
    }
}

// d += the stage's rows times the factor, for the warp's 16 rows and all 32 ranks.
DEVICE void multiply_stage(float (&d)[kRanks / 8][4], const bf16* x, const bf16* factor, unsigned lane) {
    for (unsigned k = 0; k < kDepth; k += 16) {
        uint32_t a[4];
        load_matrix_x4(a, x + lane % 16 * kDepthRow + k + lane / 16 * 8);
        for (unsigned part = 0; part < kRanks / 8; part += 2) {
            uint32_t b[4];
            load_matrix_x4(b, factor + ((part + lane / 16) * 8 + lane % 8) * kDepthRow + k + lane / 8 % 2 * 8);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            mma_16x8x16(d[part], a, first);
            mma_16x8x16(d[part + 1], a, second);
        }
    }
}
}  // namespace

KERNEL(moe_lora_project, MoeLoraProjectParams, p, MOE_LORA_THREADS) {
    SHARED(bf16, x_stages, kStages * kRows * kDepthRow);
    SHARED(bf16, factor_stages, kStages * kRanks * kDepthRow);
    SHARED(uint32_t, tokens, kRows);
    const MoeLoraProjectJob& job = p.jobs[blockIdx.x / p.rank_blocks];
    const MoePair& pair = job.pair;
    const unsigned first_rank = blockIdx.x % p.rank_blocks * kRanks;
    if (blockIdx.y >= *p.rows.num_tiles || first_rank >= pair.rank) return;
    const MoeTile tile = p.rows.tiles[blockIdx.y];
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const DropoutMask mask = dropout_mask(pair, tile.expert, p.rows.step);
    const bool drops = mask.threshold && !p.backward;
    const float scale = p.backward ? pair.scaling : mask.keep_scale;
    const uint64_t factor = (p.backward ? pair.b : pair.a) + tile.expert * pair.stride;
    const unsigned num_stages = (p.depth + kDepth - 1) / kDepth;
    for (unsigned done = 0; done < tile.num_rows; done += kRows) {
        const size_t first = tile.first_row + done;
        const unsigned num_rows = tile.num_rows - done < kRows ? tile.num_rows - done : kRows;
        if (threadIdx.x < num_rows) tokens[threadIdx.x] = static_cast<uint32_t>(token_of_row(p.rows, first + threadIdx.x));
        __syncthreads();
        float d[kRanks / 8][4] = {};
        load_rows(x_stages, p, job.x, tokens, first, num_rows, 0);
        copy_async_commit();
        load_factor(factor_stages, p, pair, factor, first_rank, 0);
        for (unsigned stage = 0; stage < num_stages; ++stage) {
            const unsigned now = stage % kStages, next = (stage + 1) % kStages;
            if (stage + 1 < num_stages)
                load_rows(x_stages + next * kRows * kDepthRow, p, job.x, tokens, first, num_rows, (stage + 1) * kDepth);
            copy_async_commit();
            if (stage + 1 < num_stages)
                load_factor(factor_stages + next * kRanks * kDepthRow, p, pair, factor, first_rank, (stage + 1) * kDepth);
            copy_async_wait<1>();
            bf16* const x = x_stages + now * kRows * kDepthRow;
            if (drops) drop_rows(x, mask, tokens, num_rows, stage * kDepth);
            __syncthreads();
            if (warp * 16 < num_rows) multiply_stage(d, x + warp * 16 * kDepthRow, factor_stages + now * kRanks * kDepthRow, lane);
            __syncthreads();
        }
        for (unsigned part = 0; part < kRanks / 8; ++part) {
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned row = warp * 16 + lane / 4 + i / 2 * 8, rank = first_rank + part * 8 + lane % 4 * 2 + i % 2;
                if (row < num_rows && rank < pair.rank)
                    p.xa[(first + row) * p.xa_width + pair.first_column + rank] = to_bf16(scale * d[part][i]);
            }
        }
    }
}

namespace {
// Rows [first, first + 32) of the job's operands, zero beyond `end`: columns [column, column + 128) of the wide one, 32 ranks of
// the narrow one.
DEVICE void load_grad_rows(bf16* wide, bf16* narrow, const MoeLoraGradsParams& p, const MoeLoraGradJob& job, size_t first, size_t end,
                           unsigned column, unsigned first_rank) {
    for (unsigned i = threadIdx.x; i < kGradRows * kColumns / kVector; i += kThreads) {
        const unsigned row = i / (kColumns / kVector), part = i % (kColumns / kVector) * kVector;
        const bool valid = first + row < end && column + part < job.width;
        const bf16* source = job.wide;
        if (valid) source += (job.gathered ? token_of_row(p.rows, first + row) : first + row) * job.width + column + part;
        copy_async_16(wide + row * kWideRow + part, source, valid);
    }
    for (unsigned i = threadIdx.x; i < kGradRows * kRanks; i += kThreads) {
        const unsigned row = i / kRanks, rank = first_rank + i % kRanks;
        float value = 0.0f;
        if (first + row < end && rank < job.pair.rank) {
            value = to_f32(job.narrow[(first + row) * p.narrow_width + job.pair.first_column + rank]);
            if (p.topk_weights) value *= p.topk_weights[p.rows.slot_of_row[first + row]];
        }
        narrow[row * kNarrowRow + i % kRanks] = to_bf16(value);
    }
}

DEVICE void drop_grad_rows(bf16* wide, const DropoutMask& mask, const MoeRows& rows, size_t first, size_t end, unsigned column) {
    for (unsigned i = threadIdx.x; i < kGradRows * kColumns / kVector; i += kThreads) {
        const unsigned row = i / (kColumns / kVector), part = i % (kColumns / kVector) * kVector;
        if (first + row < end) drop8(wide + row * kWideRow + part, mask, token_of_row(rows, first + row), column + part);
    }
}

// d[rank tile][column tile] += narrow^T wide, for the warp's 32 columns: both operands lie with rows of the sum outermost.
DEVICE void multiply_grad_stage(float (&d)[kRanks / 16][4][4], const bf16* wide, const bf16* narrow, unsigned lane) {
    for (unsigned k = 0; k < kGradRows; k += 16) {
        uint32_t a[kRanks / 16][4];
        for (unsigned i = 0; i < kRanks / 16; ++i)
            load_matrix_x4_transposed(a[i], narrow + (k + lane / 16 * 8 + lane % 8) * kNarrowRow + i * 16 + lane / 8 % 2 * 8);
        for (unsigned part = 0; part < 4; part += 2) {
            uint32_t b[4];
            load_matrix_x4_transposed(b, wide + (k + lane / 8 % 2 * 8 + lane % 8) * kWideRow + (part + lane / 16) * 8);
            const uint32_t first[2] = {b[0], b[1]}, second[2] = {b[2], b[3]};
            for (unsigned i = 0; i < kRanks / 16; ++i) {
                mma_16x8x16(d[i][part], a[i], first);
                mma_16x8x16(d[i][part + 1], a[i], second);
            }
        }
    }
}
}  // namespace

KERNEL(moe_lora_grads, MoeLoraGradsParams, p, MOE_LORA_THREADS) {
    SHARED(bf16, wide_stages, kStages * kGradRows * kWideRow);
    SHARED(bf16, narrow_stages, kStages * kGradRows * kNarrowRow);
    const MoeLoraGradJob& job = p.jobs[blockIdx.x / p.column_blocks];
    const unsigned column = blockIdx.x % p.column_blocks * kColumns, expert = blockIdx.y, first_rank = blockIdx.z * kRanks;
    const size_t begin = p.rows.expert_offsets[expert], end = p.rows.expert_offsets[expert + 1];
    if (begin == end || column >= job.width || first_rank >= job.pair.rank) return;
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    DropoutMask mask = dropout_mask(job.pair, expert, p.rows.step);
    if (job.is_b) mask.threshold = 0;
    float d[kRanks / 16][4][4] = {};
    load_grad_rows(wide_stages, narrow_stages, p, job, begin, end, column, first_rank);
    copy_async_commit();
    unsigned now = 0;
    for (size_t row = begin; row < end; row += kGradRows) {
        const unsigned next = now ^ 1;
        if (row + kGradRows < end)
            load_grad_rows(wide_stages + next * kGradRows * kWideRow, narrow_stages + next * kGradRows * kNarrowRow, p, job,
                           row + kGradRows, end, column, first_rank);
        copy_async_commit();
        copy_async_wait<1>();
        bf16* const wide = wide_stages + now * kGradRows * kWideRow;
        if (mask.threshold) drop_grad_rows(wide, mask, p.rows, row, end, column);
        __syncthreads();
        if (column + warp * 32 < job.width) multiply_grad_stage(d, wide + warp * 32, narrow_stages + now * kGradRows * kNarrowRow, lane);
        __syncthreads();
        now = next;
    }
    const float scale = job.is_b ? job.pair.scaling : mask.keep_scale;
    float* const out = p.d_lora + (job.is_b ? job.pair.b : job.pair.a) + expert * job.pair.stride;
    for (unsigned tile = 0; tile < kRanks / 16; ++tile) {
        for (unsigned part = 0; part < 4; ++part) {
            for (unsigned i = 0; i < 4; ++i) {
                const unsigned rank = first_rank + tile * 16 + lane / 4 + i / 2 * 8;
                const unsigned col = column + warp * 32 + part * 8 + lane % 4 * 2 + i % 2;
                if (rank >= job.pair.rank || col >= job.width) continue;
                float* const at = out + (job.is_b ? static_cast<size_t>(col) * job.pair.rank + rank : static_cast<size_t>(rank) * job.width + col);
                *at += scale * d[tile][part][i];
            }
        }
    }
}
