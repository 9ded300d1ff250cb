// The two products of linear_cross_entropy, over a chunk of the rows that have a target:
//
//   cross_entropy_logits:   z = x[target_rows] W^T, stored as z - m with m the maximum of the row's group of 64 columns;
//                           group_max = m, group_sum = sum exp(z - m), target_logit = z_target
//   cross_entropy_gradient: d_x[target_rows] = d_z W
//
// x, d_x [T, D], W [V, D], z and d_z [C, Vp] bf16; the statistics f32. T tokens, D hidden_size, V vocab_size, C rows of the
// chunk, Vp = V rounded up to 64.
// Tiles of 128 rows and 256 columns by 8 warps of 64 by 64, 144 KB of shared memory, block 256; _small: 128 columns by 4 warps,
// 96 KB, block 128. One block per multiprocessor. grid: logits (C / 128, V / columns), so that the row tiles that read the same
// part of W run together; gradient (tiles, or parts of tiles).
// Where the gradient has tiles for half of the multiprocessors or fewer (the last rows of a step), its sum over V is cut into
// parts that run side by side; cross_entropy_gradient_sum adds them in order. grid (tiles * 16).
// f32 accumulation in a fixed order, one rounding to bf16: deterministic. The statistics are of the unrounded logits.
// Preconditions (the launcher checks): D a multiple of 8, rows 16-byte aligned; d_z is zero from V to Vp.
// Cost: 2 V D FLOP per row in each; 1.27 TFLOP for 2,048 rows of V 151,936 and D 2,048, 1.6 ms at 790 TFLOP/s. W and z pass
// through memory once per chunk (1.2 GB, 0.3 ms). See docs/kernels/cross_entropy.md.
// Reference: src/backend/cpu/cross_entropy.rs; docs/math/cross_entropy.md.
#include "rt/operands.cuh"
#include "rt/vector.cuh"

#include "cross_entropy.h"

namespace {
using LargeTile = GemmTile<CROSS_ENTROPY_TILE_ROWS, CROSS_ENTROPY_TILE_COLUMNS, 2, 4>;
using SmallTile = GemmTile<CROSS_ENTROPY_TILE_ROWS, CROSS_ENTROPY_SMALL_COLUMNS, 2, 2>;
static_assert(LargeTile::kThreads == CROSS_ENTROPY_TILE_THREADS && SmallTile::kThreads == CROSS_ENTROPY_SMALL_THREADS &&
                  kGemmDepth == CROSS_ENTROPY_DEPTH,
              "what the launcher launches");
constexpr unsigned kGroup = CROSS_ENTROPY_GROUP;
static_assert(LargeTile::kWarpN == kGroup && SmallTile::kWarpN == kGroup, "a warp holds a whole group of a row");
// A row of a warp's results on its way out: 128 bytes and 16 of padding.
constexpr unsigned kOutRow = kGroup + kVector;

// Rows of the chunk that exist.
DEVICE unsigned rows_of_chunk(const StepStateDevice* step, unsigned first_target, unsigned num_rows) {
    if (first_target >= step->num_targets) return 0;
    const unsigned left = step->num_targets - first_target;
    return left < num_rows ? left : num_rows;
}

// Rows of x that have a target. Their places are looked up once.
template <class Tile>
struct TargetRows : Stage<Tile::kM, false> {
    static constexpr bool kStaged = false;
    static constexpr unsigned kPartsPerRow = kGemmDepth / 8;
    static constexpr unsigned kPerThread = Tile::kM * kPartsPerRow / Tile::kThreads;
    const bf16* row[kPerThread];
    unsigned rows_left, num_cols;

