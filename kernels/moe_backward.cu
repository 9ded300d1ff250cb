// moe_input_grad: the gradient of what an expert's projections i read, each row with the weights of its expert e:
//
//   delta[r] = sum_i d_out_i[r] W_ie + mask_ie(d_xa_i[r] A_ie)
//   gate and up: d_x[r] = delta[r]
//   down:        d_x[r] = w delta[r], w the row's topk_weight; partial[r, .] = sums of h[r] delta[r] over some columns
//
// d_out_i [R, N] bf16, or [T, N] gathered as it is loaded (down: the gradient of the experts' combined output); W [N, K] NF4 or
// bf16; d_xa [R, ranks] bf16 from moe_lora_project, scaling in it; A f32 or bf16; d_x, h [R, K] bf16; partial f32.
// R routed rows sorted by expert, T tokens, K in_features, N out_features. The mask of a row is that of its token.
// grid (column tiles of K, row tiles), block 128, tiles and shared memory as moe_forward.cu. A block goes through both
// projections with one set of f32 sums. The weight is read as it lies, transposed by the matrix load.
// Sums run over i, then over N in order, then the adapters; <h, delta> over a warp's columns, the rest by moe_weight_grads:
// deterministic. delta is not rounded before it is weighted.
// Preconditions (the launcher checks): N and K multiples of 8, rows and dense W 16-byte aligned; NF4: K a multiple of 64.
// Cost: 2 R K sum N FLOP; 20 instructions per element and module for its mask. docs/kernels/moe.md.
// Reference: src/backend/cpu/moe.rs; docs/math/moe.md.
#include "moe_tiles.cuh"

namespace {

// sums += mask(d_xa A), each row under its token's mask.
template <class Tile>
DEVICE void add_adapter(typename Tile::Sums& sums, bf16* tiles, const MoeInputGradParams& p, const LoraModule& module,
                        const MoeTile& tile, unsigned first_col, bool active) {
    CopiedRows<Tile, Tile::kM, false> d_xa(narrow_rows_of_tile(tile, p.d_xa, p.xa_width, module), 0);
    LowRankTile<Tile, true> a(low_rank_of(p.lora, module.a, module.rank, p.in_features, p.lora_is_bf16), first_col);
    const Dropout mask = dropout_of(*p.rows.step, module.module, module.dropout_threshold, module.keep_scale);
    add_low_rank<Tile>(sums, tiles, d_xa, a, module.rank, active,
                       AddDropped<Tile>(mask, 0, first_col, p.rows.token_of_row + tile.first_row, tile.num_rows));
}

// partial[r, part] = sum over the warp's columns of h delta, then delta *= w.
template <class Tile>
DEVICE void weigh(typename Tile::Sums& sums, const MoeInputGradParams& p, const MoeTile& tile, unsigned first_col) {
    const unsigned lane = threadIdx.x % kWarpSize;
    const unsigned part = (first_col + Tile::warp_col()) / Tile::kWarpN;
    UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m) {
        UNROLL for (unsigned i = 0; i < 4; i += 2) {
            const unsigned tile_row = Tile::warp_row() + m * 16 + lane / 4 + i * 4;
            const bool valid = tile_row < tile.num_rows;
            const size_t row = tile.first_row + (valid ? tile_row : 0);
            const float weight = p.topk_weights[p.rows.slot_of_row[row]];
            float dot = 0.0f;
            UNROLL for (unsigned n = 0; n < Tile::kFragmentsN; ++n) {
                const unsigned col = first_col + Tile::warp_col() + n * 8 + lane % 4 * 2;
                if (valid && col < p.in_features) {
                    const bf16* const h = p.h + row * p.in_features + col;
                    dot += sums[m][n][i] * to_f32(h[0]) + sums[m][n][i + 1] * to_f32(h[1]);
                }
                sums[m][n][i] *= weight;
                sums[m][n][i + 1] *= weight;
            }
            dot += __shfl_xor_sync(kFullMask, dot, 1);
            dot += __shfl_xor_sync(kFullMask, dot, 2);
            if (valid && lane % 4 == 0) p.partial[row * p.num_parts + part] = dot;
        }
    }
}

template <class Tile>
DEVICE void input_grad_tile(const MoeInputGradParams& p, unsigned char* memory) {
    static_assert(Tile::kN / Tile::kWarpN == MOE_PARTS_PER_TILE, "what the launcher makes room for");
    if (blockIdx.y >= *p.rows.num_tiles) return;
    const LinearShared shared = linear_shared(memory);
    const MoeTile& tile = p.rows.tiles[blockIdx.y];
    const unsigned first_col = blockIdx.x * Tile::kN;
    const bool active = Tile::warp_row() < tile.num_rows && first_col + Tile::warp_col() < p.in_features;

    typename Tile::Sums sums = {};
    for (unsigned i = 0; i < p.num_projections; ++i) {
        const LinearProjection w = expert_weight(p.projections[i], tile.expert);
        const bf16* const base = static_cast<const bf16*>(w.out);
        const Rows d_out = routed_rows(p.rows, base, w.out_features, p.is_gathered, tile.first_row, tile.num_rows);
        add_weight_product<Tile, true, 0, true>(sums, shared, d_out, 0, w, w, p.in_features, first_col, active);
    }
    for (unsigned i = 0; i < p.num_projections; ++i) {
        const LoraModule module = expert_module(p.projections[i], tile.expert);
        if (module.rank) add_adapter<Tile>(sums, shared.tiles, p, module, tile, first_col, active);
    }
    if (p.h) weigh<Tile>(sums, p, tile, first_col);
    for_each_fragment<Tile>(sums, [&](unsigned row, unsigned col, float(&sum)[4]) {
        UNROLL for (unsigned i = 0; i < 4; i += 2) {
            if (row + i * 4 >= tile.num_rows) continue;
            const size_t own = tile.first_row + row + i * 4;
            store_pair(p.d_x, own, first_col + col, p.in_features, sum[i], sum[i + 1]);
        }
    });
}

}  // namespace

KERNEL(moe_input_grad, MoeInputGradParams, p, MOE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    input_grad_tile<MoeLargeTile>(p, memory);
}

KERNEL(moe_input_grad_small, MoeInputGradParams, p, MOE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    input_grad_tile<MoeSmallTile>(p, memory);
}
