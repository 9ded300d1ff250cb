// gated_delta_output: O = s (diag(e^gamma) Qh S + (tril(Qh Kh^T) o D) V'), D_ij = e^(gamma_i - gamma_j).
// gated_delta_local:  d_V' = s (tril(Qh Kh^T) o D)^T d_O, the part of d_V' that comes from inside the chunk.
// Qh, Kh of unit rows, s = 1 / sqrt(dk); S the state before the chunk.
//
// u, V', S, d_O, O, d_V' bf16; gamma, q_rstd, k_rstd f32: see gated_delta.h.
// grid (ceil(R / 64), Hv), block 128: a block does the chunks that begin in its 64 rows, a warp 16 rows of the result; scores stay in
// registers. Shared memory at head size 128: 86 KB (Q, K, V', S) and 52 KB (Q, K, d_O).
// Numerics: operands bf16, scores rounded once to be operands, f32 accumulation in a fixed order: deterministic.
// Preconditions (the launcher checks): as gated_delta.cu; gated_delta_scan ran before gated_delta_output.
// Cost per chunk and head at 128: 4.2 MFLOP, 80 KB read, 16 KB written; memory bound. docs/kernels/gated_delta.md.
// Reference: src/backend/cpu/gated_delta.rs; docs/math/gated_delta.md.
#include "rt/delta.cuh"

namespace {

constexpr unsigned kThreads = GATED_DELTA_THREADS;

template <unsigned kDim>
constexpr unsigned tile_bytes(unsigned rows) {
    return rows * (kDim + kTilePadding) * 2;
}
constexpr unsigned kVectorBytes = 3 * kChunk * 4;
static_assert(tile_bytes<64>(3 * kChunk + 64) + kVectorBytes == GATED_DELTA_OUTPUT_SHARED_64, "as the launcher has it");
static_assert(tile_bytes<128>(3 * kChunk + 128) + kVectorBytes == GATED_DELTA_OUTPUT_SHARED_128, "as the launcher has it");
static_assert(tile_bytes<64>(3 * kChunk) + kVectorBytes == GATED_DELTA_LOCAL_SHARED_64, "as the launcher has it");
static_assert(tile_bytes<128>(3 * kChunk) + kVectorBytes == GATED_DELTA_LOCAL_SHARED_128, "as the launcher has it");

// What both kernels have in shared memory: `right` is V' or d_O.
template <unsigned kDim>
struct Operands {
    bf16 *q, *k, *right;
    float *gamma, *q_rstd, *k_rstd;

    __device__ __forceinline__ explicit Operands(SharedPieces& pieces) {
        q = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        k = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        right = pieces.take<bf16>(kChunk * (kDim + kTilePadding));
        gamma = pieces.take<float>(kChunk);
        q_rstd = pieces.take<float>(kChunk);
        k_rstd = pieces.take<float>(kChunk);
    }
};

DEVICE float q_scale(const GatedDeltaParams& p) { return 1.0f / sqrtf(static_cast<float>(p.key_head_dim)); }

// Q, K and the vectors. Does not wait.
template <unsigned kDim>
DEVICE void load_operands(const GatedDeltaParams& p, const Operands<kDim>& s, unsigned head, const Chunk& chunk) {
    const unsigned dk = p.key_head_dim, key_dim = p.num_key_heads * dk;
    const unsigned key_head = head * p.num_key_heads / p.num_value_heads;
    const size_t width = 2 * key_dim + p.num_value_heads * p.value_head_dim;
    const bf16* const q = p.u + chunk.start * width + key_head * dk;
    load_tile<kThreads, kChunk, kDim>(s.q, q, width, chunk.size, dk);
    load_tile<kThreads, kChunk, kDim>(s.k, q + key_dim, width, chunk.size, dk);
    load_vector(s.gamma, p.gamma + chunk_offset(p, head, chunk.start, 1), chunk.size);
    load_vector(s.q_rstd, p.q_rstd + chunk_offset(p, key_head, chunk.start, 1), chunk.size);
    load_vector(s.k_rstd, p.k_rstd + chunk_offset(p, key_head, chunk.start, 1), chunk.size);
}

template <unsigned kDim>
DEVICE void output_chunk(const GatedDeltaParams& p, const Operands<kDim>& s, bf16* state, unsigned head, const Chunk& chunk) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned dk = p.key_head_dim, dv = p.value_head_dim, row = threadIdx.x / kWarpSize * 16;
    load_operands(p, s, head, chunk);
    copy_async_commit();
    load_tile<kThreads, kChunk, kDim>(s.right, p.values + chunk_offset(p, head, chunk.start, dv), dv, chunk.size, dv);
    if (!chunk.is_first) load_tile<kThreads, kDim, kDim>(state, p.states + state_offset(p, head, chunk.start), dk, dv, dk);
    copy_async_commit();
    copy_async_wait<1>();
    __syncthreads();
    Strip<kChunk> scores{};
    if (row < chunk.size) multiply<kDim>(scores, Stored<kRow>{s.q}, row, Transposed<kRow>{s.k}, 0);
    const float scale = q_scale(p);
    scores.each([&](float& value, unsigned i, unsigned j) {
        i += row;
        value *= decay_between(s.gamma, i, j, chunk.size) * s.q_rstd[i] * s.k_rstd[j] * scale;
    });
    copy_async_wait<0>();
    __syncthreads();
    if (row >= chunk.size) return;
    Strip<kDim> o{};
    if (!chunk.is_first) {
        multiply<kDim>(o, Stored<kRow>{s.q}, row, Transposed<kRow>{state}, 0);
        o.each([&](float& value, unsigned i, unsigned) { value *= expf(s.gamma[row + i]) * s.q_rstd[row + i] * scale; });
    }
    multiply<kChunk>(o, scores, Stored<kRow>{s.right}, 0);
    const size_t stride = static_cast<size_t>(p.num_value_heads) * dv;
    write_strip<kRow>(p.o + (chunk.start + row) * stride + head * dv, stride, s.q + row * kRow, o, chunk.size - row, dv);
}

