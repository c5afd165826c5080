// The first message of many atoms and its transpose, where what atoms send follows from their elements z:
//     Δs_i = sum_z a_z sum_k C_ak S_zk,  S_zk = sum over the pairs of i with senders of z of B_k(r);
//     Δv_i = sum_z b_z sum_k C_bk V_zk,  V_zk the same with B_k(r) u;
// and of each pair, with P_zk = sum_f C_akf a_zf p_if and Q_zk = sum_f C_bkf b_zf q_if,
//     D = sum_k B_k'(r) (P_zk + u.Q_zk),  U = sum_k B_k(r) Q_zk.
// So a pair costs FUNCTIONS instead of filters; products with C are of atoms. A block has 16 atoms (tiles.cu), a
// warp some of them; of four pairs at a time eight lanes have one each, a lane every eighth function of the distance. Some
// elements at once, so that products wait for each other rarely.
// Defined from outside: F, FUNCTIONS, HAS_B; BATCH: elements at once; BESIDE: whether D and U of a pair lie side by side.
#define K ((FUNCTIONS + 15) / 16 * 16)  // as products take them: the last ones are zero
#define EACH_LANE ((FUNCTIONS + 7) / 8)  // functions
#define AHEAD (EACH_LANE <= 4)           // whether there is room to ask for the next pairs' functions early
#define ROUNDS ((ATOMS + GROUPS - 1) / GROUPS)
#define STRIDE (K / 2 + 4)  // words of a row of K halves in shared memory
#define SMALL (ATOMS * STRIDE)
#define ELEMENTS 128
#define OF_B (HAS_B ? BATCH : 1)  // of vectors
#define AT_ONCE 4  // pairs
#define CHOSEN 64  // pairs of an atom whose places are in shared memory
#define NONE 0xffff

__device__ __forceinline__ int place_of_bar(int pair, int row, int all) { return BESIDE ? 4 * pair + row : row * all + pair; }

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
            for (int k = 0; k < EACH_TIME; k++) z[k] = numbers[counts[k] ? z[k] : 0] % ELEMENTS;
#pragma unroll
            for (int k = 0; k < EACH_TIME; k++) {
                int at = from + k * THREADS;
                if (at >= ATOMS * slots) continue;
                elements[at] = counts[k] ? z[k] + 1 : 0;
                if (counts[k]) sending[z[k]] = 1;
                else if (pair_bars && at < end)
                    for (int row = 0; row < 4; row++) pair_bars[place_of_bar(begin + at, row, all)] = 0.f;
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
            const unsigned char* of = elements + local * slots;
            int count[BATCH] = {}, before = 0;
            for (int begin = 0; begin < slots; begin += 32) {
                int found = begin + lane() < slots ? of[begin + lane()] : 0;
#pragma unroll
                for (int k = 0; k < BATCH; k++) count[k] += ones(lanes_where(found == z[k] + 1));
            }
            unsigned short* at = order + local * row();
#pragma unroll
            for (int k = 0; k < BATCH; k++) {
                int whole = (count[k] + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
                if (lane() < whole - count[k]) at[before + count[k] + lane()] = NONE;
                count[k] = before, before += whole;
                if (lane() == 0) ends[local * BATCH + k] = before;
            }
            for (int begin = 0; begin < slots; begin += 32) {
                int found = begin + lane() < slots ? of[begin + lane()] : 0;
#pragma unroll
                for (int k = 0; k < BATCH; k++) {
                    uint32 lanes = lanes_where(found == z[k] + 1);
                    if (found == z[k] + 1) at[count[k] + ones(lanes & ((1u << lane()) - 1))] = (unsigned short)(begin + lane());
                    count[k] += ones(lanes);
                }
            }
        }
        sync_warp();
    }
    // places of CHOSEN / 2 of an atom's pairs, which are asked for first
    struct Places {
        float4 t_u;
        float interval;  // -1: no pair
    };
    __device__ __forceinline__ Places ask(int local, int from) const {
        int all = n * slots, entry = from + lane();
        int slot = entry < ends[local * BATCH + BATCH - 1] ? order[local * row() + entry] : NONE;
        Places r = {make_float4(0.f, 0.f, 0.f, 0.f), -1.f};
        if (slot == NONE) return r;
        const float* at = places + (block() * ATOMS + local) * slots + slot;
        return {make_float4(at[0], at[2 * all], at[3 * all], at[4 * all]), at[5 * all]};
    }
    __device__ __forceinline__ void keep(int local, int from, const Places& x) const {
        int to = local * CHOSEN + (from + lane()) % CHOSEN;
        chosen[to] = x.t_u, bytes[to] = (1 + (int)x.interval) * FUNCTIONS * 16;
    }
    // what `each` needs to begin with, of all of this warp's atoms, so that nothing is waited for one by one
    __device__ __forceinline__ void begin_all() const {
        Places found[ROUNDS][2];
#pragma unroll
        for (int m = 0; m < 2 * ROUNDS; m++)
            if (warp() + m / 2 * GROUPS < ATOMS) found[m / 2][m % 2] = ask(warp() + m / 2 * GROUPS, m % 2 * CHOSEN / 2);
#pragma unroll
        for (int m = 0; m < 2 * ROUNDS; m++)
            if (warp() + m / 2 * GROUPS < ATOMS) keep(warp() + m / 2 * GROUPS, m % 2 * CHOSEN / 2, found[m / 2][m % 2]);
        sync_warp();
    }
};

