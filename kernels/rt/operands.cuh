// Operands of the tile products in gemm.cuh: where a block's part of a matrix lies, and how a stage of it gets to shared memory.
//
//   CopiedRows    bf16 rows (activations, dense weights); f32 rows and rows off a 16-byte border, slowly
//   KeptRows      bf16 rows, gathered or not, whose places are kept in registers
//   DroppedRows   rows with an adapter's dropout mask, gathered or not, staged
//   Nf4Weight     NF4, unpacked once per tile, staged                                          (rt/nf4_operand.cuh)
//   LowRankRows   an adapter's A or B, f32 or bf16, for products over its long side, staged; read_low_rank: for the short one
#pragma once

#include "dropout.cuh"
#include "gemm.cuh"

// A matrix of activations or of a dense weight, row-major [num_rows, num_cols]. Rows and columns beyond are zeros.
struct Rows {
    const void* base;           // bf16; f32 where is_f32
    size_t stride;              // elements from row to row
    uint32_t num_rows;
    uint32_t num_cols;
    const uint32_t* index;      // row r lies at row index[r] of base; null: at r
    bool is_f32;
    bool is_vectorised;         // base and stride are multiples of 16 bytes, num_cols of 8: bf16 only
};

DEVICE Rows rows_of(const void* base, size_t stride, uint32_t num_rows, uint32_t num_cols, bool is_f32 = false,
                    const uint32_t* index = nullptr) {
    const bool is_vectorised =
        !is_f32 && num_cols % 8 == 0 && stride % 8 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
    return {base, stride, num_rows, num_cols, index, is_f32, is_vectorised};
}

// bf16 rows that the launcher has checked to be multiples of 16 bytes.
DEVICE Rows aligned_rows_of(const bf16* base, size_t stride, uint32_t num_rows, uint32_t num_cols,
                            const uint32_t* index = nullptr) {
    return {base, stride, num_rows, num_cols, index, false, true};
}

DEVICE size_t row_start(const Rows& m, unsigned row) { return (m.index ? m.index[row] : row) * m.stride; }

// Eight elements of a row as bf16, one at a time.
DEVICE Words4 load_part_by_element(const Rows& m, unsigned row, unsigned col) {
    Words4 part = {};
    if (row >= m.num_rows) return part;
    const size_t start = row_start(m, row);
    float value[8];
    for (unsigned i = 0; i < 8; ++i) {
        value[i] = 0.0f;
        if (col + i >= m.num_cols) continue;
        const size_t at = start + col + i;
        value[i] = m.is_f32 ? static_cast<const float*>(m.base)[at] : to_f32(static_cast<const bf16*>(m.base)[at]);
    }
    for (unsigned i = 0; i < 4; ++i) part.word[i] = pack_bf16_pair(value[2 * i], value[2 * i + 1]);
    return part;
}

// One 16-byte part of `m` to `target` in shared memory.
DEVICE void copy_part(SharedAddress target, const Rows& m, unsigned row, unsigned col) {
    if (m.is_vectorised) {
        const bool valid = row < m.num_rows && col < m.num_cols;
        const bf16* const base = static_cast<const bf16*>(m.base);
        copy_async_16(target, valid ? base + row_start(m, row) + col : base, valid);
    } else {
        store_shared_16(target, load_part_by_element(m, row, col));
    }
}

// Rows and columns of a stage of an operand.
template <unsigned kExtent, bool kAlongRowsOfIt>
struct Stage {
    static constexpr bool kAlongRows = kAlongRowsOfIt;
    static constexpr unsigned kRows = kAlongRows ? kGemmDepth : kExtent;
    static constexpr unsigned kCols = kAlongRows ? kExtent : kGemmDepth;
    static constexpr unsigned kParts = kRows * kCols / 8, kRowParts = kCols / 8;
    // Byte of the tile where part `part` of row `row` lies.
    DEVICE unsigned place(unsigned row, unsigned part) { return tile_offset<kCols>(row, part) * sizeof(bf16); }
    // Row and column of the matrix that element (row, col) of stage `step` is; `first`: the tile's first row, or column.
    DEVICE unsigned matrix_row(unsigned first, unsigned step, unsigned row) {
        return kAlongRows ? step * kGemmDepth + row : first + row;
    }
    DEVICE unsigned matrix_col(unsigned first, unsigned step, unsigned col) {
        return kAlongRows ? first + col : step * kGemmDepth + col;
    }
};

// A tile whose rows alternate, kHalf at a time, between rows of two matrices: gate and up of a SwiGLU, so that a thread's
// fragment n of one and n + kFragmentsN / 2 of the other are the same columns (kHalf = Tile::kWarpN / 2). Both have the same
// shape. kHalf 0: one matrix.
template <unsigned kHalf>
struct Pairing {
    DEVICE bool is_second(unsigned row) {
        if constexpr (kHalf == 0) return false;
        else return row / kHalf % 2 != 0;
    }
    DEVICE unsigned row(unsigned row) {
        if constexpr (kHalf == 0) return row;
        else return row / (2 * kHalf) * kHalf + row % kHalf;
    }
};

