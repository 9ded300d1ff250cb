// Products of tiles on tensor cores: what linear layers, experts and adapters are made of.
//
//   using Tile = GemmTile<128, 128, 2, 2>;           // a block's rows and columns, and its warps along each
//   Tile::Sums sums = {};                            // this thread's part of the block's [kM, kN] f32 results
//   accumulate<Tile>(sums, shared, a, b, depth);     // sums += A B^T, as often as there are products to add
//   add_low_rank<Tile>(sums, shared, ...);           // sums += scaling narrow B^T, an adapter's product
//   for_each_fragment<Tile>(sums, store);            // the epilogue: store(row, col, float (&sum)[4])
//
// An operand knows where its part of global memory lies and brings a stage of kGemmDepth elements in depth to shared memory
// (rt/operands.cuh: rows of bf16 or f32, gathered rows, NF4, an adapter's tensors). It has
//   kAlongRows  false: a stage is a tile [extent][kGemmDepth], as rows of x, and of W in x W^T;
//               true: a tile [kGemmDepth][extent], as W in d_y W, or both operands in d_y^T x;
//   kStaged     false: copy(tile, step) writes the stage, with asynchronous copies or at once;
//               true: fetch(step) loads it into registers, store(tile) converts and writes it, one step later.
// Elements beyond the operand's rows and columns are zeros. Extents are those of the tile: kM for A, kN for B.
//
// Shared memory: kGemmStages tiles of an operand that is copied, 2 of one that is staged. In one turn of the loop the copies of
// step + 1 start, step is converted, and step - 1 is multiplied: one barrier each. A row's 16-byte parts trade places by the row's
// number (tile_offset), so that copies, stores and matrix loads meet no bank twice.
// Sums run in depth order: deterministic.
#pragma once

#include "bits.cuh"
#include "mma.cuh"

constexpr unsigned kGemmDepth = 64;
constexpr unsigned kGemmStages = 3;

// A block's tile: kRows x kCols results by kRowWarps x kColWarps warps.
template <unsigned kRows, unsigned kCols, unsigned kRowWarps, unsigned kColWarps>
struct GemmTile {
    static constexpr unsigned kM = kRows, kN = kCols;
    static constexpr unsigned kThreads = kRowWarps * kColWarps * kWarpSize;
    // A warp's part, and its fragments of 16 x 8.
    static constexpr unsigned kWarpM = kM / kRowWarps, kWarpN = kN / kColWarps;
    static constexpr unsigned kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
    static_assert(kWarpM % 16 == 0 && kWarpN % 16 == 0, "whole matrix loads");
    static_assert(64 % kWarpM == 0 && 64 % kWarpN == 0, "fragment_at tells a warp's fragments apart by bits");
    using Sums = float[kFragmentsM][kFragmentsN][4];

    DEVICE unsigned warp_row() { return threadIdx.x / kWarpSize / kColWarps * kWarpM; }
    DEVICE unsigned warp_col() { return threadIdx.x / kWarpSize % kColWarps * kWarpN; }
};

// Element of 16-byte part `part` of row `row`, in a tile of kCols columns.
template <unsigned kCols>
DEVICE unsigned tile_offset(unsigned row, unsigned part) {
    constexpr unsigned kParts = kCols / 8;
    constexpr unsigned kRowsPer128Bytes = kParts < 8 ? 8 / kParts : 1;
    constexpr unsigned kPlaces = kParts < 8 ? kParts : 8;
    return row * kCols + (part ^ row / kRowsPer128Bytes % kPlaces) * 8;
}

// Byte of a tile that this lane names for the matrix load of A's rows [row, row + 16) at depth 0, and of B's columns
// [col, col + 16). One is made for a warp's first fragment, before the loop; fragment_at tells the others from it.
template <class Tile, bool kAlongRows>
DEVICE unsigned a_place(unsigned row) {
    const unsigned lane = threadIdx.x % kWarpSize;
    if constexpr (kAlongRows) return tile_offset<Tile::kM>(lane / 16 * 8 + lane % 8, row / 8 + lane / 8 % 2) * sizeof(bf16);
    else return tile_offset<kGemmDepth>(row + lane % 16, lane / 16) * sizeof(bf16);
}
template <class Tile, bool kAlongRows>
DEVICE unsigned b_place(unsigned col) {
    const unsigned lane = threadIdx.x % kWarpSize;
    if constexpr (kAlongRows) return tile_offset<Tile::kN>(lane % 16, col / 8 + lane / 16) * sizeof(bf16);
    else return tile_offset<kGemmDepth>(col + lane / 16 * 8 + lane % 8, lane / 8 % 2) * sizeof(bf16);
}

// The address of the fragment `further` rows of A (columns of B) and `k` in depth from that at `first`. Rows of the tile lie
// at equal distances. Its parts are told apart by bits that are clear in the first one's number, so that exclusive or adds
// them; the tile begins at a multiple of 128 bytes.
template <unsigned kExtent, bool kAlongRows>
DEVICE SharedAddress fragment_at(SharedAddress first, unsigned further, unsigned k) {
    constexpr unsigned kBytes = sizeof(bf16);
    if constexpr (kAlongRows) return (first ^ further * kBytes) + k * kExtent * kBytes;
    else return (first ^ k * kBytes) + further * kGemmDepth * kBytes;
}

