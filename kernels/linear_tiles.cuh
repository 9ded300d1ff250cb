// What the linear kernels share: which tile a block makes, the product with a frozen weight, and the stores.
#pragma once

#include "rt/nf4_operand.cuh"

#include "linear.h"

#include <type_traits>

using WideTile = GemmTile<LINEAR_TILE, LINEAR_WIDE_COLS, 2, 4>;
using PlainTile = GemmTile<LINEAR_TILE, LINEAR_TILE, 2, 2>;
using SmallTile = GemmTile<LINEAR_SMALL_TILE, LINEAR_SMALL_TILE, 2, 2>;

constexpr unsigned kDynamicCodeBytes = kDynamicCodes * sizeof(float);

template <class Tile>
constexpr unsigned linear_shared_bytes(bool is_dense) {
    const unsigned elements = (kGemmStages * Tile::kM + (is_dense ? kGemmStages : 2) * Tile::kN) * kGemmDepth;
    return kDynamicCodeBytes + elements * static_cast<unsigned>(sizeof(bf16));
}
static_assert(WideTile::kThreads == LINEAR_WIDE_THREADS, "what the launcher starts");
static_assert(PlainTile::kThreads == LINEAR_THREADS && SmallTile::kThreads == LINEAR_THREADS, "what the launcher starts");
static_assert(linear_shared_bytes<WideTile>(false) == LINEAR_WIDE_SHARED_NF4, "what the launcher asks for");
static_assert(linear_shared_bytes<WideTile>(true) == LINEAR_WIDE_SHARED_DENSE, "what the launcher asks for");
static_assert(linear_shared_bytes<PlainTile>(false) == LINEAR_SHARED_NF4, "what the launcher asks for");
static_assert(linear_shared_bytes<PlainTile>(true) == LINEAR_SHARED_DENSE, "what the launcher asks for");
static_assert(linear_shared_bytes<SmallTile>(false) == LINEAR_SMALL_SHARED_NF4, "what the launcher asks for");
static_assert(linear_shared_bytes<SmallTile>(true) == LINEAR_SMALL_SHARED_DENSE, "what the launcher asks for");

struct TilePlace {
    unsigned row_tile, col_tile;
};

// Blocks that run together share operands in the L2 cache: 16 row tiles go through all column tiles, then the next 16.
DEVICE TilePlace place_of_block(unsigned row_tiles, unsigned col_tiles) {
    constexpr unsigned kGroup = 16;
    const unsigned group = blockIdx.x / (kGroup * col_tiles), within = blockIdx.x % (kGroup * col_tiles);
    const unsigned left = row_tiles - group * kGroup, rows = left < kGroup ? left : kGroup;
    return {group * kGroup + within % rows, within / rows};
}

// Shared memory of a block.
struct LinearShared {
    float* dynamic_code;
    bf16* tiles;
};

DEVICE LinearShared linear_shared(unsigned char* memory) {
    return {reinterpret_cast<float*>(memory), reinterpret_cast<bf16*>(memory + kDynamicCodeBytes)};
}

// The first or the second, pointer by pointer: a choice of whole structs would put both into local memory.
DEVICE Nf4Weight chosen(bool is_first, const Nf4Weight& first, const Nf4Weight& second) {
    return {is_first ? first.codes : second.codes, is_first ? first.absmax : second.absmax,
            is_first ? first.nested_codes : second.nested_codes, is_first ? first.nested_absmax : second.nested_absmax,
            is_first ? first.dynamic_code : second.dynamic_code};
}

// sums += rows W^T (kAlongRows false: `first` is a row of W), or rows W (true: a column of W). With kHalf, W's rows alternate
// with those of `second`. kGathers: rows may be gathered.
template <class Tile, bool kAlongRows, unsigned kHalf = 0, bool kGathers = false>
DEVICE void add_weight_product(typename Tile::Sums& sums, const LinearShared& shared, const Rows& rows, unsigned first_row,
                               const LinearProjection& w, const LinearProjection& second, uint32_t in_features, unsigned first,
                               bool active) {
    const unsigned depth = kAlongRows ? w.out_features : in_features;
    using Inputs = std::conditional_t<kGathers, KeptRows<Tile, Tile::kM>, CopiedRows<Tile, Tile::kM, false>>;
    Inputs a(rows, first_row);
    if (w.dense) {
        CopiedRows<Tile, Tile::kN, kAlongRows, kHalf> b(
            aligned_rows_of(w.dense, in_features, w.out_features, in_features), first, second.dense);
        accumulate<Tile>(sums, shared.tiles, a, b, depth, active);
        return;
    }
    using Weight = Nf4Rows<Tile, Tile::kN, kAlongRows, kHalf>;
    // One of the two may have nested scales and the other not.
    load_dynamic_code<Tile::kThreads>(shared.dynamic_code, chosen(kHalf != 0 && w.nf4.absmax, second.nf4, w.nf4));
    __syncthreads();
    Weight b({chosen(kHalf != 0 && Weight::takes_second(), second.nf4, w.nf4), w.out_features, in_features}, shared.dynamic_code, first);
    accumulate<Tile>(sums, shared.tiles, a, b, depth, active);
}

// Stores columns col, col + 1 of row `row` of [.., num_cols], as far as they exist; col is even.
DEVICE void store_pair(bf16* out, size_t row, unsigned col, unsigned num_cols, float first, float second) {
    if (col >= num_cols) return;
    bf16* const at = out + row * num_cols + col;
    if (num_cols % 2 == 0) {
        *reinterpret_cast<uint32_t*>(at) = pack_bf16_pair(first, second);
    } else {
        at[0] = to_bf16(first);
        if (col + 1 < num_cols) at[1] = to_bf16(second);
    }
}

DEVICE void store_pair(float* out, size_t row, unsigned col, unsigned num_cols, float first, float second) {
    if (col >= num_cols) return;
    float* const at = out + row * num_cols + col;
    at[0] = first;
    if (col + 1 < num_cols) at[1] = second;
}
