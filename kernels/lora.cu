// The rank-r side of an adapter, for the modules i of one linear call:
//
//   lora_project            xa_i = keep_i (mask_i(x) A_i^T)
//   lora_project_backward   d_xa_i = scaling_i d_out_i B_i
//   lora_grads              dA_i += keep_i d_xa_i^T mask_i(x),  dB_i += scaling_i d_out_i^T xa_i
//   lora_grads_reduce       the same, from partial sums
//
// x [T, K], d_out_i [T, N_i] bf16; A_i [r_i, K], B_i [N_i, r_i] and their gradients f32 or bf16; xa, d_xa [T, sum of r] bf16; mask_i
// zeroes what dropout drops and keep_i = 1 / (1 - p) scales the sums, so that nothing but the result is rounded.
// Projections: grid (modules, T / 64, ranks / 64), rounded up, block 128: 64 rows and 16 or 64 ranks, 4 warps of 16 rows. Blocks of
// the same rows run together, so x comes from memory once and from the L2 cache for each other module. 32 and 40 KB of shared memory.
// Gradients: grid (column tiles of all jobs, T / 1024, ranks / 64), block 128: 16 or 64 ranks and 128 columns over 1024 tokens, 4
// warps of 32 columns; 36 or 56 KB. More tokens than 1024 give f32 partial sums, which lora_grads_reduce adds in order.
// f32 sums in fixed order: deterministic. Preconditions (the launcher checks): K and strides multiples of 8, rows 16-byte aligned.
// Cost: 2 T r (K + N) FLOP each way; x and d_out once each: memory bound (r FLOP a byte). Reference: src/backend/cpu/lora.rs;
// docs/math/linear.md. Hu et al. 2021.
#include "rt/operands.cuh"

#include "lora.h"

namespace {
constexpr unsigned kThreads = LORA_THREADS;

using ProjectTile16 = GemmTile<LORA_ROWS, 16, 4, 1>;
using ProjectTile64 = GemmTile<LORA_ROWS, 64, 4, 1>;
using GradTile16 = GemmTile<16, LORA_GRAD_COLS, 1, 4>;
using GradTile64 = GemmTile<64, LORA_GRAD_COLS, 1, 4>;
static_assert((kGemmStages * GradTile64::kM + 2 * GradTile64::kN) * kGemmDepth * sizeof(bf16) == LORA_GRAD_SHARED,
              "what the launcher asks for");

// sums times scale to this block's ranks of xa.
template <class Tile>
DEVICE void store_xa(typename Tile::Sums& sums, const LoraProjectParams& p, const LoraModule& module, unsigned first_row,
                     unsigned first_rank, float scale) {
    const unsigned num_tokens = p.step->num_tokens;
    for_each_fragment<Tile>(sums, [&](unsigned tile_row, unsigned tile_col, float(&sum)[4]) {
        UNROLL for (unsigned i = 0; i < 4; ++i) {
            const unsigned row = first_row + tile_row + i / 2 * 8, rank = first_rank + tile_col + i % 2;
            if (row < num_tokens && rank < module.rank)
                p.xa[static_cast<size_t>(row) * p.xa_width + module.first_column + rank] = to_bf16(scale * sum[i]);
        }
    });
}

template <class Tile>
DEVICE void project_tile(const LoraProjectParams& p, bf16* shared) {
    const LoraModule& module = p.modules[blockIdx.x];
    const unsigned first_row = blockIdx.y * Tile::kM, first_rank = blockIdx.z * Tile::kN;
    const unsigned num_tokens = p.step->num_tokens, in_features = p.num_cols[blockIdx.x];
    const bool active = first_row + Tile::warp_row() < num_tokens;
    const Dropout mask = dropout_of(*p.step, module.module, module.dropout_threshold, module.keep_scale);
    DroppedRows<Tile, Tile::kM, false> x(
        aligned_rows_of(p.rows[blockIdx.x], p.strides[blockIdx.x], num_tokens, in_features), first_row, mask);
    LowRankRows<Tile, Tile::kN, false> a(low_rank_of(p.lora, module.a, module.rank, in_features, p.lora_is_bf16), first_rank);
    typename Tile::Sums sums = {};
    accumulate<Tile>(sums, shared, x, a, in_features, active);
    store_xa<Tile>(sums, p, module, first_row, first_rank, mask.keep_scale);
}

template <class Tile>
DEVICE void project_backward_tile(const LoraProjectParams& p, bf16* shared) {
    const LoraModule& module = p.modules[blockIdx.x];
    const unsigned first_row = blockIdx.y * Tile::kM, first_rank = blockIdx.z * Tile::kN;
    const unsigned num_tokens = p.step->num_tokens, out_features = p.num_cols[blockIdx.x], stride = p.strides[blockIdx.x];
    const bool active = first_row + Tile::warp_row() < num_tokens;
    CopiedRows<Tile, Tile::kM, false> d_out(aligned_rows_of(p.rows[blockIdx.x], stride, num_tokens, stride), first_row);
    LowRankRows<Tile, Tile::kN, true> b(low_rank_of(p.lora, module.b, out_features, module.rank, p.lora_is_bf16), first_rank);
    typename Tile::Sums sums = {};
    accumulate<Tile>(sums, shared, d_out, b, out_features, active);
    store_xa<Tile>(sums, p, module, first_row, first_rank, module.scaling);
}

// Whether this block of a projection has anything to do.
DEVICE bool has_work(const LoraProjectParams& p) {
    return blockIdx.y * LORA_ROWS < p.step->num_tokens && blockIdx.z * LORA_RANKS < p.modules[blockIdx.x].rank;
}

// Element of the arena, and of the job's partial sums, that is (rank, col) of the gradient.
DEVICE size_t grad_element(const LoraGradJob& job, unsigned rank, unsigned col) {
    return job.is_b ? static_cast<size_t>(col) * job.module.rank + rank : static_cast<size_t>(rank) * job.num_cols + col;
}

DEVICE void add_to_arena(const LoraGradsParams& p, size_t element, float value) {
    if (p.d_lora_is_bf16) {
        bf16* const at = static_cast<bf16*>(p.d_lora) + element;
        *at = to_bf16(to_f32(*at) + value);
    } else {
        static_cast<float*>(p.d_lora)[element] += value;
    }
}

DEVICE const LoraGradJob& job_of_tile(const LoraGradsParams& p, unsigned tile) {
    unsigned i = 0;
    while (i + 1 < p.num_jobs && tile >= p.jobs[i + 1].first_tile) ++i;
    return p.jobs[i];
}

template <class Tile>
DEVICE void grad_tile(const LoraGradsParams& p, const LoraGradJob& job, bf16* shared) {
    const LoraModule& module = job.module;
    const unsigned first_token = blockIdx.y * LORA_GRAD_TOKENS, left = p.step->num_tokens - first_token;
    const unsigned num_tokens = left < LORA_GRAD_TOKENS ? left : LORA_GRAD_TOKENS;
    const unsigned first_col = (blockIdx.x - job.first_tile) * Tile::kN, first_rank = blockIdx.z * Tile::kM;
    const bool active = first_col + Tile::warp_col() < job.num_cols;
    Dropout mask = dropout_of(*p.step, module.module, job.is_b ? 0 : module.dropout_threshold, module.keep_scale);
    mask.first_token += first_token;
    const bf16* const narrow_base = job.narrow + static_cast<size_t>(first_token) * p.xa_width + module.first_column;
    CopiedRows<Tile, Tile::kM, true> narrow(rows_of(narrow_base, p.xa_width, num_tokens, module.rank), first_rank);
    DroppedRows<Tile, Tile::kN, true> wide(
        aligned_rows_of(job.wide + static_cast<size_t>(first_token) * job.stride, job.stride, num_tokens, job.stride), first_col,
        mask);
    typename Tile::Sums sums = {};
    accumulate<Tile>(sums, shared, narrow, wide, num_tokens, active);
    const float scale = job.is_b ? module.scaling : mask.keep_scale;
    for_each_fragment<Tile>(sums, [&](unsigned tile_row, unsigned tile_col, float(&sum)[4]) {
        UNROLL for (unsigned i = 0; i < 4; ++i) {
            const unsigned rank = first_rank + tile_row + i / 2 * 8, col = first_col + tile_col + i % 2;
            if (rank >= module.rank || col >= job.num_cols) continue;
            const size_t element = grad_element(job, rank, col);
            if (p.partials) {
                p.partials[blockIdx.y * p.num_partials + job.first_partial + element] = scale * sum[i];
            } else {
                add_to_arena(p, (job.is_b ? module.b : module.a) + element, scale * sum[i]);
            }
        }
    });
}

}  // namespace

