// The state of the gated delta rule from chunk to chunk, the only serial part. S [dk, dv], 0 at each sequence's start:
//   V' = U - W S;  S <- e^gamma_C S + Kh^T diag(e^(gamma_C - gamma)) V'
// gated_delta_output: O = s diag(e^gamma) Qh S + P V' with the S before the chunk.
// gated_delta_states: V' and S themselves, for backward.
// gated_delta_states_backward: from the last chunk to the first, d_S the gradient of the state after the chunk, 0 at each
// sequence's end,
//   d_V' = P^T d_O + diag(e^(gamma_C - gamma)) Kh d_S;  d_S <- e^gamma_C d_S + (s diag(e^gamma) Qh)^T d_O - W^T d_V'
// with Qh, Kh of unit rows, s = 1 / sqrt(dk), P the scores of gated_delta_prepare. V' replaces U.
//
// grid (ceil(dv / 64), Hv, 8), block 128: a warp has 16 columns of dv, so warps do not depend on each other; z is a lane of the
// sequences z, z + 8, ... The transposed state S^T [dv, dk] stays in f32 registers. As mma leaves S^T and V'^T they are,
// rounded, the A operands of the next product: no exchange through shared memory, which holds two stages of a chunk's operands:
// 87 KB (states) and 140 KB at head size 128.
// Numerics: operands bf16, products and state f32, sums in a fixed order: deterministic. exp of differences that are never
// positive.
// Preconditions (the launcher checks): as gated_delta.cu, which ran before.
// Cost per chunk and block at 128: 7.3 MFLOP output, 4.2 states, 7.3 backward; 65, 40 and 65 KB read from the L2 cache; bound
// by the latency of a chunk's dependent products when sequences are few. docs/kernels/gated_delta.md. Reference:
// src/backend/cpu/gated_delta.rs.
#include "rt/delta.cuh"

namespace {

constexpr unsigned kThreads = GATED_DELTA_SCAN_THREADS;
constexpr unsigned kColumns = GATED_DELTA_SCAN_COLUMNS;
constexpr unsigned kSliceRow = kColumns + kTilePadding;
constexpr unsigned kStages = 2;

constexpr unsigned kSquare = kChunk + kTilePadding;  // stride of a 64 x 64 tile

enum class Pass { kOutput, kStates, kBackward };

// The operands of a chunk. `slice` has the block's columns of U or, backward, of d_O; q, scores and q_rstd are not of kStates.
template <unsigned kDim, Pass kPass>
struct Stage {
    static constexpr bool kHasScores = kPass != Pass::kStates;
    static constexpr unsigned kTile = kChunk * (kDim + kTilePadding);
    static constexpr unsigned kBytes = (kHasScores ? 3 : 2) * (kTile * 2 + kChunk * 4) + kChunk * kSliceRow * 2 +
                                       (kHasScores ? kChunk * kSquare * 2 : 0);
    bf16 *w, *k, *q, *scores, *slice;
    float *gamma, *k_rstd, *q_rstd;

    METHOD Stage(unsigned char* memory, unsigned which) {
        SharedPieces pieces{memory + which * kBytes};
        w = pieces.take<bf16>(kTile);
        k = pieces.take<bf16>(kTile);
        q = pieces.take<bf16>(kHasScores ? kTile : 0);
        scores = pieces.take<bf16>(kHasScores ? kChunk * kSquare : 0);
        slice = pieces.take<bf16>(kChunk * kSliceRow);
        gamma = pieces.take<float>(kChunk);
        k_rstd = pieces.take<float>(kChunk);
        q_rstd = pieces.take<float>(kHasScores ? kChunk : 0);
    }
};
static_assert(kStages * Stage<64, Pass::kStates>::kBytes == GATED_DELTA_STATES_SHARED_64, "as the launcher has it");
static_assert(kStages * Stage<128, Pass::kStates>::kBytes == GATED_DELTA_STATES_SHARED_128, "as the launcher has it");
static_assert(kStages * Stage<64, Pass::kOutput>::kBytes == GATED_DELTA_OUTPUT_SHARED_64, "as the launcher has it");
static_assert(kStages * Stage<128, Pass::kOutput>::kBytes == GATED_DELTA_OUTPUT_SHARED_128, "as the launcher has it");
static_assert(kStages * Stage<64, Pass::kBackward>::kBytes == GATED_DELTA_STATES_BACKWARD_SHARED_64, "as the launcher has it");
static_assert(kStages * Stage<128, Pass::kBackward>::kBytes == GATED_DELTA_STATES_BACKWARD_SHARED_128, "as the launcher has it");

// Walks the chunks of a lane's sequences, each sequence from its first chunk or, backward, from its last.
template <bool kBackward>
struct Walk {
    const StepStateDevice* step;
    unsigned sequence, index, count;  // of the sequence's chunks: which, and how many

