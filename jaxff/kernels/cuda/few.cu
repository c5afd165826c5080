// Message sums over all pairs of few molecules of M atoms, and their transpose: jaxff.kernels.message with its tables.
//
// A block serves OWN channels of one molecule, few, so that blocks fill the GPU. First each thread makes filters of
// some pairs, two channels of them; they wait in shared memory, where both ends of a pair find them: in the second half
// PARTS threads share the sums of one channel of an atom. Pairs are counted by rounds: in round k, atom i meets atom (i + k) mod M.
// The code is short, as each block runs it once, and the next kernel displaces it.
// Then comes a phase that needs no other channels, or the sums are stored: lines for cut.cu, as macros: what they ask for
// before the sums are there, THEN_ASKS, and THEN; their arguments THEN_TAKES and THEN_MAKES.
// Defined from outside: THREADS, F, M, OWN, ATOMS, PARTS, HAS_B and HAS_Y (jaxff.kernels.message.Sources), TRANSPOSE (which
// of the two kernels), SUMS (0: only the pairs' gradients), ADDS (1: to what other messages gave those).
#define PAIR_LANES (OWN / 2)            // of a pair
#define WORKERS (THREADS / PAIR_LANES)  // pairs at once
#define FILTERS (2 + HAS_Y)             // Wa, Wb, Wc
#define SLOTS (M * M)                   // of a molecule
#define PAIRS (M * (M - 1) / 2)
#define SENT (1 + HAS_B + 3 * HAS_Y)  // rows that an atom sends: a, b, y
#define Y (1 + HAS_B)                 // the place of y
#if TRANSPOSE
#define ROWS ((SENT + 4) | 1)  // of an atom in shared memory: odd, so that atoms side by side have banks of their own
#else
#define ROWS (SENT | 1)
#endif
#define FILTER_ROWS (FILTERS | 1)  // of a pair, likewise
#define EACH_AXIS _Pragma("unroll") for (int x = 0; x < 3; x++)

struct alignas(8) Two {  // numbers of two channels
    float v[2];
};
#define OPERATOR(op) \
    __device__ __forceinline__ Two operator op(const Two& a, const Two& b) { return {a.v[0] op b.v[0], a.v[1] op b.v[1]}; }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
__device__ __forceinline__ Two operator*(float x, const Two& a) { return {x * a.v[0], x * a.v[1]}; }
__device__ __forceinline__ void operator+=(Two& a, const Two& b) { a = a + b; }
__device__ __forceinline__ float sum(const Two& a) { return a.v[0] + a.v[1]; }

struct Pair {
    int i, j;
    __device__ __forceinline__ Pair(int e) {
        i = e % M, j = i + e / M + 1;
        if (j >= M) j -= M;
    }
};

struct Molecule : Here {
    int molecule, all;      // all: slots of all molecules
    int mine, part;         // the atom that this thread sums, if part < PARTS
    int worker, two;        // that of its pairs, and two channels
    float *rows, *filters;  // of atoms [M, ROWS, OWN]; of pairs [PAIRS, FILTER_ROWS, OWN]
    float* shares;          // of sums, [PARTS - 1, M, 4 or 5, OWN]
    float4* u;              // of pairs, 0 where they don't count
    const float* places;

