// embedding_forward: out[t] = table[input_ids[t]].
//
// out [T, D], table [V, D] bf16. T tokens, D hidden_size, V vocab_size.
// grid (capacity in tokens), block 256: a block per row, a thread every 256th group of 8 columns. No shared memory.
// Bits are copied. Preconditions (the launcher checks): D a multiple of 8, rows 16-byte aligned, ids below V.
// Cost: 2 B read and 2 B written per element; memory bound. Reference: src/backend/cpu/elementwise.rs.
#include "rt/vector.cuh"

#include "embedding.h"

KERNEL(embedding_forward, EmbeddingForwardParams, p, EMBEDDING_THREADS) {
    if (blockIdx.x >= p.step->num_tokens) return;
    const bf16* const from = p.table + static_cast<size_t>(p.step->input_ids[blockIdx.x]) * p.hidden_size;
    bf16* const to = p.out + static_cast<size_t>(blockIdx.x) * p.hidden_size;
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += EMBEDDING_THREADS * kVector)
        *reinterpret_cast<Packed8*>(to + column) = *reinterpret_cast<const Packed8*>(from + column);
}
