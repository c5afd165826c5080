// Message sums over all pairs of molecules of M atoms, and their transpose: jaxff.kernels.message with its tables.
//
// A block serves 32 lanes of channels of one molecule. A filter is read once for both directions of its pair: in round
// k, atom i meets atom (i + k) mod M. A warp has OWN of the i, whose sums stay in its registers; those of the other
// atoms, of which a round has each once, wait in shared memory. So sums have a fixed order.
// Defined from outside: F, M, OWN, LANE (channels of a lane), RESIDENT (blocks of a multiprocessor at once), HAS_B and
// HAS_Y (jaxff.kernels.message.Sources), TRANSPOSE (which of the two kernels).
#define WARPS ((M + OWN - 1) / OWN)
#define WIDTH (32 * LANE)  // channels of a block
#define GROUPS ((F + WIDTH - 1) / WIDTH)
#define FILTERS (2 + HAS_Y)           // Wa, Wb, Wc
#define SLOTS (M * M)                 // of a molecule
#define SENT (1 + HAS_B + 3 * HAS_Y)  // rows that an atom sends: a, b, y
#define B (HAS_B)                     // the place of b, or any
#define Y (HAS_Y ? 1 + HAS_B : 0)     // and of y
#if TRANSPOSE
#define ROWS (2 * SENT + 4)  // of an atom in shared memory
#else
#define ROWS (SENT + 4)
#endif
#define EACH_OWN _Pragma("unroll") for (int k = 0; k < OWN; k++)
#define EACH_AXIS _Pragma("unroll") for (int x = 0; x < 3; x++)
#define EACH_CHANNEL _Pragma("unroll") for (int c = 0; c < LANE; c++)

struct alignas(4 * LANE) Lanes {  // a number for each channel of a lane
    float v[LANE];
};
#define OPERATOR(op)                                                               \
    __device__ __forceinline__ Lanes operator op(const Lanes& a, const Lanes& b) { \
        Lanes r;                                                                   \
        EACH_CHANNEL r.v[c] = a.v[c] op b.v[c];                                    \
        return r;                                                                  \
    }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
__device__ __forceinline__ Lanes all_are(float x) {
    Lanes r;
    EACH_CHANNEL r.v[c] = x;
    return r;
}
__device__ __forceinline__ Lanes operator*(float x, const Lanes& a) { return all_are(x) * a; }
__device__ __forceinline__ void operator+=(Lanes& a, const Lanes& b) { a = a + b; }
__device__ __forceinline__ float sum(const Lanes& a) {
    float r = a.v[0];
#pragma unroll
    for (int c = 1; c < LANE; c++) r += a.v[c];
    return r;
}

struct Filters {
    Lanes c[FILTERS][4];  // cubics
    __device__ __forceinline__ Lanes value(int w, float t) const { return c[w][0] + t * (c[w][1] + t * (c[w][2] + t * c[w][3])); }
    __device__ __forceinline__ Lanes slope(int w, float t) const { return c[w][1] + t * (2.f * c[w][2] + 3.f * t * c[w][3]); }
};

struct Here {
    int molecule, group, channel, all;  // all: slots of all molecules
    bool has;                           // channels of this lane
    float *rows, *t, *u;                // of atoms [M, ROWS, WIDTH]; of pairs [M, M], [3, M, M]
    int* intervals;                     // [M, M], -1 where a pair doesn't count

