// The first message of many atoms and its transpose, where what atoms send follows from their elements z:
//     Δs_i = sum_z a_z sum_k C_ak S_zk,  S_zk = sum over the pairs of i with senders of z of B_k(r);
//     Δv_i = sum_z b_z sum_k C_bk V_zk,  V_zk the same with B_k(r) u;
// and of each pair, with P_zk = sum_f C_akf a_zf p_if and Q_zk = sum_f C_bkf b_zf q_if,
//     D = sum_k B_k'(r) (P_zk + u.Q_zk),  U = sum_k B_k(r) Q_zk.
// So a pair costs FUNCTIONS instead of filters; products with C are of atoms. A block has 16 atoms (tiles.cu), a
// warp some of them, a lane functions of the distance; some elements at once, so that products wait for each other rarely.
// Defined from outside: F, FUNCTIONS, HAS_B; BATCH: elements at once.
#define K ((FUNCTIONS + 15) / 16 * 16)  // as products take them: the last ones are zero
#define COLUMNS ((FUNCTIONS + 31) / 32)
#define ROUNDS ((ATOMS + GROUPS - 1) / GROUPS)
#define STRIDE (K / 2 + 4)  // words of a row of K halves in shared memory
#define SMALL (ATOMS * STRIDE)
#define ELEMENTS 128
#define OF_B (HAS_B ? BATCH : 1)  // of vectors
#define AT_ONCE 4  // pairs: with D and U of each, 16 numbers to sum over lanes
#define CHOSEN 64  // pairs of an atom whose places are in shared memory
#define NONE 0xffff

// the pairs of a block's atoms, in shared memory
struct Pairs {
    const int* senders;
    const float* places;
    const float4* basis;
    int n, slots;
    float4* chosen;           // [ATOMS, CHOSEN] t and u of pairs in their order
    int* bytes;               // likewise where their functions are: 0 for none, where zeros are
    int* ends;                // [ATOMS, BATCH] of elements, where their pairs end in that order
    int* batch;               // the elements, ELEMENTS for none
    int* sending;             // by element, whether one sends
    unsigned short* order;    // [ATOMS, slots + AT_ONCE BATCH] slots of pairs by elements, filled up to AT_ONCE of each with NONE
    unsigned char* elements;  // [ATOMS, slots] 1 + z, 0 for pairs that don't count

    // reads the elements; pair_bars: set to 0 for pairs that don't count
    __device__ Pairs(const int* numbers, const int* s, const float* p, const float4* b, int n, int slots, void* memory, void* for_chosen,
                     float* pair_bars) : senders(s), places(p), basis(b), n(n), slots(slots) {
        chosen = (float4*)for_chosen, bytes = (int*)(chosen + ATOMS * CHOSEN);
        ends = (int*)memory, batch = ends + ATOMS * BATCH, sending = batch + BATCH;
        order = (unsigned short*)(sending + ELEMENTS), elements = (unsigned char*)(order + ATOMS * row());
        for (int k = thread(); k < ELEMENTS; k += THREADS) sending[k] = 0;
        sync();
        int all = n * slots, begin = block() * ATOMS * slots, end = min(ATOMS * slots, all - begin);
        constexpr int EACH_TIME = 4;  // asked for at once
        for (int from = thread(); from < ATOMS * slots; from += EACH_TIME * THREADS) {
            bool counts[EACH_TIME];
            int z[EACH_TIME];
#pragma unroll
            for (int k = 0; k < EACH_TIME; k++) {
                int e = begin + min(from + k * THREADS, end - 1);
                counts[k] = from + k * THREADS < end && places[all + e] > 0.f, z[k] = senders[e];
            }
#pragma unroll
            for (int k = 0; k < EACH_TIME; k++) z[k] = numbers[z[k]] % ELEMENTS;
#pragma unroll
            for (int k = 0; k < EACH_TIME; k++) {
                int at = from + k * THREADS;
                if (at >= ATOMS * slots) continue;
                elements[at] = counts[k] ? z[k] + 1 : 0;
                if (counts[k]) sending[z[k]] = 1;
                else if (pair_bars && at < end)
                    for (int axis = 0; axis < 4; axis++) pair_bars[axis * all + begin + at] = 0.f;
            }
        }
        sync();
    }
    __device__ __forceinline__ int row() const { return slots + AT_ONCE * BATCH; }
    // the next element that sends, or ELEMENTS
    __device__ __forceinline__ int after(int z) const {
        for (int k = (z + 1) / 32; k < ELEMENTS / 32; k++) {
            uint32 found = lanes_where(32 * k + lane() > z && sending[32 * k + lane()]);
            if (found) return 32 * k + lowest(found);
        }
        return ELEMENTS;
    }