    __device__ __forceinline__ Molecule(float4* memory, const float* all_places, int molecules) : Here(molecules * M, M) {
        molecule = block() / CUTS, all = molecules * SLOTS;
        mine = local % M, part = local / M, worker = thread() / PAIR_LANES, two = 2 * (thread() % PAIR_LANES);
        u = memory, rows = (float*)(u + PAIRS), filters = rows + M * ROWS * OWN;
        shares = filters + PAIRS * FILTER_ROWS * OWN, places = all_places + molecule * SLOTS;
    }
    __device__ __forceinline__ float& at(int i, int row) const { return rows[(i * ROWS + row) * OWN + first]; }
    __device__ __forceinline__ float& filter(int e, int f) const { return filters[(e * FILTER_ROWS + f) * OWN + first]; }
    __device__ __forceinline__ const Two& two_at(int i, int row) const { return *(const Two*)(rows + (i * ROWS + row) * OWN + two); }
    __device__ __forceinline__ Two& two_filters(int e, int f) const { return *(Two*)(filters + (e * FILTER_ROWS + f) * OWN + two); }
    __device__ __forceinline__ int place(int stride, int offset) const {  // of that atom
        return (molecule * M + mine) * stride + offset + cut * OWN + first;
    }
    __device__ __forceinline__ void read_directions() const {
        for (int e = thread(); e < PAIRS; e += THREADS) {
            Pair pair(e);
            const float* here = places + pair.i * M + pair.j;
            float counts = here[all] > 0.f ? 1.f : 0.f;
            u[e] = make_float4(counts * here[2 * all], counts * here[3 * all], counts * here[4 * all], 0.f);
        }
    }
    // what this thread's atom sends
    __device__ __forceinline__ void read_sent(float (&sent)[SENT], const float* a, const float* b, const float* y) const {
        if (part > 0) return;
        sent[0] = a[place(F, 0)];
        if (HAS_B) sent[1] = b[place(F, 0)];
        if (HAS_Y) EACH_AXIS sent[Y + x] = y[place(3 * F, x * F)];
    }
};
// of atom i, the pair that begins a round with it, or the one that ends there; in the last round of an even number, half do
struct Partner {
    int j, e;
    float sign;  // of the pair's direction
    __device__ __forceinline__ Partner(int i, int round, bool begins) {
        j = begins ? i + round : i - round;
        j += j < 0 ? M : j < M ? 0 : -M;
        bool last = 2 * round == M;
        e = (round - 1) * M + (last ? min(i, j) : begins ? i : j);
        sign = (last ? i < j : begins) ? 1.f : -1.f;
    }
};
// add(partner) for all of a part
template <class Add>
__device__ __forceinline__ void each_partner(const Molecule& h, const Add& add) {
#pragma unroll 1
    for (int round = 1 + h.part; 2 * round < M; round += PARTS) add(Partner(h.mine, round, true)), add(Partner(h.mine, round, false));
    if (M % 2 == 0 && h.part == 0) add(Partner(h.mine, M / 2, true));
}
// the sums of all parts, for the first one
template <int N>
__device__ __forceinline__ void join_parts(const Molecule& h, float (&sums)[N]) {
    if (PARTS == 1) return;
#pragma unroll
    for (int k = 0; k < N; k++)
        if (h.part > 0 && h.part < PARTS) h.shares[(((h.part - 1) * M + h.mine) * N + k) * OWN + h.first] = sums[k];
    sync();
#pragma unroll
    for (int k = 0; k < N; k++)
#pragma unroll
        for (int part = 1; part < PARTS; part++)
            if (h.part == 0) sums[k] += h.shares[(((part - 1) * M + h.mine) * N + k) * OWN + h.first];
}

// where a pair is in the table
struct Place {
    float t;
    int interval;  // -1 where it doesn't count
    __device__ __forceinline__ Place(const Molecule& h, int e) {
        Pair pair(e < PAIRS ? e : 0);
        const float* here = h.places + pair.i * M + pair.j;
        float counts = here[h.all], place = here[5 * h.all];  // before anything waits
        t = here[0], interval = e < PAIRS && counts > 0.f ? (int)place : -1;
    }
};

struct Coefficients {
    Two c[FILTERS][4];
    float t;
    bool counts;
    __device__ __forceinline__ Coefficients(const Molecule& h, const float* table, const Place& place) {
        counts = place.interval >= 0, t = place.t;
        const float* from = table + max(place.interval, 0) * (4 * FILTERS * F) + h.cut * OWN + h.two;
#pragma unroll
        for (int f = 0; f < FILTERS; f++)
#pragma unroll
            for (int power = 0; power < 4; power++) c[f][power] = *(const Two*)(from + (power * FILTERS + f) * F);
    }
    __device__ __forceinline__ Two value(int f) const {
        return (counts ? 1.f : 0.f) * (c[f][0] + t * (c[f][1] + t * (c[f][2] + t * c[f][3])));
    }
    __device__ __forceinline__ Two slope(int f) const { return c[f][1] + t * (2.f * c[f][2] + (3.f * t) * c[f][3]); }
};