// B of this lane's pair of AT_ONCE: cubics of every eighth function
struct Cubics {
    float4 c[EACH_LANE];
    __device__ __forceinline__ void read(const Pairs& pairs, const int* bytes) {
        const float4* from = (const float4*)((const char*)(pairs.basis + lane() % 8) + bytes[lane() / 8]);
#pragma unroll
        for (int k = 0; k < EACH_LANE; k++) {
            c[k] = make_float4(0.f, 0.f, 0.f, 0.f);
            if (8 * k + 8 <= FUNCTIONS || 8 * k + lane() % 8 < FUNCTIONS) c[k] = from[8 * k];
        }
    }
};

// Of an atom's pairs with senders of those elements, element by element: begin(k), use(cubics, this lane's pair's t and u, which of
// the order are these AT_ONCE), end(k). `begin_all` came before.
template <class Begin, class Use, class End>
__device__ __forceinline__ void each(const Pairs& pairs, int local, Begin begin, Use use, End end) {
    const int *ends = pairs.ends + local * BATCH, *bytes = pairs.bytes + local * CHOSEN;
    const float4* chosen = pairs.chosen + local * CHOSEN + lane() / 8;
    int all = ends[BATCH - 1], at = 0;
    Cubics next;
    if (AHEAD && all) next.read(pairs, bytes);
#pragma unroll 1
    for (int k = 0; k < BATCH; k++) {
        begin(k);
#pragma unroll 1
        for (int stop = ends[k]; at < stop; at += AT_ONCE) {
            if (at && at % (CHOSEN / 2) == 0 && at + CHOSEN / 2 < all) {
                sync_warp();
                pairs.keep(local, at + CHOSEN / 2, pairs.ask(local, at + CHOSEN / 2));
                sync_warp();
            }
            Cubics now = next;
            if (!AHEAD) now.read(pairs, bytes + at % CHOSEN);
            else if (at + AT_ONCE < all) next.read(pairs, bytes + (at + AT_ONCE) % CHOSEN);
            use(now, chosen[at % CHOSEN], at);
        }
        end(k);
    }
}

// sums over this lane and the one with another bit of the mask: of 2 KEPT numbers either keeps half
template <int KEPT, int COUNT>
__device__ __forceinline__ void fold(float (&x)[COUNT], int mask) {
    bool upper = lane() & mask;
#pragma unroll
    for (int k = 0; k < KEPT; k++) {
        float send = upper ? x[k] : x[k + KEPT];
        x[k] = (upper ? x[k + KEPT] : x[k]) + from_lane(send, mask);
    }
}

// the next elements after the last of these; whether there is one
__device__ __forceinline__ bool next_elements(const Pairs& pairs, int (&z)[BATCH]) {
    int last = z[BATCH - 1];
#pragma unroll
    for (int k = 0; k < BATCH; k++) pairs.batch[k] = last = z[k] = pairs.after(last);
    return z[0] < ELEMENTS;
}