// kExtent rows (columns, if kAlongRows) of a matrix, from `first` on. With kHalf, `first` counts in each of the two matrices.
// Not for gathered rows: KeptRows.
template <class Tile, unsigned kExtent, bool kAlongRowsOfIt, unsigned kHalf = 0>
struct CopiedRows : Stage<kExtent, kAlongRowsOfIt> {
    using S = Stage<kExtent, kAlongRowsOfIt>;
    static constexpr bool kStaged = false;
    static_assert(S::kParts % Tile::kThreads == 0, "as many parts for each thread");
    static_assert(kHalf == 0 || !S::kAlongRows, "rows are paired, not columns");
    // A turn: one part for each thread, consecutive rows, a multiple of 8.
    static constexpr unsigned kRowsPerTurn = Tile::kThreads / S::kRowParts, kTurns = S::kRows / kRowsPerTurn;
    static_assert(kHalf % kRowsPerTurn == 0, "the rows of a turn are of one matrix");
    static_assert(kRowsPerTurn % 8 == 0 || kTurns == 1, "all parts of a thread trade places alike");
    Rows matrix;
    unsigned first;
    const void* second_base;  // of the paired matrix

    METHOD CopiedRows(const Rows& matrix, unsigned first, const void* second_base = nullptr)
        : matrix(matrix), first(first), second_base(second_base) {}

    METHOD void copy(SharedAddress tile, unsigned step) const {
        const unsigned tile_row = threadIdx.x / S::kRowParts, part = threadIdx.x % S::kRowParts;
        const unsigned row = S::matrix_row(first, step, tile_row), col = S::matrix_col(first, step, part * 8);
        const SharedAddress target = tile + S::place(tile_row, part);
        constexpr unsigned kTurnBytes = kRowsPerTurn * S::kCols * sizeof(bf16);
        if (!matrix.is_vectorised) {
            NO_UNROLL for (unsigned i = 0; i < kTurns; ++i) {
                Rows from = matrix;
                if (Pairing<kHalf>::is_second(i * kRowsPerTurn)) from.base = second_base;
                const unsigned from_row = row + Pairing<kHalf>::row(i * kRowsPerTurn);
                store_shared_16(target + i * kTurnBytes, load_part_by_element(from, from_row, col));
            }
            return;
        }
        // One product for the thread's first part; the others lie at equal steps.
        const size_t start = row * matrix.stride + col, turn = kRowsPerTurn * matrix.stride;
        const unsigned rows = col < matrix.num_cols && row < matrix.num_rows ? matrix.num_rows - row : 0;
        UNROLL for (unsigned i = 0; i < kTurns; ++i) {
            const unsigned rows_before = Pairing<kHalf>::row(i * kRowsPerTurn);
            const bool is_second = Pairing<kHalf>::is_second(i * kRowsPerTurn);
            const bf16* const base = static_cast<const bf16*>(is_second ? second_base : matrix.base);
            copy_async_16(target + i * kTurnBytes, base + start + rows_before / kRowsPerTurn * turn, rows_before < rows);
        }
    }
};

// kExtent rows from `first` on of a matrix at 16-byte borders, gathered or not: where each of a thread's rows lies is found once and
// kept, one register a row.
template <class Tile, unsigned kExtent>
struct KeptRows : Stage<kExtent, false> {
    using S = Stage<kExtent, false>;
    static constexpr bool kStaged = false;
    static constexpr unsigned kRowsPerTurn = Tile::kThreads / S::kRowParts, kTurns = S::kRows / kRowsPerTurn;
    static_assert(S::kParts % Tile::kThreads == 0 && kRowsPerTurn % 8 == 0, "as many parts for each thread, places alike");
    Rows matrix;
    unsigned first;
    uint32_t row_start[kTurns];  // in parts of 16 bytes: a matrix has less than 2^35 elements

    METHOD KeptRows(const Rows& matrix, unsigned first) : matrix(matrix), first(first) {
        const unsigned stride = static_cast<unsigned>(matrix.stride / 8);
        UNROLL for (unsigned i = 0; i < kTurns; ++i) {
            const unsigned row = first + threadIdx.x / S::kRowParts + i * kRowsPerTurn;
            row_start[i] = row >= matrix.num_rows ? 0 : (matrix.index ? matrix.index[row] : row) * stride;
        }
    }

