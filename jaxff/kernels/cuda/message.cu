// Message sums and their transpose for many atoms: jaxff.kernels.message has the equations.
//
// A filter of the distance is W_c(r) = sum_k B_k(r) C_kc with few functions B, which are tabulated as cubics. A block
// serves one atom after the other; a warp has Wa of 32 channels or Wb and Wc of 16, two units of 16 columns each, and
// holds C for them in registers. While the tensor cores make W of 16 pairs from B and C, both as sums of two halves, the
// block evaluates B for the next pairs.
// B come by importance: of the later ones one half of each number is enough.
// Defined from outside: F, K (how many B, a multiple of 16), FULL (how many times 16 of them need both halves), HAS_B,
// HAS_Y.
// scales: the factor of W that undoes those of B and C; of slopes, one more and its inverse.
#define SCALARS ((F + 31) / 32)  // warps with Wa
#define VECTORS (F / 16)         // warps with Wb and Wc
#define WARPS (SCALARS + VECTORS)
#define THREADS (32 * WARPS)
#define STEPS (K / 16)
#define SOURCES (HAS_B + 3 * HAS_Y)  // of vectors
#define PAIRS 64             // at once
#define STRIDE (K / 2 + 4)   // words of a row of B in shared memory: no two lanes share a bank
#define PART (PAIRS * STRIDE)  // words of B's values, or slopes, in one of their two halves
#define COLUMNS ((K + 31) / 32)
#define ZERO make_float4(0.f, 0.f, 0.f, 0.f)

__device__ __forceinline__ float4 operator*(float4 x, float4 y) { return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w); }
__device__ __forceinline__ float4 operator*(float x, float4 y) { return make_float4(x * y.x, x * y.y, x * y.z, x * y.w); }
__device__ __forceinline__ float4 operator+(float4 x, float4 y) { return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w); }
__device__ __forceinline__ float4 operator-(float4 x, float4 y) { return make_float4(x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w); }
__device__ __forceinline__ float sum(float4 x) { return (x.x + x.y) + (x.z + x.w); }
__device__ __forceinline__ float4 four(const float* x, int row, int width, int channel) {
    return *(const float4*)(x + row * width + channel);
}

__device__ __forceinline__ bool of_scalars() { return warp() < SCALARS; }
// of a warp's unit: which 16 channels (none from VECTORS on), and the first four of this lane
__device__ __forceinline__ int group(int unit) { return of_scalars() ? 2 * warp() + unit : warp() - SCALARS; }
__device__ __forceinline__ bool has(int unit) { return F % 32 == 0 || group(unit) < VECTORS; }
__device__ __forceinline__ int channel(int unit) { return 16 * (has(unit) ? group(unit) : 0) + 4 * (lane() & 3); }

// --- pairs ---

struct Raw {  // a block of pairs
    float4 u_t[PAIRS];  // direction and place in the interval
    int interval[PAIRS], sender[PAIRS];  // interval -1: a pair that doesn't count
};

struct Work {  // blocks of pairs, one after the other, of the atoms of this block of threads
    int atom, slot, slots, at_once, left;
    __device__ Work(int n, int s) {
        atom = (int)((long long)n * block() / blocks());
        int padded = (s + 15) / 16 * 16;
        slots = s, at_once = padded < PAIRS ? padded : PAIRS, slot = 0;
        left = ((int)((long long)n * (block() + 1) / blocks()) - atom) * ((s + at_once - 1) / at_once);
    }
    __device__ __forceinline__ bool first() const { return slot == 0; }
    __device__ __forceinline__ bool last() const { return slot + at_once >= slots; }
    __device__ __forceinline__ void step() {
        bool done = last();
        atom += done, slot = done ? 0 : slot + at_once, left--;
    }
};

struct Loaded {
    float t, mask, ux, uy, uz, interval;
    int sender;
};

__device__ __forceinline__ Loaded load_raw(const Work& w, const int* senders, const float* places, int n) {
    Loaded r = {0.f, 0.f, 0.f, 0.f, 0.f, 0.f, 0};
    int slot = w.slot + thread();
    if (w.left > 0 && thread() < w.at_once) {
        r.sender = w.atom;
        if (slot < w.slots) {
            int e = w.atom * w.slots + slot, all = n * w.slots;
            int sender = senders[e];
            r.t = places[e], r.mask = places[all + e];
            r.ux = places[2 * all + e], r.uy = places[3 * all + e], r.uz = places[4 * all + e];
            r.interval = places[5 * all + e];
            if (r.mask > 0.f) r.sender = sender;
        }
    }
    return r;
}