    METHOD explicit Walk(const StepStateDevice* state) : step(state), sequence(blockIdx.z), index(0), count(0) {
        skip_empty();
    }
    METHOD bool is_done() const { return sequence >= step->num_sequences; }
    METHOD unsigned num_chunks() const {
        return (step->cu_seqlens[sequence + 1] - step->cu_seqlens[sequence] + kChunk - 1) / kChunk;
    }
    METHOD Chunk chunk() const {
        const unsigned at = kBackward ? count - 1 - index : index;
        const unsigned start = step->cu_seqlens[sequence] + at * kChunk, left = step->cu_seqlens[sequence + 1] - start;
        return {start, left < kChunk ? left : kChunk, at == 0, at + 1 == count};
    }
    METHOD void advance() {
        if (++index < count) return;
        index = 0;
        sequence += gridDim.z;
        skip_empty();
    }
    METHOD void skip_empty() {
        for (; !is_done(); sequence += gridDim.z) {
            count = num_chunks();
            if (count > 0) return;
        }
    }
};

// Where this warp works, and the operands of its head.
struct Place {
    unsigned head, key_head, column;  // column: the block's first of dv

    METHOD explicit Place(const GatedDeltaParams& p)
        : head(blockIdx.y), key_head(blockIdx.y * p.num_key_heads / p.num_value_heads), column(blockIdx.x * kColumns) {}
    // The warp's first column, in the block's slice.
    METHOD unsigned own() const { return threadIdx.x / kWarpSize * 16; }
};

template <unsigned kDim, Pass kPass>
DEVICE void load_stage(const GatedDeltaParams& p, const Stage<kDim, kPass>& s, const Place& place, const Chunk& chunk) {
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim, key_dim = p.num_key_heads * dk;
    const size_t width = 2 * key_dim + p.num_value_heads * dv, stride = static_cast<size_t>(p.num_value_heads) * dv;
    const bf16* const q = p.u + chunk.start * width + place.key_head * dk;
    load_tile<kThreads, kChunk, kDim>(s.w, p.w + chunk_offset(p, place.head, chunk.start, dk), dk, chunk.size, dk);
    load_tile<kThreads, kChunk, kDim>(s.k, q + key_dim, width, chunk.size, dk);
    if (kPass == Pass::kBackward) {
        load_tile<kThreads, kChunk, kColumns>(s.slice, p.d_o + chunk.start * stride + place.head * dv + place.column, stride,
                                              chunk.size, dv - place.column);
    } else {
        load_tile<kThreads, kChunk, kColumns>(s.slice, p.values + chunk_offset(p, place.head, chunk.start, dv) + place.column, dv,
                                              chunk.size, dv - place.column);
    }
    if (kPass != Pass::kStates) {
        load_tile<kThreads, kChunk, kDim>(s.q, q, width, chunk.size, dk);
        load_tile<kThreads, kChunk, kChunk>(s.scores, p.scores + chunk_offset(p, place.head, chunk.start, kChunk), kChunk,
                                            chunk.size, kChunk);
    }
    const unsigned own = threadIdx.x;
    if (own >= kChunk) return;
    const bool valid = own < chunk.size;
    const unsigned at = chunk.start + (valid ? own : 0);
    copy_async_4(s.gamma + own, p.gamma + chunk_offset(p, place.head, at, 1), valid);
    copy_async_4(s.k_rstd + own, p.k_rstd + chunk_offset(p, place.key_head, at, 1), valid);
    if (kPass != Pass::kStates) copy_async_4(s.q_rstd + own, p.q_rstd + chunk_offset(p, place.key_head, at, 1), valid);
}

// The warp's 16 columns of a slice, transposed: [16, 64].
DEVICE void load_slice(Strip<kChunk>& strip, const bf16* slice, unsigned column) {
    UNROLL for (unsigned tile = 0; tile < kChunk / 8; tile += 2) {
        // An A operand of the transpose, whose halves lie as mma leaves its results.
        uint32_t a[4];
        Transposed<kSliceRow>{slice}.load_a(a, column, tile * 8);
        UNROLL for (unsigned i = 0; i < 4; ++i) {
            strip.part[tile + i / 2][i % 2 * 2] = low_half(a[i]);
            strip.part[tile + i / 2][i % 2 * 2 + 1] = high_half(a[i]);
        }
    }
}

// The strip back into the warp's columns of the slice, and those to global memory.
DEVICE void write_slice(bf16* target, size_t stride, bf16* slice, Strip<kChunk>& strip, unsigned column, unsigned rows,
                        unsigned columns) {
    strip.each([&](float value, unsigned row, unsigned chunk_row) {
        slice[chunk_row * kSliceRow + column + row] = to_bf16(value);
    });
    __syncwarp();
    if (column < columns) {
        copy_out<kSliceRow, 16, kWarpSize>(target + column, stride, slice + column, rows, 16, threadIdx.x % kWarpSize);
    }
}

// The warp's 16 rows of S^T, rounded, to scratch. A warp beyond dv, a multiple of 16, has none.
template <unsigned kDim>
DEVICE void write_state(bf16* states, const Strip<kDim>& state, unsigned row, unsigned dk, unsigned dv) {
    if (row >= dv) return;
    const unsigned lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned tile = 0; tile < kDim / 8; ++tile) {
        const unsigned column = tile * 8 + lane % 4 * 2;
        if (column >= dk) continue;
        bf16* const at = states + (row + lane / 4) * dk + column;
        *reinterpret_cast<uint32_t*>(at) = pack_bf16_pair(state.part[tile][0], state.part[tile][1]);
        *reinterpret_cast<uint32_t*>(at + 8 * dk) = pack_bf16_pair(state.part[tile][2], state.part[tile][3]);
    }
}

