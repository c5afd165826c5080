// Message sums and their transpose for many atoms: jaxff.kernels.message has the equations.
//
// A filter of the distance is W_c(r) = sum_k B_k(r) C_kc with few functions B, which are tabulated as cubics, in each of
// some bins of distances (arrange.cu). A block serves eight atoms after the other eight, and of each up to eight pairs in
// a turn, all in one bin. A warp has Wa of 32 channels or Wb and Wc of 16, two units of 16 columns each, and holds C for
// them in registers. The tensor cores make W of 16 pairs, two of each atom, from B and C, both as sums of two halves.
// Meanwhile the block evaluates B for the next turn.
// Defined from outside: F, HAS_B, HAS_Y; BIN, STEP: intervals of a bin, and from one's beginning to the next one's.
// scales: the factor of W that undoes those of B and C; of slopes, one more and its inverse.
#define SCALARS ((F + 31) / 32)  // warps with Wa
#define VECTORS (F / 16)         // warps with Wb and Wc
#define WARPS (SCALARS + VECTORS)
#define THREADS (32 * WARPS)
#define SOURCES (HAS_B + 3 * HAS_Y)  // of vectors
#define GROUP 8                // atoms
#define PAIRS 64               // of a turn: four times 16, of which rows g and g + 8 are of the g-th atom
#define K 16                   // functions
#define STRIDE (K / 2)         // words of a row of B in shared memory, whose halves change places: `swapped`
#define PART (PAIRS * STRIDE)  // words of B's values, or slopes, in one of their two halves
#define ROUNDS ((PAIRS * K + THREADS - 1) / THREADS)
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

struct Turn {
    float4 u_t[PAIRS];     // direction and place in the interval
    int sender[PAIRS];
    int chunks, bin;       // of 16 pairs, 0: no turn
    int first, last, cut;  // whether this block's first of these atoms; their last; its last, if that is not theirs
    int atom, unused[2];   // the first of the eight
};

// What warps tell each other: they don't wait until all are through with a turn, but only until all have made B of the
// next one and the turn after it. So one may still be in the turn before.
struct Memory {
    Turn* turn;               // four
    uint64* answered;         // a barrier for each turn, then one for the end of each
    short *slot, *interval;   // of pairs: of four turns, of two; -1: no pair
    uint32* values;           // of three turns [high, low], and likewise of slopes
    __device__ __forceinline__ Memory(char* memory) {
        turn = (Turn*)memory, answered = (uint64*)(turn + 4), slot = (short*)(answered + 2), interval = slot + 4 * PAIRS;
        values = (uint32*)(interval + 2 * PAIRS);
    }
    __device__ __forceinline__ uint64* done() const { return answered + 1; }
    __device__ __forceinline__ Turn& at(int it) const { return turn[it & 3]; }
    __device__ __forceinline__ short* slots(int it) const { return slot + (it & 3) * PAIRS; }
    __device__ __forceinline__ short* intervals(int it) const { return interval + (it & 1) * PAIRS; }
};

// The turns of this block: a thread loads one of a turn's pairs, and before it the word that tells which.
//
// Blocks have equal shares of all groups, so that most end within one; what one leaves there for another one to add to
// (join.cu) goes to `rest`.
struct Turns {
    const uint32* words;
    const float* pairs;
    int n, slots, capacity, group, turn, end, stop;  // the next turn; the first that is not of this block
    bool first;                                      // whether it is this block's first of its atoms
    uint32 word;

    __device__ Turns(const uint32* w, const float* p, int atoms, int s, int c) : words(w), pairs(p), n(atoms), slots(s), capacity(c), first(true) {
        long long groups = (n + GROUP - 1) / GROUP, from = groups * block(), to = from + groups;
        group = (int)(from / blocks()), end = (int)(to / blocks());
        turn = until(group, (int)(from % blocks())), stop = until(end, (int)(to % blocks()));
        read();
    }
    // the turns in this part, of `blocks()`, of a group
    __device__ int until(int group, int part) const {
        if (!part) return 0;
        uint32 found = 0;
        int begin = -32;
        while (!found) {
            begin += 32;
            found = lanes_where(words[(group * capacity + min(begin + lane(), capacity - 1)) * GROUP] >> 23 & 1);
        }
        return (int)((long long)(begin + lowest(found) + 1) * part / blocks());
    }
    __device__ __forceinline__ void read() {
        word = group < end || (group == end && turn < stop) ? words[(group * capacity + turn) * GROUP + thread() % GROUP] : 0;
    }
};

struct Loaded {
    float4 u_t;
    int interval_slot, sender;
};