// Rows of A from the warp's `further`-th on, depth [k, k + 16): a fragment.
template <class Tile, bool kAlongRows>
DEVICE void load_a(uint32_t (&out)[4], SharedAddress first, unsigned further, unsigned k) {
    const SharedAddress at = fragment_at<Tile::kM, kAlongRows>(first, further, k);
    if constexpr (kAlongRows) load_matrix_x4_transposed(out, at);
    else load_matrix_x4(out, at);
}

// 16 columns of B from the warp's `further`-th on, depth [k, k + 16): two fragments.
template <class Tile, bool kAlongRows>
DEVICE void load_b(uint32_t (&first_part)[2], uint32_t (&second_part)[2], SharedAddress first, unsigned further, unsigned k) {
    const SharedAddress at = fragment_at<Tile::kN, kAlongRows>(first, further, k);
    uint32_t part[4];
    if constexpr (kAlongRows) load_matrix_x4_transposed(part, at);
    else load_matrix_x4(part, at);
    first_part[0] = part[0], first_part[1] = part[1], second_part[0] = part[2], second_part[1] = part[3];
}

// sums += A B^T over one stage, of which `a` and `b` are the warp's first fragments.
template <class Tile, bool kAAlongRows, bool kBAlongRows>
DEVICE void multiply_stage(typename Tile::Sums& sums, SharedAddress a, SharedAddress b) {
    UNROLL for (unsigned k = 0; k < kGemmDepth; k += 16) {
        uint32_t a_part[Tile::kFragmentsM][4];
        UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m) load_a<Tile, kAAlongRows>(a_part[m], a, m * 16, k);
        UNROLL for (unsigned n = 0; n < Tile::kFragmentsN; n += 2) {
            uint32_t b_first[2], b_second[2];
            load_b<Tile, kBAlongRows>(b_first, b_second, b, n * 8, k);
            UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m) {
                mma_16x8x16(sums[m][n], a_part[m], b_first);
                mma_16x8x16(sums[m][n + 1], a_part[m], b_second);
            }
        }
    }
}

// Elements of shared memory that accumulate needs.
template <class Tile, class A, class B>
constexpr unsigned gemm_shared_elements() {
    return (Tile::kM * (A::kStaged ? 2 : kGemmStages) + Tile::kN * (B::kStaged ? 2 : kGemmStages)) * kGemmDepth;
}

// The buffers of one operand in shared memory, and its part of a turn. `slot`: a step's number, modulo kGemmStages.
template <class Operand, unsigned kExtent>
struct GemmBuffers {
    static constexpr unsigned kBytes = kExtent * kGemmDepth * sizeof(bf16);
    static constexpr unsigned kTotalBytes = kBytes * (Operand::kStaged ? 2 : kGemmStages);
    SharedAddress first;

    METHOD SharedAddress at(unsigned step, unsigned slot) const {
        return first + (Operand::kStaged ? step % 2 : slot) * kBytes;
    }
    METHOD void begin(Operand& operand) const {
        if constexpr (Operand::kStaged) operand.fetch(0);
    }
    METHOD void copy(Operand& operand, unsigned step, unsigned slot) const {
        if constexpr (!Operand::kStaged) operand.copy(at(step, slot), step);
    }
    // Writes step, which was fetched in the turn before, and fetches the next.
    METHOD void convert(Operand& operand, unsigned step, unsigned num_steps) const {
        if constexpr (Operand::kStaged) {
            if (step < num_steps) operand.store(at(step, 0));
            if (step + 1 < num_steps) operand.fetch(step + 1);
        }
    }
};

// sums += A B^T over `depth` > 0. All threads of the block call it; `shared` is free before and after. A warp that is not
// `active` (its rows or columns are beyond the end) only helps to load.
template <class Tile, class A, class B>
DEVICE void accumulate(typename Tile::Sums& sums, bf16* shared, A& a, B& b, unsigned depth, bool active = true) {
    const GemmBuffers<A, Tile::kM> a_tiles = {shared_address(shared)};
    const GemmBuffers<B, Tile::kN> b_tiles = {a_tiles.first + a_tiles.kTotalBytes};
    const unsigned a_first = a_place<Tile, A::kAlongRows>(Tile::warp_row());
    const unsigned b_first = b_place<Tile, B::kAlongRows>(Tile::warp_col());
    const unsigned num_steps = (depth + kGemmDepth - 1) / kGemmDepth;
    static_assert(kGemmStages == 3, "copies are a step ahead, products a step behind");
    a_tiles.copy(a, 0, 0);
    b_tiles.copy(b, 0, 0);
    copy_async_commit();
    a_tiles.begin(a);
    b_tiles.begin(b);
    // Turn `step` copies the next step, converts this one and multiplies the one before; `slot` is the next step's.
    unsigned slot = 1;
    for (unsigned step = 0; step <= num_steps; ++step) {
        if (step > 0) copy_async_wait<kGemmStages - 2>();
        __syncthreads();  // Everyone's part of step - 1 is there, and everyone is through with step - 2.
        if (step + 1 < num_steps) {
            a_tiles.copy(a, step + 1, slot);
            b_tiles.copy(b, step + 1, slot);
        }
        copy_async_commit();
        slot = slot == kGemmStages - 1 ? 0 : slot + 1;  // of step + 2, and of step - 1
        a_tiles.convert(a, step, num_steps);
        b_tiles.convert(b, step, num_steps);
        if (step > 0 && active) {
            const SharedAddress a_at = a_tiles.at(step - 1, slot) + a_first, b_at = b_tiles.at(step - 1, slot) + b_first;
            multiply_stage<Tile, A::kAlongRows, B::kAlongRows>(sums, a_at, b_at);
        }
    }
    __syncthreads();
}

