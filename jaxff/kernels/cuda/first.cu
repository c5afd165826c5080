// The first message of many atoms and its transpose, where what atoms send follows from their elements z:
//     Δs_i = sum_z a_z sum_k C_ak S_zk,  S_zk = sum over the pairs of i with senders of z of B_k(r);
//     Δv_i = sum_z b_z sum_k C_bk V_zk,  V_zk the same with B_k(r) u;
// and of each pair, with P_zk = sum_f C_akf a_zf p_if and Q_zk = sum_f C_bkf b_zf q_if,
//     D = sum_k B_k'(r) (P_zk + u.Q_zk),  U = sum_k B_k(r) Q_zk.
// So a pair costs FUNCTIONS instead of filters; products with C are of atoms. A block has 16 atoms (tiles.cu), a
// warp some of them, a lane functions of the distance.
// Defined from outside: F, FUNCTIONS, HAS_B.
#define K ((FUNCTIONS + 15) / 16 * 16)  // as products take them: the last ones are zero
#define COLUMNS ((FUNCTIONS + 31) / 32)
#define ROUNDS ((ATOMS + GROUPS - 1) / GROUPS)
#define STRIDE (K / 2 + 4)  // words of a row of K halves in shared memory
#define SMALL (ATOMS * STRIDE)
#define ELEMENTS 128
#define AT_ONCE 4  // pairs: with D and U of each, 16 numbers to sum over lanes

struct Pairs {
    const int* senders;
    const float* places;
    const float4* basis;
    int n, slots;
    float4* chosen;           // of this warp: t and u of 32 pairs, their intervals, and slots of pairs
    int* sending;             // by element, whether one sends
    unsigned char* elements;  // of these 16 atoms' pairs 1 + z, 0 for pairs that don't count
    __device__ __forceinline__ int* intervals() const { return (int*)(chosen + 32); }
    __device__ __forceinline__ unsigned short* chosen_slots() const { return (unsigned short*)(chosen + 40); }

    // reads the elements; pair_bars: set to 0 for pairs that don't count
    __device__ Pairs(const int* numbers, const int* s, const float* p, const float4* b, int n, int slots, void* memory, float* pair_bars)
        : senders(s), places(p), basis(b), n(n), slots(slots) {
        int each = 40 + (slots + 7) / 8;  // 16 bytes
        chosen = (float4*)memory + each * warp(), sending = (int*)((float4*)memory + each * GROUPS);
        elements = (unsigned char*)(sending + ELEMENTS);
        for (int k = thread(); k < ELEMENTS; k += THREADS) sending[k] = 0;
        sync();
        int all = n * slots;
        for (int k = thread(); k < ATOMS * slots; k += THREADS) {
            int e = block() * ATOMS * slots + k;
            bool counts = e < all && places[all + e] > 0.f;
            int z = counts ? numbers[senders[e]] % ELEMENTS : 0;
            elements[k] = counts ? z + 1 : 0;
            if (counts) sending[z] = 1;
            else if (pair_bars && e < all)
                for (int row = 0; row < 4; row++) pair_bars[row * all + e] = 0.f;
        }
        sync();
    }
    // the next element that sends, or -1
    __device__ __forceinline__ int after(int z) const {
        for (int k = (z + 1) / 32; k < ELEMENTS / 32; k++) {
            uint32 found = lanes_where(32 * k + lane() > z && sending[32 * k + lane()]);
            if (found) return 32 * k + lowest(found);
        }
        return -1;
    }
};

struct Some {  // AT_ONCE pairs, some of which may be none: coefficients of B in this lane (zeros for none), t and u
    int slot;  // of the pair that this lane stores, -1 for none: an equal part of the lanes for each
    float4 c[AT_ONCE][COLUMNS], t_u[AT_ONCE];
};

