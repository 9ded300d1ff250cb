// gated_delta_scan: the state from chunk to chunk, the only serial part. S [dk, dv], 0 at each sequence's start:
//   V' = U - W S;  S <- e^gamma_C S + Kh^T diag(e^(gamma_C - gamma)) V'
// backward, from the last chunk to the first, d_S the gradient of the state after the chunk, 0 at each sequence's end:
//   d_V' += diag(e^(gamma_C - gamma)) Kh d_S;  d_S <- e^gamma_C d_S + (diag(e^gamma) Qh s)^T d_O - W^T d_V'
// with Qh, Kh of unit rows and s = 1 / sqrt(dk). V' replaces U, and the full d_V' its part from gated_delta_local.
//
// grid (ceil(dv / 32), Hv, 8), block 64: a warp has 16 columns of dv, so warps do not depend on each other; z is a lane of sequences z, z + 8, ...
// The transposed state S^T [dv, dk] stays in f32 registers. As mma leaves S^T and V'^T they are, rounded, the A operands of
// the next product: no exchange through shared memory. Its bf16 copy before (after) each chunk goes to scratch.
// Shared memory: two stages of a chunk's operands, 79 KB forward and 124 KB backward at head size 128.
// Numerics: operands bf16, products and state f32, sums in a fixed order: deterministic. exp of differences that are never positive.
// Preconditions (the launcher checks): as gated_delta.cu, which ran before.
// Cost per chunk and block at 128: 2.1 MFLOP forward, 3.1 backward, 37 KB and 57 KB read from the L2 cache; bound by the latency of
// a chunk's two dependent products when sequences are few. docs/kernels/gated_delta.md. Reference: src/backend/cpu/gated_delta.rs.
#include "rt/delta.cuh"

namespace {

constexpr unsigned kThreads = GATED_DELTA_SCAN_THREADS;
constexpr unsigned kColumns = GATED_DELTA_SCAN_COLUMNS;
constexpr unsigned kSliceRow = kColumns + kTilePadding;
constexpr unsigned kStages = 2;

template <unsigned kDim>
struct Stage {
    bf16 *w, *k, *q, *values, *d_o;
    float *gamma, *k_rstd, *q_rstd;

    // Bytes of a stage; q, d_o and q_rstd are of the backward scan only.
    __host__ __device__ static constexpr unsigned bytes(bool backward) {
        const unsigned tiles = backward ? 3 : 2, slices = backward ? 2 : 1;
        return tiles * kChunk * (kDim + kTilePadding) * 2 + slices * kChunk * kSliceRow * 2 + tiles * kChunk * 4;
    }

    __device__ __forceinline__ Stage(unsigned char* memory, unsigned which, bool backward) {
        SharedPieces pieces{memory + which * bytes(backward)};
        w = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        k = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        q = pieces.take<bf16>(backward ? kChunk * (kDim + kTilePadding) : 0);
        values = pieces.take<bf16>(kChunk * kSliceRow);
        d_o = pieces.take<bf16>(backward ? kChunk * kSliceRow : 0);
        gamma = pieces.take<float>(kChunk);
        k_rstd = pieces.take<float>(kChunk);
        q_rstd = pieces.take<float>(backward ? kChunk : 0);
    }
};
static_assert(kStages * Stage<64>::bytes(false) == GATED_DELTA_SCAN_SHARED_64, "as the launcher has it");
static_assert(kStages * Stage<128>::bytes(false) == GATED_DELTA_SCAN_SHARED_128, "as the launcher has it");
static_assert(kStages * Stage<64>::bytes(true) == GATED_DELTA_SCAN_BACKWARD_SHARED_64, "as the launcher has it");
static_assert(kStages * Stage<128>::bytes(true) == GATED_DELTA_SCAN_BACKWARD_SHARED_128, "as the launcher has it");

// Walks the chunks of a lane's sequences, each sequence from its first chunk or, backward, from its last.
template <bool kBackward>
struct Walk {
    const StepStateDevice* step;
    unsigned sequence, index, count;  // of the sequence's chunks: which, and how many

