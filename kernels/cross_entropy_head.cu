// The two products of linear_cross_entropy, over a chunk of the rows that have a target:
//
//   cross_entropy_logits:   z = x[target_rows] W^T, stored as z - m with m the maximum of the row's group of 64 columns;
//                           group_max = m, group_sum = sum exp(z - m), target_logit = z_target
//   cross_entropy_gradient: d_x[target_rows] = d_z W
//
// x, d_x [T, D], W [V, D], z and d_z [C, Vp] bf16; the statistics f32. T tokens, D hidden_size, V vocab_size, C rows of the
// chunk, Vp = V rounded up to 64.
// A block makes a tile of 128 rows and 256 columns with 8 warps of 64 by 64, over stages of 64 in depth, three of which are
// under way: 144 KB of shared memory, one block per multiprocessor. grid: logits (C / 128, V / 256), so that the row tiles that read
// the same part of W run together; gradient (D / 256, C / 128); rounded up.
// A row of a stage is made of 16-byte parts that trade places by the row's number, so that copies and matrix loads meet no bank twice.
// f32 accumulation in depth order, one rounding to bf16: deterministic. The statistics are of the unrounded logits.
// Preconditions (the launcher checks): D a multiple of 8, rows 16-byte aligned; d_z is zero from V to Vp.
// Cost: 2 V D FLOP per row in each; 2.55 TFLOP for 2,048 rows of V 151,936 and D 2,048, 3.2 ms at 790 TFLOP/s. W and z pass
// through memory once per chunk (1.2 GB, 0.3 ms). See docs/kernels/cross_entropy.md.
// Reference: src/backend/cpu/cross_entropy.rs; docs/math/cross_entropy.md.
#include "rt/mma.cuh"
#include "rt/vector.cuh"

#include "cross_entropy.h"

