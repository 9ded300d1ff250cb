// embedding_forward: out[t] = table[input_ids[t]].
//
// out [T, D], table [V, D] bf16. T tokens, D hidden_size, V vocab_size.
// grid (capacity in tokens), block 256: a block per row, a thread every 256th group of 8 columns. No shared memory.
// Bits are copied; an id that is not below V gives NaN, and so a loss that is not finite (launchers see only the first batch
// of a recording). Preconditions (the launcher checks): D a multiple of 8, rows 16-byte aligned.
// Cost: 2 B read and 2 B written per element; memory bound. Reference: src/backend/cpu/elementwise.rs.
#include "rt/vector.cuh"

#include "embedding.h"

KERNEL(embedding_forward, EmbeddingForwardParams, p, EMBEDDING_THREADS) {
    if (blockIdx.x >= p.step->num_tokens) return;
    const unsigned id = p.step->input_ids[blockIdx.x];
    const bf16* const from = p.table + static_cast<size_t>(id) * p.hidden_size;
    bf16* const to = p.out + static_cast<size_t>(blockIdx.x) * p.hidden_size;
    for (unsigned column = threadIdx.x * kVector; column < p.hidden_size; column += EMBEDDING_THREADS * kVector) {
        Packed8 packed;
        for (bf16& value : packed.value) value = to_bf16(NAN);
        if (id < p.vocab_size) packed = *reinterpret_cast<const Packed8*>(from + column);
        *reinterpret_cast<Packed8*>(to + column) = packed;
    }
}
