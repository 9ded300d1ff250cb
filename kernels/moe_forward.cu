// The experts' products, each row with the weights of its expert e:
//
//   moe_gate_up_forward  gate[r] = x[t] Wg_e^T + sg xa_g[r] Bg_e^T, up likewise, h[r] = silu(gate[r]) up[r]
//   moe_down_forward     out[r] = h[r] Wd_e^T + sd xa_d[r] Bd_e^T
//
// x [T, D] bf16, gathered as it is loaded: row r reads token t(r); gate, up, h [R, I], out [R, D] bf16; xa [R, ranks] bf16 from
// moe_lora_project; W NF4 or bf16; B f32 or bf16. R routed rows sorted by expert, I width, D hidden_size.
// grid (column tiles, row tiles), block 128: 4 warps make 128 rows (64 where experts have few) of one expert by 128 columns; of
// gate_up 64 columns of gate and the same 64 of up, whose rows alternate in the tile, so that a thread has both factors of its
// elements of h. Row tiles come from the device's list (moe_tiles), an expert's one after the other, so that blocks that run
// together share weights and rows in the L2 cache. 57 to 97 KB of shared memory: two or three blocks a multiprocessor.
// h is made of gate and up as they are stored, rounded to bf16: backward then differentiates what forward computed.
// f32 sums over the depth in order, then the adapter; rounded once: deterministic.
// Preconditions (the launcher checks): I and D multiples of 8, rows and dense W 16-byte aligned; NF4: depth a multiple of 64.
// Cost: gate_up 4 R D I FLOP, down 2 R D I; weights once per row tile of their expert, from the L2 cache after the first.
// docs/kernels/moe.md. Reference: src/backend/cpu/moe.rs; docs/math/moe.md. Shazeer et al. 2017, Dettmers et al. 2023.
#include "moe_tiles.cuh"

namespace {

// For add_low_rank: sum += scaling product; with kHalf, in the columns of one of two projections.
template <unsigned kHalf>
struct AddOfPair {
    float scaling;
    bool is_second;

    METHOD void begin(unsigned, unsigned) {}
    METHOD void operator()(unsigned, unsigned col, float (&sum)[4], const float (&product)[4]) const {
        if (Pairing<kHalf>::is_second(col) == is_second) AddScaled{scaling}(0, col, sum, product);
    }
};

// sums += scaling xa B^T; with kHalf, in the columns of one of two projections.
template <class Tile, unsigned kHalf>
DEVICE void add_adapter(typename Tile::Sums& sums, bf16* tiles, const MoeForwardParams& p, const MoeProjection& projection,
                        const MoeTile& tile, unsigned first_col, bool is_second, bool active) {
    const LoraModule module = expert_module(projection, tile.expert);
    if (module.rank == 0) return;
    CopiedRows<Tile, Tile::kM, false> xa(narrow_rows_of_tile(tile, p.xa, p.xa_width, module), 0);
    const uint32_t out_features = projection.expert0.out_features;
    LowRankTile<Tile, false, kHalf> b(low_rank_of(p.lora, module.b, out_features, module.rank, p.lora_is_bf16), first_col, is_second);
    add_low_rank<Tile>(sums, tiles, xa, b, module.rank, active, AddOfPair<kHalf>{module.scaling, is_second});
}

DEVICE float swiglu(float gate, float up) {
    gate = to_f32(to_bf16(gate));
    return gate / (1.0f + expf(-gate)) * to_f32(to_bf16(up));
}

template <class Tile>
DEVICE void gate_up_tile(const MoeForwardParams& p, unsigned char* memory) {
    constexpr unsigned kHalf = Tile::kWarpN / 2;
    if (blockIdx.y >= *p.rows.num_tiles) return;
    const LinearShared shared = linear_shared(memory);
    // A reference: what a product has no use for is read again after it.
    const MoeTile& tile = p.rows.tiles[blockIdx.y];
    const unsigned num_cols = p.projections[0].expert0.out_features, first_col = blockIdx.x * (Tile::kN / 2);
    const bool active = Tile::warp_row() < tile.num_rows && first_col + Tile::warp_col() / 2 < num_cols;

    typename Tile::Sums sums = {};
    const Rows x = routed_rows(p.rows, p.x, p.in_features, true, tile.first_row, tile.num_rows);
    add_weight_product<Tile, false, kHalf, true>(sums, shared, x, 0, expert_weight(p.projections[0], tile.expert),
                                           expert_weight(p.projections[1], tile.expert), p.in_features, first_col, active);
    NO_UNROLL for (unsigned i = 0; i < 2; ++i)
        add_adapter<Tile, kHalf>(sums, shared.tiles, p, p.projections[i], tile, first_col, i == 1, active);

    bf16* const gate = static_cast<bf16*>(p.projections[0].expert0.out);
    bf16* const up = static_cast<bf16*>(p.projections[1].expert0.out);

    constexpr unsigned kHalfFragments = Tile::kFragmentsN / 2;
    const unsigned lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m) {
        UNROLL for (unsigned n = 0; n < kHalfFragments; ++n) {
            const unsigned col = first_col + Tile::warp_col() / 2 + n * 8 + lane % 4 * 2;
            const float(&g)[4] = sums[m][n];
            const float(&u)[4] = sums[m][n + kHalfFragments];
            UNROLL for (unsigned i = 0; i < 4; i += 2) {
                const unsigned tile_row = Tile::warp_row() + m * 16 + lane / 4 + i * 4;
                if (tile_row >= tile.num_rows) continue;
                const size_t row = tile.first_row + tile_row;
                store_pair(gate, row, col, num_cols, g[i], g[i + 1]);
                store_pair(up, row, col, num_cols, u[i], u[i + 1]);
                store_pair(p.h, row, col, num_cols, swiglu(g[i], u[i]), swiglu(g[i + 1], u[i + 1]));
            }
        }
    }
}

