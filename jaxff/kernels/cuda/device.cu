// What the kernels need of a GPU. tests/kernels/host.h has the same for a CPU, where the tests run the kernels.
#ifndef JAXFF_HOST
typedef unsigned int uint32;
typedef unsigned long long uint64;
#define SHARED(type, name) extern __shared__ __align__(16) type name[]

__device__ __forceinline__ int thread() { return threadIdx.x; }
__device__ __forceinline__ int block() { return blockIdx.x; }
__device__ __forceinline__ int blocks() { return gridDim.x; }
__device__ __forceinline__ void sync() { __syncthreads(); }
// Waits until the kernels before this one, which may have been started early, have ended, and what they wrote is there.
// What lies at the pointers is read after it: that it never changes within this kernel would allow for more.
template <class... Pointer>
__device__ __forceinline__ void ready(Pointer&... pointers) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
    (..., [](Pointer& x) { asm volatile("" : "+l"(x)); }(pointers));
#endif
}
// a value that is in a register from here on, not read or made again where it is used
template <class Value>
__device__ __forceinline__ void stay(Value& x) { asm volatile("" : "+l"(x)); }
__device__ __forceinline__ void stay(int& x) { asm volatile("" : "+r"(x)); }
// shared memory whose address is in a register from here on, not made again wherever it is needed
template <class Word>
__device__ __forceinline__ Word* in_register(Word* memory) {
    return (Word*)__cvta_shared_to_generic(__shfl_sync(0xffffffffu, (uint32)__cvta_generic_to_shared(memory), 0));
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float from_lane(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ int of_lane(int x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
__device__ __forceinline__ float of_lane(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
// a bit for each lane where it is so
__device__ __forceinline__ uint32 lanes_where(bool so) { return __ballot_sync(0xffffffffu, so); }
__device__ __forceinline__ int ones(uint32 bits) { return __popc(bits); }
// four bytes, each of which four bits of `which` choose: of x from 0 on, of y from 4 on
__device__ __forceinline__ uint32 bytes_of(uint32 x, uint32 y, uint32 which) { return __byte_perm(x, y, which); }
// the place of the lowest bit; -1 of 0
__device__ __forceinline__ int lowest(uint32 bits) { return __ffs(bits) - 1; }

__device__ __forceinline__ int as_int(float x) { return __float_as_int(x); }
__device__ __forceinline__ float as_float(int x) { return __int_as_float(x); }
__device__ __forceinline__ void max_at(int* x, int y) { atomicMax(x, y); }

// within one or two units of the last place; what is smaller than 1e-38 counts as 0
__device__ __forceinline__ float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float square_root(float x) {
    float r;
    asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
__device__ __forceinline__ float root(float x) { return sqrtf(x); }  // rounded as IEEE does
// relative error of x 2^-24 more, as the exponent is rounded
__device__ __forceinline__ float exponential(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x * 1.44269504f));
    return r;
}

// x and y as halves in one word, x in the lower one
__device__ __forceinline__ uint32 halves(float x, float y) {
    uint32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(y), "f"(x));
    return r;
}
__device__ __forceinline__ void floats(uint32 h, float& x, float& y) {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(x), "=f"(y) : "r"(h));
}
// c += a b; a [16, 16] and b [16, 8] halves, c [16, 8] floats, each as mma.m16n8k16 spreads it over a warp
__device__ __forceinline__ void mma(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// c = a b
__device__ __forceinline__ void mma_new(float (&c)[4], const uint32 (&a)[4], uint32 b0, uint32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
}
// likewise of a's first eight columns and of as many rows of b: c += a[:, :8] b[:8]
__device__ __forceinline__ void mma_of_8(float (&c)[4], const uint32 (&a)[4], uint32 b0) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
}
// [16, 16] halves in shared memory, as mma takes them; a lane tells where four words are: of row lane % 16, the first or the
// last by its half warp
__device__ __forceinline__ void load_a_at(uint32 (&a)[4], const uint32* words) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3]) : "r"((uint32)__cvta_generic_to_shared(words)) : "memory");
}