// What scales a row of Q where it meets the state.
template <unsigned kDim, Pass kPass>
DEVICE float q_factor(const GatedDeltaParams& p, const Stage<kDim, kPass>& s, unsigned row) {
    return expf(s.gamma[row]) * s.q_rstd[row] / sqrtf(static_cast<float>(p.key_head_dim));
}

// The chunk's O, from the state before it and V'.
template <unsigned kDim>
DEVICE void write_output(const GatedDeltaParams& p, const Stage<kDim, Pass::kOutput>& s, const Place& place, const Chunk& chunk,
                         const Strip<kDim>& state, const Strip<kChunk>& values) {
    const unsigned dv = p.value_head_dim;
    Strip<kChunk> o{};
    if (!chunk.is_first) {
        multiply<kDim>(o, state, Transposed<kDim + kTilePadding>{s.q}, 0);
        o.each([&](float& value, unsigned, unsigned row) { value *= q_factor(p, s, row); });
    }
    multiply<kChunk>(o, values, Transposed<kSquare>{s.scores}, 0);
    const size_t stride = static_cast<size_t>(p.num_value_heads) * dv;
    write_slice(p.o + chunk.start * stride + place.head * dv + place.column, stride, s.slice, o, place.own(), chunk.size,
                dv - place.column);
}