template <class Tile>
DEVICE void down_tile(const MoeForwardParams& p, unsigned char* memory) {
    if (blockIdx.y >= *p.rows.num_tiles) return;
    const LinearShared shared = linear_shared(memory);
    // A reference: what a product has no use for is read again after it.
    const MoeTile& tile = p.rows.tiles[blockIdx.y];
    const LinearProjection& down = p.projections[0].expert0;
    const unsigned num_cols = down.out_features, first_col = blockIdx.x * Tile::kN;
    const bool active = Tile::warp_row() < tile.num_rows && first_col + Tile::warp_col() < num_cols;

    typename Tile::Sums sums = {};
    const LinearProjection weight = expert_weight(p.projections[0], tile.expert);
    const Rows h = routed_rows(p.rows, p.x, p.in_features, false, tile.first_row, tile.num_rows);
    add_weight_product<Tile, false>(sums, shared, h, 0, weight, weight, p.in_features, first_col, active);
    add_adapter<Tile, 0>(sums, shared.tiles, p, p.projections[0], tile, first_col, false, active);
    for_each_fragment<Tile>(sums, [&](unsigned row, unsigned col, float(&sum)[4]) {
        UNROLL for (unsigned i = 0; i < 4; i += 2) {
            if (row + i * 4 >= tile.num_rows) continue;
            const size_t own = tile.first_row + row + i * 4;
            store_pair(static_cast<bf16*>(down.out), own, first_col + col, num_cols, sum[i], sum[i + 1]);
        }
    });
}

}  // namespace

KERNEL(moe_gate_up_forward, MoeForwardParams, p, MOE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    gate_up_tile<MoeLargeTile>(p, memory);
}

KERNEL(moe_gate_up_forward_small, MoeForwardParams, p, MOE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    gate_up_tile<MoeSmallTile>(p, memory);
}

KERNEL(moe_down_forward, MoeForwardParams, p, MOE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    down_tile<MoeLargeTile>(p, memory);
}

KERNEL(moe_down_forward_small, MoeForwardParams, p, MOE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    down_tile<MoeSmallTile>(p, memory);
}