    // the pairs of this warp's atoms with senders of some elements
    __device__ void choose(const int (&z)[BATCH]) const {
        for (int local = warp(); local < ATOMS; local += GROUPS) {
            unsigned short* at = order + local * row();
            int count = 0;
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                for (int begin = 0; begin < slots && z[k] < ELEMENTS; begin += 32) {
                    int slot = begin + lane();
                    bool mine = slot < slots && elements[local * slots + slot] == z[k] + 1;
                    uint32 lanes = lanes_where(mine);
                    if (mine) at[count + ones(lanes & ((1u << lane()) - 1))] = (unsigned short)slot;
                    count += ones(lanes);
                }
                int whole = (count + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
                if (count + lane() < whole) at[count + lane()] = NONE;
                count = whole;
                if (lane() == 0) ends[local * BATCH + k] = count;
            }
        }
        sync_warp();
    }
    // places of CHOSEN / 2 of an atom's pairs
    __device__ __forceinline__ void stage(int local, int from) const {
        int all = n * slots, entry = from + lane(), to = local * CHOSEN + entry % CHOSEN;
        int slot = entry < ends[local * BATCH + BATCH - 1] ? order[local * row() + entry] : NONE;
        const float* at = places + (block() * ATOMS + local) * slots + slot;
        chosen[to] = make_float4(0.f, 0.f, 0.f, 0.f), bytes[to] = 0;
        if (slot == NONE) return;
        chosen[to] = make_float4(at[0], at[2 * all], at[3 * all], at[4 * all]);
        bytes[to] = (1 + (int)at[5 * all]) * FUNCTIONS * 16;
    }
};

// B of AT_ONCE pairs in this lane: cubics
struct Cubics {
    float4 c[AT_ONCE][COLUMNS];
    __device__ __forceinline__ void read(const Pairs& pairs, const int* bytes) {
#pragma unroll
        for (int q = 0; q < AT_ONCE; q++)
#pragma unroll
            for (int k = 0; k < COLUMNS; k++) {
                c[q][k] = make_float4(0.f, 0.f, 0.f, 0.f);
                if (32 * k + lane() < FUNCTIONS) c[q][k] = *(const float4*)((const char*)(pairs.basis + 32 * k + lane()) + bytes[q]);
            }
    }
};

// Of an atom's pairs with senders of those elements, element by element: begin(k), use(cubics, their places, which of the order)
// for AT_ONCE at a time, end(k). Their places were staged up to CHOSEN.
template <class Begin, class Use, class End>
__device__ __forceinline__ void each(const Pairs& pairs, int local, Begin begin, Use use, End end) {
    const int *ends = pairs.ends + local * BATCH, *bytes = pairs.bytes + local * CHOSEN;
    const float4* chosen = pairs.chosen + local * CHOSEN;
    int all = ends[BATCH - 1], at = 0;
    Cubics next;
    if (all) next.read(pairs, bytes);
#pragma unroll 1
    for (int k = 0; k < BATCH; k++) {
        begin(k);
#pragma unroll 1
        for (int stop = ends[k]; at < stop; at += AT_ONCE) {
            if (at && at % (CHOSEN / 2) == 0 && at + CHOSEN / 2 < all) {
                sync_warp();
                pairs.stage(local, at + CHOSEN / 2);
                sync_warp();
            }
            Cubics now = next;
            if (at + AT_ONCE < all) next.read(pairs, bytes + (at + AT_ONCE) % CHOSEN);
            use(now, chosen + at % CHOSEN, at);
        }
        end(k);
    }
}