__device__ __forceinline__ Loaded load_turn(const Turns& turns) {
    Loaded r = {ZERO, -1, 0};
    int atom = turns.group * GROUP + thread() % GROUP, place = thread() / 16 * 2 + thread() / GROUP % 2;
    if (thread() < PAIRS && place < (int)(turns.word >> 16 & 15)) {
        int all = turns.n * turns.slots;
        const float* from = turns.pairs + atom * turns.slots + (int)(turns.word & 0xffff) + place;
        r.u_t = make_float4(from[all], from[2 * all], from[3 * all], from[0]);
        r.interval_slot = as_int(from[5 * all]), r.sender = (int)from[4 * all];
    }
    return r;
}

// the turn that was loaded; and goes on to the next one
__device__ __forceinline__ void keep_turn(const Memory& m, int it, const Loaded& r, Turns& turns) {
    int p = thread();
    if (p >= PAIRS) return;
    Turn& turn = m.at(it);
    turn.u_t[p] = r.u_t, turn.sender[p] = r.sender;
    m.intervals(it)[p] = (short)(r.interval_slot >> 16), m.slots(it)[p] = r.interval_slot < 0 ? -1 : (short)(r.interval_slot & 0xffff);
    bool last = turns.word >> 23 & 1;
    if (p == 0) {
        turn.chunks = turns.word >> 20 & 7, turn.bin = turns.word >> 24, turn.atom = turns.group * GROUP;
        turn.first = turns.first, turn.last = last, turn.cut = turns.group == turns.end && turns.turn + 1 == turns.stop;
    }
    turns.group += last, turns.turn = last ? 0 : turns.turn + 1, turns.first = last;
    turns.read();
}

// --- B of a turn: coefficients are asked for by `ask`, values (and slopes) written by `answer` ---

struct Asked {
    float4 c[ROUNDS];
};

__device__ __forceinline__ void ask(Asked& q, const Turn& turn, const short* intervals, const float4* basis) {
    int pairs = 16 * turn.chunks, begin = turn.bin * (BIN - STEP);
#pragma unroll
    for (int m = 0; m < ROUNDS; m++) {
        int p = (thread() + m * THREADS) / K, interval = p < pairs ? intervals[p] : -1;
        q.c[m] = ZERO;
        if (interval >= 0) q.c[m] = basis[(begin + interval) * K + thread() % K];
    }
}

__device__ __forceinline__ void put(uint32* high, uint32* low, int k, float x) {
    uint32 h, l;
    split(x, 0.f, h, l);
    ((unsigned short*)high)[k] = (unsigned short)h;
    ((unsigned short*)low)[k] = (unsigned short)l;
}

template <bool SLOPES>
__device__ __forceinline__ void answer(const Asked& q, const Turn& turn, uint32* b, float slope) {
    int pairs = 16 * turn.chunks;
#pragma unroll
    for (int m = 0; m < ROUNDS; m++) {
        int p = (thread() + m * THREADS) / K, k = thread() % K;
        if (p >= pairs) continue;
        float t = turn.u_t[p].w;
        uint32* row = b + p * STRIDE + swapped(p, k / 8) * 4 - k / 8 * 4;
        put(row, row + PART, k, cubic(q.c[m], t));
        if (SLOPES) put(row + 2 * PART, row + 3 * PART, k, slope * cubic_slope(q.c[m], t));
    }
}

// two turns, and B of the first
template <bool SLOPES>
__device__ __forceinline__ void begin(const Memory& m, Turns& turns, const float4* basis, float slope) {
    if (thread() == 0) barrier_init(m.answered, WARPS), barrier_init(m.done(), WARPS);
    for (int k = 0; k < 2; k++) keep_turn(m, k, load_turn(turns), turns);
    sync();
    Asked asked;
    ask(asked, m.at(0), m.intervals(0), basis);
    answer<SLOPES>(asked, m.at(0), m.values, slope);
    sync();
}

// senders of two pairs of this lane; of the next turn after the last 16 pairs of this one
struct Senders {
    int of[2];
    __device__ __forceinline__ void read(const Turn& now, const Turn& next, int chunk, int chunks) {
        const int* from = (chunk < chunks ? now.sender + 16 * chunk : next.sender) + (lane() >> 2);
        of[0] = from[0], of[1] = from[8];
    }
};

// --- W of 16 pairs ---