__device__ __forceinline__ void keep_raw(Raw& raw, const Loaded& r, const Work& w) {
    int p = thread();
    if (p >= w.at_once) return;
    raw.u_t[p] = make_float4(r.ux, r.uy, r.uz, r.t);
    raw.interval[p] = r.mask > 0.f ? (int)r.interval : -1, raw.sender[p] = r.sender;
}

// --- B of 16 pairs, a warp for each: coefficients are asked for by `ask`, values (and slopes) written by `answer` ---

#define ALL_ROUNDS ((16 + WARPS - 1) / WARPS)
// warps of vectors, which have more to do, come last
#define ROUNDS_OF_VECTORS ((16 + VECTORS - 1) / WARPS)

template <int ROUNDS>
struct Asked {
    float4 c[ROUNDS][COLUMNS];
};

template <int ROUNDS>
__device__ __forceinline__ void ask(Asked<ROUNDS>& q, const Raw& raw, int chunk, const float4* basis) {
#pragma unroll
    for (int m = 0; m < ROUNDS; m++) {
        int p = warp() + m * WARPS, interval = p < 16 ? raw.interval[16 * chunk + p] : -1;
#pragma unroll
        for (int k = 0; k < COLUMNS; k++) {
            q.c[m][k] = ZERO;
            if (interval >= 0 && 32 * k + lane() < K) q.c[m][k] = basis[interval * K + 32 * k + lane()];
        }
    }
}

__device__ __forceinline__ void put(uint32* high, uint32* low, int k, float x) {
    uint32 h, l;
    split(x, 0.f, h, l);
    ((unsigned short*)high)[k] = (unsigned short)h;
    ((unsigned short*)low)[k] = (unsigned short)l;
}

template <bool SLOPES, int ROUNDS>
__device__ __forceinline__ void answer(const Asked<ROUNDS>& q, const Raw& raw, int chunk, uint32* b, float slope) {
#pragma unroll
    for (int m = 0; m < ROUNDS; m++) {
        int p = warp() + m * WARPS;
        if (p >= 16) continue;
        float t = raw.u_t[16 * chunk + p].w;
        uint32* row = b + (16 * chunk + p) * STRIDE;
#pragma unroll
        for (int k = 0; k < COLUMNS; k++) {
            if (32 * k + lane() >= K) continue;
            float4 c = q.c[m][k];
            put(row, row + PART, 32 * k + lane(), cubic(c, t));
            if (SLOPES) put(row + 2 * PART, row + 3 * PART, 32 * k + lane(), slope * cubic_slope(c, t));
        }
    }
}

// two blocks of pairs, and B of the first; `ahead` then stands at the third
template <bool SLOPES>
__device__ __forceinline__ void begin(Raw* raw, uint32* values, const Work& work, Work& ahead, const int* senders,
                                      const float* places, const float4* basis, int n, float slope) {
    for (int k = 0; k < 2; k++) {
        keep_raw(raw[k], load_raw(ahead, senders, places, n), work);
        ahead.step();
    }
    sync();
    for (int chunk = 0; chunk < work.at_once / 16; chunk++) {
        Asked<ALL_ROUNDS> asked;
        ask(asked, raw[0], chunk, basis);
        answer<SLOPES>(asked, raw[0], chunk, values, slope);
    }
    sync();
}

// --- W of 16 pairs ---

struct Weights {  // C of this warp's units
    uint2 high[2][2][STEPS], low[2][2][FULL];
    __device__ __forceinline__ Weights(const uint2* highs, const uint2* lows) {
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {
            int which = of_scalars() ? 0 : 1 + unit;
            bool there = has(unit) && which < 2 + HAS_Y;
#pragma unroll
            for (int s = 0; s < STEPS; s++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    int of_columns = which * VECTORS + group(unit);
                    uint2 zero = {0, 0};
                    high[unit][j][s] = there ? highs[((of_columns * STEPS + s) * 2 + j) * 32 + lane()] : zero;
                    if (s < FULL) low[unit][j][s] = there ? lows[((of_columns * FULL + s) * 2 + j) * 32 + lane()] : zero;
                }
        }
    }
};

struct Filters {  // by unit, for two pairs, rows g and g + 8 of the 16, and the four channels of this lane
    float4 w[2][2];
};