    // the places of the molecule's pairs in shared memory, before a sync
    __device__ __forceinline__ Here(float* memory, const float* places, int molecules) {
        group = block() % GROUPS, molecule = block() / GROUPS, channel = WIDTH * group + LANE * lane(), all = molecules * SLOTS;
        has = channel < F;
        rows = memory, t = rows + M * ROWS * WIDTH, u = t + SLOTS, intervals = (int*)(u + 3 * SLOTS);
        const float* here = places + molecule * SLOTS;
        for (int e = thread(); e < SLOTS; e += 32 * WARPS) {
            intervals[e] = here[all + e] > 0.f ? (int)here[5 * all + e] : -1, t[e] = here[e];
            EACH_AXIS u[x * SLOTS + e] = here[(2 + x) * all + e];
        }
    }
    __device__ __forceinline__ int own(int k) const { return warp() + k * WARPS; }
    // the atom that own(k) meets in a round, or -1: of an even number, half meet the other half in the last one
    __device__ __forceinline__ int met(int k, int round) const {
        int i = own(k), j = i + round < M ? i + round : i + round - M;
        return i >= M || (2 * round == M && i >= round) || intervals[i * M + j] < 0 ? -1 : j;
    }
    // a row of an atom in shared memory
    __device__ __forceinline__ Lanes& at(int i, int row) const { return *(Lanes*)(rows + (i * ROWS + row) * WIDTH + LANE * lane()); }
    __device__ __forceinline__ Lanes read(const float* x, int stride, int offset, int i) const {
        return has ? *(const Lanes*)(x + (molecule * M + i) * stride + offset + channel) : all_are(0.f);
    }
    __device__ __forceinline__ void write(float* x, int stride, int offset, int i, const Lanes& value) const {
        if (has) *(Lanes*)(x + (molecule * M + i) * stride + offset + channel) = value;
    }
    __device__ __forceinline__ void read_filters(Filters& w, const float* table, int k, int round) const {
        int j = met(k, round);
        if (j < 0 || !has) return;
        const float* from = table + intervals[own(k) * M + j] * (4 * FILTERS * F) + channel;
#pragma unroll
        for (int f = 0; f < FILTERS; f++)
#pragma unroll
            for (int power = 0; power < 4; power++) w.c[f][power] = *(const Lanes*)(from + (power * FILTERS + f) * F);
    }
    // what an atom sends
    __device__ __forceinline__ void read_sent(int i, const float* a, const float* b, const float* y) const {
        at(i, 0) = read(a, F, 0, i);
        if (HAS_B) at(i, B) = read(b, F, 0, i);
        if (HAS_Y) EACH_AXIS at(i, Y + x) = read(y, 3 * F, x * F, i);
    }
};

#if TRANSPOSE
// sums over a warp of four numbers, of which a lane gets one: the (lane / 8)-th
__device__ __forceinline__ float sum_of_four(float x0, float x1, float x2, float x3) {
    bool upper = lane() & 16, odd = lane() & 8;
    float y0 = (upper ? x2 : x0) + from_lane(upper ? x0 : x2, 16), y1 = (upper ? x3 : x1) + from_lane(upper ? x1 : x3, 16);
    float z = (odd ? y1 : y0) + from_lane(odd ? y0 : y1, 8);
#pragma unroll
    for (int mask = 4; mask; mask /= 2) z += from_lane(z, mask);
    return z;
}