    METHOD TargetRows(const CrossEntropyLogitsParams& p, unsigned first, unsigned num_rows)
        : rows_left(num_rows - first), num_cols(p.hidden_size) {
        UNROLL for (unsigned i = 0; i < kPerThread; ++i) {
            const unsigned target = p.first_target + first + (tile_row(i) < rows_left ? tile_row(i) : 0);
            row[i] = p.x + static_cast<size_t>(p.step->target_rows[target]) * num_cols;
        }
    }
    METHOD unsigned tile_row(unsigned i) const { return (threadIdx.x + i * Tile::kThreads) / kPartsPerRow; }
    METHOD void copy(SharedAddress tile, unsigned step) const {
        const unsigned part = threadIdx.x % kPartsPerRow, col = step * kGemmDepth + part * 8;
        UNROLL for (unsigned i = 0; i < kPerThread; ++i) {
            const bool valid = tile_row(i) < rows_left && col < num_cols;
            copy_async_16(tile + Stage<Tile::kM, false>::place(tile_row(i), part), valid ? row[i] + col : row[i], valid);
        }
    }
};
template <class Tile>
using HeadRows = CopiedRows<Tile, Tile::kN, false>;
template <class Tile>
using GradientRows = CopiedRows<Tile, Tile::kM, false>;
template <class Tile>
using HeadColumns = CopiedRows<Tile, Tile::kN, true>;

template <class Tile>
constexpr bool fits(unsigned shared_bytes) {
    return gemm_shared_elements<Tile, TargetRows<Tile>, HeadRows<Tile>>() * sizeof(bf16) == shared_bytes &&
           gemm_shared_elements<Tile, GradientRows<Tile>, HeadColumns<Tile>>() * sizeof(bf16) == shared_bytes &&
           Tile::kM * Tile::kN / kGroup * kOutRow * sizeof(bf16) <= shared_bytes;
}
static_assert(fits<LargeTile>(CROSS_ENTROPY_TILE_SHARED) && fits<SmallTile>(CROSS_ENTROPY_SMALL_SHARED),
              "what the launcher asks for");

// This warp's results, as bf16, through shared memory to global, 16 bytes at a time: out_row(row) is where the warp's first
// column of its row `row` goes, null where it is not wanted.
template <class Tile, class OutRow>
DEVICE void store_warp_tile(typename Tile::Sums& sums, bf16* shared, unsigned num_columns, OutRow out_row) {
    const unsigned lane = threadIdx.x % kWarpSize;
    bf16* const tile = shared + threadIdx.x / kWarpSize * Tile::kWarpM * kOutRow;
    for_each_fragment<Tile>(sums, [&](unsigned row, unsigned col, float(&sum)[4]) {
        bf16* const at = tile + (row - Tile::warp_row()) * kOutRow + col - Tile::warp_col();
        *reinterpret_cast<uint32_t*>(at) = pack_bf16_pair(sum[0], sum[1]);
        *reinterpret_cast<uint32_t*>(at + 8 * kOutRow) = pack_bf16_pair(sum[2], sum[3]);
    });
    __syncwarp();
    for (unsigned i = 0; i < Tile::kWarpM; i += 4) {
        const unsigned row = i + lane / 8, column = lane % 8 * kVector;
        bf16* const to = out_row(row);
        if (!to || column >= num_columns) continue;
        *reinterpret_cast<Packed8*>(to + column) = *reinterpret_cast<const Packed8*>(tile + row * kOutRow + column);
    }
}

// Maximum or sum over the four lanes that hold a row.
DEVICE float quad_max(float value) {
    value = fmaxf(value, __shfl_xor_sync(kFullMask, value, 1));
    return fmaxf(value, __shfl_xor_sync(kFullMask, value, 2));
}
DEVICE float quad_sum(float value) {
    value += __shfl_xor_sync(kFullMask, value, 1);
    return value + __shfl_xor_sync(kFullMask, value, 2);
}

// How the gradient of a chunk is cut: into tiles, and the sum of each into parts.
struct GradientParts {
    unsigned num_rows, col_tiles, num_tiles, num_parts, steps_per_part;
};

template <class Tile>
DEVICE GradientParts gradient_parts(const CrossEntropyGradientParams& p) {
    GradientParts cut;
    cut.num_rows = rows_of_chunk(p.step, p.first_target, p.num_rows);
    cut.col_tiles = (p.hidden_size + Tile::kN - 1) / Tile::kN;
    cut.num_tiles = (cut.num_rows + Tile::kM - 1) / Tile::kM * cut.col_tiles;
    const unsigned num_steps = (p.vocab_size + kGemmDepth - 1) / kGemmDepth;
    const unsigned per_tile = cut.num_tiles ? p.num_multiprocessors / cut.num_tiles : 1;
    const unsigned most_parts = per_tile < 1 ? 1 : per_tile;
    cut.steps_per_part = (num_steps + most_parts - 1) / most_parts;
    cut.num_parts = (num_steps + cut.steps_per_part - 1) / cut.steps_per_part;
    return cut;
}

// Where a part's sums of row `row` of tile `tile` are, in f32.
template <class Tile>
DEVICE float* partial_row(const CrossEntropyGradientParams& p, const GradientParts& cut, unsigned part, unsigned tile,
                          unsigned row) {
    return p.partial + (static_cast<size_t>(part * cut.num_tiles + tile) * Tile::kM + row) * Tile::kN;
}
template <class Tile>
DEVICE void logits_tile(const CrossEntropyLogitsParams& p, bf16* shared) {
    const unsigned num_rows = rows_of_chunk(p.step, p.first_target, p.num_rows);
    const unsigned first_row = blockIdx.x * Tile::kM, first_col = blockIdx.y * Tile::kN;
    if (first_row >= num_rows) return;
    const unsigned warp_row = first_row + Tile::warp_row(), warp_col = first_col + Tile::warp_col();
    const bool active = warp_row < num_rows && warp_col < p.vocab_size;
    TargetRows<Tile> x(p, first_row, num_rows);
    HeadRows<Tile> head(aligned_rows_of(p.head, p.hidden_size, p.vocab_size, p.hidden_size), first_col);
    typename Tile::Sums z = {};
    accumulate<Tile>(z, shared, x, head, p.hidden_size, active);
    if (!active) return;

    const unsigned num_groups = (p.vocab_size + kGroup - 1) / kGroup, lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned i = 0; i < 2 * Tile::kFragmentsM; ++i) {
        const unsigned m = i / 2, half = i % 2 * 2;
        const unsigned row = warp_row + i * 8 + lane / 4;
        const unsigned target = row < num_rows ? p.step->target_ids[p.first_target + row] : p.vocab_size;
        float largest = -INFINITY, sum = 0.0f;
        UNROLL for (unsigned j = 0; j < 2 * Tile::kFragmentsN; ++j) {
            const unsigned col = warp_col + j / 2 * 8 + lane % 4 * 2 + j % 2;
            float& value = z[m][j / 2][half + j % 2];
            if (col >= p.vocab_size) value = -INFINITY;
            else if (col == target) p.target_logit[row] = value;
            largest = fmaxf(largest, value);
        }
        largest = quad_max(largest);
        UNROLL for (unsigned j = 0; j < 2 * Tile::kFragmentsN; ++j) {
            float& value = z[m][j / 2][half + j % 2];
            value -= largest;
            sum += __expf(value);
        }
        sum = quad_sum(sum);
        if (row < num_rows && lane % 4 == 0) {
            const size_t at = static_cast<size_t>(row) * num_groups + warp_col / kGroup;
            p.group_max[at] = largest;
            p.group_sum[at] = sum;
        }
    }
    if (!p.logits) return;
    const size_t row_length = static_cast<size_t>(num_groups) * kGroup;
    store_warp_tile<Tile>(z, shared, kGroup, [&](unsigned row) {
        return warp_row + row < num_rows ? p.logits + (warp_row + row) * row_length + warp_col : nullptr;
    });
}