struct Weights {  // C of this warp's units
    uint4 c[2][2];
    __device__ __forceinline__ void load(const uint4* matrices, int bin) {
#pragma unroll
        for (int unit = 0; unit < 2; unit++) {
            int which = of_scalars() ? 0 : 1 + unit;
            bool there = has(unit) && which < 2 + HAS_Y;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                uint4 zero = {0, 0, 0, 0};
                c[unit][j] = there ? matrices[((bin * (2 + HAS_Y) * VECTORS + which * VECTORS + group(unit)) * 2 + j) * 32 + lane()] : zero;
            }
        }
    }
    // waits until they are there; nothing: 0, which the compiler must not know
    __device__ __forceinline__ void arrive(uint32 nothing) {
#pragma unroll
        for (int unit = 0; unit < 2; unit++)
#pragma unroll
            for (int j = 0; j < 2; j++)
                c[unit][j].x |= nothing, c[unit][j].y |= nothing, c[unit][j].z |= nothing, c[unit][j].w |= nothing;
    }
};

struct Filters {  // by unit, for two pairs, rows g and g + 8 of the 16, and the four channels of this lane
    float4 w[2][2];
};

// b: values or slopes of B, [high, low]
__device__ __forceinline__ Filters evaluate(const uint32* b, int chunk, const Weights& w) {
    float acc[2][2][4] = {};
    uint32 high[4], low[4];
    load_swapped(high, b + 16 * chunk * STRIDE);
    load_swapped(low, b + PART + 16 * chunk * STRIDE);
#pragma unroll
    for (int f = 0; f < 2; f++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            mma(acc[f][j], low, w.c[f][j].x, w.c[f][j].y);
            mma(acc[f][j], high, w.c[f][j].z, w.c[f][j].w);
            mma(acc[f][j], high, w.c[f][j].x, w.c[f][j].y);
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

__device__ __forceinline__ void store_four(float* out, int row, int width, int channel, float4 x, float factor) {
    *(float4*)(out + row * width + channel) = factor * x;
}

// zeros where a block leaves nothing there
__device__ __forceinline__ void clear_rest(const Turns& turns, float* rest, int width) {
    if (block() + 1 < blocks() && !turns.stop)
        for (int k = thread(); k < GROUP * width; k += THREADS) rest[block() * GROUP * width + k] = 0.f;
}

__device__ __forceinline__ void load_scalars(float4 (&x)[2][2], const float* a, const Senders& from) {
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int unit = 0; unit < 2; unit++) x[r][unit] = four(a, from.of[r], F, channel(unit));
}

// b where there is none, y where there is none: not read
extern "C" __global__ void __launch_bounds__(THREADS, 1)
message(const float* __restrict__ pairs, const uint32* __restrict__ words, const float4* __restrict__ basis,
        const uint4* __restrict__ matrices, const float* __restrict__ scales, const float* __restrict__ a,
        const float* __restrict__ b, const float* __restrict__ y, int n, int slots, int capacity, float* __restrict__ ds,
        float* __restrict__ dv, float* __restrict__ rest) {
    SHARED(char, memory);
    Memory m(memory);
    Turns turns(words, pairs, n, slots, capacity);
    int g = lane() >> 2;
    clear_rest(turns, rest, 4 * F);
    begin<false>(m, turns, basis, 0.f);
    Weights c;
    c.load(matrices, m.at(0).bin);
    float4 sums[3] = {ZERO, ZERO, ZERO};  // of the vectors, or of the scalars of each unit
    float4 scalars[2][2], heard[2][SOURCES + 1];  // of the pairs that come next
    Senders from;
    from.read(m.at(0), m.at(1), 0, 1);
    if (of_scalars()) load_scalars(scalars, a, from);
    else
        for (int r = 0; r < 2; r++) load_sources(heard[r], from.of[r], channel(0), b, y);
    for (int it = 0;; it++) {
        const Turn &now = m.at(it), &next = m.at(it + 1);
        const uint32* mine = m.values + it % 3 * 2 * PART;
        int chunks = now.chunks;
        if (!chunks) break;
        c.arrive((uint32)chunks >> 8);
        Loaded after = load_turn(turns);
        Asked asked;
        ask(asked, next, m.intervals(it + 1), basis);
        from.read(now, next, 1, chunks);
        auto prepare_next = [&] {
            answer<false>(asked, next, m.values + (it + 1) % 3 * 2 * PART, 0.f);
            keep_turn(m, it + 2, after, turns);
            barrier_arrive(m.answered);
        };
        if (of_scalars()) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                Filters filter = evaluate(mine, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int unit = 0; unit < 2; unit++) sums[unit] = sums[unit] + filter.w[unit][r] * scalars[r][unit];
                load_scalars(scalars, a, from);
                from.read(now, next, chunk + 2, chunks);
                if (chunk == min(1, chunks - 1)) prepare_next();
            }
        } else {
            for (int chunk = 0; chunk < chunks; chunk++) {
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
                    load_sources(heard[r], from.of[r], channel(0), b, y);
                }
                from.read(now, next, chunk + 2, chunks);
                if (chunk == min(1, chunks - 1)) prepare_next();
            }
        }
        if (next.chunks && next.bin != now.bin) c.load(matrices, next.bin);
        if (now.last || now.cut) {
            bool here = now.cut || now.atom + g < n;
            float *to_s = now.cut ? rest : ds, *to_v = now.cut ? rest + F : dv;
            int atom = now.cut ? block() * GROUP + g : now.atom + g, of_s = now.cut ? 4 * F : F, of_v = now.cut ? 4 * F : 3 * F;
#pragma unroll
            for (int k = 0; k < 3; k++) {
                if (here) {
                    if (!of_scalars()) store_four(to_v, atom, of_v, channel(0) + k * F, sums[k], scales[0]);
                    else if (k < 2 && has(k)) store_four(to_s, atom, of_s, channel(k), sums[k], scales[0]);
                }
                sums[k] = ZERO;
            }
        }
        barrier_wait(m.answered, it & 1);
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