KERNEL(lora_project, LoraProjectParams, p, LORA_THREADS) {
    SHARED(bf16, shared, (2 * LORA_ROWS + 2 * LORA_RANKS) * kGemmDepth);
    if (!has_work(p)) return;
    if (p.modules[blockIdx.x].rank <= 16) {
        project_tile<ProjectTile16>(p, shared);
    } else {
        project_tile<ProjectTile64>(p, shared);
    }
}

KERNEL(lora_project_backward, LoraProjectParams, p, LORA_THREADS) {
    SHARED(bf16, shared, (kGemmStages * LORA_ROWS + 2 * LORA_RANKS) * kGemmDepth);
    if (!has_work(p)) return;
    if (p.modules[blockIdx.x].rank <= 16) {
        project_backward_tile<ProjectTile16>(p, shared);
    } else {
        project_backward_tile<ProjectTile64>(p, shared);
    }
}

KERNEL(lora_grads, LoraGradsParams, p, LORA_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    bf16* const shared = reinterpret_cast<bf16*>(memory);
    const LoraGradJob& job = job_of_tile(p, blockIdx.x);
    if (blockIdx.y * LORA_GRAD_TOKENS >= p.step->num_tokens || blockIdx.z * LORA_RANKS >= job.module.rank) return;
    if (job.module.rank <= 16) {
        grad_tile<GradTile16>(p, job, shared);
    } else {
        grad_tile<GradTile64>(p, job, shared);
    }
}

// grid (num_partials / 128, rounded up), block 128: a thread sums one element over the splits that have tokens.
KERNEL(lora_grads_reduce, LoraGradsParams, p, LORA_THREADS) {
    const size_t at = static_cast<size_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (at >= p.num_partials) return;
    const unsigned splits = (p.step->num_tokens + LORA_GRAD_TOKENS - 1) / LORA_GRAD_TOKENS;
    float sum = 0.0f;
    for (unsigned split = 0; split < splits; ++split) sum += p.partials[split * p.num_partials + at];
    unsigned i = 0;
    while (i + 1 < p.num_jobs && at >= p.jobs[i + 1].first_partial) ++i;
    const LoraGradJob& job = p.jobs[i];
    add_to_arena(p, (job.is_b ? job.module.b : job.module.a) + (at - job.first_partial), sum);
}
