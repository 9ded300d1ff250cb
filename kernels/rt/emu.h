// CUDA's execution model on the CPU, for kernels compiled as C++17.
//
// Every thread of a block is a fiber; a block runs on one core. A fiber runs until it waits (barrier, shuffle, vote, matrix
// load or product) and goes on when all threads it waits for have arrived. If none can go on, the launch fails with the kernel, the
// block, and where its threads wait: a barrier that only a part of a block reaches is an error, never a hang.
//
// Shared memory and the targets of pending asynchronous copies are NaN; shared arrays lie between guard bands. What is
// not seen here: races that the fiber orders do not bring out, the memory model, bank conflicts, tensor-core rounding.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define DEVICE [[maybe_unused]] static inline

struct uint3 {
    unsigned x, y, z;
};

namespace emu {

// A launch, as the driver describes it. Mirrored in src/backend/gpu/driver/emu.rs.
struct Launch {
    uint32_t grid[3];
    uint32_t block[3];
    uint32_t dynamic_shared_bytes;
    // Order in which warps, and the lanes of a warp, go on: 0 forward, 1 reversed, else the seed of a shuffle per round.
    uint32_t order;
    const void* params;
};

using Body = void (*)(const void* params);

// Runs blocks [first, first + count) of the launch, in order. Returns 0, or 1 with a message in `error`.
int run(const char* kernel, Body body, uint32_t expected_threads, const Launch* launch, uint64_t first, uint64_t count,
        char* error, size_t error_bytes);

// A place in a kernel's source.
struct Site {
    const char* file;
    int line;
};
#define EMU_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

const uint3& thread_index();
const uint3& block_index();
const uint3& block_extent();
const uint3& grid_extent();

void* shared(const void* key, size_t bytes, const char* name);
void* dynamic_shared();
void sync_block(Site site);

// A collective of the lanes in `mask`: each deposits `in_bytes`; the last one to arrive calls `compute(in, out, mask)`
// over all deposits; each takes its `out_bytes`.
enum class Op { Sync, Shuffle, Vote, LoadMatrix, Multiply };
constexpr size_t kSlotBytes = 64;
struct Slots {
    alignas(16) unsigned char lane[32][kSlotBytes];
};
using Compute = void (*)(const Slots& in, Slots& out, uint32_t mask);
void collective(Op op, uint32_t mask, const void* in, size_t in_bytes, void* out, size_t out_bytes, Compute compute, Site site);

unsigned lane_index();
void fail(Site site, const char* what);

template <class T>
T get(const Slots& slots, unsigned lane) {
    static_assert(sizeof(T) <= kSlotBytes, "a slot holds it");
    T value;
    memcpy(&value, slots.lane[lane], sizeof(T));
    return value;
}

template <class T>
void put(Slots& slots, unsigned lane, const T& value) {
    static_assert(sizeof(T) <= kSlotBytes, "a slot holds it");
    memcpy(slots.lane[lane], &value, sizeof(T));
}

template <class T>
struct Lanes {
    T value;
    unsigned source;
};

template <class T>
T shuffle(unsigned mask, T value, unsigned source, Site site) {
    Lanes<T> in{value, source};
    T out;
    collective(
        Op::Shuffle, mask, &in, sizeof in, &out, sizeof out,
        [](const Slots& in, Slots& out, uint32_t mask) {
            for (unsigned lane = 0; lane < 32; ++lane) {
                if (!(mask >> lane & 1)) continue;
                const unsigned source = get<Lanes<T>>(in, lane).source & 31;
                // A lane outside the mask gives no value: the reader gets NaN bits.
                T value;
                memset(&value, 0xff, sizeof value);
                if (mask >> source & 1) value = get<Lanes<T>>(in, source).value;
                put(out, lane, value);
            }
        },
        site);
    return out;
}

inline unsigned ballot(unsigned mask, int predicate, Site site) {
    unsigned in = predicate != 0, out;
    collective(
        Op::Vote, mask, &in, sizeof in, &out, sizeof out,
        [](const Slots& in, Slots& out, uint32_t mask) {
            unsigned votes = 0;
            for (unsigned lane = 0; lane < 32; ++lane)
                if (mask >> lane & 1) votes |= get<unsigned>(in, lane) << lane;
            for (unsigned lane = 0; lane < 32; ++lane) put(out, lane, votes);
        },
        site);
    return out;
}

void copy_async(void* shared, const void* global, size_t bytes, size_t valid_bytes, Site site);
void copy_commit();
void copy_wait(unsigned pending_groups);

}  // namespace emu

#define threadIdx (emu::thread_index())
#define blockIdx (emu::block_index())
#define blockDim (emu::block_extent())
#define gridDim (emu::grid_extent())

#define KERNEL(name, Params, p, threads)                                                                                     \
    static void name##_body(const Params& p);                                                                                \
    extern "C" int name##_emu(const emu::Launch* launch, uint64_t first, uint64_t count, char* error, size_t error_bytes) {  \
        return emu::run(                                                                                                     \
            #name, [](const void* params) { name##_body(*static_cast<const Params*>(params)); }, threads, launch, first,     \
            count, error, error_bytes);                                                                                      \
    }                                                                                                                        \
    static void name##_body(const Params& p)

#define SHARED(T, name, count)      \
    static const char name##_key = 0; \
    T* const name = static_cast<T*>(emu::shared(&name##_key, sizeof(T) * (count), #name))
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(emu::dynamic_shared())

inline void __syncthreads(EMU_SITE) { emu::sync_block({file, line}); }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE) {
    emu::collective(
        emu::Op::Sync, mask, nullptr, 0, nullptr, 0, [](const emu::Slots&, emu::Slots&, uint32_t) {}, {file, line});
}
template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source, EMU_SITE) {
    return emu::shuffle(mask, value, source, {file, line});
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned lanes, EMU_SITE) {
    return emu::shuffle(mask, value, emu::lane_index() ^ lanes, {file, line});
}
// As CUDA: a lane whose source lies outside the warp keeps its own value.
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, EMU_SITE) {
    const unsigned lane = emu::lane_index();
    return emu::shuffle(mask, value, lane < delta ? lane : lane - delta, {file, line});
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, EMU_SITE) {
    const unsigned lane = emu::lane_index();
    return emu::shuffle(mask, value, lane + delta > 31 ? lane : lane + delta, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_SITE) { return emu::ballot(mask, predicate, {file, line}); }
inline int __any_sync(unsigned mask, int predicate, EMU_SITE) { return emu::ballot(mask, predicate, {file, line}) != 0; }
inline int __all_sync(unsigned mask, int predicate, EMU_SITE) {
    return emu::ballot(mask, predicate, {file, line}) == mask;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }

// Blocks run on several cores: these are atomic between them. Integers only, by rule: a float's sum depends on its order.
inline int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* at, unsigned value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }
inline unsigned atomicOr(unsigned* at, unsigned value) { return __atomic_fetch_or(at, value, __ATOMIC_RELAXED); }

struct bf16 {
    uint16_t bits;
};
DEVICE float to_f32(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}
DEVICE float to_f32(float value) { return value; }
// To nearest, ties to even; NaN stays NaN.
DEVICE bf16 to_bf16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    if (value != value) return bf16{static_cast<uint16_t>(bits >> 16 | 0x40)};
    return bf16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

// Built with -ffp-contract=off: never fused.
inline float rounded_product(float a, float b) { return a * b; }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
inline float __expf(float value) { return expf(value); }
inline float __fdividef(float a, float b) { return a / b; }