// b: values or slopes of B, [high, low]
__device__ __forceinline__ Filters evaluate(const uint32* b, int chunk, const Weights& c) {
    const uint32* rows = b + 16 * chunk * STRIDE;
    float acc[2][2][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        uint32 high[4], low[4];
        load_a(high, rows + 8 * s, STRIDE);
        if (s < FULL) load_a(low, rows + PART + 8 * s, STRIDE);
#pragma unroll
        for (int f = 0; f < 2; f++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (s < FULL) {
                    mma(acc[f][j], low, c.high[f][j][s].x, c.high[f][j][s].y);
                    mma(acc[f][j], high, c.low[f][j][s].x, c.low[f][j][s].y);
                }
                mma(acc[f][j], high, c.high[f][j][s].x, c.high[f][j][s].y);
            }
    }
    Filters r;
#pragma unroll
    for (int f = 0; f < 2; f++) {
        r.w[f][0] = make_float4(acc[f][0][0], acc[f][0][1], acc[f][1][0], acc[f][1][1]);
        r.w[f][1] = make_float4(acc[f][0][2], acc[f][0][3], acc[f][1][2], acc[f][1][3]);
    }
    return r;
}

// four channels of b, y of an atom
__device__ __forceinline__ void load_sources(float4* x, int atom, int channel, const float* b, const float* y) {
    if (HAS_B) x[0] = four(b, atom, F, channel);
#pragma unroll
    for (int axis = 0; axis < 3 * HAS_Y; axis++) x[HAS_B + axis] = four(y, atom, 3 * F, channel + axis * F);
}

// a sum over the eight lanes that have the same channels; each stores one of them
__device__ __forceinline__ void store_sum(float* out, int row, int width, int channel, float4 x, float factor) {
    bool upper = lane() & 16, odd = lane() & 8;
    float p = (upper ? x.z : x.x) + from_lane(upper ? x.x : x.z, 16);
    float q = (upper ? x.w : x.y) + from_lane(upper ? x.y : x.w, 16);
    float r = (odd ? q : p) + from_lane(odd ? p : q, 8);
    r += from_lane(r, 4);
    if (!(lane() & 4)) out[row * width + channel + 2 * upper + odd] = factor * r;
}

// b where there is none, y where there is none: not read
extern "C" __global__ void __launch_bounds__(THREADS, 1)
message(const int* __restrict__ senders, const float* __restrict__ places, const float4* __restrict__ basis,
        const uint2* __restrict__ highs, const uint2* __restrict__ lows, const float* __restrict__ scales, const float* __restrict__ a,
        const float* __restrict__ b, const float* __restrict__ y, int n, int slots, float* __restrict__ ds,
        float* __restrict__ dv) {
    SHARED(char, memory);
    Raw* raw = (Raw*)memory;
    uint32* values = (uint32*)(raw + 3);  // two blocks of pairs of [high, low]
    Work work(n, slots), ahead = work;
    Weights c(highs, lows);
    int chunks = work.at_once / 16, g = lane() >> 2;
    begin<false>(raw, values, work, ahead, senders, places, basis, n, 0.f);
    float4 sums[3] = {ZERO, ZERO, ZERO};  // of the vectors, or of the scalars of each unit
    for (int it = 0; work.left > 0; it++) {
        const Raw& now = raw[it % 3];
        const Raw& next = raw[(it + 1) % 3];
        const uint32* mine = values + (it & 1) * 2 * PART;
        uint32* other = values + ((it + 1) & 1) * 2 * PART;
        Loaded after = load_raw(ahead, senders, places, n);
        if (of_scalars())
            for (int chunk = 0; chunk < chunks; chunk++) {
                Asked<ALL_ROUNDS> asked;
                ask(asked, next, chunk, basis);
                float4 heard[2][2];
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int unit = 0; unit < 2; unit++) heard[r][unit] = four(a, now.sender[16 * chunk + g + 8 * r], F, channel(unit));
                Filters filter = evaluate(mine, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int unit = 0; unit < 2; unit++) sums[unit] = sums[unit] + filter.w[unit][r] * heard[r][unit];
                answer<false>(asked, next, chunk, other, 0.f);
            }
        else
            for (int chunk = 0; chunk < chunks; chunk++) {
                Asked<ROUNDS_OF_VECTORS> asked;
                ask(asked, next, chunk, basis);
                float4 heard[2][SOURCES + 1];
#pragma unroll
                for (int r = 0; r < 2; r++) load_sources(heard[r], now.sender[16 * chunk + g + 8 * r], channel(0), b, y);
                Filters filter = evaluate(mine, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float4 u = now.u_t[16 * chunk + g + 8 * r];
                    float4 w = HAS_B ? filter.w[0][r] * heard[r][0] : filter.w[0][r];
                    sums[0] = sums[0] + u.x * w;
                    sums[1] = sums[1] + u.y * w;
                    sums[2] = sums[2] + u.z * w;
#pragma unroll
                    for (int axis = 0; axis < 3 * HAS_Y; axis++) sums[axis] = sums[axis] + filter.w[1][r] * heard[r][HAS_B + axis];
                }
                answer<false>(asked, next, chunk, other, 0.f);
            }
        keep_raw(raw[(it + 2) % 3], after, work);
        if (work.last()) {
#pragma unroll
            for (int k = 0; k < 3; k++) {
                if (!of_scalars()) store_sum(dv, work.atom, 3 * F, channel(0) + k * F, sums[k], scales[0]);
                else if (k < 2 && has(k)) store_sum(ds, work.atom, F, channel(k), sums[k], scales[0]);
                sums[k] = ZERO;
            }
        }
        work.step(), ahead.step();
        sync();
    }
}