// table: [intervals, 4, FILTERS, F]; bars: [groups of channels, 4, pairs], D and U of a pair as `whole` joins them, and
// anything where no pair counts
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
molecule_transpose(const float* __restrict__ places, const float* __restrict__ table, const float* __restrict__ p,
                   const float* __restrict__ q, const float* __restrict__ a, const float* __restrict__ b,
                   const float* __restrict__ y, int molecules, float* __restrict__ a_bar, float* __restrict__ b_bar,
                   float* __restrict__ y_bar, float* __restrict__ bars) {
    SHARED(float, memory);
    Here h(memory, places, molecules);
    constexpr int P = SENT, Q = SENT + 1, SUMS = SENT + 4;  // rows: what an atom sends, its cotangents, what others found
    for (int i = warp(); i < M; i += WARPS) {
        h.read_sent(i, a, b, y);
        h.at(i, P) = h.read(p, F, 0, i);
        EACH_AXIS h.at(i, Q + x) = h.read(q, 3 * F, x * F, i);
#pragma unroll
        for (int r = 0; r < SENT; r++) h.at(i, SUMS + r) = all_are(0.f);
    }
    sync();
    Lanes own[OWN][SUMS] = {}, heard[OWN][SENT] = {};
    Filters filters[OWN] = {};
    EACH_OWN
#pragma unroll
        for (int r = 0; r < SUMS; r++)
            if (h.own(k) < M) own[k][r] = h.at(h.own(k), r);
    float* bar = bars + (h.group * 4 + lane() / 8) * h.all + h.molecule * SLOTS;
    float sign = lane() < 8 ? 1.f : -1.f;  // D, or U, of which a pair has that of its reverse minus its own
#pragma unroll 2
    for (int round = 1; round <= M / 2; round++) {
        EACH_OWN h.read_filters(filters[k], table, k, round);
        EACH_OWN {
            int i = h.own(k), j = h.met(k, round);
            if (j < 0) continue;
            int e = i * M + j;
            float t = h.t[e];
            const Filters& w = filters[k];
            const Lanes *mine = own[k], wa = w.value(0, t), wb = w.value(1, t), wc = w.value(FILTERS - 1, t), p_j = h.at(j, P);
            Lanes q_i = all_are(0.f), q_j = q_i, ways = q_i, u_bar[3];
            Lanes b_i = HAS_B ? mine[B] : all_are(1.f), b_j = HAS_B ? h.at(j, B) : all_are(1.f);
            EACH_AXIS {
                float u = h.u[x * SLOTS + e];
                Lanes its = h.at(j, Q + x);
                q_i += u * mine[Q + x], q_j += u * its;
                u_bar[x] = wb * (b_i * its - b_j * mine[Q + x]);
                if (!HAS_Y) continue;
                ways += mine[Y + x] * its + h.at(j, Y + x) * mine[Q + x];
                heard[k][Y + x] += wc * its, h.at(j, SUMS + Y + x) += wc * mine[Q + x];
            }
            heard[k][0] += wa * p_j, h.at(j, SUMS) += wa * mine[P];
            if (HAS_B) heard[k][B] = heard[k][B] - wb * q_j, h.at(j, SUMS + B) += wb * q_i;
            Lanes d = w.slope(0, t) * (mine[0] * p_j + h.at(j, 0) * mine[P]) - w.slope(1, t) * (b_i * q_j - b_j * q_i);
            if (HAS_Y) d += w.slope(FILTERS - 1, t) * ways;
            float total = sum_of_four(sum(d), sum(u_bar[0]), sum(u_bar[1]), sum(u_bar[2]));
            if (lane() % 8 == 0) bar[e] = sign * total, bar[j * M + i] = total;
        }
        sync();
    }
    EACH_OWN {
        int i = h.own(k);
        if (i >= M) continue;
        h.write(a_bar, F, 0, i, heard[k][0] + h.at(i, SUMS));
        if (HAS_B) h.write(b_bar, F, 0, i, heard[k][B] + h.at(i, SUMS + B));
        if (HAS_Y) EACH_AXIS h.write(y_bar, 3 * F, x * F, i, heard[k][Y + x] + h.at(i, SUMS + Y + x));
    }
}
#else
// table: [intervals, 4, FILTERS, F]
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
molecule_message(const float* __restrict__ places, const float* __restrict__ table, const float* __restrict__ a,
                 const float* __restrict__ b, const float* __restrict__ y, int molecules, float* __restrict__ ds,
                 float* __restrict__ dv) {
    SHARED(float, memory);
    Here h(memory, places, molecules);
    constexpr int SUMS = SENT;  // rows: what an atom sends, what others told it
    for (int i = warp(); i < M; i += WARPS) {
        h.read_sent(i, a, b, y);
#pragma unroll
        for (int r = 0; r < 4; r++) h.at(i, SUMS + r) = all_are(0.f);
    }
    sync();
    Lanes own[OWN][SENT] = {}, heard[OWN][4] = {};
    Filters filters[OWN] = {};
    EACH_OWN
#pragma unroll
        for (int r = 0; r < SENT; r++)
            if (h.own(k) < M) own[k][r] = h.at(h.own(k), r);
#pragma unroll 2
    for (int round = 1; round <= M / 2; round++) {
        EACH_OWN h.read_filters(filters[k], table, k, round);
        EACH_OWN {
            int j = h.met(k, round);
            if (j < 0) continue;
            int e = h.own(k) * M + j;
            float t = h.t[e];
            const Filters& w = filters[k];
            Lanes wa = w.value(0, t), wb = w.value(1, t), wc = w.value(FILTERS - 1, t);
            Lanes from_j = HAS_B ? wb * h.at(j, B) : wb, from_i = HAS_B ? wb * own[k][B] : wb;
            heard[k][0] += wa * h.at(j, 0), h.at(j, SUMS) += wa * own[k][0];
            EACH_AXIS {
                float u = h.u[x * SLOTS + e];
                Lanes mine = u * from_j, its = -u * from_i;
                if (HAS_Y) mine += wc * h.at(j, Y + x), its += wc * own[k][Y + x];
                heard[k][1 + x] += mine, h.at(j, SUMS + 1 + x) += its;
            }
        }
        sync();
    }
    EACH_OWN {
        int i = h.own(k);
        if (i >= M) continue;
        h.write(ds, F, 0, i, heard[k][0] + h.at(i, SUMS));
        EACH_AXIS h.write(dv, 3 * F, x * F, i, heard[k][1 + x] + h.at(i, SUMS + 1 + x));
    }
}
#endif