// Halves, into rows of K, of sums over the lanes of all pairs, and zeros after them: x[4 m + r] is of row(4 m + r) and function(...)
template <int COUNT, class Row, class Function>
__device__ __forceinline__ void put_sums(uint32* operands, int local, float factor, float (&x)[COUNT], Row row, Function function) {
#pragma unroll
    for (int m = 0; m < COUNT; m += 4) {
        float four[4];
#pragma unroll
        for (int r = 0; r < 4; r++) four[r] = m + r < COUNT ? factor * x[m + r] : 0.f;
        fold<2>(four, 16), fold<1>(four, 8);
        int of = m + lane() / 8;
        if (of >= COUNT) continue;
        uint32 high, low;
        split(four[0], 0.f, high, low);
        unsigned short* at = (unsigned short*)(operands + 2 * row(of) * SMALL + local * STRIDE) + 8 * function(of) + lane() % 8;
        at[0] = (unsigned short)high, at[2 * SMALL] = (unsigned short)low;
    }
#pragma unroll
    for (int k = 0; k < COUNT; k++) x[k] = 0.f;
}

// what this thread stored, which a read that takes no place in L1 might miss
__device__ __forceinline__ void add_stored(const Here& h, Row& r, const float* x, int stride, int offset) {
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (h.has(k, F)) add_four(r, k, x + (long long)(h.atom + 8 * k) * stride + offset + h.channel);
}

// Matrices: of each element a C and, with b, b C, or else C; factors undo theirs.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
first_message(const int* __restrict__ senders, const float* __restrict__ places, const int* __restrict__ numbers,
              const float4* __restrict__ basis, const uint4* __restrict__ of_a, const uint4* __restrict__ of_b,
              const float* __restrict__ factors, int n, int slots, float* ds, float* dv) {
    constexpr int MATRIX = F / 16 * (K / 16) * 64;
    SHARED(uint32, memory);
    uint32* operands = in_register(memory);  // S of elements, then V: [BATCH + 3 OF_B, high and low, ATOMS, STRIDE]
    float4* for_chosen = (float4*)(operands + 2 * (BATCH + 3 * OF_B) * SMALL);
    Pairs pairs(numbers, senders, places, basis, n, slots, (float*)for_chosen + 5 * ATOMS * CHOSEN, for_chosen, nullptr);
    Here here(n);
    float shrink = 1.f, grow = 1.f;  // B is at most 64, a half at most 65504
    while (64.f * slots * shrink > 32768.f) shrink *= 0.5f, grow *= 2.f;
    for (int k = thread(); k < (BATCH + 3 * OF_B) * SMALL / 2; k += THREADS) ((uint4*)operands)[k] = {0, 0, 0, 0};  // where no functions are
    sync();
    bool first = true;
    int z[BATCH];
    for (z[BATCH - 1] = -1; next_elements(pairs, z) || first; first = false) {
        pairs.choose(z);
        pairs.begin_all();
        for (int local = warp(); local < ATOMS; local += GROUPS) {
            float sums[4 * EACH_LANE] = {};  // of S and V by turns
            auto use = [&](const Cubics& cubics, float4 at, int) {
#pragma unroll
                for (int k = 0; k < EACH_LANE; k++) {
                    float value = cubic(cubics.c[k], at.x);
                    sums[4 * k] += value, sums[4 * k + 1] += at.y * value, sums[4 * k + 2] += at.z * value, sums[4 * k + 3] += at.w * value;
                }
            };
            each(pairs, local, [](int) {}, use, [&](int k) {
                if (HAS_B) {
                    if (pairs.batch[k] == ELEMENTS) return;
                    put_sums(operands, local, shrink, sums, [&](int of) { return of % 4 ? BATCH + 3 * k + of % 4 - 1 : k; }, [](int of) { return of / 4; });
                    return;
                }
                float scalars[EACH_LANE], vectors[3 * EACH_LANE];
#pragma unroll
                for (int f = 0; f < EACH_LANE; f++) {
                    scalars[f] = sums[4 * f], sums[4 * f] = 0.f;
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) vectors[3 * f + axis] = sums[4 * f + 1 + axis];
                }
                put_sums(operands, local, shrink, scalars, [&](int) { return k; }, [](int of) { return of; });
                if (k == BATCH - 1) put_sums(operands, local, shrink, vectors, [](int of) { return BATCH + of % 3; }, [](int of) { return of / 3; });
            });
        }
        sync();
        float scalar[1][1][2][4] = {}, vector[3][1][2][4] = {};
#pragma unroll 1
        for (int k = 0; k < BATCH; k++) {
            int of = pairs.batch[k];
            if (of >= ELEMENTS) break;
            accumulate<1, 1, K, 1, F, STRIDE>(scalar, operands + 2 * k * SMALL, of_a + of * MATRIX);
            if (HAS_B || k == 0) accumulate<3, 1, K, 1, F, STRIDE>(vector, operands + 2 * (BATCH + 3 * k) * SMALL, of_b + (HAS_B ? of : 0) * MATRIX);
        }
        Row x = as_row(scalar[0][0], grow * factors[0], grow * factors[0]);
        if (!first) add_stored(here, x, ds, F, 0);
        store_row(here, ds, F, 0, F, x);
#pragma unroll
        for (int axis = 0; axis < 3; axis++) {
            x = as_row(vector[axis][0], grow * factors[1], grow * factors[1]);
            if (!first) add_stored(here, x, dv, 3 * F, axis * F);
            store_row(here, dv, 3 * F, axis * F, F, x);
        }
        sync();
    }
}

