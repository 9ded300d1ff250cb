// linear_forward: out_i = x W_i^T + bias_i + scaling_i xa_i B_i^T for up to four projections i of one x.
//
// x [T, K] bf16; W_i [N_i, K] NF4 or bf16; xa [T, sum of ranks] bf16 from lora_project (lora.cu); bias f32; B_i f32 or bf16;
// out_i [T, N_i] bf16 or f32. T tokens, K in_features, N out_features.
// grid (row tiles of the capacity x column tiles of all projections), block 128: a tile of 128 x 128, 4 warps of 64 x 64 (64 x 64
// and 32 x 32 at small capacities). 81 or 97 KB of shared memory: two blocks a multiprocessor.
// xa is made before, in a kernel of its own: the mask and x A^T are then computed once and not once per column tile (N / 128
// times), for reading x once more, which is a few percent of what the product itself reads from the L2 cache. B joins here:
// a product over the rank per fragment, scaled and added in f32.
// f32 sums over K in order, then the adapter, then the bias; rounded once: deterministic.
// Preconditions (the launcher checks): x and dense W 16-byte aligned, K a multiple of 8; NF4: K a multiple of 64.
// Cost: 2 T K N FLOP; 2 T K B of x, 2 T N of out and K N / 2 (NF4) or 2 K N of weights. docs/kernels/linear.md.
// Reference: src/backend/cpu/linear.rs; docs/math/linear.md. Dettmers et al. 2023, Hu et al. 2021.
#include "linear_tiles.cuh"

namespace {

template <class Tile>
DEVICE void forward_tile(const LinearParams& p, unsigned char* memory) {
    const LinearShared shared = linear_shared(memory);
    const TilePlace place = place_of_block(p.row_tiles, p.col_tiles);
    const unsigned num_tokens = p.step->num_tokens, first_row = place.row_tile * Tile::kM;
    if (first_row >= num_tokens) return;
    unsigned i = 0;
    while (i + 1 < p.num_projections && place.col_tile >= p.projections[i + 1].first_tile) ++i;
    const LinearProjection& w = p.projections[i];
    const unsigned first_col = (place.col_tile - w.first_tile) * Tile::kN;
    const bool active = first_row + Tile::warp_row() < num_tokens && first_col + Tile::warp_col() < w.out_features;

    typename Tile::Sums sums = {};
    add_weight_product<Tile, false>(sums, shared, aligned_rows_of(p.x, p.in_features, num_tokens, p.in_features), first_row,
                                    w, w, p.in_features, first_col, active);
    // Registers are short in the product of a wide tile: these are not held through it.
    constexpr bool kIsWide = Tile::kThreads == LINEAR_WIDE_THREADS;
    const unsigned num_rows = p.step->num_tokens;
    const unsigned row0 = kIsWide ? place_of_block(made_anew(p.row_tiles), p.col_tiles).row_tile * Tile::kM : first_row;
    if (w.lora.rank) {
        CopiedRows<Tile, Tile::kM, false> xa(rows_of(p.xa + w.lora.first_column, p.xa_width, num_rows, w.lora.rank), row0);
        LowRankTile<Tile, false> b(low_rank_of(p.lora, w.lora.b, w.out_features, w.lora.rank, p.lora_is_bf16), first_col);
        add_low_rank<Tile>(sums, shared.tiles, xa, b, w.lora.rank, active, AddScaled{w.lora.scaling});
    }
    for_each_fragment<Tile>(sums, [&](unsigned tile_row, unsigned tile_col, float(&sum)[4]) {
        const unsigned row = row0 + tile_row, col = first_col + tile_col;
        if (w.bias && col < w.out_features) {
            const float bias[2] = {w.bias[col], col + 1 < w.out_features ? w.bias[col + 1] : 0.0f};
            UNROLL for (unsigned j = 0; j < 4; ++j) sum[j] += bias[j % 2];
        }
        UNROLL for (unsigned half = 0; half < 2; ++half) {
            if (row + half * 8 >= num_rows) continue;
            if (w.out_is_f32) {
                store_pair(static_cast<float*>(w.out), row + half * 8, col, w.out_features, sum[2 * half], sum[2 * half + 1]);
            } else {
                store_pair(static_cast<bf16*>(w.out), row + half * 8, col, w.out_features, sum[2 * half], sum[2 * half + 1]);
            }
        }
    });
}

}  // namespace

KERNEL(linear_forward_wide, LinearParams, p, LINEAR_WIDE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    forward_tile<WideTile>(p, memory);
}

KERNEL(linear_forward, LinearParams, p, LINEAR_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    forward_tile<PlainTile>(p, memory);
}

KERNEL(linear_forward_small, LinearParams, p, LINEAR_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    forward_tile<SmallTile>(p, memory);
}
