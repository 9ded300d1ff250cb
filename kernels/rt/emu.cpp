// The emulated device: fibers, barriers, shared memory, asynchronous copies. See emu.h.
#include "emu.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kGuardBytes = 64;
constexpr unsigned char kGuardByte = 0xa5;
constexpr unsigned kMaxThreads = 1024;
constexpr uint32_t kAllLanes = 0xffffffffu;

// A place to go on from: the stack pointer with all else on the stack (x86-64), or a ucontext.
struct Context {
#if defined(__x86_64__)
    void* stack_pointer = nullptr;
#else
    ucontext_t context;
#endif
};

enum class State { Runnable, AtBarrier, InWarp, Exited };

struct Copy {
    void* target;
    const void* source;
    size_t bytes, valid_bytes;
    unsigned group;
};

struct Fiber {
    Context context;
    State state = State::Runnable;
    uint3 index{};
    unsigned linear = 0;
    Site site{"", 0};
    std::vector<Copy> copies;
    unsigned next_group = 0;
};

struct Warp {
    uint32_t arrived = 0;
    uint32_t mask = 0;
    Op op = Op::Sync;
    Site site{"", 0};
    Slots in, out;
};

struct SharedArray {
    const void* key;
    size_t bytes;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char* data;
    const char* name;
};

// What one core works with; kept from launch to launch.
struct Core {
    Context scheduler;
    std::unique_ptr<unsigned char[]> stacks;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<SharedArray> arrays;
    std::vector<unsigned> warp_order;
    unsigned lane_order[32] = {};
    Fiber* current = nullptr;
    const Launch* launch = nullptr;
    const char* kernel = "";
    Body body = nullptr;
    uint3 block{}, block_extent{}, grid_extent{};
    unsigned num_threads = 0, num_at_barrier = 0;
    Site barrier_site{"", 0};
    bool failed = false;
    char* error = nullptr;
    size_t error_bytes = 0;
#if EMU_ASAN
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
#endif
};

Core& core() {
    static thread_local Core instance;
    return instance;
}

unsigned char* stack_of(Core& core, unsigned thread) { return core.stacks.get() + thread * kStackBytes; }

#if defined(__x86_64__)
extern "C" void brightrun_emu_switch(void** save, void* to);
asm(R"(
.text
.globl brightrun_emu_switch
.type brightrun_emu_switch,@function
brightrun_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size brightrun_emu_switch, .-brightrun_emu_switch
.section .note.GNU-stack,"",@progbits
.text
)");
void swap(Context& from, Context& to) { brightrun_emu_switch(&from.stack_pointer, to.stack_pointer); }
#else
void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif

// To the fiber and back: returns when the fiber waits or ends.
void resume(Core& core, Fiber& fiber) {
    core.current = &fiber;
#if EMU_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_of(core, fiber.linear), kStackBytes);
#endif
    swap(core.scheduler, fiber.context);
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
    core.current = nullptr;
}

// From the fiber to the scheduler: returns when it goes on.
void suspend(Core& core) {
    Fiber& fiber = *core.current;
#if EMU_ASAN
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(fiber.state == State::Exited ? nullptr : &fake, core.scheduler_stack,
                                   core.scheduler_stack_bytes);
#endif
    swap(fiber.context, core.scheduler);
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(fake, &core.scheduler_stack, &core.scheduler_stack_bytes);
#endif
}

extern "C" void brightrun_emu_enter() {
    Core& c = core();
#if EMU_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &c.scheduler_stack, &c.scheduler_stack_bytes);
#endif
    Fiber& fiber = *c.current;
    c.body(c.launch->params);
    // Copies that were never waited for would be lost on a device too: their targets stay NaN.
    fiber.state = State::Exited;
    suspend(c);
    abort();
}