// what `each` needs, of all of this warp's atoms, so that nothing is waited for one by one
__device__ __forceinline__ void stage_all(const Pairs& pairs) {
#pragma unroll
    for (int m = 0; m < ROUNDS; m++) {
        if (warp() + m * GROUPS >= ATOMS) continue;
        pairs.stage(warp() + m * GROUPS, 0);
        pairs.stage(warp() + m * GROUPS, CHOSEN / 2);
    }
    sync_warp();
}

// the next elements after the last of these; whether there is one
__device__ __forceinline__ bool next_elements(const Pairs& pairs, int (&z)[BATCH]) {
    int last = z[BATCH - 1];
#pragma unroll
    for (int k = 0; k < BATCH; k++) pairs.batch[k] = last = z[k] = pairs.after(last);
    return z[0] < ELEMENTS;
}

__device__ __forceinline__ Row operator*(const Row& x, const Row& y) {
    Row r;
    EACH r.v[i] = x.v[i] * y.v[i];
    return r;
}

__device__ __forceinline__ Row of_element(const Here& h, const float* x, int z) { return load_shared_row(h, x + z * F, 0, F); }

// a and b of each element, [., F]; b where there is none: not read. Matrices: C of a, C of b; factors undo theirs.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
first_message(const int* __restrict__ senders, const float* __restrict__ places, const int* __restrict__ numbers,
              const float4* __restrict__ basis, const uint4* __restrict__ c_a, const uint4* __restrict__ c_b,
              const float* __restrict__ factors, const float* __restrict__ a, const float* __restrict__ b, int n, int slots,
              float* __restrict__ ds, float* __restrict__ dv) {
    SHARED(uint32, operands);  // S of elements, then V: [BATCH + 3 OF_B, high and low, ATOMS, STRIDE]
    float4* for_chosen = (float4*)(operands + 2 * (BATCH + 3 * OF_B) * SMALL);
    Pairs pairs(numbers, senders, places, basis, n, slots, (float*)for_chosen + 5 * ATOMS * CHOSEN, for_chosen, nullptr);
    Here here(n);
    Row s = {}, v[3] = {};
    float shrink = 1.f, grow = 1.f;  // B is at most 64, a half at most 65504
    while (64.f * slots * shrink > 32768.f) shrink *= 0.5f, grow *= 2.f;
    int z[BATCH];
    for (z[BATCH - 1] = -1; next_elements(pairs, z);) {
        pairs.choose(z);
        stage_all(pairs);
        for (int local = warp(); local < ATOMS; local += GROUPS) {
            float sums[4][COLUMNS] = {};
            auto use = [&](const Cubics& cubics, const float4* places, int) {
#pragma unroll
                for (int q = 0; q < AT_ONCE; q++)
#pragma unroll
                    for (int k = 0; k < COLUMNS; k++) {
                        float4 at = places[q];
                        float value = cubic(cubics.c[q][k], at.x);
                        sums[0][k] += value, sums[1][k] += at.y * value, sums[2][k] += at.z * value, sums[3][k] += at.w * value;
                    }
            };
            auto put = [&](int r, int row) {
#pragma unroll
                for (int k = 0; k < COLUMNS; k++) {
                    uint32 high, low;
                    split(shrink * sums[r][k], 0.f, high, low);
                    unsigned short* at = (unsigned short*)(operands + 2 * row * SMALL + local * STRIDE) + 32 * k + lane();
                    if (32 * k + lane() < K) at[0] = (unsigned short)high, at[2 * SMALL] = (unsigned short)low;
                    sums[r][k] = 0.f;
                }
            };
            each(pairs, local, [](int) {}, use, [&](int k) {
                if (HAS_B && pairs.batch[k] == ELEMENTS) return;
                put(0, k);
                if (HAS_B || k == BATCH - 1)
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) put(1 + axis, BATCH + 3 * (HAS_B ? k : 0) + axis);
            });
        }
        sync();
#pragma unroll 1
        for (int k = 0; k < BATCH; k++) {
            int of = pairs.batch[k];
            if (of >= ELEMENTS) break;
            float scalar[1][1][2][4] = {};
            accumulate<1, 1, K, 1, F, STRIDE>(scalar, operands + 2 * k * SMALL, c_a);
            Row x = of_element(here, a, of) * as_row(scalar[0][0], grow * factors[0], grow * factors[0]);
            EACH s.v[i] += x.v[i];
            if (!HAS_B && k) continue;
            float vector[3][1][2][4] = {};
            accumulate<3, 1, K, 1, F, STRIDE>(vector, operands + 2 * (BATCH + 3 * k) * SMALL, c_b);
#pragma unroll
            for (int axis = 0; axis < 3; axis++) {
                x = as_row(vector[axis][0], grow * factors[1], grow * factors[1]);
                if (HAS_B) x = of_element(here, b, of) * x;
                EACH v[axis].v[i] += x.v[i];
            }
        }
        sync();
    }
    store_row(here, ds, F, 0, F, s);