// use(Some) for all pairs of an atom whose senders have element z
template <class Use>
__device__ __forceinline__ void each(const Pairs& pairs, int local, int z, Use use) {
    int all = pairs.n * pairs.slots, start = (block() * ATOMS + local) * pairs.slots, count = 0;
    for (int begin = 0; begin < pairs.slots; begin += 32) {
        int slot = begin + lane();
        bool mine = slot < pairs.slots && pairs.elements[local * pairs.slots + slot] == z + 1;
        uint32 lanes = lanes_where(mine);
        if (mine) pairs.chosen_slots()[count + ones(lanes & ((1u << lane()) - 1))] = (unsigned short)slot;
        count += ones(lanes);
    }
    for (int begin = 0; begin < count; begin += 32) {
        sync_warp();
        int slot = begin + lane() < count ? pairs.chosen_slots()[begin + lane()] : -1;
        if (slot >= 0) {
            const float* at = pairs.places + start + slot;
            pairs.chosen[lane()] = make_float4(at[0], at[2 * all], at[3 * all], at[4 * all]);
            pairs.intervals()[lane()] = (int)at[5 * all];
        }
        sync_warp();
        for (int first = 0; first < min(32, count - begin); first += AT_ONCE) {
            Some some;
            some.slot = of_lane(slot, first + lane() / (32 / AT_ONCE));
#pragma unroll
            for (int q = 0; q < AT_ONCE; q++) {
                bool is_one = begin + first + q < count;
#pragma unroll
                for (int k = 0; k < COLUMNS; k++) {
                    some.c[q][k] = make_float4(0.f, 0.f, 0.f, 0.f);
                    int function = 32 * k + lane();
                    if (is_one && function < FUNCTIONS) some.c[q][k] = pairs.basis[pairs.intervals()[first + q] * FUNCTIONS + function];
                }
                some.t_u[q] = is_one ? pairs.chosen[first + q] : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            use(some);
        }
    }
    sync_warp();
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
    SHARED(uint32, operands);  // S and V of an element: [4 rows, high and low, ATOMS, STRIDE]
    Pairs pairs(numbers, senders, places, basis, n, slots, operands + 8 * SMALL, nullptr);
    Here here(n);
    Row s = {}, v[3] = {};
    float sums[ROUNDS][4][COLUMNS] = {}, shrink = 1.f;  // B is at most 64, a half at most 65504
    while (64.f * slots * shrink > 32768.f) shrink *= 0.5f;
    for (int z = pairs.after(-1), next; z >= 0; z = next) {
        next = pairs.after(z);
        bool vectors = HAS_B || next < 0;
#pragma unroll
        for (int m = 0; m < ROUNDS; m++) {
            int local = warp() + m * GROUPS;
            if (local >= ATOMS) continue;
            each(pairs, local, z, [&](const Some& some) {
#pragma unroll
                for (int q = 0; q < AT_ONCE; q++)
#pragma unroll
                    for (int k = 0; k < COLUMNS; k++) {
                        float4 c = some.c[q][k], at = some.t_u[q];
                        float value = cubic(c, at.x);
                        sums[m][0][k] += value, sums[m][1][k] += at.y * value;
                        sums[m][2][k] += at.z * value, sums[m][3][k] += at.w * value;
                    }
            });
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int k = 0; k < COLUMNS; k++) {
                    if (r && !vectors) continue;
                    uint32 high, low;
                    split(shrink * sums[m][r][k], 0.f, high, low);
                    unsigned short* at = (unsigned short*)(operands + 2 * r * SMALL + local * STRIDE) + 32 * k + lane();
                    if (32 * k + lane() < K) at[0] = (unsigned short)high, at[2 * SMALL] = (unsigned short)low;
                    sums[m][r][k] = 0.f;
                }
        }
        sync();
        float scalar[1][1][2][4] = {};
        accumulate<1, 1, K, 1, F, STRIDE>(scalar, operands, c_a);
        Row x = of_element(here, a, z) * as_row(scalar[0][0], factors[0] / shrink, factors[0] / shrink);
        EACH s.v[i] += x.v[i];
        if (vectors) {
            float vector[3][1][2][4] = {};
            accumulate<3, 1, K, 1, F, STRIDE>(vector, operands + 2 * SMALL, c_b);
#pragma unroll
            for (int axis = 0; axis < 3; axis++) {
                x = as_row(vector[axis][0], factors[1] / shrink, factors[1] / shrink);
                if (HAS_B) x = of_element(here, b, z) * x;
                EACH v[axis].v[i] += x.v[i];
            }
        }
        sync();
    }
    store_row(here, ds, F, 0, F, s);
#pragma unroll
    for (int axis = 0; axis < 3; axis++) store_row(here, dv, 3 * F, axis * F, F, v[axis]);
}