// a warp's share of [D, U_xyz] of two pairs: over the four lanes of a pair, of which lane t keeps row t & 1, and of it D
// and Ux (t < 2) or Uy and Uz
__device__ __forceinline__ void keep_share(float* share, int chunk, const float (&d)[2], const float (&u)[2][3]) {
    int g = lane() >> 2;
    bool odd = lane() & 1, upper = lane() & 2;
    float k0 = (odd ? d[1] : d[0]) + from_lane(odd ? d[0] : d[1], 1);
    float k1 = (odd ? u[1][0] : u[0][0]) + from_lane(odd ? u[0][0] : u[1][0], 1);
    float k2 = (odd ? u[1][1] : u[0][1]) + from_lane(odd ? u[0][1] : u[1][1], 1);
    float k3 = (odd ? u[1][2] : u[0][2]) + from_lane(odd ? u[0][2] : u[1][2], 1);
    int pair = 16 * chunk + g + 8 * odd;
    share[2 * upper * PAIRS + pair] = (upper ? k2 : k0) + from_lane(upper ? k0 : k2, 2);
    share[(2 * upper + 1) * PAIRS + pair] = (upper ? k3 : k1) + from_lane(upper ? k1 : k3, 2);
}

// the same of D alone
__device__ __forceinline__ void keep_share(float* share, int chunk, const float (&d)[2]) {
    bool odd = lane() & 1;
    float sum = (odd ? d[1] : d[0]) + from_lane(odd ? d[0] : d[1], 1);
    sum += from_lane(sum, 2);
    if (!(lane() & 2)) share[16 * chunk + (lane() >> 2) + 8 * odd] = sum;
}

// the sums of all warps' shares, of a block of pairs: [D] of each scalars' warp, then [D, U_xyz] of each vectors'
#define SHARES ((SCALARS + 4 * VECTORS) * PAIRS)
__device__ __forceinline__ void add_shares(const float* shares, const Work& w, int n, const float* scales, float* pair_bars) {
    for (int k = thread(); k < 4 * PAIRS; k += THREADS) {
        int pair = k % PAIRS, slot = w.slot + pair;
        if (pair < w.at_once && slot < w.slots) {
            float total = 0.f;
#pragma unroll
            for (int warp = 0; warp < SCALARS; warp++)
                if (k < PAIRS) total += shares[warp * PAIRS + k];
#pragma unroll
            for (int warp = 0; warp < VECTORS; warp++) total += shares[(SCALARS + 4 * warp) * PAIRS + k];
            pair_bars[k / PAIRS * n * w.slots + w.atom * w.slots + slot] = scales[0] * (k < PAIRS ? scales[2] * total : total);
        }
    }
}