#if TRANSPOSE
// sums over PAIR_LANES of four numbers, of which a lane gets one: the (lane / (PAIR_LANES / 4))-th
__device__ __forceinline__ float sum_of_four(float x0, float x1, float x2, float x3) {
    bool upper = thread() & PAIR_LANES / 2, odd = thread() & PAIR_LANES / 4;
    float y0 = (upper ? x2 : x0) + from_lane(upper ? x0 : x2, PAIR_LANES / 2);
    float y1 = (upper ? x3 : x1) + from_lane(upper ? x1 : x3, PAIR_LANES / 2);
    float z = (odd ? y1 : y0) + from_lane(odd ? y0 : y1, PAIR_LANES / 4);
#pragma unroll
    for (int mask = PAIR_LANES / 8; mask; mask /= 2) z += from_lane(z, mask);
    return z;
}

// table: [intervals, 4, FILTERS, F]; bars: [groups of channels, 4, pairs], D and U of a pair as `whole` joins them; 0
// where no pair counts
extern "C" __global__ void __launch_bounds__(THREADS, 1)
few_transpose(const float* __restrict__ all_places, const float* __restrict__ table, const float* __restrict__ p,
              const float* __restrict__ q, const float* __restrict__ a, const float* __restrict__ b,
              const float* __restrict__ y, const float* __restrict__ bars_before THEN_TAKES, int molecules,
              float* __restrict__ bars THEN_MAKES) {
    ready(all_places, p, q, a, b, y, bars_before);
    SHARED(float4, memory);
    Molecule h(memory, all_places, molecules);
    constexpr int P = SENT, Q = SENT + 1;
    Place place(h, h.worker);
    float sent[SENT], above[4];
    h.read_sent(sent, a, b, y);
    if (h.part == 0) {
        above[0] = p[h.place(F, 0)];
        EACH_AXIS above[1 + x] = q[h.place(3 * F, x * F)];
    }
    h.read_directions();
    int bar = (h.cut * 4 + h.two / (OWN / 4)) * h.all + h.molecule * SLOTS;
    bool writes = h.two % (OWN / 4) == 0;
    float sign = h.two < OWN / 4 ? 1.f : -1.f;  // D, or U, of which a pair has that of its reverse minus its own
#pragma unroll 1
    for (int e = h.worker; e < PAIRS + h.worker; e += WORKERS) {
        Coefficients w(h, table, place);
        place = Place(h, e + WORKERS);
        if (e == h.worker) {
            if (h.part == 0) {
#pragma unroll
                for (int r = 0; r < SENT; r++) h.at(h.mine, r) = sent[r];
#pragma unroll
                for (int r = 0; r < 4; r++) h.at(h.mine, P + r) = above[r];
            }
            sync();
        }
        Pair pair(e < PAIRS ? e : 0);
        int i = pair.i, j = pair.j;
        Two zero = {}, one = {1.f, 1.f}, wb = w.value(1), d = zero, u_bar[3] = {};
        float before = ADDS && writes && e < PAIRS ? bars_before[bar + j * M + i] : 0.f;
        if (w.counts) {
            Two b_i = HAS_B ? h.two_at(i, 1) : one, b_j = HAS_B ? h.two_at(j, 1) : one, q_i = zero, q_j = zero, ways = zero;
            float4 u4 = h.u[e];
            float u[3] = {u4.x, u4.y, u4.z};
            EACH_AXIS {
                Two mine = h.two_at(i, Q + x), its = h.two_at(j, Q + x);
                q_i += u[x] * mine, q_j += u[x] * its;
                u_bar[x] = wb * (b_i * its - b_j * mine);
                if (HAS_Y) ways += h.two_at(i, Y + x) * its + h.two_at(j, Y + x) * mine;
            }
            d = w.slope(0) * (h.two_at(i, 0) * h.two_at(j, P) + h.two_at(j, 0) * h.two_at(i, P));
            d += w.slope(1) * (b_j * q_i - b_i * q_j);
            if (HAS_Y) d += w.slope(FILTERS - 1) * ways;
        }
        float total = before + sum_of_four(sum(d), sum(u_bar[0]), sum(u_bar[1]), sum(u_bar[2]));
        if (e >= PAIRS) continue;
        if (writes) bars[bar + i * M + j] = sign * total, bars[bar + j * M + i] = total;
        if (!SUMS) continue;
        h.two_filters(e, 0) = w.value(0), h.two_filters(e, 1) = wb;
        if (HAS_Y) h.two_filters(e, 2) = w.value(FILTERS - 1);
    }
    for (int k = thread(); k < 4 * M; k += THREADS) bars[(h.cut * 4 + k / M) * h.all + h.molecule * SLOTS + k % M * (M + 1)] = 0.f;
    if (!SUMS) return;
    Here here(molecules * M, M);
    THEN_ASKS
    sync();
    float sums[5] = {};
    if (h.part < PARTS)
        each_partner(h, [&](const Partner& its) {
            float q[3];
            EACH_AXIS q[x] = h.at(its.j, Q + x);
            sums[0] += h.filter(its.e, 0) * h.at(its.j, P);
            if (HAS_B) {
                float4 u = h.u[its.e];
                sums[1] -= its.sign * h.filter(its.e, 1) * (u.x * q[0] + u.y * q[1] + u.z * q[2]);
            }
            if (HAS_Y) EACH_AXIS sums[2 + x] += h.filter(its.e, 2) * q[x];
        });
    join_parts(h, sums);
    if (here.local >= ATOMS) return;
    sync();  // what was shared is done with
    THEN
}
#else
// table: [intervals, 4, FILTERS, F]
extern "C" __global__ void __launch_bounds__(THREADS, 1)
few_message(const float* __restrict__ all_places, const float* __restrict__ table, const float* __restrict__ a,
            const float* __restrict__ b, const float* __restrict__ y THEN_TAKES, int molecules THEN_MAKES) {
    ready(all_places, a, b, y);
    SHARED(float4, memory);
    Molecule h(memory, all_places, molecules);
    Place place(h, h.worker);
    float sent[SENT];
    h.read_sent(sent, a, b, y);
    h.read_directions();
#pragma unroll 1
    for (int e = h.worker; e < PAIRS; e += WORKERS) {
        Coefficients w(h, table, place);
        place = Place(h, e + WORKERS);
#pragma unroll
        for (int f = 0; f < FILTERS; f++) h.two_filters(e, f) = w.value(f);
    }
    if (h.part == 0)
#pragma unroll
        for (int r = 0; r < SENT; r++) h.at(h.mine, r) = sent[r];
    Here here(molecules * M, M);
    THEN_ASKS
    sync();
    float sums[4] = {};
    if (h.part < PARTS)
        each_partner(h, [&](const Partner& its) {
            sums[0] += h.filter(its.e, 0) * h.at(its.j, 0);
            float along = its.sign * h.filter(its.e, 1);
            if (HAS_B) along *= h.at(its.j, 1);
            float4 u4 = h.u[its.e];
            float u[3] = {u4.x, u4.y, u4.z};
            EACH_AXIS {
                sums[1 + x] += u[x] * along;
                if (HAS_Y) sums[1 + x] += h.filter(its.e, 2) * h.at(its.j, Y + x);
            }
        });
    join_parts(h, sums);
    if (here.local >= ATOMS) return;
    sync();  // what was shared is done with
    THEN
}
#endif