template <class Tile>
DEVICE void gradient_tile(const CrossEntropyGradientParams& p, bf16* shared) {
    const GradientParts cut = gradient_parts<Tile>(p);
    if (blockIdx.x >= cut.num_tiles * cut.num_parts) return;
    const unsigned part = blockIdx.x / cut.num_tiles, tile = blockIdx.x % cut.num_tiles;
    const unsigned tile_row = tile / cut.col_tiles * Tile::kM, tile_col = tile % cut.col_tiles * Tile::kN;
    const unsigned warp_row = tile_row + Tile::warp_row(), warp_col = tile_col + Tile::warp_col();
    const bool active = warp_row < cut.num_rows && warp_col < p.hidden_size;
    const size_t row_length = static_cast<size_t>((p.vocab_size + kGroup - 1) / kGroup) * kGroup;
    const unsigned start = part * cut.steps_per_part * kGemmDepth, left = p.vocab_size - start;
    const unsigned depth = left < cut.steps_per_part * kGemmDepth ? left : cut.steps_per_part * kGemmDepth;
    GradientRows<Tile> d_logits(aligned_rows_of(p.d_logits + start, row_length, cut.num_rows, depth), tile_row);
    const bf16* const head_start = p.head + static_cast<size_t>(start) * p.hidden_size;
    HeadColumns<Tile> head(aligned_rows_of(head_start, p.hidden_size, depth, p.hidden_size), tile_col);
    typename Tile::Sums d = {};
    accumulate<Tile>(d, shared, d_logits, head, depth, active);
    if (!active) return;

    if (cut.num_parts > 1) {
        for_each_fragment<Tile>(d, [&](unsigned row, unsigned col, float(&sum)[4]) {
            for (unsigned half = 0; half < 2; ++half) {
                float* const to = partial_row<Tile>(p, cut, part, tile, row + half * 8) + col;
                to[0] = sum[2 * half], to[1] = sum[2 * half + 1];
            }
        });
        return;
    }
    store_warp_tile<Tile>(d, shared, p.hidden_size - warp_col, [&](unsigned row) -> bf16* {
        if (warp_row + row >= cut.num_rows) return nullptr;
        const size_t token = p.step->target_rows[p.first_target + warp_row + row];
        return p.d_x + token * p.hidden_size + warp_col;
    });
}

