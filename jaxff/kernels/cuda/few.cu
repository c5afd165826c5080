// Message sums over all pairs of few molecules of M atoms, and their transpose: jaxff.kernels.message with its tables.
//
// A block serves WIDTH channels of one molecule, few, so that blocks fill the GPU. First each thread makes filters of
// some pairs, one channel of them; they wait in shared memory, where both ends of a pair find them: the second half
// sums for each atom. Pairs are counted by rounds: in round k, atom i meets atom (i + k) mod M.
// Defined from outside: F, M, WIDTH, HAS_B and HAS_Y (jaxff.kernels.message.Sources), TRANSPOSE (which of the two
// kernels), SUMS (0: only the pairs' gradients).
#define THREADS 512
#define AT_ONCE 4  // pairs whose filters a thread asks for at once
#define GROUPS (F / WIDTH)
#define WORKERS (THREADS / WIDTH)  // pairs or atoms at once
#define FILTERS (2 + HAS_Y)        // Wa, Wb, Wc
#define SLOTS (M * M)              // of a molecule
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

struct Pair {
    int i, j;
    __device__ __forceinline__ Pair(int e) {
        i = e % M, j = i + e / M + 1;
        if (j >= M) j -= M;
    }
};

struct Here {
    int molecule, group, channel, worker, all;  // channel: of the block's; all: slots of all molecules
    float *rows, *filters, *u;                  // of atoms [M, ROWS, WIDTH]; of pairs [PAIRS, FILTER_ROWS, WIDTH], [PAIRS, 3]
    const float* places;

    __device__ __forceinline__ Here(float* memory, const float* all_places, int molecules) {
        group = block() % GROUPS, molecule = block() / GROUPS, all = molecules * SLOTS;
        channel = thread() % WIDTH, worker = thread() / WIDTH;
        rows = memory, filters = rows + M * ROWS * WIDTH, u = filters + PAIRS * FILTER_ROWS * WIDTH;
        places = all_places + molecule * SLOTS;
    }
    __device__ __forceinline__ float& at(int i, int row) const { return rows[(i * ROWS + row) * WIDTH + channel]; }
    __device__ __forceinline__ float& filter(int e, int f) const { return filters[(e * FILTER_ROWS + f) * WIDTH + channel]; }
    __device__ __forceinline__ int place(int stride, int offset, int i) const {
        return (molecule * M + i) * stride + offset + group * WIDTH + channel;
    }
    // what an atom sends
    __device__ __forceinline__ void read_sent(int i, const float* a, const float* b, const float* y) const {
        at(i, 0) = a[place(F, 0, i)];
        if (HAS_B) at(i, 1) = b[place(F, 0, i)];
        if (HAS_Y) EACH_AXIS at(i, Y + x) = y[place(3 * F, x * F, i)];
    }
    // the pair of atom i with the one that it meets in a round, and how its direction is counted
    __device__ __forceinline__ int met(int i, int round, int& j, float& sign) const {
        j = i + round < M ? i + round : i + round - M;
        bool first = 2 * round < M || (2 * round == M && i < j);
        sign = first ? 1.f : -1.f;
        return first ? (round - 1) * M + i : (M - round - 1) * M + j;
    }
};

struct Coefficients {
    float c[FILTERS][4], t;
    bool counts;
    __device__ __forceinline__ void read(const Here& h, const float* table, int e) {
        counts = false;
        if (e >= PAIRS) return;
        Pair pair(e);
        const float* here = h.places + pair.i * M + pair.j;
        t = here[0], counts = here[h.all] > 0.f;
        if (!counts) return;
        const float* from = table + (int)here[5 * h.all] * (4 * FILTERS * F) + h.group * WIDTH + h.channel;
#pragma unroll
        for (int f = 0; f < FILTERS; f++)
#pragma unroll
            for (int power = 0; power < 4; power++) c[f][power] = from[(power * FILTERS + f) * F];
    }
    __device__ __forceinline__ float value(int f) const {
        return counts ? c[f][0] + t * (c[f][1] + t * (c[f][2] + t * c[f][3])) : 0.f;
    }
    __device__ __forceinline__ float slope(int f) const { return c[f][1] + t * (2.f * c[f][2] + 3.f * t * c[f][3]); }
};

#if TRANSPOSE
// sums over WIDTH lanes of four numbers, of which a lane gets one: the (lane / (WIDTH / 4))-th
__device__ __forceinline__ float sum_of_four(float x0, float x1, float x2, float x3) {
    bool upper = thread() & WIDTH / 2, odd = thread() & WIDTH / 4;
    float y0 = (upper ? x2 : x0) + from_lane(upper ? x0 : x2, WIDTH / 2);
    float y1 = (upper ? x3 : x1) + from_lane(upper ? x1 : x3, WIDTH / 2);
    float z = (odd ? y1 : y0) + from_lane(odd ? y0 : y1, WIDTH / 4);
#pragma unroll
    for (int mask = WIDTH / 8; mask; mask /= 2) z += from_lane(z, mask);
    return z;
}