// Three numbers and a tag, which are written and read as a whole, by blocks that run at once.
struct Word {
    float x, y, z;
    uint32 tag;
};
__device__ __forceinline__ void put(uint4* to, float x, float y, float z, uint32 tag) {
    asm volatile("{.reg .b128 w; .reg .b64 a, b; mov.b64 a, {%1, %2}; mov.b64 b, {%3, %4}; mov.b128 w, {a, b}; st.relaxed.gpu.global.b128 [%0], w;}"
                 : : "l"(to), "f"(x), "f"(y), "f"(z), "r"(tag) : "memory");
}
__device__ __forceinline__ Word look_at(const uint4* from) {
    Word w;
    asm volatile("{.reg .b128 w; .reg .b64 a, b; ld.relaxed.gpu.global.b128 w, [%4]; mov.b128 {a, b}, w; mov.b64 {%0, %1}, a; mov.b64 {%2, %3}, b;}"
                 : "=f"(w.x), "=f"(w.y), "=f"(w.z), "=r"(w.tag) : "l"(from) : "memory");
    return w;
}
// likewise sixteen bytes of any kind
__device__ __forceinline__ void show(uint4* to, uint4 w) {
    asm volatile("{.reg .b128 w; .reg .b64 a, b; mov.b64 a, {%1, %2}; mov.b64 b, {%3, %4}; mov.b128 w, {a, b}; st.relaxed.gpu.global.b128 [%0], w;}"
                 : : "l"(to), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
}
__device__ __forceinline__ uint4 seen(const uint4* from) {
    uint4 w;
    asm volatile("{.reg .b128 w; .reg .b64 a, b; ld.relaxed.gpu.global.b128 w, [%4]; mov.b128 {a, b}, w; mov.b64 {%0, %1}, a; mov.b64 {%2, %3}, b;}"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w) : "l"(from) : "memory");
    return w;
}
// the bits in which x and y differ, and those before: one instruction, which compilers don't take apart
__device__ __forceinline__ uint32 or_differ(uint32 before, uint32 x, uint32 y) {
    uint32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xbe;" : "=r"(r) : "r"(x), "r"(y), "r"(before));
    return r;
}
__device__ __forceinline__ void other_blocks() {}
__device__ __forceinline__ uint32 cycles() { return clock(); }
// Waits for some cycles: until what others were about to send may be there, as a look that finds nothing takes longer
template <uint32 CYCLES>
__device__ __forceinline__ void pause_for() {
    uint32 start = cycles();
    while (cycles() - start < CYCLES) {}
}
// what other launches of this kernel left, not what a cache has
__device__ __forceinline__ uint32 latest(const uint32* x) { return *(const volatile uint32*)x; }
// what is read once and not written meanwhile: it takes no place in L1
__device__ __forceinline__ float4 passing(const float4* from) {
    float4 r;
    asm("ld.global.nc.L1::no_allocate.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "l"(from));
    return r;
}
// asked for now, wherever it is needed; nothing writes it meanwhile
__device__ __forceinline__ float4 early(const float4* from) {
    float4 r;
    asm volatile("ld.global.nc.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(r.x), "=f"(r.y), "=f"(r.z), "=f"(r.w) : "l"(from));
    return r;
}
__device__ __forceinline__ uint4 early(const uint4* from) {
    uint4 r;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w) : "l"(from));
    return r;
}
__device__ __forceinline__ int largest_of_warp(int x) { return __reduce_max_sync(0xffffffffu, x); }
// among the first so many threads
template <int COUNT>
__device__ __forceinline__ void sync_first() { asm volatile("bar.sync 1, %0;" : : "n"(COUNT) : "memory"); }
// among so many others
template <int COUNT>
__device__ __forceinline__ void sync_others() { asm volatile("bar.sync 2, %0;" : : "n"(COUNT) : "memory"); }