template <class Tile>
DEVICE void sum_parts(const CrossEntropyGradientParams& p) {
    constexpr unsigned kThreadsPerRow = Tile::kN / kVector;
    static_assert(Tile::kThreads / kThreadsPerRow == CROSS_ENTROPY_SUM_ROWS, "what the launcher launches");
    const GradientParts cut = gradient_parts<Tile>(p);
    const unsigned at = blockIdx.x * CROSS_ENTROPY_SUM_ROWS + threadIdx.x / kThreadsPerRow;
    const unsigned tile = at / Tile::kM, row = at % Tile::kM, col = threadIdx.x % kThreadsPerRow * kVector;
    if (cut.num_parts < 2 || tile >= cut.num_tiles) return;
    const unsigned chunk_row = tile / cut.col_tiles * Tile::kM + row, d_x_col = tile % cut.col_tiles * Tile::kN + col;
    if (chunk_row >= cut.num_rows || d_x_col >= p.hidden_size) return;
    float sum[kVector] = {};
    for (unsigned part = 0; part < cut.num_parts; ++part) {
        float values[kVector];
        load8(values, partial_row<Tile>(p, cut, part, tile, row) + col);
        for (unsigned i = 0; i < kVector; ++i) sum[i] += values[i];
    }
    const size_t token = p.step->target_rows[p.first_target + chunk_row];
    store8(p.d_x + token * p.hidden_size + d_x_col, sum);
}
}  // namespace

KERNEL(cross_entropy_logits, CrossEntropyLogitsParams, p, CROSS_ENTROPY_TILE_THREADS) {
    DYNAMIC_SHARED(bf16, shared);
    logits_tile<LargeTile>(p, shared);
}

KERNEL(cross_entropy_logits_small, CrossEntropyLogitsParams, p, CROSS_ENTROPY_SMALL_THREADS) {
    DYNAMIC_SHARED(bf16, shared);
    logits_tile<SmallTile>(p, shared);
}

KERNEL(cross_entropy_gradient, CrossEntropyGradientParams, p, CROSS_ENTROPY_TILE_THREADS) {
    DYNAMIC_SHARED(bf16, shared);
    gradient_tile<LargeTile>(p, shared);
}

KERNEL(cross_entropy_gradient_small, CrossEntropyGradientParams, p, CROSS_ENTROPY_SMALL_THREADS) {
    DYNAMIC_SHARED(bf16, shared);
    gradient_tile<SmallTile>(p, shared);
}

KERNEL(cross_entropy_gradient_sum, CrossEntropyGradientParams, p, CROSS_ENTROPY_TILE_THREADS) { sum_parts<LargeTile>(p); }

KERNEL(cross_entropy_gradient_sum_small, CrossEntropyGradientParams, p, CROSS_ENTROPY_SMALL_THREADS) {
    sum_parts<SmallTile>(p);
}