// the sums of all warps' shares, of a turn: [D] of each scalars' warp, then [D, U_xyz] of each vectors'
#define SHARES ((SCALARS + 4 * VECTORS) * PAIRS)
__device__ __forceinline__ void add_shares(const float* shares, const Memory& m, int it, int n, int slots, const float* scales, float* pair_bars) {
    for (int k = thread(); k < 4 * PAIRS; k += THREADS) {
        int slot = m.slots(it)[k % PAIRS];
        if (slot < 0) continue;
        float total = 0.f;
#pragma unroll
        for (int warp = 0; warp < SCALARS; warp++)
            if (k < PAIRS) total += shares[warp * PAIRS + k];
#pragma unroll
        for (int warp = 0; warp < VECTORS; warp++) total += shares[(SCALARS + 4 * warp) * PAIRS + k];
        int edge = (m.at(it).atom + k % GROUP) * slots + slot;
        pair_bars[k / PAIRS * (n * slots) + edge] = scales[0] * (k < PAIRS ? scales[2] * total : total);
    }
}

// Cotangents of the sources; and of each pair (i, j) that counts the half [D, U_xyz] that belongs to what i sends to j:
// D = sum_f a_i p_j Wa' - b_i (u.q_j) Wb' + (y_i.q_j) Wc',  U = sum_f b_i q_j Wb.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
message_transpose(const float* __restrict__ pairs, const uint32* __restrict__ words, const float4* __restrict__ basis,
                  const uint4* __restrict__ matrices, const float* __restrict__ scales, const float* __restrict__ p,
                  const float* __restrict__ q, const float* __restrict__ a, const float* __restrict__ b,
                  const float* __restrict__ y, int n, int slots, int capacity, float* __restrict__ a_bar,
                  float* __restrict__ b_bar, float* __restrict__ y_bar, float* __restrict__ rest, float* __restrict__ pair_bars) {
    SHARED(char, memory);
    Memory m(memory);
    float* shares = (float*)(m.values + 12 * PART);  // two of SHARES
    Turns turns(words, pairs, n, slots, capacity);
    int g = lane() >> 2;
    constexpr int ALL = (1 + SOURCES) * F;  // what an atom has in `rest`
    clear_rest(turns, rest, ALL);
    begin<true>(m, turns, basis, scales[1]);
    Weights c;
    c.load(matrices, m.at(0).bin);
    float4 own[4], bars[4];                // of b and y, or of a for each unit
    float4 scalars[2][2], vectors[2][3];  // p and q of the pairs that come next
    auto load_vectors = [&](int r, int sender) {
#pragma unroll
        for (int axis = 0; axis < 3; axis++) vectors[r][axis] = four(q, sender, 3 * F, channel(0) + axis * F);
    };
    Senders from;
    from.read(m.at(0), m.at(1), 0, 1);
    if (of_scalars()) load_scalars(scalars, p, from);
    else
        for (int r = 0; r < 2; r++) load_vectors(r, from.of[r]);
    for (int it = 0;; it++) {
        const Turn &now = m.at(it), &next = m.at(it + 1);
        const uint32* mine = m.values + it % 3 * 4 * PART;
        int chunks = now.chunks;
        auto add_shares_before = [&] {
            if (it == 0) return;
            barrier_wait(m.done(), (it - 1) & 1);
            add_shares(shares + ((it - 1) & 1) * SHARES, m, it - 1, n, slots, scales, pair_bars);
        };
        if (!chunks) {
            add_shares_before();
            break;
        }
        c.arrive((uint32)chunks >> 8);
        float* share = shares + (it & 1) * SHARES + (of_scalars() ? warp() : 4 * warp() - 3 * SCALARS) * PAIRS;
        Loaded after = load_turn(turns);
        Asked asked;
        ask(asked, next, m.intervals(it + 1), basis);
        from.read(now, next, 1, chunks);
        auto prepare_next = [&] {
            answer<true>(asked, next, m.values + (it + 1) % 3 * 4 * PART, scales[1]);
            keep_turn(m, it + 2, after, turns);
            add_shares_before();
            barrier_arrive(m.answered);
        };
        if (now.first) {
            int atom = min(now.atom + g, n - 1);
            if (of_scalars()) own[0] = four(a, atom, F, channel(0)), own[1] = four(a, atom, F, channel(1));
            else load_sources(own, atom, channel(0), b, y);
#pragma unroll
            for (int k = 0; k < 4; k++) bars[k] = ZERO;
        }
        if (of_scalars()) {
            for (int chunk = 0; chunk < chunks; chunk++) {
                float4 ap[2][2];
                float d[2];
                Filters filter = evaluate(mine, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++)
#pragma unroll
                    for (int unit = 0; unit < 2; unit++) {
                        bars[unit] = bars[unit] + filter.w[unit][r] * scalars[r][unit];
                        ap[r][unit] = own[unit] * scalars[r][unit];
                    }
                load_scalars(scalars, p, from);
                from.read(now, next, chunk + 2, chunks);
                filter = evaluate(mine + 2 * PART, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++) d[r] = sum(ap[r][0] * filter.w[0][r] + ap[r][1] * filter.w[1][r]);
                keep_share(share, chunk, d);
                if (chunk == min(1, chunks - 1)) prepare_next();
            }
        } else {
            for (int chunk = 0; chunk < chunks; chunk++) {
                float4 along[2], yq[2];
                float d[2], u_bar[2][3];
                Filters filter = evaluate(mine, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float4* qj = vectors[r];
                    float4 u = now.u_t[16 * chunk + g + 8 * r], w = filter.w[0][r];
                    along[r] = u.x * qj[0] + u.y * qj[1] + u.z * qj[2];
                    if (HAS_B) {
                        bars[0] = bars[0] - w * along[r];
                        w = own[0] * w;
                        along[r] = own[0] * along[r];
                    }
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) u_bar[r][axis] = sum(w * qj[axis]);
#if HAS_Y
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) bars[HAS_B + axis] = bars[HAS_B + axis] + filter.w[1][r] * qj[axis];
                    yq[r] = own[HAS_B] * qj[0] + own[1 + HAS_B] * qj[1] + own[2 + HAS_B] * qj[2];
#endif
                    load_vectors(r, from.of[r]);
                }
                from.read(now, next, chunk + 2, chunks);
                filter = evaluate(mine + 2 * PART, chunk, c);
#pragma unroll
                for (int r = 0; r < 2; r++)
                    d[r] = HAS_Y ? sum(yq[r] * filter.w[1][r] - along[r] * filter.w[0][r]) : sum(ZERO - along[r] * filter.w[0][r]);
                keep_share(share, chunk, d, u_bar);
                if (chunk == min(1, chunks - 1)) prepare_next();
            }
        }
        if (next.chunks && next.bin != now.bin) c.load(matrices, next.bin);
        barrier_arrive(m.done());
        if (now.cut || (now.last && now.atom + g < n)) {
            float *to_a = now.cut ? rest : a_bar, *to_b = now.cut ? rest + F : b_bar, *to_y = now.cut ? rest + (1 + HAS_B) * F : y_bar;
            int atom = now.cut ? block() * GROUP + g : now.atom + g, of_one = now.cut ? ALL : F, of_y = now.cut ? ALL : 3 * F;
#pragma unroll
            for (int unit = 0; unit < 2; unit++)
                if (of_scalars() && has(unit)) store_four(to_a, atom, of_one, channel(unit), bars[unit], scales[0]);
            if (!of_scalars()) {
                if (HAS_B) store_four(to_b, atom, of_one, channel(0), bars[0], scales[0]);
#pragma unroll
                for (int axis = 0; axis < 3 * HAS_Y; axis++)
                    store_four(to_y, atom, of_y, channel(0) + axis * F, bars[HAS_B + axis], scales[0]);
            }
        }
        barrier_wait(m.answered, it & 1);
    }
}