    METHOD void copy(SharedAddress tile, unsigned step) const {
        const unsigned tile_row = threadIdx.x / S::kRowParts, part = threadIdx.x % S::kRowParts;
        const unsigned row = first + tile_row, col = step * kGemmDepth + part * 8;
        const unsigned rows = col < matrix.num_cols && row < matrix.num_rows ? matrix.num_rows - row : 0;
        const SharedAddress target = tile + S::place(tile_row, part);
        const bf16* const from = static_cast<const bf16*>(matrix.base) + (col < matrix.num_cols ? col : 0);
        UNROLL for (unsigned i = 0; i < kTurns; ++i)
            copy_async_16(target + i * kRowsPerTurn * S::kCols * sizeof(bf16), from + static_cast<size_t>(row_start[i]) * 8,
                          i * kRowsPerTurn < rows);
    }
};

// Rows under a dropout mask; row r of `matrix` is token r of the micro-batch, or tokens[r]; if rows are gathered, by their tokens.
// What is kept is not scaled: that is left to whoever has the sums, so that what is multiplied is exact in bf16.
template <class Tile, unsigned kExtent, bool kAlongRowsOfIt>
struct DroppedRows : Stage<kExtent, kAlongRowsOfIt> {
    using S = Stage<kExtent, kAlongRowsOfIt>;
    static constexpr bool kStaged = true;
    static constexpr unsigned kPerThread = S::kParts / Tile::kThreads, kRowsPerTurn = Tile::kThreads / S::kRowParts;
    static_assert(S::kParts % Tile::kThreads == 0, "as many parts for each thread");
    static_assert(kRowsPerTurn % 8 == 0 || kPerThread == 1, "all parts of a thread trade places alike");
    Rows matrix;
    unsigned first;
    Dropout mask;
    const uint32_t* tokens;
    // What was fetched: the thread's column, parts, and their tokens.
    unsigned fetched_col = 0;
    uint32_t token[kPerThread] = {};
    Words4 part[kPerThread] = {};

    METHOD DroppedRows(const Rows& matrix, unsigned first, const Dropout& mask, const uint32_t* tokens = nullptr)
        : matrix(matrix), first(first), mask(mask), tokens(tokens) {}

    METHOD void fetch(unsigned step) {
        const unsigned row = S::matrix_row(first, step, threadIdx.x / S::kRowParts);
        const unsigned col = S::matrix_col(first, step, threadIdx.x % S::kRowParts * 8);
        const unsigned rows = row < matrix.num_rows && col < matrix.num_cols ? matrix.num_rows - row : 0;
        fetched_col = col;
        UNROLL for (unsigned i = 0; i < kPerThread; ++i)
            token[i] = !tokens ? row + i * kRowsPerTurn : i * kRowsPerTurn < rows ? tokens[row + i * kRowsPerTurn] : 0;
        UNROLL for (unsigned i = 0; i < kPerThread; ++i) {
            part[i] = {};
            if (i * kRowsPerTurn >= rows) continue;
            const unsigned own = row + i * kRowsPerTurn;
            if (!matrix.is_vectorised) {
                part[i] = load_part_by_element(matrix, own, col);
                continue;
            }
            const size_t start = (matrix.index ? token[i] : own) * matrix.stride;
            part[i] = *reinterpret_cast<const Words4*>(static_cast<const bf16*>(matrix.base) + start + col);
        }
    }
    METHOD void store(SharedAddress tile) {
        const SharedAddress target = tile + S::place(threadIdx.x / S::kRowParts, threadIdx.x % S::kRowParts);
        if (mask.is_on) {
            UNROLL for (unsigned i = 0; i < kPerThread; ++i) drop_part(part[i], mask, token[i], fetched_col);
        }
        UNROLL for (unsigned i = 0; i < kPerThread; ++i)
            store_shared_16(target + i * kRowsPerTurn * S::kCols * sizeof(bf16), part[i]);
    }
};

// A tensor of an adapter, row-major [num_rows, num_cols], in the arena: f32 or bf16.
struct LowRank {
    const void* base;
    uint32_t num_rows;
    uint32_t num_cols;
    bool is_bf16;
    bool is_vectorised;  // rows are multiples of 16 bytes, num_cols of 8
};

DEVICE LowRank low_rank_of(const void* arena, size_t first, uint32_t num_rows, uint32_t num_cols, bool is_bf16) {
    const void* const base = static_cast<const unsigned char*>(arena) + first * (is_bf16 ? sizeof(bf16) : sizeof(float));
    const bool is_vectorised = num_cols % 8 == 0 && reinterpret_cast<uintptr_t>(base) % 16 == 0;
    return {base, num_rows, num_cols, is_bf16, is_vectorised};
}

// Eight elements as they lie in memory: bf16 in word[0], or f32 in both.
struct LowRankPart {
    Words4 word[2];
};