// 16 columns of a row of K numbers of each atom
__device__ __forceinline__ void keep(const Here& h, float* rows, int part, const Row& r) {
#pragma unroll
    for (int k = 0; k < 2; k++)
        *(float4*)(rows + (h.local + 8 * k) * K + 16 * part + 4 * (lane() & 3)) = make_float4(r.v[4 * k], r.v[4 * k + 1], r.v[4 * k + 2], r.v[4 * k + 3]);
}

// Of each pair (i, j) [D, -U_xyz], the half that belongs to what j sends to i. Matrices: those, transposed.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
first_transpose(const int* __restrict__ senders, const float* __restrict__ places, const int* __restrict__ numbers,
                const float4* __restrict__ basis, const uint4* __restrict__ of_a, const uint4* __restrict__ of_b,
                const float* __restrict__ factors, const float* __restrict__ p, const float* __restrict__ q, int n, int slots,
                float* __restrict__ pair_bars) {
    constexpr int PARTS = K / 16, COLUMN = F / 16 * 64;  // words of 16 columns of a matrix, by four
    SHARED(uint32, memory);
    uint32* operands = in_register(memory);  // rows of F, [4, high and low, ATOMS, WORDS]; when they are no longer needed, places of pairs
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
        pairs.begin_all();
        for (int local = warp(); local < ATOMS; local += GROUPS) {
            float g[4][EACH_LANE];
            auto begin = [&](int of) {
#pragma unroll
                for (int k = 0; k < EACH_LANE; k++) {
                    int column = local * K + 8 * k + lane() % 8;
                    g[0][k] = above[of * ATOMS * K + column];
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) g[1 + axis][k] = above_q[(3 * (HAS_B ? of : 0) + axis) * ATOMS * K + column];
                }
            };
            each(pairs, local, begin, [&](const Cubics& cubics, float4 at, int from) {
                float x[4] = {};  // D and -U
#pragma unroll
                for (int k = 0; k < EACH_LANE; k++) {
                    float4 c = cubics.c[k];
                    float value = cubic(c, at.x), slope = cubic_slope(c, at.x);
                    x[0] += slope * (g[0][k] + at.y * g[1][k] + at.z * g[2][k] + at.w * g[3][k]);
                    x[1] -= value * g[1][k], x[2] -= value * g[2][k], x[3] -= value * g[3][k];
                }
                // sums over a pair's lanes; lane 2 k, and 2 k + 1, gets the k-th of all pairs'
                fold<2>(x, 4), fold<1>(x, 2);
                x[0] += from_lane(x[0], 1);
                int slot = pairs.order[local * pairs.row() + from + lane() / 8];
                if (slot != NONE && lane() % 2 == 0)
                    pair_bars[place_of_bar((block() * ATOMS + local) * slots + slot, lane() / 2 % 4, n * slots)] = x[0];
            }, [](int) {});
        }
    }
}