// Cotangents of the sources; and of each pair (i, j) the half [D, U_xyz] that belongs to what i sends to j:
// D = sum_f a_i p_j Wa' - b_i (u.q_j) Wb' + (y_i.q_j) Wc',  U = sum_f b_i q_j Wb.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
message_transpose(const int* __restrict__ senders, const float* __restrict__ places, const float4* __restrict__ basis,
                  const uint2* __restrict__ highs, const uint2* __restrict__ lows, const float* __restrict__ scales, const float* __restrict__ p,
                  const float* __restrict__ q, const float* __restrict__ a, const float* __restrict__ b,
                  const float* __restrict__ y, int n, int slots, float* __restrict__ a_bar, float* __restrict__ b_bar,
                  float* __restrict__ y_bar, float* __restrict__ pair_bars) {
    SHARED(char, memory);
    Raw* raw = (Raw*)memory;
    uint32* values = (uint32*)(raw + 3);          // two blocks of pairs of [high, low, high of slopes, low of slopes]
    float* shares = (float*)(values + 8 * PART);  // two of SHARES
    Work work(n, slots), ahead = work, before = work;
    Weights c(highs, lows);
    int chunks = work.at_once / 16, g = lane() >> 2;
    begin<true>(raw, values, work, ahead, senders, places, basis, n, scales[1]);
    float4 own[4], bars[4];  // of b and y, or of a for each unit
    for (int it = 0;; it++) {
        if (it > 0) add_shares(shares + ((it - 1) & 1) * SHARES, before, n, scales, pair_bars);
        if (work.left <= 0) break;
        before = work;
        const Raw& now = raw[it % 3];
        const Raw& next = raw[(it + 1) % 3];
        const uint32* mine = values + (it & 1) * 4 * PART;
        uint32* other = values + ((it + 1) & 1) * 4 * PART;
        float* share = shares + (it & 1) * SHARES + (of_scalars() ? warp() : 4 * warp() - 3 * SCALARS) * PAIRS;
        Loaded after = load_raw(ahead, senders, places, n);
        if (work.first()) {
            if (of_scalars()) own[0] = four(a, work.atom, F, channel(0)), own[1] = four(a, work.atom, F, channel(1));
            else load_sources(own, work.atom, channel(0), b, y);
#pragma unroll
            for (int k = 0; k < 4; k++) bars[k] = ZERO;
        }
        if (of_scalars())
            for (int chunk = 0; chunk < chunks; chunk++) {
                Asked<ALL_ROUNDS> asked;
                ask(asked, next, chunk, basis);
                float4 pj[2][2];
                float d[2];
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int unit = 0; unit < 2; unit++) pj[r][unit] = four(p, now.sender[16 * chunk + g + 8 * r], F, channel(unit));
                Filters filter = evaluate(mine, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int unit = 0; unit < 2; unit++) bars[unit] = bars[unit] + filter.w[unit][r] * pj[r][unit];
                filter = evaluate(mine + 2 * PART, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++)
                    d[r] = sum(own[0] * pj[r][0] * filter.w[0][r] + own[1] * pj[r][1] * filter.w[1][r]);
                keep_share(share, chunk, d);
                answer<true>(asked, next, chunk, other, scales[1]);
            }
        else
            for (int chunk = 0; chunk < chunks; chunk++) {
                Asked<ROUNDS_OF_VECTORS> asked;
                ask(asked, next, chunk, basis);
                float4 qj[2][3], uq[2];
                float d[2], u_bar[2][3];
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int axis = 0; axis < 3; axis++)
                        qj[r][axis] = four(q, now.sender[16 * chunk + g + 8 * r], 3 * F, channel(0) + axis * F);
                Filters filter = evaluate(mine, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float4 u = now.u_t[16 * chunk + g + 8 * r], w = filter.w[0][r];
                    uq[r] = u.x * qj[r][0] + u.y * qj[r][1] + u.z * qj[r][2];
                    if (HAS_B) {
                        bars[0] = bars[0] - w * uq[r];
                        w = own[0] * w;
                        uq[r] = own[0] * uq[r];
                    }
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) u_bar[r][axis] = sum(w * qj[r][axis]);
#pragma unroll
                    for (int axis = 0; axis < 3 * HAS_Y; axis++) bars[HAS_B + axis] = bars[HAS_B + axis] + filter.w[1][r] * qj[r][axis];
                }
                filter = evaluate(mine + 2 * PART, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    float4 terms = ZERO - uq[r] * filter.w[0][r];
#if HAS_Y
                    terms = terms + (own[HAS_B] * qj[r][0] + own[1 + HAS_B] * qj[r][1] + own[2 + HAS_B] * qj[r][2]) * filter.w[1][r];
#endif
                    d[r] = sum(terms);
                }
                keep_share(share, chunk, d, u_bar);
                answer<true>(asked, next, chunk, other, scales[1]);
            }
        keep_raw(raw[(it + 2) % 3], after, work);
        if (work.last()) {
#pragma unroll
            for (int unit = 0; unit < 2; unit++)
                if (of_scalars() && has(unit)) store_sum(a_bar, work.atom, F, channel(unit), bars[unit], scales[0]);
            if (!of_scalars()) {
                if (HAS_B) store_sum(b_bar, work.atom, F, channel(0), bars[0], scales[0]);
#pragma unroll
                for (int axis = 0; axis < 3 * HAS_Y; axis++)
                    store_sum(y_bar, work.atom, 3 * F, channel(0) + axis * F, bars[HAS_B + axis], scales[0]);
            }
        }
        work.step(), ahead.step();
        sync();
    }
}