template <unsigned kDim>
DEVICE void local_chunk(const GatedDeltaParams& p, const Operands<kDim>& s, unsigned head, const Chunk& chunk) {
    constexpr unsigned kRow = kDim + kTilePadding;
    const unsigned dv = p.value_head_dim, row = threadIdx.x / kWarpSize * 16;
    const size_t stride = static_cast<size_t>(p.num_value_heads) * dv;
    load_operands(p, s, head, chunk);
    load_tile<kThreads, kChunk, kDim>(s.right, p.d_o + chunk.start * stride + head * dv, stride, chunk.size, dv);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    if (row >= chunk.size) return;
    // The transposed scores: a row per key.
    Strip<kChunk> scores{};
    multiply<kDim>(scores, Stored<kRow>{s.k}, row, Transposed<kRow>{s.q}, 0);
    const float scale = q_scale(p);
    scores.each([&](float& value, unsigned j, unsigned i) {
        j += row;
        value *= decay_between(s.gamma, i, j, chunk.size) * s.q_rstd[i] * s.k_rstd[j] * scale;
    });
    Strip<kDim> d_values{};
    multiply<kChunk>(d_values, scores, Stored<kRow>{s.right}, 0);
    write_strip<kRow>(p.d_values + chunk_offset(p, head, chunk.start + row, dv), dv, s.k + row * kRow, d_values,
                      chunk.size - row, dv);
}

template <unsigned kDim>
DEVICE void output(const GatedDeltaParams& p, unsigned char* memory) {
    SharedPieces pieces{memory};
    const Operands<kDim> operands(pieces);
    bf16* const state = pieces.take<bf16>(kDim * (kDim + kTilePadding));
    ChunkStarts starts = chunk_starts(p.step, blockIdx.x);
    for (unsigned start; starts.next(start);) {
        output_chunk(p, operands, state, blockIdx.y, chunk_at(p.step, start));
        __syncthreads();
    }
}

template <unsigned kDim>
DEVICE void local(const GatedDeltaParams& p, unsigned char* memory) {
    SharedPieces pieces{memory};
    const Operands<kDim> operands(pieces);
    ChunkStarts starts = chunk_starts(p.step, blockIdx.x);
    for (unsigned start; starts.next(start);) {
        local_chunk(p, operands, blockIdx.y, chunk_at(p.step, start));
        __syncthreads();
    }
}

}  // namespace

KERNEL(gated_delta_output_64, GatedDeltaParams, p, GATED_DELTA_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    output<64>(p, memory);
}

KERNEL(gated_delta_output_128, GatedDeltaParams, p, GATED_DELTA_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    output<128>(p, memory);
}

KERNEL(gated_delta_local_64, GatedDeltaParams, p, GATED_DELTA_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    local<64>(p, memory);
}

KERNEL(gated_delta_local_128, GatedDeltaParams, p, GATED_DELTA_THREADS) {
    DYNAMIC_SHARED(unsigned char, memory);
    local<128>(p, memory);
}
