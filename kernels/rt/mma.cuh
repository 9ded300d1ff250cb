// Tensor-core tiles: 16x8x16 products of bf16 in f32, and the loads that bring their operands from shared memory.
//
// Layout of a fragment (lane = 4 g + t): a[4] holds rows g and g + 8, columns 2t.. and 2t + 8.. of A [16, 16], two bf16 a
// register; b[2] rows 2t.. and 2t + 8.. of column g of B [16, 8]; d[4] rows g and g + 8, columns 2t, 2t + 1 of D [16, 8].
#pragma once

#include "bits.cuh"

#ifdef __CUDACC__

// d += a b.
DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A place in shared memory, in bytes. A register: what is made of it by + and ^ costs an instruction each, a constant added
// last none.
using SharedAddress = uint32_t;
DEVICE SharedAddress shared_address(const void* at) { return static_cast<SharedAddress>(__cvta_generic_to_shared(at)); }

// Four 8x8 matrices of bf16: lane l gives the address of row l % 8 of matrix l / 8, 16 bytes in shared memory.
DEVICE void load_matrix_x4(uint32_t (&out)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}
DEVICE void load_matrix_x4(uint32_t (&out)[4], const void* row) { load_matrix_x4(out, shared_address(row)); }

// The same, each matrix transposed.
DEVICE void load_matrix_x4_transposed(uint32_t (&out)[4], SharedAddress row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(row)
                 : "memory");
}
DEVICE void load_matrix_x4_transposed(uint32_t (&out)[4], const void* row) {
    load_matrix_x4_transposed(out, shared_address(row));
}

// 16 bytes to shared memory.
DEVICE void store_shared_16(SharedAddress target, const Words4& value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(target), "r"(value.word[0]), "r"(value.word[1]),
                 "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
}

// 16 bytes from global to shared memory without waiting; zeros where not `valid`.
DEVICE void copy_async_16(SharedAddress target, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void copy_async_16(void* target, const void* source, bool valid) {
    copy_async_16(shared_address(target), source, valid);
}
// 4 bytes from global to shared memory without waiting; zeros where not `valid`.
DEVICE void copy_async_4(void* target, const void* source, bool valid) {
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(target));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(source), "r"(valid ? 4 : 0) : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are under way.
template <unsigned kPending>
DEVICE void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

DEVICE void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EMU_SITE) {
    struct In {
        uint32_t a[4], b[2];
        float d[4];
    } in;
    memcpy(in.a, a, sizeof a);
    memcpy(in.b, b, sizeof b);
    memcpy(in.d, d, sizeof d);
    emu::collective(
        emu::Op::Multiply, kFullMask, &in, sizeof in, d, sizeof d,
        [](const emu::Slots& in, emu::Slots& out, uint32_t) {
            float a[16][16], b[16][8], d[16][8];
            const auto half = [](uint32_t word, int which) {
                return to_f32(bf16{static_cast<uint16_t>(word >> (16 * which))});
            };
            for (unsigned lane = 0; lane < 32; ++lane) {
                const In given = emu::get<In>(in, lane);
                const unsigned g = lane / 4, t = lane % 4;
                for (int which = 0; which < 2; ++which) {
                    for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][2 * t + i / 2 * 8 + which] = half(given.a[i], which);
                    for (int i = 0; i < 2; ++i) b[2 * t + i * 8 + which][g] = half(given.b[i], which);
                    for (int i = 0; i < 2; ++i) d[g + i * 8][2 * t + which] = given.d[2 * i + which];
                }
            }
            for (int row = 0; row < 16; ++row)
                for (int k = 0; k < 16; ++k)
                    for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
            for (unsigned lane = 0; lane < 32; ++lane) {
                const unsigned g = lane / 4, t = lane % 4;
                const float part[4] = {d[g][2 * t], d[g][2 * t + 1], d[g + 8][2 * t], d[g + 8][2 * t + 1]};
                memcpy(out.lane[lane], part, sizeof part);
            }
        },
        {file, line});
}

template <bool kTransposed>
DEVICE void load_matrix(uint32_t (&out)[4], const void* row, emu::Site site) {
    if (reinterpret_cast<uintptr_t>(row) % 16) emu::fail(site, "loads a matrix row that is not 16-byte aligned");
    struct Row {
        uint16_t bits[8];
    } in;
    memcpy(&in, row, sizeof in);
    emu::collective(
        emu::Op::LoadMatrix, kFullMask, &in, sizeof in, out, sizeof out,
        [](const emu::Slots& in, emu::Slots& out, uint32_t) {
            for (unsigned lane = 0; lane < 32; ++lane) {
                uint32_t words[4];
                for (unsigned matrix = 0; matrix < 4; ++matrix) {
                    const auto at = [&](unsigned row, unsigned column) {
                        return emu::get<Row>(in, matrix * 8 + row).bits[column];
                    };
                    const unsigned g = lane / 4, t = lane % 4;
                    const uint32_t low = kTransposed ? at(2 * t, g) : at(g, 2 * t);
                    const uint32_t high = kTransposed ? at(2 * t + 1, g) : at(g, 2 * t + 1);
                    words[matrix] = low | high << 16;
                }
                memcpy(out.lane[lane], words, sizeof words);
            }
        },
        site);
}
using SharedAddress = uintptr_t;
DEVICE SharedAddress shared_address(const void* at) { return reinterpret_cast<SharedAddress>(at); }

DEVICE void load_matrix_x4(uint32_t (&out)[4], const void* row, EMU_SITE) { load_matrix<false>(out, row, {file, line}); }
DEVICE void load_matrix_x4(uint32_t (&out)[4], SharedAddress row, EMU_SITE) {
    load_matrix<false>(out, reinterpret_cast<const void*>(row), {file, line});
}
DEVICE void load_matrix_x4_transposed(uint32_t (&out)[4], const void* row, EMU_SITE) {
    load_matrix<true>(out, row, {file, line});
}
DEVICE void load_matrix_x4_transposed(uint32_t (&out)[4], SharedAddress row, EMU_SITE) {
    load_matrix<true>(out, reinterpret_cast<const void*>(row), {file, line});
}

DEVICE void store_shared_16(SharedAddress target, const Words4& value) { *reinterpret_cast<Words4*>(target) = value; }

DEVICE void copy_async_16(void* target, const void* source, bool valid, EMU_SITE) {
    emu::copy_async(target, source, 16, valid ? 16 : 0, {file, line});
}
DEVICE void copy_async_16(SharedAddress target, const void* source, bool valid, EMU_SITE) {
    emu::copy_async(reinterpret_cast<void*>(target), source, 16, valid ? 16 : 0, {file, line});
}
DEVICE void copy_async_4(void* target, const void* source, bool valid, EMU_SITE) {
    emu::copy_async(target, source, 4, valid ? 4 : 0, {file, line});
}
DEVICE void copy_async_commit() { emu::copy_commit(); }
template <unsigned kPending>
DEVICE void copy_async_wait() {
    emu::copy_wait(kPending);
}

#endif