// A barrier in shared memory at which warps arrive without waiting: its phases end when `count` have arrived.
__device__ __forceinline__ uint32 place_of(const uint64* b) { return (uint32)__cvta_generic_to_shared(b); }
__device__ __forceinline__ void barrier_init(uint64* b, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(place_of(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64* b) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" : : "r"(place_of(b)) : "memory");
}
// until the phase of this parity has ended; the first phase's is 0
__device__ __forceinline__ void barrier_wait(const uint64* b, int parity) {
#if __CUDA_ARCH__ >= 900
#define TRY "mbarrier.try_wait"
#else
#define TRY "mbarrier.test_wait"
#endif
    asm volatile("{.reg .pred p;\nagain:\n" TRY ".parity.shared.b64 p, [%0], %1;\n@!p bra again;\n}" : : "r"(place_of(b)), "r"(parity) : "memory");
}
// 16 bytes that come into shared memory meanwhile; `end_copies` ends a group of those of a thread, and
// `wait_for_copies` waits for all groups but the last LATER
__device__ __forceinline__ void copy_16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"((uint32)__cvta_generic_to_shared(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int LATER>
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" : : "n"(LATER) : "memory"); }
// Bytes that come into shared memory meanwhile, of which a barrier's phase waits for as many as `arrive_with` tells it;
// before compute capability 9.0 they have come at once.
__device__ __forceinline__ void bulk_copy(float* to, const float* from, int bytes, uint64* b) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 : : "r"((uint32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes), "r"(place_of(b)) : "memory");
#else
    for (int k = 0; k < bytes / 16; k++) ((float4*)to)[k] = ((const float4*)from)[k];
#endif
}
// in one lane of a warp: addresses there take no loop over lanes
__device__ __forceinline__ bool elected() {
#if __CUDA_ARCH__ >= 900
    uint32 r = 0;
    asm volatile("{.reg .b32 l; .reg .pred p; elect.sync l|p, 0xffffffff; @p mov.s32 %0, 1;}" : "+r"(r));
    return r != 0;
#else
    return (threadIdx.x & 31) == 0;
#endif
}
// one arrival at a barrier, of a warp whose copies these are
__device__ __forceinline__ void arrive_with(uint64* b, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" : : "r"(place_of(b)), "r"(bytes) : "memory");
#else
    asm volatile("{.reg .b64 t; mbarrier.arrive.shared.b64 t, [%0];}" : : "r"(place_of(b)) : "memory");
#endif
}
// so that copies find the barriers, or come after what was written there
__device__ __forceinline__ void barriers_made() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}
// bytes that are asked for from memory, so that L2 has them
__device__ __forceinline__ void soon(const float* from, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(from), "r"(bytes) : "memory");
#endif
}
// so many registers a thread from here on, of four warps that all come here: more than before, or fewer. Of kernels that
// are `exact` (launch.py); elsewhere nothing
template <int COUNT, bool MORE>
__device__ __forceinline__ void registers() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (MORE) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(COUNT));
    else asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(COUNT));
#endif
}
#endif

__device__ __forceinline__ int lane() { return thread() & 31; }
__device__ __forceinline__ int warp() { return thread() >> 5; }

// the [16, 16] halves at `rows`, `stride` words a row, in shared memory, as mma takes them
__device__ __forceinline__ void load_a(uint32 (&a)[4], const uint32* rows, int stride) {
    load_a_at(a, rows + (lane() & 15) * stride + (lane() >> 4) * 4);
}
// of rows of 16 halves that lie without gaps, where the two halves of a row are
__device__ __forceinline__ int swapped(int row, int half) { return half ^ (row >> 2 & 1); }

// Bytes that come into shared memory meanwhile: one more arrival at a barrier, whose phase does not end before they are there.
__device__ __forceinline__ void copy(void* to, const void* from, int bytes, uint64* b) {
    arrive_with(b, bytes);
    bulk_copy((float*)to, (const float*)from, bytes, b);
}

// words of other blocks, when they have this tag; word k lies at place(k). All lanes of a warp look until all have theirs.
// The last word counts first: so all are asked for before one is waited for.
template <int COUNT, class Place>
__device__ __forceinline__ void receive(Word (&words)[COUNT], uint32 tag, Place place) {
    for (bool there = false; !there;) {
        uint32 other = 0;
#pragma unroll
        for (int k = 0; k < COUNT; k++) words[k] = look_at(place(k));
#pragma unroll
        for (int k = COUNT; k--;) other = or_differ(other, words[k].tag, tag);
        there = lanes_where(other == 0) == 0xffffffffu;
        if (!there) other_blocks();
    }
}