namespace {
constexpr unsigned kThreads = CROSS_ENTROPY_MATMUL_THREADS;
constexpr unsigned kRows = CROSS_ENTROPY_TILE_ROWS;
constexpr unsigned kColumns = CROSS_ENTROPY_TILE_COLUMNS;
constexpr unsigned kDepth = 64;
constexpr unsigned kStages = 3;
constexpr unsigned kStageElements = (kRows + kColumns) * kDepth;
static_assert(kStages * kStageElements * sizeof(bf16) == CROSS_ENTROPY_SHARED_BYTES, "what the launcher asks for");
// A warp's part of the tile.
constexpr unsigned kWarpTile = 64;
constexpr unsigned kWarpsPerRow = kColumns / kWarpTile;
static_assert(kWarpTile == CROSS_ENTROPY_GROUP, "a warp holds a whole group of a row");
// A row of a warp's result on its way out: 128 bytes and 16 of padding.
constexpr unsigned kOutRow = kWarpTile + kVector;
static_assert(kThreads / kWarpSize * kWarpTile * kOutRow <= kStages * kStageElements, "results fit where the stages were");

// The part of a warp's 64 x 64 results that a lane holds: [row / 16][column / 8][as mma_16x8x16 lays it out].
using Accumulators = float[4][8][4];

// Rows of the chunk that exist.
DEVICE unsigned rows_of_chunk(const StepStateDevice* step, unsigned first_target, unsigned num_rows) {
    if (first_target >= step->num_targets) return 0;
    const unsigned left = step->num_targets - first_target;
    return left < num_rows ? left : num_rows;
}

// Where 16-byte part `part` of row `row` lies, in a stage whose rows have kParts parts.
template <unsigned kParts>
DEVICE unsigned place(unsigned row, unsigned part) {
    return (row * kParts + (part ^ row % 8)) * kVector;
}

// An operand whose rows are contiguous in depth: kRows of them for A, kColumns for B. A thread copies one part of every 32nd row.
constexpr unsigned kDeepParts = kDepth / kVector;
constexpr unsigned kDeepStep = kThreads / kDeepParts;
template <unsigned kOperandRows>
struct DeepRows {
    static constexpr unsigned kPerThread = kOperandRows / kDeepStep;
    const bf16* row[kPerThread];
    unsigned valid;  // a bit each
};
using ARows = DeepRows<kRows>;
using BRows = DeepRows<kColumns>;

// B as [depth, columns], contiguous in columns.
constexpr unsigned kWideParts = kColumns / kVector;
constexpr unsigned kWideStep = kThreads / kWideParts;
struct WideRows {
    const bf16* matrix;
    size_t num_columns;
    unsigned first_column;
};

// The thread's row `i` of a DeepRows.
DEVICE unsigned deep_row(unsigned i) { return threadIdx.x / kDeepParts + i * kDeepStep; }

template <unsigned kOperandRows>
DEVICE void load(bf16* stage, const DeepRows<kOperandRows>& rows, unsigned depth, unsigned depth_end) {
    const unsigned part = threadIdx.x % kDeepParts, at = depth + part * kVector;
    for (unsigned i = 0; i < rows.kPerThread; ++i) {
        const bool exists = (rows.valid >> i & 1) && at < depth_end;
        copy_async_16(stage + place<kDeepParts>(deep_row(i), part), rows.row[i] + (exists ? at : 0), exists);
    }
}

DEVICE void load(bf16* stage, const WideRows& rows, unsigned depth, unsigned depth_end) {
    const unsigned part = threadIdx.x % kWideParts, column = rows.first_column + part * kVector;
    for (unsigned i = 0; i < kDepth / kWideStep; ++i) {
        const unsigned row = threadIdx.x / kWideParts + i * kWideStep;
        const bool exists = depth + row < depth_end && column < rows.num_columns;
        const size_t at = exists ? (depth + row) * rows.num_columns + column : 0;
        copy_async_16(stage + place<kWideParts>(row, part), rows.matrix + at, exists);
    }
}

struct Fragments {
    uint32_t a[4][4];
    uint32_t b[4][4];  // of two groups of 8 columns: first low and high half in depth, second low and high
};

DEVICE void load_a(Fragments& f, const bf16* a, unsigned warp_row, unsigned depth) {
    const unsigned lane = threadIdx.x % kWarpSize;
    for (unsigned i = 0; i < 4; ++i)
        load_matrix_x4(f.a[i], a + place<kDeepParts>(warp_row + i * 16 + lane % 16, depth / kVector + lane / 16));
}

DEVICE void load_b(Fragments& f, const BRows&, const bf16* b, unsigned warp_column, unsigned depth) {
    const unsigned lane = threadIdx.x % kWarpSize;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = warp_column + i * 16 + lane / 16 * 8 + lane % 8;
        load_matrix_x4(f.b[i], b + place<kDeepParts>(row, depth / kVector + lane / 8 % 2));
    }
}

DEVICE void load_b(Fragments& f, const WideRows&, const bf16* b, unsigned warp_column, unsigned depth) {
    const unsigned lane = threadIdx.x % kWarpSize;
    for (unsigned i = 0; i < 4; ++i)
        load_matrix_x4_transposed(
            f.b[i], b + place<kWideParts>(depth + lane % 16, warp_column / kVector + i * 2 + lane / 16));
}

DEVICE void multiply(Accumulators& d, const Fragments& f) {
    for (unsigned i = 0; i < 4; ++i) {
        for (unsigned j = 0; j < 4; ++j) {
            const uint32_t first[2] = {f.b[j][0], f.b[j][1]}, second[2] = {f.b[j][2], f.b[j][3]};
            mma_16x8x16(d[i][2 * j], f.a[i], first);
            mma_16x8x16(d[i][2 * j + 1], f.a[i], second);
        }
    }
}