template <unsigned kDim, Pass kPass>
DEVICE void scan_chunk(const GatedDeltaParams& p, const Stage<kDim, kPass>& s, const Place& place, const Chunk& chunk,
                       Strip<kDim>& state) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim;
    Strip<kChunk> values;
    load_slice(values, s.slice, place.own());
    if (chunk.is_first) {
        state = {};
    } else {
        Strip<kChunk> read{};
        multiply<kDim>(read, state, Transposed<kRow>{s.w}, 0);
        values.each_with(read, [](float& value, float read) { value -= read; });
    }
    if constexpr (kPass == Pass::kOutput) {
        write_output(p, s, place, chunk, state, values);
    } else {
        const unsigned row = place.column + place.own();
        if (!chunk.is_first) write_state(p.states + state_offset(p, place.head, chunk.start), state, row, dk, dv);
        write_slice(p.values + chunk_offset(p, place.head, chunk.start, dv) + place.column, dv, s.slice, values, place.own(),
                    chunk.size, dv - place.column);
    }
    if (chunk.is_last) return;
    const float last = s.gamma[chunk.size - 1];
    const float kept = expf(last);
    values.each([&](float& value, unsigned, unsigned row) { value *= expf(last - s.gamma[row]) * s.k_rstd[row]; });
    state.each([&](float& value, unsigned, unsigned) { value *= kept; });
    multiply<kChunk>(state, values, Stored<kRow>{s.k}, 0);
}

template <unsigned kDim>
DEVICE void scan_chunk(const GatedDeltaParams& p, const Stage<kDim, Pass::kBackward>& s, const Place& place, const Chunk& chunk,
                       Strip<kDim>& d_state) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim;
    const float last = s.gamma[chunk.size - 1];
    Strip<kChunk> d_o, d_values{};
    load_slice(d_o, s.slice, place.own());
    if (chunk.is_last) {
        d_state = {};
    } else {
        // The chunk after this one begins where the state it left is kept.
        const unsigned row = place.column + place.own();
        write_state(p.d_states + state_offset(p, place.head, chunk.start + kChunk), d_state, row, dk, dv);
        multiply<kDim>(d_values, d_state, Transposed<kRow>{s.k}, 0);
        d_values.each([&](float& value, unsigned, unsigned row) { value *= expf(last - s.gamma[row]) * s.k_rstd[row]; });
    }
    multiply<kChunk>(d_values, d_o, Stored<kSquare>{s.scores}, 0);
    write_slice(p.d_values + chunk_offset(p, place.head, chunk.start, dv) + place.column, dv, s.slice, d_values, place.own(),
                chunk.size, dv - place.column);
    if (chunk.is_first) return;
    const float kept = expf(last);
    d_values.each([](float& value, unsigned, unsigned) { value = -value; });
    d_state.each([&](float& value, unsigned, unsigned) { value *= kept; });
    d_o.each([&](float& value, unsigned, unsigned row) { value *= q_factor(p, s, row); });
    multiply<kChunk>(d_state, d_o, Stored<kRow>{s.q}, 0);
    multiply<kChunk>(d_state, d_values, Stored<kRow>{s.w}, 0);
}

template <unsigned kDim, Pass kPass>
DEVICE void scan(const GatedDeltaParams& p, unsigned char* memory) {
    constexpr bool kBackward = kPass == Pass::kBackward;
    using ChunkStage = Stage<kDim, kPass>;
    Walk<kBackward> ahead(p.step);
    if (ahead.is_done()) return;
    const Place place(p);
    Walk<kBackward> walk = ahead;
    Strip<kDim> state{};
    load_stage(p, ChunkStage(memory, 0), place, ahead.chunk());
    copy_async_commit();
    for (unsigned stage = 0; !walk.is_done(); stage ^= 1, walk.advance()) {
        ahead.advance();
        if (!ahead.is_done()) load_stage(p, ChunkStage(memory, stage ^ 1), place, ahead.chunk());
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        scan_chunk(p, ChunkStage(memory, stage), place, walk.chunk(), state);
        __syncthreads();  // before the stage is filled again
    }
}

}  // namespace

KERNEL(gated_delta_output_64, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<64, Pass::kOutput>(p, memory);
}

KERNEL(gated_delta_output_128, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<128, Pass::kOutput>(p, memory);
}

KERNEL(gated_delta_states_64, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<64, Pass::kStates>(p, memory);
}

KERNEL(gated_delta_states_128, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<128, Pass::kStates>(p, memory);
}

KERNEL(gated_delta_states_backward_64, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<64, Pass::kBackward>(p, memory);
}

KERNEL(gated_delta_states_backward_128, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<128, Pass::kBackward>(p, memory);
}
