// The rank-r side of the experts' adapters, for the modules i (gate and up, or down) of one call and each expert e:
//
//   moe_lora_project           xa_i = keep_i (mask_i(x) A_ie^T)
//   moe_lora_project_backward  d_xa_i = scaling_i d_out_i B_ie
//   moe_lora_grads             dA_ie += keep_i d_xa_i^T mask_i(x), dB_ie += scaling_i d_out_i^T xa_i, over the expert's rows in order
//
// x, d_out [T, n] (a row per token, gathered) or [R, n] bf16; xa, d_xa [R, sum of ranks] bf16; A [r, in], B [out, r] and their
// gradients f32 or bf16. R routed rows sorted by expert, T tokens. The mask of a row is that of its token. topk_weights, where
// given, multiply each row's term of the gradients (down: the gradient of its output is weight d_out).
// projections: grid (modules, tiles, ranks / 64), block 128: 64 rows at a time, 16 or 64 ranks. Blocks of the same rows run
// together, so that x comes from memory once. 32 and 40 KB of shared memory.
// grads: grid (column tiles of all jobs, E, ranks / 64), block 128: 16 or 64 ranks and 128 columns, 64 rows a step; 36 or 56 KB.
// f32 sums, those over rows by one block in their order: deterministic. The gradients of an expert without rows are left alone.
// Preconditions (the launcher checks): n a multiple of 8, rows 16-byte aligned, ranks above 0.
// Cost: 2 R r n FLOP each; x and d_out once per module: memory bound (r FLOP a byte). docs/kernels/moe.md.
// Reference: src/backend/cpu/lora.rs, moe.rs; docs/math/moe.md. Hu et al. 2021.
#include "moe_rows.cuh"

#include "moe_lora.h"