// d = A B over [0, depth); `works`: this warp's part of the tile is wanted. All threads call it.
template <class B>
DEVICE void multiply_tile(Accumulators& d, bf16* stages, const ARows& a, const B& b, unsigned depth, bool works) {
    const unsigned warp = threadIdx.x / kWarpSize;
    const unsigned warp_row = warp / kWarpsPerRow * kWarpTile, warp_column = warp % kWarpsPerRow * kWarpTile;
    const unsigned num_stages = (depth + kDepth - 1) / kDepth;
    const auto copy = [&](unsigned stage) {
        bf16* const at = stages + stage % kStages * kStageElements;
        if (stage < num_stages) {
            load(at, a, stage * kDepth, depth);
            load(at + kRows * kDepth, b, stage * kDepth, depth);
        }
        copy_async_commit();
    };
    for (unsigned stage = 0; stage + 1 < kStages; ++stage) copy(stage);
    for (unsigned stage = 0; stage < num_stages; ++stage) {
        copy_async_wait<kStages - 2>();
        // The stage is there for all, and all have done with the one before, whose place the next copies take.
        __syncthreads();
        copy(stage + kStages - 1);
        if (!works) continue;
        const bf16* const a_stage = stages + stage % kStages * kStageElements;
        const bf16* const b_stage = a_stage + kRows * kDepth;
        const auto load_fragments = [&](Fragments& f, unsigned k) {
            load_a(f, a_stage, warp_row, k);
            load_b(f, b, b_stage, warp_column, k);
        };
        // Fragments are loaded one product ahead.
        Fragments even, odd;
        load_fragments(even, 0);
        for (unsigned k = 0; k < kDepth; k += 32) {
            load_fragments(odd, k + 16);
            multiply(d, even);
            if (k + 32 < kDepth) load_fragments(even, k + 32);
            multiply(d, odd);
        }
    }
    copy_async_wait<0>();
    __syncthreads();
}