void prepare(Core& core, Fiber& fiber) {
    unsigned char* stack = stack_of(core, fiber.linear);
#if EMU_ASAN
    // What a fiber that never returned left marked.
    __asan_unpoison_memory_region(stack, kStackBytes);
#endif
#if defined(__x86_64__)
    auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
    auto* slot = reinterpret_cast<uint64_t*>(top);
    *--slot = 0;
    *--slot = reinterpret_cast<uint64_t>(&brightrun_emu_enter);
    for (int saved = 0; saved < 6; ++saved) *--slot = 0;
    fiber.context.stack_pointer = slot;
#else
    getcontext(&fiber.context.context);
    fiber.context.context.uc_stack.ss_sp = stack;
    fiber.context.context.uc_stack.ss_size = kStackBytes;
    fiber.context.context.uc_link = nullptr;
    makecontext(&fiber.context.context, brightrun_emu_enter, 0);
#endif
}

const char* base_name(const char* path) {
    const char* slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

[[gnu::format(printf, 2, 3)]] void report(Core& core, const char* format, ...) {
    if (core.failed) return;
    core.failed = true;
    int used = snprintf(core.error, core.error_bytes, "kernel %s, block (%u, %u, %u): ", core.kernel, core.block.x,
                        core.block.y, core.block.z);
    if (used < 0 || static_cast<size_t>(used) >= core.error_bytes) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(core.error + used, core.error_bytes - used, format, arguments);
    va_end(arguments);
}

// No fiber can go on: says who waits where.
void report_stuck(Core& core) {
    unsigned counts[4] = {};
    const Fiber* waiting = nullptr;
    for (const Fiber& fiber : core.fibers) {
        ++counts[static_cast<int>(fiber.state)];
        if (fiber.state != State::Exited && !waiting) waiting = &fiber;
    }
    report(core,
           "%u of %u threads wait at a barrier, %u inside a warp, %u have returned; thread %u waits at %s:%d for threads "
           "that do not come",
           counts[1], core.num_threads, counts[2], counts[3], waiting ? waiting->linear : 0,
           waiting ? base_name(waiting->site.file) : "", waiting ? waiting->site.line : 0);
}

void check_guards(Core& core) {
    for (const SharedArray& array : core.arrays) {
        const unsigned char* before = array.data - kGuardBytes;
        const unsigned char* after = array.data + array.bytes;
        for (size_t i = 0; i < kGuardBytes; ++i) {
            if (before[i] != kGuardByte || after[i] != kGuardByte) {
                report(core, "wrote beyond the shared array %s of %zu bytes", array.name, array.bytes);
                return;
            }
        }
    }
}

void* allocate_shared(Core& core, const void* key, size_t bytes, const char* name) {
    constexpr size_t kAlignment = 128;
    std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes + 2 * kGuardBytes + kAlignment]);
    auto address = reinterpret_cast<uintptr_t>(memory.get()) + kGuardBytes;
    auto* data = reinterpret_cast<unsigned char*>((address + kAlignment - 1) & ~(kAlignment - 1));
    memset(data - kGuardBytes, kGuardByte, kGuardBytes);
    memset(data, 0xff, bytes);
    memset(data + bytes, kGuardByte, kGuardBytes);
    core.arrays.push_back({key, bytes, std::move(memory), data, name});
    return data;
}

void shuffle(unsigned* first, unsigned count, uint64_t& seed) {
    for (unsigned i = count - 1; i > 0; --i) {
        seed = seed * 6364136223846793005u + 1442695040888963407u;
        std::swap(first[i], first[(seed >> 33) % (i + 1)]);
    }
}

// Runs one warp after the other, each as far as it gets without the others: what is missing between warps then shows. True
// if any fiber ran.
bool run_round(Core& core, uint64_t& seed) {
    const bool is_reversed = core.launch->order == 1, is_shuffled = core.launch->order > 1;
    const unsigned num_warps = static_cast<unsigned>(core.warps.size());
    if (is_shuffled) shuffle(core.warp_order.data(), num_warps, seed);
    bool ran = false;
    for (unsigned at = 0; at < num_warps && !core.failed; ++at) {
        const unsigned warp = core.warp_order[is_reversed ? num_warps - 1 - at : at];
        const unsigned lanes = std::min(32u, core.num_threads - warp * 32);
        for (bool goes_on = true; goes_on && !core.failed;) {
            goes_on = false;
            if (is_shuffled) shuffle(core.lane_order, 32, seed);
            for (unsigned i = 0; i < 32 && !core.failed; ++i) {
                const unsigned lane = core.lane_order[is_reversed ? 31 - i : i];
                if (lane >= lanes || core.fibers[warp * 32 + lane].state != State::Runnable) continue;
                goes_on = ran = true;
                resume(core, core.fibers[warp * 32 + lane]);
            }
        }
    }
    return ran;
}

