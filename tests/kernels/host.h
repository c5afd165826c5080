// CUDA kernels on a CPU, for tests: the threads of a block are fibers of one thread, which take turns where they wait
// for each other. What jaxff/kernels/cuda/device.cu has of a GPU, for a CPU.
#define JAXFF_HOST
#include <math.h>
#include <setjmp.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::max;
using std::min;
typedef unsigned int uint32;
typedef unsigned long long uint64;
struct float4 {
    float x, y, z, w;
};
struct int4 {
    int x, y, z, w;
};
struct float2 {
    float x, y;
};
struct uint2 {
    uint32 x, y;
};
struct uint4 {
    uint32 x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Fiber {
    ucontext_t context;  // to begin
    jmp_buf place;       // to go on: unlike swapcontext, this asks nothing of the kernel of the system
    std::unique_ptr<char[]> stack;  // not written, so that little of it takes memory
    bool begun, done;
};
struct Barrier {
    int waiting = 0, generation = 0, gone = 0;  // gone: threads that ended before
};
struct Lane {
    float x;
    uint32 a[4], b[2];
};
static std::vector<Fiber> fibers;
static std::vector<Barrier> warps;
static std::vector<Lane> lanes;
static std::vector<std::vector<char>> shared_memory;  // of each block that runs
struct Barriers {
    Barrier all, first, others;
};
static std::vector<Barriers> all;  // likewise
static ucontext_t outside;
static int current, first_block, the_blocks, the_threads;

template <class... Pointer>
inline void ready(Pointer&...) {}
inline int thread() { return current % the_threads; }
inline int block() { return first_block + current / the_threads; }
inline int blocks() { return the_blocks; }
#define SHARED(type, name) type* name = (type*)shared_memory[current / the_threads].data()

inline void next_fiber() {
    int from = current, n = (int)fibers.size();
    for (int k = 1; k <= n; k++) {
        int to = (from + k) % n;
        if (fibers[to].done) continue;
        if (to == from || _setjmp(fibers[from].place)) return;
        current = to;
        if (fibers[to].begun) _longjmp(fibers[to].place, 1);
        fibers[to].begun = true;
        setcontext(&fibers[to].context);
    }
    setcontext(&outside);
}
inline void wait_at(Barrier& b, int count) {
    int generation = b.generation;
    if (++b.waiting == count - b.gone) {
        b.waiting = 0, b.generation++;
        return;
    }
    while (b.generation == generation) next_fiber();
}
inline void sync() { wait_at(all[current / the_threads].all, the_threads); }
template <class Value>
inline void stay(Value&) {}
template <class Word>
inline Word* in_register(Word* memory) { return memory; }
inline void sync_warp() { wait_at(warps[current / 32], 32); }

inline float from_lane(float x, int mask) {
    lanes[current].x = x;
    sync_warp();
    float r = lanes[current ^ mask].x;
    sync_warp();
    return r;
}
inline int of_lane(int x, int lane) {
    lanes[current].a[0] = (uint32)x;
    sync_warp();
    int r = (int)lanes[current / 32 * 32 + lane].a[0];
    sync_warp();
    return r;
}
inline float of_lane(float x, int lane) {
    lanes[current].x = x;
    sync_warp();
    float r = lanes[current / 32 * 32 + lane].x;
    sync_warp();
    return r;
}
inline uint32 lanes_where(bool so) {
    lanes[current].a[0] = so;
    sync_warp();
    uint32 r = 0;
    for (int k = 0; k < 32; k++) r |= lanes[current / 32 * 32 + k].a[0] << k;
    sync_warp();
    return r;
}
inline int ones(uint32 bits) { return __builtin_popcount(bits); }
inline uint32 bytes_of(uint32 x, uint32 y, uint32 which) {
    uint64 both = (uint64)y << 32 | x;
    uint32 r = 0;
    for (int k = 0; k < 4; k++) r |= (uint32)(both >> 8 * (which >> 4 * k & 7) & 255) << 8 * k;
    return r;
}
inline int lowest(uint32 bits) { return bits ? __builtin_ctz(bits) : -1; }
inline int as_int(float x) {
    int r;
    memcpy(&r, &x, 4);
    return r;
}
inline float as_float(int x) {
    float r;
    memcpy(&r, &x, 4);
    return r;
}
inline void max_at(int* x, int y) { *x = std::max(*x, y); }
inline float reciprocal(float x) { return 1 / x; }
inline float square_root(float x) { return sqrtf(x); }
inline float root(float x) { return sqrtf(x); }
inline float exponential(float x) { return expf(x); }
inline uint32 halves(float x, float y) {
    _Float16 h[2] = {(_Float16)x, (_Float16)y};
    uint32 r;
    memcpy(&r, h, 4);
    return r;
}
inline void floats(uint32 h, float& x, float& y) {
    _Float16 r[2];
    memcpy(r, &h, 4);
    x = r[0], y = r[1];
}
inline float half_of(uint32 h, int which) {
    float x[2];
    floats(h, x[0], x[1]);
    return x[which];
}
template <int COLUMNS>
inline void multiply_add(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    Lane& mine = lanes[current];
    std::copy(a, a + 4, mine.a);
    mine.b[0] = b0, mine.b[1] = b1;
    sync_warp();
    const Lane* w = &lanes[current / 32 * 32];
    int g = current % 32 / 4, t = current % 4;
    for (int i = 0; i < 4; i++) {
        int row = g + 8 * (i / 2), column = 2 * t + i % 2;
        for (int k = 0; k < COLUMNS; k++)
            c[i] += half_of(w[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2) * half_of(w[column * 4 + k % 8 / 2].b[k / 8], k % 2);
    }
    sync_warp();
}
inline void mma(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) { multiply_add<16>(c, a, b0, b1); }
inline void mma_new(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    std::fill(c, c + 4, 0.f);
    mma(c, a, b0, b1);
}
inline void mma_of_8(float (&c)[4], const uint32 (&a)[4], uint32 b0) { multiply_add<8>(c, a, b0, 0); }
struct Word {
    float x, y, z;
    uint32 tag;
};
inline void put(uint4* to, float x, float y, float z, uint32 tag) {
    Word w{x, y, z, tag};
    memcpy(to, &w, sizeof w);
}
inline Word look_at(const uint4* from) {
    Word w;
    memcpy(&w, from, sizeof w);
    return w;
}
inline void show(uint4* to, uint4 w) { *to = w; }
inline uint4 seen(const uint4* from) { return *from; }
inline uint32 or_differ(uint32 before, uint32 x, uint32 y) { return before | (x ^ y); }
inline void other_blocks() { next_fiber(); }
inline uint32 cycles() {
    static uint32 now = 0;
    return ++now;
}
template <uint32 CYCLES>
inline void pause_for() {}
inline uint32 latest(const uint32* x) { return *x; }
template <int COUNT>
inline void sync_first() { wait_at(all[current / the_threads].first, COUNT); }
template <int COUNT>
inline void sync_others() { wait_at(all[current / the_threads].others, COUNT); }
inline void barrier_init(uint64* b, int count) { *b = (uint64)count << 32; }
inline void barrier_arrive(uint64* b) {
    sync_warp();
    if (current % 32 == 0) ++*b;
}
inline void barrier_wait(const uint64* b, int parity) {
    while ((uint32)*b / (*b >> 32) % 2 == parity) next_fiber();
}
inline void copy_16(void* to, const void* from) { memcpy(to, from, 16); }
inline void end_copies() {}
template <int LATER>
inline void wait_for_copies() {}
inline void bulk_copy(float* to, const float* from, int bytes, uint64*) { memcpy(to, from, bytes); }
inline bool elected() { return current % 32 == 0; }
inline void arrive_with(uint64* b, int) { ++*b; }
inline void barriers_made() {}
template <int COUNT, bool MORE>
inline void registers() {}
inline void load_a_at(uint32 (&a)[4], const uint32* words) {
    memcpy(lanes[current].a, &words, sizeof words);
    sync_warp();
    for (int i = 0; i < 4; i++) {
        const uint32* from;
        memcpy(&from, lanes[current / 32 * 32 + 8 * i + current % 32 / 4].a, sizeof from);
        a[i] = from[current % 4];
    }
    sync_warp();
}
inline void soon(const float*, int) {}
inline float4 passing(const float4* from) { return *from; }
inline float4 early(const float4* from) { return *from; }
inline uint4 early(const uint4* from) { return *from; }
inline int largest_of_warp(int x) {
    lanes[current].a[0] = (uint32)x;
    sync_warp();
    int r = x;
    for (int k = 0; k < 32; k++) r = max(r, (int)lanes[current / 32 * 32 + k].a[0]);
    sync_warp();
    return r;
}

static void (*body)();
static void enter() {
    body();
    fibers[current].done = true;
    Barrier& b = all[current / the_threads].all;
    if (++b.gone + b.waiting == the_threads) b.waiting = 0, b.generation++;  // they waited for this one
    next_fiber();
}

// runs kernel(args...) with as many threads and blocks, all blocks at once or one after the other; args point to the values
template <class... Types, size_t... I>
void run_kernel(void (*kernel)(Types...), void** args, int count, int threads, int shared, bool together, std::index_sequence<I...>) {
    constexpr size_t STACK = 1 << 18;
    static void (*the_kernel)(Types...);
    static void** the_args;
    the_kernel = kernel, the_args = args;
    body = [] { the_kernel(*(Types*)the_args[I]...); };
    the_blocks = count, the_threads = threads;
    int at_once = together ? count : 1, fibers_at_once = at_once * threads;
    for (first_block = 0; first_block < count; first_block += at_once) {
        fibers.clear(), fibers.resize(fibers_at_once);
        warps.assign(fibers_at_once / 32, Barrier()), lanes.assign(fibers_at_once, Lane()), all.assign(at_once, Barriers());
        shared_memory.assign(at_once, std::vector<char>(shared, (char)0x7b));  // not zeros
        for (Fiber& f : fibers) {
            f.begun = f.done = false, f.stack.reset(new char[STACK]);
            getcontext(&f.context);
            f.context.uc_stack.ss_sp = f.stack.get(), f.context.uc_stack.ss_size = STACK;
            f.context.uc_link = nullptr;
            makecontext(&f.context, enter, 0);
        }
        current = 0, fibers[0].begun = true;
        swapcontext(&outside, &fibers[0].context);
    }
}
template <class... Types>
void run_kernel(void (*kernel)(Types...), void** args, int count, int threads, int shared, bool together) {
    run_kernel(kernel, args, count, threads, shared, together, std::index_sequence_for<Types...>());
}