// Four numbers, rounded to 23 bits, and a bit of a tag after each; likewise
__device__ __forceinline__ uint32 with_bit(float x, uint32 bits) { return ((uint32)as_int(x) + 1 & ~1u) | bits & 1; }
__device__ __forceinline__ void put(uint4* to, float x, float y, float z, float w, uint32 tag) {
    show(to, {with_bit(x, tag), with_bit(y, tag >> 1), with_bit(z, tag >> 2), with_bit(w, tag >> 3)});
}
template <int COUNT, class Place>
__device__ __forceinline__ void receive(float4 (&numbers)[COUNT], uint32 tag, Place place) {
    uint4 words[COUNT];
    for (bool there = false; !there;) {
        uint32 other = 0;
#pragma unroll
        for (int k = 0; k < COUNT; k++) words[k] = seen(place(k));
#pragma unroll
        for (int k = COUNT; k--;) {
            other = or_differ(or_differ(other, words[k].x, tag), words[k].y, tag >> 1);
            other = or_differ(or_differ(other, words[k].z, tag >> 2), words[k].w, tag >> 3);
        }
        there = lanes_where(!(other & 1)) == 0xffffffffu;
        if (!there) other_blocks();
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++)
        numbers[k] = make_float4(as_float(words[k].x & ~1u), as_float(words[k].y & ~1u), as_float(words[k].z & ~1u), as_float(words[k].w & ~1u));
}

// Where the time of a kernel goes that does all of a molecule: with CLOCKS, experiments/speed/stages.py has each block's
// first thread write what begins, and when; names as there. `clocks`: [blocks, CLOCKS, 2].
enum { STAGE_PAIRS, STAGE_FILTERS, STAGE_EXCHANGE, STAGE_MESSAGE, STAGE_VECTORS, STAGE_UPDATE, STAGE_GATE, STAGE_READOUT,
       STAGE_MESSAGE_BACK, STAGE_VECTORS_BACK, STAGE_UPDATE_BACK, STAGE_GATE_BACK, STAGE_PAIRS_BACK, STAGE_END };
#if CLOCKS
#define WITH_CLOCKS , uint32* clocks
#define BEGIN_STAGES int stages = 0
#define STAGE(what) do { \
    if (thread() == 0 && stages < CLOCKS) { \
        uint32* to = clocks + (block() * CLOCKS + stages++) * 2; \
        to[0] = STAGE_##what, to[1] = cycles(); \
    } } while (0)
#else
#define WITH_CLOCKS
#define BEGIN_STAGES
#define STAGE(what)
#endif

// a number as the sum of two halves: 22 bits
__device__ __forceinline__ void split(float x, float y, uint32& high, uint32& low) {
    float hx, hy;
    high = halves(x, y);
    floats(high, hx, hy);
    low = halves(x - hx, y - hy);
}

// Four numbers in three words, each to 16 bits: the first three as they lie there, but for the last byte of each, which has one
// of the fourth; that one's last byte, which no word has room for, is the byte before it. Each is as near as that allows.
// nearest: a number with a given last byte.
__device__ __forceinline__ uint32 nearest(float x, uint32 last_byte) {
    uint32 bits = (uint32)as_int(x), size = bits & 0x7fffffffu;
    size = min(size + 128, 0x7fffffffu);  // what is no number stays none
    return (bits & 0x80000000u) | ((max(size, last_byte) - last_byte) & ~255u) | last_byte;
}
__device__ __forceinline__ void pack(const float (&x)[4], float (&words)[3]) {
    uint32 bits = (uint32)as_int(x[3]), fourth = nearest(x[3], bits >> 8 & 255);
#pragma unroll
    for (int k = 0; k < 3; k++) words[k] = as_float((int)nearest(x[k], fourth >> 8 * (k + 1) & 255));
}
__device__ __forceinline__ float fourth_of(float x, float y, float z) {
    return as_float((int)bytes_of(bytes_of(as_int(x), as_int(y), 0x0400), as_int(z), 0x4210));
}

// a cubic of t, and its slope
__device__ __forceinline__ float cubic(float4 c, float t) { return c.x + t * (c.y + t * (c.z + t * c.w)); }
__device__ __forceinline__ float cubic_slope(float4 c, float t) { return c.y + t * (2.f * c.z + 3.f * t * c.w); }

__device__ __forceinline__ float logistic(float z) { return reciprocal(1.f + exponential(-z)); }
__device__ __forceinline__ float silu_slope(float z, float sigmoid) { return sigmoid * (1.f + z * (1.f - sigmoid)); }