    __device__ __forceinline__ explicit Walk(const StepStateDevice* state) : step(state), sequence(blockIdx.z), index(0) {
        count = is_done() ? 0 : num_chunks();
    }
    __device__ __forceinline__ bool is_done() const { return sequence >= step->num_sequences; }
    __device__ __forceinline__ unsigned num_chunks() const {
        return (step->cu_seqlens[sequence + 1] - step->cu_seqlens[sequence] + kChunk - 1) / kChunk;
    }
    __device__ __forceinline__ Chunk chunk() const {
        const unsigned at = kBackward ? count - 1 - index : index;
        const unsigned start = step->cu_seqlens[sequence] + at * kChunk, left = step->cu_seqlens[sequence + 1] - start;
        return {start, left < kChunk ? left : kChunk, at == 0, at + 1 == count};
    }
    __device__ __forceinline__ void advance() {
        if (++index < count) return;
        index = 0;
        sequence += gridDim.z;
        if (!is_done()) count = num_chunks();
    }
};

// Where this warp works, and the operands of its head.
struct Place {
    unsigned head, key_head, column;  // column: the block's first of dv

    __device__ __forceinline__ explicit Place(const GatedDeltaParams& p)
        : head(blockIdx.y), key_head(blockIdx.y * p.num_key_heads / p.num_value_heads), column(blockIdx.x * kColumns) {}
    // The warp's first column, in the block's slice.
    __device__ __forceinline__ unsigned own() const { return threadIdx.x / kWarpSize * 16; }
};

template <unsigned kDim>
DEVICE void load_stage(const GatedDeltaParams& p, const Stage<kDim>& s, const Place& place, const Chunk& chunk, bool backward) {
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim, key_dim = p.num_key_heads * dk;
    const size_t width = 2 * key_dim + p.num_value_heads * dv, row = chunk.start;
    const bf16* const q = p.u + row * width + place.key_head * dk;
    load_tile<kThreads, kChunk, kDim>(s.w, p.w + chunk_offset(p, place.head, chunk.start, dk), dk, chunk.size, dk);
    load_tile<kThreads, kChunk, kDim>(s.k, q + key_dim, width, chunk.size, dk);
    const bf16* const values = backward ? p.d_values : p.values;
    load_tile<kThreads, kChunk, kColumns>(s.values, values + chunk_offset(p, place.head, chunk.start, dv) + place.column, dv, chunk.size,
                                dv - place.column);
    const unsigned own = threadIdx.x;
    const bool valid = own < chunk.size;
    const unsigned at = chunk.start + (valid ? own : 0);
    copy_async_4(s.gamma + own, p.gamma + chunk_offset(p, place.head, at, 1), valid);
    copy_async_4(s.k_rstd + own, p.k_rstd + chunk_offset(p, place.key_head, at, 1), valid);
    if (backward) {
        load_tile<kThreads, kChunk, kDim>(s.q, q, width, chunk.size, dk);
        load_tile<kThreads, kChunk, kColumns>(s.d_o, p.d_o + (row * p.num_value_heads + place.head) * dv + place.column,
                                    static_cast<size_t>(p.num_value_heads) * dv, chunk.size, dv - place.column);
        copy_async_4(s.q_rstd + own, p.q_rstd + chunk_offset(p, place.key_head, at, 1), valid);
    }
}

// The warp's 16 columns of a slice, transposed: [16, 64].
DEVICE void load_slice(Strip<kChunk>& strip, const bf16* slice, unsigned column) {
    for (unsigned tile = 0; tile < kChunk / 8; tile += 2) {
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
        copy_out<kSliceRow>(target + column, stride, slice + column, rows, 16, threadIdx.x % kWarpSize, kWarpSize);
    }
}

// The warp's 16 rows of S^T, rounded, to scratch. dv, of which rows exist, is a multiple of 16.
template <unsigned kDim>
DEVICE void write_state(bf16* states, const Strip<kDim>& state, unsigned row, unsigned dk, unsigned dv) {
    if (row >= dv) return;
    const unsigned lane = threadIdx.x % kWarpSize;
    UNROLL for (unsigned tile = 0; tile < kDim / 8; ++tile) {
        const unsigned column = tile * 8 + lane % 4 * 2;
        if (column >= dk) continue;
        bf16* const at = states + (row + lane / 4) * dk + column;
        *reinterpret_cast<uint32_t*>(at) = pack_pair(state.part[tile][0], state.part[tile][1]);
        *reinterpret_cast<uint32_t*>(at + 8 * dk) = pack_pair(state.part[tile][2], state.part[tile][3]);
    }
}

template <unsigned kDim>
DEVICE void scan_chunk(const GatedDeltaParams& p, const Stage<kDim>& s, const Place& place, const Chunk& chunk, Strip<kDim>& state) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim;
    Strip<kChunk> values;
    load_slice(values, s.values, place.own());
    if (chunk.is_first) {
        state = {};
    } else {
        write_state(p.states + state_offset(p, place.head, chunk.start), state, place.column + place.own(), dk, dv);
        Strip<kChunk> read{};
        multiply<kDim>(read, state, Transposed<kRow>{s.w}, 0);
        values.each_with(read, [](float& value, float read) { value -= read; });
    }
    write_slice(p.values + chunk_offset(p, place.head, chunk.start, dv) + place.column, dv, s.values, values, place.own(),
                chunk.size, dv - place.column);
    if (chunk.is_last) return;
    const float last = s.gamma[chunk.size - 1];
    const float kept = expf(last);
    values.each([&](float& value, unsigned, unsigned row) { value *= expf(last - s.gamma[row]) * s.k_rstd[row]; });
    state.each([&](float& value, unsigned, unsigned) { value *= kept; });
    multiply<kChunk>(state, values, Stored<kRow>{s.k}, 0);
}