// table: [intervals, 4, FILTERS, F]; bars: [groups of channels, 4, pairs], D and U of a pair as `whole` joins them: all
// of it at one end, 0 at the other and where no pair counts
extern "C" __global__ void __launch_bounds__(THREADS)
few_transpose(const float* __restrict__ places, const float* __restrict__ table, const float* __restrict__ p,
              const float* __restrict__ q, const float* __restrict__ a, const float* __restrict__ b,
              const float* __restrict__ y, int molecules, float* __restrict__ a_bar, float* __restrict__ b_bar,
              float* __restrict__ y_bar, float* __restrict__ bars) {
    SHARED(float, memory);
    Here h(memory, places, molecules);
    constexpr int P = SENT, Q = SENT + 1;
    for (int i = h.worker; i < M; i += WORKERS) {
        h.read_sent(i, a, b, y);
        h.at(i, P) = p[h.place(F, 0, i)];
        EACH_AXIS h.at(i, Q + x) = q[h.place(3 * F, x * F, i)];
    }
    float* bar = bars + (h.group * 4 + h.channel / (WIDTH / 4)) * h.all + h.molecule * SLOTS;
    bool writes = h.channel % (WIDTH / 4) == 0;
    if (writes)
        for (int i = h.worker; i < M; i += WORKERS) bar[i * M + i] = 0.f;
    for (int first = h.worker; first < PAIRS + h.worker; first += AT_ONCE * WORKERS) {
        Coefficients w[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) w[k].read(h, table, first + k * WORKERS);
        if (first == h.worker) sync();  // the rows are there
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int e = first + k * WORKERS;
            if (first - h.worker + k * WORKERS >= PAIRS) continue;  // the same for all threads
            Pair pair(e < PAIRS ? e : 0);
            int i = pair.i, j = pair.j;
            float wb = w[k].value(1), d = 0.f, u_bar[3] = {};
            if (w[k].counts) {
                float b_i = HAS_B ? h.at(i, 1) : 1.f, b_j = HAS_B ? h.at(j, 1) : 1.f, q_i = 0.f, q_j = 0.f, ways = 0.f;
                EACH_AXIS {
                    float u = h.places[(2 + x) * h.all + i * M + j], mine = h.at(i, Q + x), its = h.at(j, Q + x);
                    q_i += u * mine, q_j += u * its;
                    u_bar[x] = wb * (b_i * its - b_j * mine);
                    if (HAS_Y) ways += h.at(i, Y + x) * its + h.at(j, Y + x) * mine;
                }
                d = w[k].slope(0) * (h.at(i, 0) * h.at(j, P) + h.at(j, 0) * h.at(i, P)) - w[k].slope(1) * (b_i * q_j - b_j * q_i);
                if (HAS_Y) d += w[k].slope(FILTERS - 1) * ways;
            }
            float total = sum_of_four(d, u_bar[0], u_bar[1], u_bar[2]);
            if (e >= PAIRS) continue;
            if (writes) bar[i * M + j] = total, bar[j * M + i] = 0.f;
            if (!SUMS) continue;
            h.filter(e, 0) = w[k].value(0), h.filter(e, 1) = wb;
            if (HAS_Y) h.filter(e, 2) = w[k].value(FILTERS - 1);
            if (h.channel < 3) h.u[3 * e + h.channel] = w[k].counts ? h.places[(2 + h.channel) * h.all + i * M + j] : 0.f;
        }
    }
    if (!SUMS) return;
    sync();
    for (int i = h.worker; i < M; i += WORKERS) {
        float sums[5] = {};
#pragma unroll 4
        for (int round = 1; round < M; round++) {
            int j;
            float sign, along = 0.f;
            int e = h.met(i, round, j, sign);
            float wc = HAS_Y ? h.filter(e, 2) : 0.f;
            sums[0] += h.filter(e, 0) * h.at(j, P);
            EACH_AXIS {
                float its = h.at(j, Q + x);
                along += h.u[3 * e + x] * its;
                if (HAS_Y) sums[2 + x] += wc * its;
            }
            if (HAS_B) sums[1] -= sign * h.filter(e, 1) * along;
        }
        a_bar[h.place(F, 0, i)] = sums[0];
        if (HAS_B) b_bar[h.place(F, 0, i)] = sums[1];
        if (HAS_Y) EACH_AXIS y_bar[h.place(3 * F, x * F, i)] = sums[2 + x];
    }
}
#else
// table: [intervals, 4, FILTERS, F]
extern "C" __global__ void __launch_bounds__(THREADS)
few_message(const float* __restrict__ places, const float* __restrict__ table, const float* __restrict__ a,
            const float* __restrict__ b, const float* __restrict__ y, int molecules, float* __restrict__ ds,
            float* __restrict__ dv) {
    SHARED(float, memory);
    Here h(memory, places, molecules);
    for (int i = h.worker; i < M; i += WORKERS) h.read_sent(i, a, b, y);
    for (int first = h.worker; first < PAIRS; first += AT_ONCE * WORKERS) {
        Coefficients w[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) w[k].read(h, table, first + k * WORKERS);
#pragma unroll
        for (int k = 0; k < AT_ONCE; k++) {
            int e = first + k * WORKERS;
            if (e >= PAIRS) break;
            Pair pair(e);
#pragma unroll
            for (int f = 0; f < FILTERS; f++) h.filter(e, f) = w[k].value(f);
            if (h.channel < 3) h.u[3 * e + h.channel] = w[k].counts ? h.places[(2 + h.channel) * h.all + pair.i * M + pair.j] : 0.f;
        }
    }
    sync();
    for (int i = h.worker; i < M; i += WORKERS) {
        float scalar = 0.f, vector[3] = {};
#pragma unroll 4
        for (int round = 1; round < M; round++) {
            int j;
            float sign;
            int e = h.met(i, round, j, sign);
            scalar += h.filter(e, 0) * h.at(j, 0);
            float from_j = sign * h.filter(e, 1);
            if (HAS_B) from_j *= h.at(j, 1);
            EACH_AXIS {
                vector[x] += h.u[3 * e + x] * from_j;
                if (HAS_Y) vector[x] += h.filter(e, 2) * h.at(j, Y + x);
            }
        }
        ds[h.place(F, 0, i)] = scalar;
        EACH_AXIS dv[h.place(3 * F, x * F, i)] = vector[x];
    }
}
#endif