void run_block(Core& core) {
    core.arrays.clear();
    core.num_at_barrier = 0;
    allocate_shared(core, nullptr, core.launch->dynamic_shared_bytes, "of the launch");
    for (Warp& warp : core.warps) warp.arrived = 0;
    for (unsigned thread = 0; thread < core.num_threads; ++thread) {
        Fiber& fiber = core.fibers[thread];
        fiber.state = State::Runnable;
        fiber.linear = thread;
        fiber.index = {thread % core.block_extent.x, thread / core.block_extent.x % core.block_extent.y,
                       thread / (core.block_extent.x * core.block_extent.y)};
        fiber.copies.clear();
        fiber.next_group = 0;
        prepare(core, fiber);
    }
    for (unsigned warp = 0; warp < core.warps.size(); ++warp) core.warp_order[warp] = warp;
    for (unsigned lane = 0; lane < 32; ++lane) core.lane_order[lane] = lane;
    uint64_t seed = core.launch->order;
    while (run_round(core, seed)) {
    }
    const auto has_exited = [](const Fiber& fiber) { return fiber.state == State::Exited; };
    if (!core.failed && !std::all_of(core.fibers.begin(), core.fibers.end(), has_exited)) report_stuck(core);
    if (!core.failed) check_guards(core);
}

}  // namespace

const uint3& thread_index() { return core().current->index; }
const uint3& block_index() { return core().block; }
const uint3& block_extent() { return core().block_extent; }
const uint3& grid_extent() { return core().grid_extent; }
unsigned lane_index() { return core().current->linear % 32; }

void fail(Site site, const char* what) {
    Core& c = core();
    report(c, "thread %u at %s:%d: %s", c.current->linear, base_name(site.file), site.line, what);
    // The block ends here: none of its fibers goes on.
    suspend(c);
    abort();
}

void* shared(const void* key, size_t bytes, const char* name) {
    Core& c = core();
    for (const SharedArray& array : c.arrays)
        if (array.key == key) return array.data;
    return allocate_shared(c, key, bytes, name);
}

void* dynamic_shared() { return core().arrays.front().data; }

void sync_block(Site site) {
    Core& c = core();
    Fiber& fiber = *c.current;
    if (c.num_at_barrier == 0) {
        c.barrier_site = site;
    } else if (c.barrier_site.line != site.line || strcmp(c.barrier_site.file, site.file) != 0) {
        char what[200];
        snprintf(what, sizeof what, "at this barrier while others wait at the one at %s:%d", base_name(c.barrier_site.file),
                 c.barrier_site.line);
        fail(site, what);
    }
    if (++c.num_at_barrier < c.num_threads) {
        fiber.state = State::AtBarrier;
        fiber.site = site;
        suspend(c);
        return;
    }
    c.num_at_barrier = 0;
    for (Fiber& other : c.fibers)
        if (other.state == State::AtBarrier) other.state = State::Runnable;
    // The last one steps back too, so that the launch's order holds after each barrier.
    suspend(c);
}