// This warp's results, as bf16, through shared memory to global, 16 bytes at a time: out_row(row of the warp) is where the warp's
// first column of a row lies, null where the row is not wanted.
template <class OutRow>
DEVICE void store_warp_tile(const Accumulators& d, bf16* stages, unsigned num_columns, OutRow out_row) {
    const unsigned lane = threadIdx.x % kWarpSize;
    bf16* const tile = stages + threadIdx.x / kWarpSize * kWarpTile * kOutRow;
    for (unsigned i = 0; i < 4; ++i) {
        for (unsigned j = 0; j < 8; ++j) {
            for (unsigned k = 0; k < 4; ++k) {
                const unsigned row = i * 16 + k / 2 * 8 + lane / 4, column = j * 8 + lane % 4 * 2 + k % 2;
                tile[row * kOutRow + column] = to_bf16(d[i][j][k]);
            }
        }
    }
    __syncwarp();
    for (unsigned i = 0; i < kWarpTile; i += 4) {
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
}  // namespace

KERNEL(cross_entropy_logits, CrossEntropyLogitsParams, p, CROSS_ENTROPY_MATMUL_THREADS) {
    DYNAMIC_SHARED(bf16, stages);
    const unsigned num_rows = rows_of_chunk(p.step, p.first_target, p.num_rows);
    const unsigned row0 = blockIdx.x * kRows, column0 = blockIdx.y * kColumns;
    if (row0 >= num_rows) return;
    ARows a{};
    for (unsigned i = 0; i < ARows::kPerThread; ++i) {
        const unsigned row = row0 + deep_row(i);
        a.valid |= (row < num_rows ? 1u : 0u) << i;
        const size_t token = row < num_rows ? p.step->target_rows[p.first_target + row] : 0;
        a.row[i] = p.x + token * p.hidden_size;
    }
    BRows b{};
    for (unsigned i = 0; i < BRows::kPerThread; ++i) {
        const unsigned column = column0 + deep_row(i);
        b.valid |= (column < p.vocab_size ? 1u : 0u) << i;
        b.row[i] = p.head + static_cast<size_t>(column < p.vocab_size ? column : 0) * p.hidden_size;
    }
    const unsigned warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
    const unsigned warp_row = row0 + warp / kWarpsPerRow * kWarpTile;
    const unsigned warp_column = column0 + warp % kWarpsPerRow * kWarpTile;
    const bool works = warp_row < num_rows && warp_column < p.vocab_size;
    Accumulators z = {};
    multiply_tile(z, stages, a, b, p.hidden_size, works);
    if (!works) return;

    const unsigned num_groups = (p.vocab_size + kWarpTile - 1) / kWarpTile, group = warp_column / kWarpTile;
    for (unsigned i = 0; i < 4; ++i) {
        for (unsigned half = 0; half < 2; ++half) {
            const unsigned row = warp_row + i * 16 + half * 8 + lane / 4;
            const unsigned target = row < num_rows ? p.step->target_ids[p.first_target + row] : p.vocab_size;
            float largest = -INFINITY, sum = 0.0f;
            for (unsigned j = 0; j < 8; ++j) {
                for (unsigned k = 0; k < 2; ++k) {
                    const unsigned column = warp_column + j * 8 + lane % 4 * 2 + k;
                    float& value = z[i][j][half * 2 + k];
                    if (column == target) p.target_logit[row] = value;
                    if (column >= p.vocab_size) value = -INFINITY;
                    largest = fmaxf(largest, value);
                }
            }
            largest = quad_max(largest);
            for (unsigned j = 0; j < 8; ++j) {
                for (unsigned k = 0; k < 2; ++k) {
                    float& value = z[i][j][half * 2 + k];
                    value -= largest;
                    sum += __expf(value);
                }
            }
            sum = quad_sum(sum);
            if (row < num_rows && lane % 4 == 0) {
                const size_t at = static_cast<size_t>(row) * num_groups + group;
                p.group_max[at] = largest;
                p.group_sum[at] = sum;
            }
        }
    }
    if (!p.logits) return;
    const size_t row_length = static_cast<size_t>(num_groups) * kWarpTile;
    store_warp_tile(z, stages, kWarpTile, [&](unsigned row) {
        return warp_row + row < num_rows ? p.logits + (warp_row + row) * row_length + warp_column : nullptr;
    });
}

KERNEL(cross_entropy_gradient, CrossEntropyGradientParams, p, CROSS_ENTROPY_MATMUL_THREADS) {
    DYNAMIC_SHARED(bf16, stages);
    const unsigned num_rows = rows_of_chunk(p.step, p.first_target, p.num_rows);
    const unsigned row0 = blockIdx.y * kRows, column0 = blockIdx.x * kColumns;
    if (row0 >= num_rows) return;
    const size_t row_length = static_cast<size_t>((p.vocab_size + kWarpTile - 1) / kWarpTile) * kWarpTile;
    ARows a{};
    for (unsigned i = 0; i < ARows::kPerThread; ++i) {
        const unsigned row = row0 + deep_row(i);
        a.valid |= (row < num_rows ? 1u : 0u) << i;
        a.row[i] = p.d_logits + (row < num_rows ? row : 0) * row_length;
    }
    const WideRows b{p.head, p.hidden_size, column0};
    const unsigned warp = threadIdx.x / kWarpSize;
    const unsigned warp_row = row0 + warp / kWarpsPerRow * kWarpTile;
    const unsigned warp_column = column0 + warp % kWarpsPerRow * kWarpTile;
    const bool works = warp_row < num_rows && warp_column < p.hidden_size;
    Accumulators d = {};
    multiply_tile(d, stages, a, b, p.vocab_size, works);
    if (!works) return;

    store_warp_tile(d, stages, p.hidden_size - warp_column, [&](unsigned row) -> bf16* {
        if (warp_row + row >= num_rows) return nullptr;
        const size_t token = p.step->target_rows[p.first_target + warp_row + row];
        return p.d_x + token * p.hidden_size + warp_column;
    });
}
