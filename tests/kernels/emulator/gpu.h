// A GPU on the CPU: runs a kernel's own source, thread by thread, with the instructions of tensor_core.cuh emulated.
//
// Threads are fibers. One runs until it meets its warp (ldmatrix, mma), its warpgroup (wgmma) or its block
// (__syncthreads) and is then parked; a warp runs until it waits for others, four warps until they wait for their block,
// so a missing barrier shows: warp 0 is always far ahead. A kernel must be right both ways: with asynchronous copies that
// land only when they are waited for and products of a warpgroup that run at once, where a missing wait for a copy shows,
// and with copies that land at once and products that run only when they are waited for, where a stage or register that
// is overwritten too early shows. Shared memory starts as NaN. Every copy is checked against the buffers that the caller
// declared, every matrix load against bank conflicts, every piece that wgmma reads for the fence that its copy needs.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#define SPARSEDM_TENSOR_CORE
#define SPARSEDM_WARPGROUP
#define __device__
#define __global__
#define __shared__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n)

using std::max;
using std::min;

struct uint4 {
    unsigned x, y, z, w;
};
struct float4 {
    float x, y, z, w;
};
struct Index {
    int x, y, z;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float __uint_as_float(unsigned u) {
    float f;
    memcpy(&f, &u, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned u;
    memcpy(&u, &f, 4);
    return u;
}
inline float __expf(float x) { return expf(x); }

alignas(1024) inline char memory[256 * 1024];
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace gpu {

inline std::string error;
inline bool lazy;  // copies land when they are waited for, products run at once; else the reverse
inline int shared_bytes;
inline std::vector<std::pair<const char*, const char*>> readable;

inline void fail(const std::string& what) {
    if (error.empty())
        error = what + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + " thread " +
                std::to_string(threadIdx.x) + ")";
}

struct Copy {
    unsigned shared;
    const void* global;
    bool valid;
};
struct Bulk {
    unsigned shared;
    std::vector<char> bytes;
};
struct Meeting {
    int arrived = 0, generation = 0;
    const char* name = nullptr;
    void* operands[128];
};
struct Thread {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    const Meeting* waits_for = nullptr;  // where it is parked, and since which generation
    int since = 0;
    std::vector<Copy> open;                // copies of the group that is being filled
    std::deque<std::vector<Copy>> groups;  // committed ones
    std::vector<unsigned> unfenced;        // pieces that landed since this thread's last fence
};

inline std::vector<Thread> threads;
struct Warpgroup {
    Meeting meeting;
    std::vector<std::function<void()>> open;                // products of the group that is being filled
    std::deque<std::vector<std::function<void()>>> groups;  // committed ones
};

// PTX ISA, "mbarrier": of the kind that create_barrier makes.
struct Barrier {
    Meeting phase;      // its generation counts the phases that ended
    bool announced = false;
    long long missing = 0;     // bytes announced and not arrived; below 0 where they arrive before they are announced
    std::vector<Bulk> copies;  // that have not landed
};

inline std::vector<Meeting> warps;
inline std::map<unsigned, Barrier> barriers;
inline std::vector<Warpgroup> warpgroups;
inline Meeting block;
inline int current;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void park() { swapcontext(&threads[current].context, &scheduler); }

// Whether running the thread now would do nothing.
inline bool stuck(const Thread& t) { return t.waits_for && t.waits_for->generation == t.since; }

inline void meet(Meeting& m, int expected, const char* name, int slot, void* operands, const std::function<void()>& act) {
    if (m.arrived && strcmp(m.name, name)) fail(std::string("threads diverge: ") + m.name + " meets " + name);
    m.name = name;
    if (slot >= 0) m.operands[slot] = operands;
    const int generation = m.generation;
    if (++m.arrived == expected) {
        act();
        m.arrived = 0;
        ++m.generation;
    } else {
        Thread& me = threads[current];
        me.waits_for = &m, me.since = generation;
        park();  // until the generation has changed: see stuck()
        me.waits_for = nullptr;
    }
}

template <class Operands>
void warp_meets(const char* name, Operands& mine, void (*act)(Operands* (&)[32])) {
    Meeting& m = warps[threadIdx.x / 32];
    meet(m, 32, name, threadIdx.x % 32, &mine, [&] { act(reinterpret_cast<Operands*(&)[32]>(m.operands)); });
}

inline char* at(unsigned shared, int bytes) {
    if (shared % bytes || (int)shared + bytes > shared_bytes) {
        fail("shared memory: " + std::to_string(bytes) + " bytes at " + std::to_string(shared));
        return memory;
    }
    return memory + shared;
}

inline bool fenced[sizeof memory / 16];  // whether the tensor cores see what was copied to a piece of 16 bytes

inline void land(const Copy& copy) {
    fenced[copy.shared / 16] = false;
    threads[current].unfenced.push_back(copy.shared);
    if (copy.valid)
        memcpy(at(copy.shared, 16), copy.global, 16);
    else
        memset(at(copy.shared, 16), 0, 16);
}

inline void enter() {
    body();
    threads[current].done = true;
    park();
}

inline void run_block(int count) {
    std::fill(memory, memory + sizeof memory, (char)0xff);  // NaN in every floating-point type
    threads = std::vector<Thread>(count);
    warps.assign(count / 32, {});
    warpgroups = std::vector<Warpgroup>(count / 128);
    std::fill(fenced, fenced + sizeof fenced, true);
    block = {};
    barriers.clear();
    for (Thread& t : threads) {
        t.stack.reset(new char[1 << 17]);
        getcontext(&t.context);
        t.context.uc_stack.ss_sp = t.stack.get();
        t.context.uc_stack.ss_size = 1 << 17;
        t.context.uc_link = nullptr;
        makecontext(&t.context, enter, 0);
    }
    // Run the threads from `first` on, once each; whether any of them moved.
    const auto run = [](int first, int number) {
        bool moved = false;
        for (current = first; current < first + number; ++current) {
            if (threads[current].done || stuck(threads[current])) continue;
            threadIdx = {current, 0, 0};
            swapcontext(&scheduler, &threads[current].context);
            moved = true;
        }
        return moved;
    };
    for (int left = count; left && error.empty();) {
        bool moved = false;
        for (int group = 0; group < count; group += 128)
            for (bool again = true; again && error.empty(); moved |= again) {
                again = false;
                for (int warp = group; warp < min(group + 128, count); warp += 32)
                    while (error.empty() && run(warp, 32)) again = true;
            }
        left = std::count_if(threads.begin(), threads.end(), [](const Thread& t) { return !t.done; });
        if (left && !moved) fail("deadlock");
    }
}

inline void launch(Index grid, int count, int shared, bool copies_are_lazy, std::function<void()> kernel) {
    error.clear();
    lazy = copies_are_lazy, shared_bytes = shared, body = std::move(kernel);
    gridDim = grid, blockDim = {count, 1, 1};
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) run_block(count);
}

inline float half_to_float(unsigned short h) {
#if BFLOAT16
    return __uint_as_float((unsigned)h << 16);
#else
    _Float16 f;
    memcpy(&f, &h, 2);
    return (float)f;
#endif
}

inline unsigned short float_to_half(float f) {
#if BFLOAT16
    unsigned u = __float_as_uint(f);
    return std::isnan(f) ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16;  // to nearest, ties to even
#else
    _Float16 h = (_Float16)f;
    unsigned short s;
    memcpy(&s, &h, 2);
    return s;
#endif
}

}  // namespace gpu

inline unsigned long long __cvta_generic_to_shared(const void* p) { return (const char*)p - memory; }
inline void __syncthreads() {
    gpu::meet(gpu::block, blockDim.x, "__syncthreads", -1, nullptr, [] {});
}
inline void __syncwarp() {
    int nothing;
    gpu::warp_meets<int>("__syncwarp", nothing, [](int* (&)[32]) {});
}

inline void copy_async(unsigned shared, const void* global, bool valid) {
    bool inside = false;
    for (auto [first, last] : gpu::readable) inside |= global >= first && (const char*)global + 16 <= last;
    if (!inside || (uintptr_t)global % 16) return gpu::fail("copy from outside of its buffer");
    gpu::threads[gpu::current].open.push_back({shared, global, valid});
    if (!gpu::lazy) gpu::land({shared, global, valid});
}
inline void commit_copies() {
    auto& t = gpu::threads[gpu::current];
    t.groups.push_back(std::move(t.open));
    t.open.clear();
}
template <int PENDING>
void wait_copies() {
    auto& groups = gpu::threads[gpu::current].groups;
    for (; (int)groups.size() > PENDING; groups.pop_front())
        if (gpu::lazy)
            for (const auto& copy : groups.front()) gpu::land(copy);
}

inline void load_shared(unsigned (&r)[4], unsigned shared) { memcpy(r, gpu::at(shared, 16), 16); }
inline unsigned load_shared(unsigned shared) {
    unsigned r;
    memcpy(&r, gpu::at(shared, 4), 4);
    return r;
}

inline void load_matrices(unsigned (&r)[4], unsigned shared) {
    struct Lane {
        unsigned* r;
        unsigned shared;
    } mine{r, shared};
    gpu::warp_meets<Lane>("ldmatrix", mine, [](Lane* (&lanes)[32]) {
        for (int matrix = 0; matrix < 4; ++matrix) {
            unsigned banks = 0;
            for (int row = 0; row < 8; ++row) {
                const unsigned from = lanes[matrix * 8 + row]->shared;
                banks |= 1u << from / 16 % 8;
                for (int t = 0; t < 4; ++t) memcpy(lanes[row * 4 + t]->r + matrix, gpu::at(from, 16) + t * 4, 4);
            }
            if (banks != 0xff) gpu::fail("ldmatrix: bank conflict");
        }
    });
}

// PTX ISA, "matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16 types".
template <int SELECTOR>
void multiply_sparse(float (&c)[4], const unsigned (&a)[4], const unsigned (&b)[4], unsigned metadata) {
    struct Lane {
        float* c;
        const unsigned *a, *b;
        unsigned metadata;
    } mine{c, a, b, metadata};
    gpu::warp_meets<Lane>(SELECTOR ? "mma.sp 1" : "mma.sp 0", mine, [](Lane* (&lanes)[32]) {
        static float dense_a[16][32], dense_b[32][8];
        memset(dense_a, 0, sizeof dense_a);
        for (int lane = 0; lane < 32; ++lane) {
            const int g = lane >> 2, t = lane % 4;
            for (int i = 0; i < 8; ++i) {
                const int row = i < 2 || (i >= 4 && i < 6) ? g : g + 8, quad = i < 4 ? t : t + 4;
                const unsigned word = lanes[4 * g + 2 * SELECTOR + quad / 4]->metadata;
                const int nibble = word >> (row / 8 * 16 + quad % 4 * 4) & 15;
                if ((nibble & 3) >= nibble >> 2) gpu::fail("mma.sp: invalid metadata");
                const int column = quad * 4 + (i % 2 ? nibble >> 2 : nibble & 3);
                dense_a[row][column] = gpu::half_to_float(lanes[lane]->a[i / 2] >> i % 2 * 16);
                dense_b[t * 2 + i % 2 + i / 2 * 8][g] = gpu::half_to_float(lanes[lane]->b[i / 2] >> i % 2 * 16);
            }
        }
        for (int lane = 0; lane < 32; ++lane)
            for (int i = 0; i < 4; ++i) {
                float sum = lanes[lane]->c[i];
                for (int k = 0; k < 32; ++k) sum += dense_a[(lane >> 2) + i / 2 * 8][k] * dense_b[k][lane % 4 * 2 + i % 2];
                lanes[lane]->c[i] = sum;
            }
    });
}

inline void widen(unsigned word, float& first, float& second) {
    first = gpu::half_to_float(word);
    second = gpu::half_to_float(word >> 16);
}
inline unsigned narrow(float first, float second) {
    return gpu::float_to_half(first) | (unsigned)gpu::float_to_half(second) << 16;
}

inline void show_to_engines() {
    auto& t = gpu::threads[gpu::current];
    for (unsigned shared : t.unfenced) gpu::fenced[shared / 16] = true;
    t.unfenced.clear();
}

namespace gpu {

inline Barrier& barrier_at(unsigned shared) {
    at(shared, 8);
    if (!barriers.count(shared)) fail("no barrier was created at " + std::to_string(shared));
    return barriers[shared];
}

inline void end_phase(Barrier& barrier) {
    if (!barrier.announced || barrier.missing) return;
    barrier.announced = false;
    ++barrier.phase.generation;
}

inline void land(Barrier& barrier, const Bulk& copy) {
    // The engine's writes are of the tensor cores' own proxy: they need no fence.
    for (size_t i = 0; i < copy.bytes.size(); i += 16) {
        fenced[(copy.shared + i) / 16] = true;
        memcpy(at(copy.shared + i, 16), copy.bytes.data() + i, 16);
    }
    barrier.missing -= copy.bytes.size();
    end_phase(barrier);
}

inline void start(unsigned shared, std::vector<char> bytes, unsigned address) {
    Barrier& barrier = barrier_at(address);
    if (lazy)
        barrier.copies.push_back({shared, std::move(bytes)});
    else
        land(barrier, {shared, std::move(bytes)});
}

}  // namespace gpu

inline void create_barrier(unsigned barrier) {
    gpu::at(barrier, 8);
    gpu::barriers[barrier] = {};
}
inline void announce_bytes(unsigned address, unsigned bytes) {
    gpu::Barrier& barrier = gpu::barrier_at(address);
    if (barrier.announced) gpu::fail("mbarrier: a phase was announced twice");
    barrier.announced = true;
    barrier.missing += bytes;
    gpu::end_phase(barrier);
}
inline void wait_bytes(unsigned address, unsigned parity) {
    gpu::Barrier& barrier = gpu::barrier_at(address);
    while (gpu::error.empty() && barrier.phase.generation % 2 == (int)parity) {
        const auto copies = std::move(barrier.copies);
        barrier.copies.clear();
        for (const gpu::Bulk& copy : copies) gpu::land(barrier, copy);
        if (barrier.phase.generation % 2 != (int)parity) break;
        gpu::Thread& me = gpu::threads[gpu::current];
        me.waits_for = &barrier.phase, me.since = barrier.phase.generation;
        gpu::park();
        me.waits_for = nullptr;
    }
}

inline void copy_bulk(unsigned shared, const void* global, unsigned bytes, unsigned barrier) {
    bool inside = false;
    for (auto [first, last] : gpu::readable) inside |= global >= first && (const char*)global + bytes <= last;
    if (!inside) return gpu::fail("bulk copy from outside of its buffer");
    if ((uintptr_t)global % 16 || shared % 16 || bytes % 16) return gpu::fail("bulk copy is not aligned to 16 bytes");
    gpu::start(shared, {(const char*)global, (const char*)global + bytes}, barrier);
}

// What tests/kernels/emulator/emulator.py puts into the 128 bytes.
struct TensorMap {
    const char* base;
    long long columns, rows, box_columns, box_rows;
    char unused[88];
};

// PTX ISA, "tensor tiled mode", "out-of-boundary access" and "swizzling modes": 128 bytes, as for a matrix descriptor.
inline void copy_box(unsigned shared, const TensorMap& map, int column, int row, unsigned barrier) {
    if (shared % 1024) gpu::fail("copy engine: the swizzle starts at a multiple of 1024");
    if (map.box_columns * 2 != 128) gpu::fail("copy engine: a row of the box is not as wide as the swizzle");
    std::vector<char> bytes(map.box_rows * 128, 0);
    for (int r = 0; r < map.box_rows; ++r)
        for (int c = 0; c < map.box_columns; ++c)
            if (row + r < map.rows && column + c < map.columns)
                memcpy(
                    &bytes[r * 128 + ((c / 8 ^ r % 8) * 16) + c % 8 * 2],
                    map.base + ((row + r) * map.columns + column + c) * 2, 2
                );
    gpu::start(shared, std::move(bytes), barrier);
}

namespace gpu {

template <class Operands>
void warpgroup_meets(const char* name, Operands& mine, const std::function<void(Warpgroup&)>& act) {
    Warpgroup& group = warpgroups[threadIdx.x / 128];
    meet(group.meeting, 128, name, threadIdx.x % 128, &mine, [&] { act(group); });
}

}  // namespace gpu

inline void sync_warpgroup() {
    int nothing;
    gpu::warpgroup_meets("sync_warpgroup", nothing, [](gpu::Warpgroup&) {});
}
inline void begin_products() {}
inline void commit_products() {
    int nothing;
    gpu::warpgroup_meets("commit_products", nothing, [](gpu::Warpgroup& group) {
        group.groups.push_back(std::move(group.open));
        group.open.clear();
    });
}
template <int PENDING>
void wait_products() {
    int nothing;
    gpu::warpgroup_meets("wait_products", nothing, [](gpu::Warpgroup& group) {
        for (; (int)group.groups.size() > PENDING; group.groups.pop_front())
            for (auto& product : group.groups.front()) product();
    });
}

// PTX ISA, "matrix descriptor": of wgmma.
inline unsigned long long describe(unsigned shared) {
    if (shared % 1024) gpu::fail("wgmma: the swizzle starts at a multiple of 1024");
    return shared >> 4;
}

// PTX ISA, "asynchronous warpgroup level matrix multiply-accumulate", m64nNk32: each warp has 16 rows of A, as in
// mma.sp.m16n8k32, and of D, eight columns after the other as in mma. Runs late or at once.
template <int SELECTOR>
void multiply_sparse_group(float (&c)[16][1][4], const unsigned (&a)[4], unsigned long long b, unsigned metadata) {
    struct Lane {
        float* c;
        const unsigned* a;
        unsigned long long b;
        unsigned metadata;
    } mine{&c[0][0][0], a, b, metadata};
    gpu::warpgroup_meets(SELECTOR ? "wgmma.sp 1" : "wgmma.sp 0", mine, [](gpu::Warpgroup& group) {
        std::vector<Lane> lanes;
        for (int i = 0; i < 128; ++i) lanes.push_back(*(Lane*)group.meeting.operands[i]);
        auto product = [lanes] {
            static float dense_a[64][32], dense_b[32][128];
            memset(dense_a, 0, sizeof dense_a);
            for (const Lane& lane : lanes)
                if (lane.b != lanes[0].b) gpu::fail("wgmma: lanes disagree about b");
            for (int n = 0; n < 128; ++n)
                for (int k = 0; k < 32; ++k) {
                    // the address as it comes out of the descriptor, then bits 4-6 ^= bits 7-9
                    unsigned from = (unsigned)lanes[0].b * 16 + n / 8 * 1024 + n % 8 * 128 + k * 2;
                    from ^= from >> 7 << 4 & 0x70;
                    if (!gpu::fenced[from / 16]) gpu::fail("wgmma reads a copy that was not fenced");
                    unsigned short value;
                    memcpy(&value, gpu::at(from, 2), 2);
                    dense_b[k][n] = gpu::half_to_float(value);
                }
            for (int i = 0; i < 128; ++i) {
                const int first = i / 32 * 32, g = i % 32 >> 2, t = i % 4;
                for (int j = 0; j < 8; ++j) {
                    const int row = j < 2 || (j >= 4 && j < 6) ? g : g + 8, quad = j < 4 ? t : t + 4;
                    const unsigned word = lanes[first + 4 * g + 2 * SELECTOR + quad / 4].metadata;
                    const int nibble = word >> (row / 8 * 16 + quad % 4 * 4) & 15;
                    if ((nibble & 3) >= nibble >> 2) gpu::fail("wgmma.sp: invalid metadata");
                    dense_a[i / 32 * 16 + row][quad * 4 + (j % 2 ? nibble >> 2 : nibble & 3)] =
                        gpu::half_to_float(lanes[i].a[j / 2] >> j % 2 * 16);
                }
            }
            for (int i = 0; i < 128; ++i)
                for (int j = 0; j < 64; ++j) {
                    const int row = i / 32 * 16 + (i % 32 >> 2) + j % 4 / 2 * 8, n = j / 4 * 8 + i % 4 * 2 + j % 2;
                    float sum = lanes[i].c[j];
                    for (int k = 0; k < 32; ++k) sum += dense_a[row][k] * dense_b[k][n];
                    lanes[i].c[j] = sum;
                }
        };
        if (gpu::lazy)
            product();
        else
            group.open.push_back(product);
    });
}