#pragma unroll
    for (int axis = 0; axis < 3; axis++) store_row(here, dv, 3 * F, axis * F, F, v[axis]);
}

// 16 columns of a row of K numbers of each atom
__device__ __forceinline__ void keep(const Here& h, float* rows, int part, const Row& r) {
#pragma unroll
    for (int k = 0; k < 2; k++)
        *(float4*)(rows + (h.local + 8 * k) * K + 16 * part + 4 * (lane() & 3)) = make_float4(r.v[4 * k], r.v[4 * k + 1], r.v[4 * k + 2], r.v[4 * k + 3]);
}

// sums over this lane and the one with another bit of the mask: of 2 KEPT numbers either keeps half
template <int KEPT>
__device__ __forceinline__ void fold(float (&x)[4 * AT_ONCE], int mask) {
    bool upper = lane() & mask;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        float send = upper ? x[k] : x[k + KEPT];
        x[k] = (upper ? x[k + KEPT] : x[k]) + from_lane(send, mask);
    }
}

// Of each pair (i, j) [D, -U_xyz], the half that belongs to what j sends to i. Matrices: of each element a C and, with b,
// b C, or else C, all transposed.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
first_transpose(const int* __restrict__ senders, const float* __restrict__ places, const int* __restrict__ numbers,
                const float4* __restrict__ basis, const uint4* __restrict__ of_a, const uint4* __restrict__ of_b,
                const float* __restrict__ factors, const float* __restrict__ p, const float* __restrict__ q, int n, int slots,
                float* __restrict__ pair_bars) {
    constexpr int PARTS = K / 16, COLUMN = F / 16 * 64;  // words of 16 columns of a matrix, by four
    SHARED(uint32, operands);  // rows of F, [4, high and low, ATOMS, WORDS]; when they are no longer needed, places of pairs
    float* above = (float*)(operands + max(8 * HALF, 5 * ATOMS * CHOSEN));  // P of elements, [BATCH, ATOMS, K]
    float* above_q = above + BATCH * ATOMS * K;                            // [OF_B, 3, ATOMS, K]
    int* maxima = (int*)(above_q + OF_B * 3 * ATOMS * K);                  // of p's rows, of q's
    Pairs pairs(numbers, senders, places, basis, n, slots, maxima + 2 * ATOMS, operands, pair_bars);
    Here here(n);
    int z[BATCH];
    for (z[BATCH - 1] = -1; next_elements(pairs, z);) {
        if (thread() < 2 * ATOMS) maxima[thread()] = 0;
        Row own[4];
        own[0] = load_row(here, p, F, 0, F);
#pragma unroll
        for (int axis = 0; axis < 3; axis++) own[1 + axis] = load_row(here, q, 3 * F, axis * F, F);
        sync();
        largest(here, maxima, F, own[0]);
        largest(here, maxima + ATOMS, F, own[1], own[2], own[3]);
        sync();
        Scale of_p(here, maxima), of_q(here, maxima + ATOMS);
        put_row(here, operands, of_p, own[0], F);
#pragma unroll
        for (int axis = 0; axis < 3; axis++) put_row(here, operands + 2 * (1 + axis) * HALF, of_q, own[1 + axis], F);
        pairs.choose(z);
        sync();
#pragma unroll 1
        for (int job = warp(); job < BATCH * PARTS; job += GROUPS) {
            int k = job / PARTS, part = job % PARTS, of = pairs.batch[k];
            if (of >= ELEMENTS) break;
            float scalar[1][1][2][4] = {};  // columns of a warp's own are 16 warp() and on
            accumulate<1, 1, F, 1, F>(scalar, operands, of_a + (of * PARTS + part - warp()) * COLUMN);
            keep(here, above + k * ATOMS * K, part, as_row(scalar[0][0], factors[2] * of_p.down(0), factors[2] * of_p.down(1)));
            if (!HAS_B && k) continue;
            float vector[3][1][2][4] = {};
            accumulate<3, 1, F, 1, F>(vector, operands + 2 * HALF, of_b + ((HAS_B ? of : 0) * PARTS + part - warp()) * COLUMN);
#pragma unroll
            for (int axis = 0; axis < 3; axis++)
                keep(here, above_q + (3 * k + axis) * ATOMS * K, part, as_row(vector[axis][0], factors[3] * of_q.down(0), factors[3] * of_q.down(1)));
        }
        sync();
        stage_all(pairs);
        for (int local = warp(); local < ATOMS; local += GROUPS) {
            float g[4][COLUMNS];
            auto begin = [&](int of) {
#pragma unroll
                for (int k = 0; k < COLUMNS; k++) {
                    int column = local * K + min(32 * k + lane(), K - 1);
                    g[0][k] = above[of * ATOMS * K + column];
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) g[1 + axis][k] = above_q[(3 * (HAS_B ? of : 0) + axis) * ATOMS * K + column];
                }
            };
            each(pairs, local, begin, [&](const Cubics& cubics, const float4* places, int from) {
                float x[4 * AT_ONCE] = {};  // D and -U of each
#pragma unroll
                for (int m = 0; m < AT_ONCE; m++)
#pragma unroll
                    for (int k = 0; k < COLUMNS; k++) {
                        float4 c = cubics.c[m][k], at = places[m];
                        float value = cubic(c, at.x), slope = cubic_slope(c, at.x);
                        x[4 * m] += slope * (g[0][k] + at.y * g[1][k] + at.z * g[2][k] + at.w * g[3][k]);
                        x[4 * m + 1] -= value * g[1][k], x[4 * m + 2] -= value * g[2][k], x[4 * m + 3] -= value * g[3][k];
                    }
                // sums over lanes; lane 2 k, and 2 k + 1, gets the k-th
                fold<8>(x, 16), fold<4>(x, 8), fold<2>(x, 4), fold<1>(x, 2);
                x[0] += from_lane(x[0], 1);
                int slot = pairs.order[local * pairs.row() + from + lane() / 8];
                if (slot != NONE && lane() % 2 == 0)
                    pair_bars[lane() / 2 % 4 * n * slots + (block() * ATOMS + local) * slots + slot] = x[0];
            }, [](int) {});
        }
    }
}