// Calls f(row, col, sum) for each fragment of this thread: sum[0], sum[1] are columns col, col + 1 of the tile's row `row`,
// sum[2], sum[3] of row + 8. All lanes of a warp are in the same fragment. col is even.
template <class Tile, class F>
DEVICE void for_each_fragment(typename Tile::Sums& sums, F f) {
    const unsigned lane = threadIdx.x % kWarpSize;
    const unsigned row = Tile::warp_row() + lane / 4, col = Tile::warp_col() + lane % 4 * 2;
    UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m) {
        UNROLL for (unsigned n = 0; n < Tile::kFragmentsN; ++n) f(row + m * 16, col + n * 8, sums[m][n]);
    }
}

// For add_low_rank: sum += scaling product.
struct AddScaled {
    float scaling;

    METHOD void begin(unsigned, unsigned) {}
    METHOD void operator()(unsigned, unsigned, float (&sum)[4], const float (&product)[4]) const {
        UNROLL for (unsigned i = 0; i < 4; ++i) sum[i] += scaling * product[i];
    }
};

// Elements of shared memory that add_low_rank needs.
template <class Tile>
constexpr unsigned low_rank_shared_elements() {
    return (Tile::kM + Tile::kN) * kGemmDepth;
}

// An adapter's product narrow low^T over `rank`, 16 ranks at a time. For each fragment add(index, col, sum, product) adds what it
// makes of the product to the sum; index = m kFragmentsN + n for the n-th of row m of fragments, whose columns are col, col + 1.
// add.begin(row, col) comes first, once for each row of fragments, in order, with the thread's place in its first one (as
// for_each_fragment has it). `narrow` and `low` are operands with copy(tile, step), extents kM and kN. All threads of the block
// call it; `shared` is free before and after.
template <class Tile, class Narrow, class Low, class Add>
DEVICE void add_low_rank(typename Tile::Sums& sums, bf16* shared, const Narrow& narrow, const Low& low, unsigned rank, bool active,
                         Add add) {
    const SharedAddress narrow_tile = shared_address(shared), low_tile = narrow_tile + Tile::kM * kGemmDepth * sizeof(bf16);
    const unsigned lane = threadIdx.x % kWarpSize;
    const unsigned warp_row = Tile::warp_row(), warp_col = Tile::warp_col(), col = warp_col + lane % 4 * 2;
    if (active) {
        UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m) add.begin(warp_row + m * 16 + lane / 4, col);
    }
    for (unsigned first = 0; first < rank; first += kGemmDepth) {
        narrow.copy(narrow_tile, first / kGemmDepth);
        copy_async_commit();
        low.copy(low_tile, first / kGemmDepth);
        copy_async_wait<0>();
        __syncthreads();
        const unsigned left = rank - first, depth = left < kGemmDepth ? left : kGemmDepth;
        // Made here: before, registers are needed for the masks.
        const SharedAddress a_first = narrow_tile + a_place<Tile, Narrow::kAlongRows>(made_anew(warp_row));
        const SharedAddress b_first = low_tile + b_place<Tile, Low::kAlongRows>(made_anew(warp_col));
        NO_UNROLL for (unsigned k = 0; k < depth && active; k += 16) {
            uint32_t a_part[Tile::kFragmentsM][4];
            UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m)
                load_a<Tile, Narrow::kAlongRows>(a_part[m], a_first, m * 16, k);
            UNROLL for (unsigned n = 0; n < Tile::kFragmentsN; n += 2) {
                uint32_t b_even[2], b_odd[2];
                load_b<Tile, Low::kAlongRows>(b_even, b_odd, b_first, n * 8, k);
                UNROLL for (unsigned m = 0; m < Tile::kFragmentsM; ++m) {
                    float product[2][4] = {};
                    mma_16x8x16(product[0], a_part[m], b_even);
                    mma_16x8x16(product[1], a_part[m], b_odd);
                    const unsigned index = m * Tile::kFragmentsN + n;
                    add(index, col + n * 8, sums[m][n], product[0]);
                    add(index + 1, col + n * 8 + 8, sums[m][n + 1], product[1]);
                }
            }
        }
        __syncthreads();
    }
}
