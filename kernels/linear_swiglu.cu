// linear_swiglu_forward: h = silu(gate) up, with gate = x Wg^T and up = x Wu^T, each with its bias and adapter.
//
// As linear_forward, with two projections of the same shape. gate, up, h [T, N] bf16.
// grid (row tiles of the capacity x column tiles), block 128: a tile of 128 rows, and 64 columns of both gate and up. The rows of
// Wg and Wu alternate in the tile, 32 at a time, so that a thread's sums of gate and of up belong to the same elements of h.
// h is made of gate and up as they are stored, rounded to bf16: backward then differentiates what forward computed.
// Deterministic. Preconditions (the launcher checks): as linear_forward; both weights NF4, or both dense.
// Cost: 4 T K N FLOP; h costs nothing but its 2 T N bytes. docs/kernels/linear.md.
// Reference: src/backend/cpu/linear.rs, elementwise.rs; docs/math/linear.md. Shazeer 2020.
#include "linear_tiles.cuh"

namespace {

// For add_low_rank: sum += scaling product in the columns of one of the two projections.
template <unsigned kHalf>
struct AddOfPair {
    float scaling;
    bool is_second;

    METHOD void begin(unsigned, unsigned) {}
    METHOD void operator()(unsigned index, unsigned col, float (&sum)[4], const float (&product)[4]) const {
        if (Pairing<kHalf>::is_second(col) == is_second) AddScaled{scaling}(index, col, sum, product);
    }
};

// sums += scaling xa B^T in the columns of one of the two projections.
template <class Tile, unsigned kHalf>
DEVICE void add_adapter(typename Tile::Sums& sums, bf16* tiles, const LinearParams& p, const LinearProjection& w,
                        unsigned num_tokens, unsigned first_row, unsigned first_col, bool is_second, bool active) {
    const LoraModule& module = w.lora;
    if (module.rank == 0) return;
    CopiedRows<Tile, Tile::kM, false> xa(rows_of(p.xa + module.first_column, p.xa_width, num_tokens, module.rank), first_row);
    LowRankTile<Tile, false, kHalf> b(low_rank_of(p.lora, module.b, w.out_features, module.rank, p.lora_is_bf16), first_col,
                                      is_second);
    add_low_rank<Tile>(sums, tiles, xa, b, module.rank, active, AddOfPair<kHalf>{module.scaling, is_second});
}

DEVICE void add_bias(float (&sum)[4], const float* bias, unsigned col, unsigned num_cols) {
    if (!bias || col >= num_cols) return;
    const float values[2] = {bias[col], col + 1 < num_cols ? bias[col + 1] : 0.0f};
    UNROLL for (unsigned j = 0; j < 4; ++j) sum[j] += values[j % 2];
}

DEVICE float swiglu(float gate, float up) {
    gate = to_f32(to_bf16(gate));
    return gate / (1.0f + expf(-gate)) * to_f32(to_bf16(up));
}

template <class Tile>
DEVICE void swiglu_tile(const LinearParams& p, unsigned char* memory) {
    constexpr unsigned kHalf = Tile::kWarpN / 2;
    const LinearShared shared = linear_shared(memory);
    const TilePlace place = place_of_block(p.row_tiles, p.col_tiles);
    const unsigned num_tokens = p.step->num_tokens, first_row = place.row_tile * Tile::kM;
    if (first_row >= num_tokens) return;
    const LinearProjection &gate = p.projections[0], &up = p.projections[1];
    const unsigned num_cols = gate.out_features, first_col = place.col_tile * (Tile::kN / 2);
    const bool active = first_row + Tile::warp_row() < num_tokens && first_col + Tile::warp_col() / 2 < num_cols;

    typename Tile::Sums sums = {};
    add_weight_product<Tile, false, kHalf>(sums, shared, aligned_rows_of(p.x, p.in_features, num_tokens, p.in_features),
                                           first_row, gate, up, p.in_features, first_col, active);
    add_adapter<Tile, kHalf>(sums, shared.tiles, p, gate, num_tokens, first_row, first_col, false, active);
    add_adapter<Tile, kHalf>(sums, shared.tiles, p, up, num_tokens, first_row, first_col, true, active);

    constexpr unsigned kHalfFragments = Tile::kFragmentsN / 2;
    const unsigned lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m) {
        UNROLL for (unsigned n = 0; n < kHalfFragments; ++n) {
            const unsigned col = first_col + Tile::warp_col() / 2 + n * 8 + lane % 4 * 2;
            float(&g)[4] = sums[m][n];
            float(&u)[4] = sums[m][n + kHalfFragments];
            add_bias(g, gate.bias, col, num_cols);
            add_bias(u, up.bias, col, num_cols);
            UNROLL for (unsigned i = 0; i < 4; i += 2) {
                const unsigned row = first_row + Tile::warp_row() + m * 16 + lane / 4 + i * 4;
                if (row >= num_tokens) continue;
                store_pair(static_cast<bf16*>(gate.out), row, col, num_cols, g[i], g[i + 1]);
                store_pair(static_cast<bf16*>(up.out), row, col, num_cols, u[i], u[i + 1]);
                store_pair(p.h, row, col, num_cols, swiglu(g[i], u[i]), swiglu(g[i + 1], u[i + 1]));
            }
        }
    }
}

}  // namespace

KERNEL(linear_swiglu_forward_wide, LinearParams, p, LINEAR_WIDE_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    swiglu_tile<WideTile>(p, memory);
}

KERNEL(linear_swiglu_forward, LinearParams, p, LINEAR_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    swiglu_tile<PlainTile>(p, memory);
}

KERNEL(linear_swiglu_forward_small, LinearParams, p, LINEAR_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    swiglu_tile<SmallTile>(p, memory);
}