void collective(Op op, uint32_t mask, const void* in, size_t in_bytes, void* out, size_t out_bytes, Compute compute,
                Site site) {
    Core& c = core();
    Fiber& fiber = *c.current;
    const unsigned lane = fiber.linear % 32;
    Warp& warp = c.warps[fiber.linear / 32];
    const unsigned lanes = std::min(32u, c.num_threads - fiber.linear / 32 * 32);
    const uint32_t existing = lanes == 32 ? kAllLanes : (1u << lanes) - 1;
    mask &= existing;
    if (!(mask >> lane & 1)) fail(site, "takes part in a warp operation whose mask leaves it out");
    if (warp.arrived == 0) {
        warp.mask = mask;
        warp.op = op;
        warp.site = site;
    } else if (warp.mask != mask || warp.op != op || warp.site.line != site.line ||
               strcmp(warp.site.file, site.file) != 0) {
        char what[200];
        snprintf(what, sizeof what, "a warp operation while its warp is at another one, at %s:%d (or with another mask)",
                 base_name(warp.site.file), warp.site.line);
        fail(site, what);
    }
    if (in_bytes) memcpy(warp.in.lane[lane], in, in_bytes);
    warp.arrived |= 1u << lane;
    if (warp.arrived != mask) {
        fiber.state = State::InWarp;
        fiber.site = site;
        suspend(c);
    } else {
        compute(warp.in, warp.out, mask);
        warp.arrived = 0;
        Fiber* first = &c.fibers[fiber.linear / 32 * 32];
        for (unsigned other = 0; other < lanes; ++other)
            if ((mask >> other & 1) && first[other].state == State::InWarp) first[other].state = State::Runnable;
        // Step back, so that no lane runs ahead of one that has not taken its result.
        suspend(c);
    }
    if (out_bytes) memcpy(out, warp.out.lane[lane], out_bytes);
}

void copy_async(void* target, const void* source, size_t bytes, size_t valid_bytes, Site site) {
    if (bytes != 4 && bytes != 8 && bytes != 16) fail(site, "an asynchronous copy of other than 4, 8 or 16 bytes");
    if (reinterpret_cast<uintptr_t>(target) % bytes || (valid_bytes && reinterpret_cast<uintptr_t>(source) % bytes))
        fail(site, "a misaligned asynchronous copy");
    memset(target, 0xff, bytes);
    Fiber& fiber = *core().current;
    fiber.copies.push_back({target, source, bytes, valid_bytes, fiber.next_group});
}

void copy_commit() { ++core().current->next_group; }

void copy_wait(unsigned pending_groups) {
    Fiber& fiber = *core().current;
    std::vector<Copy> left;
    for (const Copy& copy : fiber.copies) {
        if (copy.group + pending_groups >= fiber.next_group) {
            left.push_back(copy);
            continue;
        }
        if (copy.valid_bytes) memcpy(copy.target, copy.source, copy.valid_bytes);
        memset(static_cast<unsigned char*>(copy.target) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
    }
    fiber.copies.swap(left);
}

int run(const char* kernel, Body body, uint32_t expected_threads, const Launch* launch, uint64_t first, uint64_t count,
        char* error, size_t error_bytes) {
    Core& c = core();
    c.launch = launch;
    c.kernel = kernel;
    c.body = body;
    c.error = error;
    c.error_bytes = error_bytes;
    c.failed = false;
    c.block = {0, 0, 0};
    c.block_extent = {launch->block[0], launch->block[1], launch->block[2]};
    c.grid_extent = {launch->grid[0], launch->grid[1], launch->grid[2]};
    const uint64_t threads = uint64_t{launch->block[0]} * launch->block[1] * launch->block[2];
    if (threads == 0 || threads > kMaxThreads || threads != expected_threads) {
        report(c, "launched with %llu threads a block, the kernel is made for %u", static_cast<unsigned long long>(threads),
               expected_threads);
        return 1;
    }
    c.num_threads = static_cast<unsigned>(threads);
    if (!c.stacks) c.stacks.reset(new unsigned char[kMaxThreads * kStackBytes]);
    c.fibers.resize(c.num_threads);
    c.warps.resize((c.num_threads + 31) / 32);
    c.warp_order.resize(c.warps.size());
    for (uint64_t block = first; block < first + count && !c.failed; ++block) {
        c.block = {static_cast<unsigned>(block % c.grid_extent.x),
                   static_cast<unsigned>(block / c.grid_extent.x % c.grid_extent.y),
                   static_cast<unsigned>(block / c.grid_extent.x / c.grid_extent.y)};
        run_block(c);
    }
    return c.failed;
}

}  // namespace emu

// Marks guard bands of device memory, so that a sanitized build also tells reads of them; else nothing.
extern "C" void brightrun_emu_guard([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes, [[maybe_unused]] int on) {
#if EMU_ASAN
    if (on) {
        __asan_poison_memory_region(at, bytes);
    } else {
        __asan_unpoison_memory_region(at, bytes);
    }
#endif
}
