// linear_backward_input: d_x (+)= sum_i d_out_i W_i + mask_i(d_xa_i A_i) for up to four projections i of one x.
//
// d_out_i [T, N_i] bf16, rows at 16-byte borders (linear_align makes such of others); W_i [N_i, K] NF4 or bf16; d_xa [T, sum
// of ranks] bf16 from lora_project_backward (lora.cu), scaling in it; A_i f32 or bf16; d_x [T, K] bf16.
// T tokens, K in_features, N out_features.
// grid (row tiles of the capacity x column tiles of K), block 128, tiles and shared memory as linear_forward. A block goes
// through all projections with one set of f32 sums, so d_x is written once. The weight is read as it lies: a stage is 64 of its
// rows and the tile's columns, transposed by the matrix load. mask_i, and the scale of what is kept, act on the adapter's part alone.
// Sums run over i, then over N in order, then the adapters; rounded once (accumulate: the sum with what is there is): deterministic.
// Preconditions (the launcher checks): dense W and d_x 16-byte aligned, K a multiple of 8; NF4: K a multiple of 64.
// Cost: 2 T K sum N FLOP, and 20 instructions per element of d_x and module for its mask. docs/kernels/linear.md.
// Reference: src/backend/cpu/linear.rs; docs/math/linear.md.
#include "linear_tiles.cuh"

namespace {

template <class Tile>
DEVICE void add_adapter(typename Tile::Sums& sums, bf16* tiles, const LinearParams& p, const LoraModule& module,
                        unsigned num_tokens, unsigned first_row, unsigned first_col, bool active) {
    CopiedRows<Tile, Tile::kM, false> d_xa(rows_of(p.xa + module.first_column, p.xa_width, num_tokens, module.rank), first_row);
    LowRankTile<Tile, true> a(low_rank_of(p.lora, module.a, module.rank, p.in_features, p.lora_is_bf16), first_col);
    const Dropout mask = dropout_of(*p.step, module.module, module.dropout_threshold, module.keep_scale);
    add_low_rank<Tile>(sums, tiles, d_xa, a, module.rank, active, AddDropped<Tile>(mask, first_row, first_col));
}

template <class Tile>
DEVICE void backward_tile(const LinearParams& p, unsigned char* memory) {
    const LinearShared shared = linear_shared(memory);
    const TilePlace place = place_of_block(p.row_tiles, p.col_tiles);
    const unsigned num_tokens = p.step->num_tokens, first_row = place.row_tile * Tile::kM;
    if (first_row >= num_tokens) return;
    const unsigned first_col = place.col_tile * Tile::kN;
    const bool active = first_row + Tile::warp_row() < num_tokens && first_col + Tile::warp_col() < p.in_features;

    typename Tile::Sums sums = {};
    for (unsigned i = 0; i < p.num_projections; ++i) {
        const LinearProjection& w = p.projections[i];
        const Rows d_out = aligned_rows_of(static_cast<const bf16*>(w.out), w.out_stride, num_tokens, w.out_stride);
        add_weight_product<Tile, true>(sums, shared, d_out, first_row, w, w, p.in_features, first_col, active);
    }
    for (unsigned i = 0; i < p.num_projections; ++i) {
        const LoraModule& module = p.projections[i].lora;
        if (module.rank) add_adapter<Tile>(sums, shared.tiles, p, module, num_tokens, first_row, first_col, active);
    }
    for_each_fragment<Tile>(sums, [&](unsigned tile_row, unsigned tile_col, float(&sum)[4]) {
        const unsigned col = first_col + tile_col;
        if (col >= p.in_features) return;
        UNROLL for (unsigned i = 0; i < 4; i += 2) {
            const unsigned row = first_row + tile_row + i * 4;
            if (row >= num_tokens) continue;
            if (p.accumulate) {
                const bf16* const before = p.d_x + static_cast<size_t>(row) * p.in_features + col;
                sum[i] += to_f32(before[0]);
                sum[i + 1] += to_f32(before[1]);
            }
            store_pair(p.d_x, row, col, p.in_features, sum[i], sum[i + 1]);
        }
    });
}

}  // namespace

KERNEL(linear_backward_input_wide, LinearParams, p, LINEAR_WIDE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    backward_tile<WideTile>(p, memory);
}

KERNEL(linear_backward_input, LinearParams, p, LINEAR_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    backward_tile<PlainTile>(p, memory);
}

KERNEL(linear_backward_input_small, LinearParams, p, LINEAR_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    backward_tile<SmallTile>(p, memory);
}

// grid (elements at capacity / (8 threads), rounded up), block 128: a thread makes 8 elements of out.
KERNEL(linear_align, LinearAlignParams, p, LINEAR_THREADS) {
    const unsigned parts = p.stride / 8;
    const size_t at = static_cast<size_t>(blockIdx.x) * LINEAR_THREADS + threadIdx.x;
    const size_t row = at / parts;
    if (row >= p.step->num_tokens) return;
    const Rows rows = rows_of(p.d_out, p.num_cols, p.step->num_tokens, p.num_cols, p.is_f32);
    const Words4 part = load_part_by_element(rows, static_cast<unsigned>(row), static_cast<unsigned>(at % parts) * 8);
    *reinterpret_cast<Words4*>(p.out + at * 8) = part;
}