template <unsigned kDim>
DEVICE void scan_chunk_backward(const GatedDeltaParams& p, const Stage<kDim>& s, const Place& place, const Chunk& chunk,
                                Strip<kDim>& d_state) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim;
    const float last = s.gamma[chunk.size - 1];
    Strip<kChunk> d_values;
    load_slice(d_values, s.values, place.own());
    if (chunk.is_last) {
        d_state = {};
    } else {
        // The chunk after this one begins where the state it left is kept.
        write_state(p.d_states + state_offset(p, place.head, chunk.start + kChunk), d_state, place.column + place.own(), dk, dv);
        Strip<kChunk> written{};
        multiply<kDim>(written, d_state, Transposed<kRow>{s.k}, 0);
        written.each([&](float& value, unsigned, unsigned row) { value *= expf(last - s.gamma[row]) * s.k_rstd[row]; });
        d_values.each_with(written, [](float& value, float written) { value += written; });
    }
    write_slice(p.d_values + chunk_offset(p, place.head, chunk.start, dv) + place.column, dv, s.values, d_values, place.own(),
                chunk.size, dv - place.column);
    if (chunk.is_first) return;
    const float kept = expf(last), scale = 1.0f / sqrtf(static_cast<float>(dk));
    d_values.each([](float& value, unsigned, unsigned) { value = -value; });
    d_state.each([&](float& value, unsigned, unsigned) { value *= kept; });
    Strip<kChunk> d_o;
    load_slice(d_o, s.d_o, place.own());
    d_o.each([&](float& value, unsigned, unsigned row) { value *= expf(s.gamma[row]) * s.q_rstd[row] * scale; });
    multiply<kChunk>(d_state, d_o, Stored<kRow>{s.q}, 0);
    multiply<kChunk>(d_state, d_values, Stored<kRow>{s.w}, 0);
}

template <unsigned kDim, bool kBackward>
DEVICE void scan(const GatedDeltaParams& p, unsigned char* memory) {
    Walk<kBackward> ahead(p.step);
    if (ahead.is_done()) return;
    const Place place(p);
    Walk<kBackward> walk = ahead;
    Strip<kDim> state{};
    load_stage(p, Stage<kDim>(memory, 0, kBackward), place, ahead.chunk(), kBackward);
    copy_async_commit();
    for (unsigned stage = 0; !walk.is_done(); stage ^= 1, walk.advance()) {
        ahead.advance();
        if (!ahead.is_done()) load_stage(p, Stage<kDim>(memory, stage ^ 1, kBackward), place, ahead.chunk(), kBackward);
        copy_async_commit();
        copy_async_wait<1>();
        __syncthreads();
        const Stage<kDim> current(memory, stage, kBackward);
        if (kBackward) {
            scan_chunk_backward(p, current, place, walk.chunk(), state);
        } else {
            scan_chunk(p, current, place, walk.chunk(), state);
        }
        __syncthreads();  // before the stage is filled again
    }
}

}  // namespace

KERNEL(gated_delta_scan_64, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<64, false>(p, memory);
}

KERNEL(gated_delta_scan_128, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<128, false>(p, memory);
}

KERNEL(gated_delta_scan_backward_64, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<64, true>(p, memory);
}

KERNEL(gated_delta_scan_backward_128, GatedDeltaParams, p, GATED_DELTA_SCAN_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    scan<128, true>(p, memory);
}