DEVICE LowRankPart load_low_rank(const LowRank& m, unsigned row, unsigned col) {
    LowRankPart part = {};
    if (row >= m.num_rows || col >= m.num_cols) return part;
    const size_t at = static_cast<size_t>(row) * m.num_cols + col;
    if (m.is_vectorised) {
        const Words4* const from = reinterpret_cast<const Words4*>(static_cast<const unsigned char*>(m.base) +
                                                                   at * (m.is_bf16 ? sizeof(bf16) : sizeof(float)));
        part.word[0] = from[0];
        if (!m.is_bf16) part.word[1] = from[1];
        return part;
    }
    for (unsigned i = 0; i < 8; ++i) {
        if (col + i >= m.num_cols) break;
        if (m.is_bf16) {
            part.word[0].word[i / 2] |= static_cast<const uint16_t*>(m.base)[at + i] * (i % 2 ? 0x10000u : 1u);
        } else {
            part.word[i / 4].word[i % 4] = static_cast<const uint32_t*>(m.base)[at + i];
        }
    }
    return part;
}

DEVICE void store_low_rank(SharedAddress target, const LowRankPart& part, bool is_bf16) {
    Words4 out = part.word[0];
    if (!is_bf16) {
        UNROLL for (unsigned i = 0; i < 4; ++i) {
            const Words4& from = part.word[i / 2];
            out.word[i] = pack_bf16_pair(f32_of_bits(from.word[i % 2 * 2]), f32_of_bits(from.word[i % 2 * 2 + 1]));
        }
    }
    store_shared_16(target, out);
}

// For a product over the tensor's long side (xa = x A^T, d_xa = d_y B), in stages.
template <class Tile, unsigned kExtent, bool kAlongRowsOfIt>
struct LowRankRows : Stage<kExtent, kAlongRowsOfIt> {
    using S = Stage<kExtent, kAlongRowsOfIt>;
    static constexpr bool kStaged = true;
    static constexpr unsigned kPerThread = S::kParts / Tile::kThreads;
    static_assert(S::kParts % Tile::kThreads == 0, "as many parts for each thread");
    LowRank matrix;
    unsigned first;
    LowRankPart part[kPerThread] = {};

    METHOD LowRankRows(const LowRank& matrix, unsigned first) : matrix(matrix), first(first) {}

    METHOD void fetch(unsigned step) {
        UNROLL for (unsigned i = 0; i < kPerThread; ++i) {
            const unsigned at = threadIdx.x + i * Tile::kThreads;
            part[i] = load_low_rank(matrix, S::matrix_row(first, step, at / (S::kCols / 8)),
                                    S::matrix_col(first, step, at % (S::kCols / 8) * 8));
        }
    }
    METHOD void store(SharedAddress tile) const {
        UNROLL for (unsigned i = 0; i < kPerThread; ++i) {
            const unsigned at = threadIdx.x + i * Tile::kThreads;
            store_low_rank(tile + S::place(at / S::kRowParts, at % S::kRowParts), part[i], matrix.is_bf16);
        }
    }
};

// For add_low_rank, the product over the rank: the tensor's part for this tile, up to the next 16 ranks. B [N, rank] (along
// columns) in forward, A [rank, K] (along rows) in backward.
template <class Tile, bool kAlongRowsOfIt, unsigned kHalf = 0>
struct LowRankTile : Stage<Tile::kN, kAlongRowsOfIt> {
    using S = Stage<Tile::kN, kAlongRowsOfIt>;
    static_assert(kHalf == 0 || !S::kAlongRows, "rows are paired, not columns");
    LowRank matrix;
    unsigned first;
    bool is_second;  // of the paired matrices; the other one's rows of the tile are left as they are

    METHOD LowRankTile(const LowRank& matrix, unsigned first, bool is_second = false)
        : matrix(matrix), first(first), is_second(is_second) {}

    METHOD void copy(SharedAddress tile, unsigned step) const {
        const unsigned rank = S::kAlongRows ? matrix.num_rows : matrix.num_cols;
        const unsigned left = (rank - step * kGemmDepth + 15) / 16 * 16;
        const unsigned depth = left < kGemmDepth ? left : kGemmDepth;
        const unsigned rows = S::kAlongRows ? depth : S::kRows, parts = (S::kAlongRows ? S::kCols : depth) / 8;
        NO_UNROLL for (unsigned at = threadIdx.x; at < rows * parts; at += Tile::kThreads) {
            const unsigned row = at / parts, part = at % parts;
            if (Pairing<kHalf>::is_second(row) != is_second) continue;
            const LowRankPart values = load_low_rank(matrix, S::matrix_row(first, step, Pairing<kHalf>::row(row)),
                                                     S::matrix_col(first, step, part * 8));
            store_low_rank(tile + S::place(row, part), values, matrix.is_bf16);
        }
    }
};