// a row of K numbers of each atom
__device__ __forceinline__ void keep(const Here& h, float* at, const Row& r) {
    if (h.channel >= K) return;
#pragma unroll
    for (int k = 0; k < 8; k++) at[(h.local + 8 * (k / 4)) * 4 * K + h.channel + k % 4] = r.v[k];
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

// Of each pair (i, j) [D, -U_xyz], the half that belongs to what j sends to i. Matrices: C of a and of b, transposed.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
first_transpose(const int* __restrict__ senders, const float* __restrict__ places, const int* __restrict__ numbers,
                const float4* __restrict__ basis, const uint4* __restrict__ c_a, const uint4* __restrict__ c_b,
                const float* __restrict__ factors, const float* __restrict__ p, const float* __restrict__ q,
                const float* __restrict__ a, const float* __restrict__ b, int n, int slots, float* __restrict__ pair_bars) {
    SHARED(uint32, operands);  // rows of F
    float* above = (float*)(operands + 8 * HALF);  // [ATOMS, P and Q, K]
    int* maxima = (int*)(above + 4 * ATOMS * K);   // of p's rows, of q's
    Pairs pairs(numbers, senders, places, basis, n, slots, maxima + 2 * ATOMS, pair_bars);
    Here here(n);
    Row own[4];
    own[0] = load_row(here, p, F, 0, F);
#pragma unroll
    for (int axis = 0; axis < 3; axis++) own[1 + axis] = load_row(here, q, 3 * F, axis * F, F);
    bool vectors = true;
    for (int z = pairs.after(-1); z >= 0; z = pairs.after(z), vectors = HAS_B) {
        if (thread() < ATOMS * (1 + vectors)) maxima[thread()] = 0;
        sync();
        Row x = of_element(here, a, z) * own[0], y[3] = {own[1], own[2], own[3]};
        if (HAS_B) {
            Row of_b = of_element(here, b, z);
#pragma unroll
            for (int axis = 0; axis < 3; axis++) y[axis] = of_b * y[axis];
        }
        largest(here, maxima, F, x);
        if (vectors) largest(here, maxima + ATOMS, F, y[0], y[1], y[2]);
        sync();
        Scale of_p(here, maxima), of_q(here, maxima + ATOMS);
        put_row(here, operands, of_p, x, F);
        if (vectors)
#pragma unroll
            for (int axis = 0; axis < 3; axis++) put_row(here, operands + 2 * (1 + axis) * HALF, of_q, y[axis], F);
        sync();
        Row scalar[1][1];
        multiply<1, 1, F, 1, K>(scalar, operands, of_p, c_a, factors[2]);
        keep(here, above, scalar[0][0]);
        if (vectors) {
            Row vector[3][1];
            multiply<3, 1, F, 1, K>(vector, operands + 2 * HALF, of_q, c_b, factors[3]);
#pragma unroll
            for (int axis = 0; axis < 3; axis++) keep(here, above + (1 + axis) * K, vector[axis][0]);
        }
        sync();
        for (int local = warp(); local < ATOMS; local += GROUPS) {
            float g[4][COLUMNS];
#pragma unroll
            for (int r = 0; r < 4; r++)
#pragma unroll
                for (int k = 0; k < COLUMNS; k++) g[r][k] = 32 * k + lane() < K ? above[(4 * local + r) * K + 32 * k + lane()] : 0.f;
            each(pairs, local, z, [&](const Some& some) {
                float x[4 * AT_ONCE] = {};  // D and -U of each
#pragma unroll
                for (int m = 0; m < AT_ONCE; m++)
#pragma unroll
                    for (int k = 0; k < COLUMNS; k++) {
                        float4 c = some.c[m][k], at = some.t_u[m];
                        float value = cubic(c, at.x), slope = cubic_slope(c, at.x);
                        x[4 * m] += slope * (g[0][k] + at.y * g[1][k] + at.z * g[2][k] + at.w * g[3][k]);
                        x[4 * m + 1] -= value * g[1][k], x[4 * m + 2] -= value * g[2][k], x[4 * m + 3] -= value * g[3][k];
                    }
                // sums over lanes; lane 2 k, and 2 k + 1, gets the k-th
                fold<8>(x, 16), fold<4>(x, 8), fold<2>(x, 4), fold<1>(x, 2);
                x[0] += from_lane(x[0], 1);
                if (some.slot >= 0 && lane() % 2 == 0)
                    pair_bars[lane() / 2 % 4 * n * slots + (block() * ATOMS + local) * slots + some.slot] = x[0];
            });
        }
        sync();
    }
}
