// What the products of the experts share.
#pragma once

#include "linear_tiles.cuh"

#include "moe_experts.h"
#include "moe_rows.cuh"

// A tile of rows of one expert; where experts have few rows, half as many.
using MoeLargeTile = GemmTile<MOE_TILE_ROWS, MOE_TILE_COLS, 2, 2>;
using MoeSmallTile = GemmTile<MOE_SMALL_TILE_ROWS, MOE_TILE_COLS, 2, 2>;
static_assert(MoeLargeTile::kThreads == MOE_THREADS && MoeSmallTile::kThreads == MOE_THREADS, "what the launcher starts");
static_assert(linear_shared_bytes<MoeLargeTile>(false) == MOE_SHARED_NF4, "what the launcher asks for");
static_assert(linear_shared_bytes<MoeLargeTile>(true) == MOE_SHARED_DENSE, "what the launcher asks for");
static_assert(linear_shared_bytes<MoeSmallTile>(false) == MOE_SMALL_SHARED_NF4, "what the launcher asks for");
static_assert(linear_shared_bytes<MoeSmallTile>(true) == MOE_SMALL_SHARED_DENSE, "what the launcher asks for");

// The tile's rows of the module's part of xa or d_xa.
DEVICE Rows narrow_rows_of_tile(const MoeTile& tile, const bf16* xa, uint32_t xa_width, const LoraModule& module) {
    const bf16* const first = xa + static_cast<size_t>(tile.first_row) * xa_width + module.first_column;
    return rows_of(first, xa_width, tile.num_rows, module.rank);
}