namespace {
using ProjectTile16 = GemmTile<MOE_LORA_ROWS, 16, 4, 1>;
using ProjectTile64 = GemmTile<MOE_LORA_ROWS, 64, 4, 1>;
using GradTile16 = GemmTile<16, MOE_LORA_GRAD_COLS, 1, 4>;
using GradTile64 = GemmTile<64, MOE_LORA_GRAD_COLS, 1, 4>;
static_assert((kGemmStages * GradTile64::kM + 2 * GradTile64::kN) * kGemmDepth * sizeof(bf16) == MOE_LORA_GRAD_SHARED,
              "what the launcher asks for");

// sums times scale to this block's ranks of xa.
template <class Tile>
DEVICE void store_xa(typename Tile::Sums& sums, const MoeLoraProjectParams& p, const LoraModule& module, size_t first_row,
                     unsigned num_rows, float scale) {
    const unsigned first_rank = blockIdx.z * Tile::kN;
    for_each_fragment<Tile>(sums, [&](unsigned row, unsigned col, float(&sum)[4]) {
        UNROLL for (unsigned i = 0; i < 4; ++i) {
            const unsigned own = row + i / 2 * 8, rank = first_rank + col + i % 2;
            if (own < num_rows && rank < module.rank)
                p.xa[(first_row + own) * p.xa_width + module.first_column + rank] = to_bf16(scale * sum[i]);
        }
    });
}

template <class Tile>
DEVICE void project_rows(const MoeLoraProjectParams& p, bf16* shared, unsigned expert, size_t first_row, unsigned num_rows) {
    const MoeLoraProjectJob& job = p.jobs[blockIdx.x];
    const LoraModule module = expert_module(job.projection, expert);
    const Dropout mask = dropout_of(*p.rows.step, module.module, module.dropout_threshold, module.keep_scale);
    DroppedRows<Tile, Tile::kM, false> x(routed_rows(p.rows, job.rows, job.num_cols, job.is_gathered, first_row, num_rows), 0, mask,
                                         p.rows.token_of_row + first_row);
    LowRankRows<Tile, Tile::kN, false> a(low_rank_of(p.lora, module.a, module.rank, job.num_cols, p.lora_is_bf16),
                                         blockIdx.z * Tile::kN);
    typename Tile::Sums sums = {};
    accumulate<Tile>(sums, shared, x, a, job.num_cols, Tile::warp_row() < num_rows);
    store_xa<Tile>(sums, p, module, first_row, num_rows, mask.keep_scale);
}

template <class Tile>
DEVICE void project_backward_rows(const MoeLoraProjectParams& p, bf16* shared, unsigned expert, size_t first_row,
                                  unsigned num_rows) {
    const MoeLoraProjectJob& job = p.jobs[blockIdx.x];
    const LoraModule module = expert_module(job.projection, expert);
    KeptRows<Tile, Tile::kM> d_out(routed_rows(p.rows, job.rows, job.num_cols, job.is_gathered, first_row, num_rows), 0);
    LowRankRows<Tile, Tile::kN, true> b(low_rank_of(p.lora, module.b, job.num_cols, module.rank, p.lora_is_bf16),
                                        blockIdx.z * Tile::kN);
    typename Tile::Sums sums = {};
    accumulate<Tile>(sums, shared, d_out, b, job.num_cols, Tile::warp_row() < num_rows);
    store_xa<Tile>(sums, p, module, first_row, num_rows, module.scaling);
}

// Calls f(expert, first_row, num_rows) for the rows of this block's tile, 64 at a time, if the job has ranks left for it.
template <class F>
DEVICE void for_rows_of_tile(const MoeLoraProjectParams& p, F f) {
    const unsigned rank = p.jobs[blockIdx.x].projection.expert0.lora.rank;
    if (blockIdx.y >= *p.rows.num_tiles || blockIdx.z * MOE_LORA_RANKS >= rank) return;
    const MoeTile tile = p.rows.tiles[blockIdx.y];
    for (unsigned done = 0; done < tile.num_rows; done += MOE_LORA_ROWS) {
        const unsigned left = tile.num_rows - done;
        f(tile.expert, static_cast<size_t>(tile.first_row) + done, left < MOE_LORA_ROWS ? left : MOE_LORA_ROWS);
    }
}

// The narrow operand of the gradients: an expert's rows of xa or d_xa, each times its weight, along rows.
template <class Tile>
struct WeightedRows : Stage<Tile::kM, true> {
    using S = Stage<Tile::kM, true>;
    static constexpr bool kStaged = false;
    Rows matrix;
    unsigned first_rank;
    const uint32_t* slots;
    const float* weights;  // by slot; null: 1

    METHOD WeightedRows(const Rows& matrix, unsigned first_rank, const uint32_t* slots, const float* weights)
        : matrix(matrix), first_rank(first_rank), slots(slots), weights(weights) {}

    METHOD void copy(SharedAddress tile, unsigned step) const {
        for (unsigned at = threadIdx.x; at < S::kParts; at += Tile::kThreads) {
            const unsigned tile_row = at / (S::kCols / 8), part = at % (S::kCols / 8);
            const unsigned row = S::matrix_row(first_rank, step, tile_row), col = S::matrix_col(first_rank, step, part * 8);
            const SharedAddress target = tile + S::place(tile_row, part);
            if (!weights || row >= matrix.num_rows) {
                copy_part(target, matrix, row, col);
                continue;
            }
            Words4 values = load_part_by_element(matrix, row, col);
            const float weight = weights[slots[row]];
            UNROLL for (unsigned i = 0; i < 4; ++i)
                values.word[i] = pack_bf16_pair(weight * f32_of_bits(values.word[i] << 16),
                                                weight * f32_of_bits(values.word[i] & 0xffff0000u));
            store_shared_16(target, values);
        }
    }
};

DEVICE void add_to_arena(const MoeLoraGradsParams& p, size_t element, float value) {
    if (p.d_lora_is_bf16) {
        bf16* const at = static_cast<bf16*>(p.d_lora) + element;
        *at = to_bf16(to_f32(*at) + value);
    } else {
        static_cast<float*>(p.d_lora)[element] += value;
    }
}

template <class Tile>
DEVICE void grad_tile(const MoeLoraGradsParams& p, const MoeLoraGradJob& job, bf16* shared, size_t first_row, unsigned num_rows) {
    const LoraModule module = expert_module(job.projection, blockIdx.y);
    const unsigned first_col = (blockIdx.x - job.first_tile) * Tile::kN, first_rank = blockIdx.z * Tile::kM;
    const bool active = first_col + Tile::warp_col() < job.num_cols;
    const Dropout mask = dropout_of(*p.rows.step, module.module, job.is_b ? 0 : module.dropout_threshold, module.keep_scale);
    const bf16* const narrow_base = job.narrow + first_row * p.xa_width + module.first_column;
    WeightedRows<Tile> narrow(rows_of(narrow_base, p.xa_width, num_rows, module.rank), first_rank, p.rows.slot_of_row + first_row,
                              p.topk_weights);
    DroppedRows<Tile, Tile::kN, true> wide(routed_rows(p.rows, job.wide, job.num_cols, job.is_gathered, first_row, num_rows),
                                           first_col, mask, p.rows.token_of_row + first_row);
    typename Tile::Sums sums = {};
    accumulate<Tile>(sums, shared, narrow, wide, num_rows, active);
    const float scale = job.is_b ? module.scaling : mask.keep_scale;
    for_each_fragment<Tile>(sums, [&](unsigned row, unsigned col, float(&sum)[4]) {
        UNROLL for (unsigned i = 0; i < 4; ++i) {
            const unsigned rank = first_rank + row + i / 2 * 8, column = first_col + col + i % 2;
            if (rank >= module.rank || column >= job.num_cols) continue;
            const size_t element = job.is_b ? module.b + static_cast<size_t>(column) * module.rank + rank
                                            : module.a + static_cast<size_t>(rank) * job.num_cols + column;
            add_to_arena(p, element, scale * sum[i]);
        }
    });
}
}  // namespace

KERNEL(moe_lora_project, MoeLoraProjectParams, p, MOE_LORA_THREADS) {
    SHARED(bf16, shared, (2 * MOE_LORA_ROWS + 2 * MOE_LORA_RANKS) * kGemmDepth);
    for_rows_of_tile(p, [&](unsigned expert, size_t first_row, unsigned num_rows) {
        if (p.jobs[blockIdx.x].projection.expert0.lora.rank <= 16) {
            project_rows<ProjectTile16>(p, shared, expert, first_row, num_rows);
        } else {
            project_rows<ProjectTile64>(p, shared, expert, first_row, num_rows);
        }
    });
}

KERNEL(moe_lora_project_backward, MoeLoraProjectParams, p, MOE_LORA_THREADS) {
    SHARED(bf16, shared, (kGemmStages * MOE_LORA_ROWS + 2 * MOE_LORA_RANKS) * kGemmDepth);
    for_rows_of_tile(p, [&](unsigned expert, size_t first_row, unsigned num_rows) {
        if (p.jobs[blockIdx.x].projection.expert0.lora.rank <= 16) {
            project_backward_rows<ProjectTile16>(p, shared, expert, first_row, num_rows);
        } else {
            project_backward_rows<ProjectTile64>(p, shared, expert, first_row, num_rows);
        }
    });
}

KERNEL(moe_lora_grads, MoeLoraGradsParams, p, MOE_LORA_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    bf16* const shared = reinterpret_cast<bf16*>(memory);
    unsigned i = 0;
    while (i + 1 < p.num_jobs && blockIdx.x >= p.jobs[i + 1].first_tile) ++i;
    const MoeLoraGradJob& job = p.jobs[i];
    const unsigned rank = job.projection.expert0.lora.rank;
    const unsigned first_row = p.rows.expert_offsets[blockIdx.y], end = p.rows.expert_offsets[blockIdx.y + 1];
    if (first_row == end || blockIdx.z * MOE_LORA_RANKS >= rank) return;
    if (rank <= 16) {
        grad_tile<GradTile16>(p, job, shared, first_row, end - first_row);
    } else {
        grad_tile<GradTile64>(p, job, shared, first_row, end - first_row);
    }
}
