// Message sums over all pairs of molecules of M atoms, and their transpose, with filters by tensor cores:
// jaxff.kernels.message has the equations.
//
// A filter of the distance is W_c(r) = sum_k B_k(r) C_kc with few functions B, which are tabulated as cubics. A block
// serves PACK molecules, whose atoms lie in shared memory; it takes 16 of them at once, and of each the pair with the
// atom that comes r after it in its molecule: a unit. A warp has 16 channels and holds C for them in registers. The
// tensor cores make W of a unit from B and C, both as sums of two halves; in the transpose while sums are made with the W
// before it. Sums stay in registers, as a lane has the same two atoms in all units of a tile. Warps evaluate B for units
// to come.
// Defined from outside: F, M, PACK, K, HAS_B and HAS_Y (jaxff.kernels.message.Sources), TRANSPOSE (which kernel).
// scales: the factor of W that undoes those of B and C; of slopes, one more and its inverse.
#define WARPS (F / 16)  // of a group
#define GROUPS (TRANSPOSE ? 1 : 2)  // which take tiles by turns; one, where a lane needs more registers than half of them
#define THREADS (32 * WARPS * GROUPS)
#define ALL (PACK * M)  // atoms
#define FIRST (min((16 * GROUPS - 1) / M + 1, PACK) * M)  // those that are in the groups' first tiles, or meet them
#define PAIRS (ALL * M)
#define TILES ((ALL + 15) / 16)
#define TURNS (M / 2 * 2)                  // units of a tile, of which the last is empty where M is even
#define TILES_OF_GROUP ((TILES + GROUPS - 1) / GROUPS)
#define UNITS (TILES_OF_GROUP * TURNS)      // of a group, some empty
#define AHEAD (TRANSPOSE ? 2 : 1)          // units that B is made before
#define WIDTH (F + 16)                     // of an atom's row in shared memory: the two that lanes read at once share no bank
#define FILTERS (2 + HAS_Y)                // Wa, Wb, Wc
#define SENT (1 + HAS_B + 3 * HAS_Y)       // rows that an atom sends: a, b, y
#define STEPS ((K + 15) / 16)              // of a product
#define STRIDE (K > 24 ? 20 : 12)          // words of a row of B, of which no eight in a row share a bank
#define PART (16 * STRIDE)                 // words of B's values, or slopes, in one of their two halves
#define BUFFER ((1 + TRANSPOSE) * 2 * PART)
#define BUFFERS 4                          // of B: a warp may be a unit before the others
#define SUMS (64 * WARPS)                  // U and D of 16 pairs by each warp
#define BY_WARP 2                          // atoms that a warp evaluates B for at once
#define ROUNDS ((16 + BY_WARP * WARPS - 1) / (BY_WARP * WARPS))
#define ROWS (TRANSPOSE ? 4 : SENT)        // of an atom in shared memory: what it hears
#define EACH_ATOM _Pragma("unroll") for (int h = 0; h < 2; h++)
#define EACH_AXIS _Pragma("unroll") for (int x = 0; x < 3; x++)
#define B (HAS_B)                           // the place of b, or any
#define Y (HAS_Y ? 1 + HAS_B : 0)           // and of y
#define ZERO make_float4(0.f, 0.f, 0.f, 0.f)

__device__ __forceinline__ float4 operator*(float4 x, float4 y) { return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w); }
__device__ __forceinline__ float4 operator*(float x, float4 y) { return make_float4(x * y.x, x * y.y, x * y.z, x * y.w); }
__device__ __forceinline__ float4 operator+(float4 x, float4 y) { return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w); }
__device__ __forceinline__ float4 operator-(float4 x, float4 y) { return make_float4(x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w); }
__device__ __forceinline__ float dot(float4 x, float4 y) { return (x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w); }
__device__ __forceinline__ float axis_of(float4 u, int x) { return x == 0 ? u.x : x == 1 ? u.y : u.z; }

struct Memory {
    float* rows;       // [ROWS, ALL, WIDTH]
    float4* places;    // of pairs [UNITS, 16] of the groups: direction, and place in the interval; in the end gradients [U, D]
    int* from;         // their intervals' cubics in `basis`
    uint64* answered;  // a barrier for each buffer
    uint32* b;         // of BUFFERS units: values [high, low], and likewise slopes
    float* sums;       // of BUFFERS units: [U, D] of each warp [16, 4]
    __device__ __forceinline__ Memory(char* memory) {
        rows = (float*)memory, places = (float4*)(rows + ROWS * ALL * WIDTH), from = (int*)(places + 16 * UNITS * GROUPS);
        answered = (uint64*)(from + 16 * UNITS * GROUPS), b = (uint32*)(answered + BUFFERS * GROUPS);
        sums = (float*)(b + BUFFERS * BUFFER * GROUPS);
    }
    __device__ __forceinline__ void of_group(int group) {
        places += 16 * UNITS * group, from += 16 * UNITS * group, answered += BUFFERS * group, b += BUFFERS * BUFFER * group;
    }
    __device__ __forceinline__ uint32* at(int unit) const { return b + unit % BUFFERS * BUFFER; }
};

// where an atom's pair with the one that comes r after it lies among `places`
__device__ __forceinline__ int pair_of(int row, int r) { return 16 * (row / 16 * TURNS + r - 1) + row % 16; }

// x: rows of all atoms of COUNT times F channels, of which those of some atoms of the block go into as many rows from
// `row` on
template <int COUNT>
__device__ __forceinline__ void copy_rows(const Memory& m, int row, const float* x, int begin, int end) {
    constexpr int WIDE = COUNT * F / 4;
    for (int k = begin * WIDE + thread(); k < end * WIDE; k += THREADS) {
        int atom = k / WIDE, channel = k % WIDE * 4;
        copy_16(m.rows + ((row + channel / F) * ALL + atom) * WIDTH + channel % F, (const float4*)x + block() * ALL * WIDE + k);
    }
}

// intervals: of the table, after which are zeros for pairs that don't count
__device__ __forceinline__ void keep_places(const Memory& m, const float* places, int molecules, int intervals, int there) {
    int all = molecules * M * M;
#pragma unroll 4
    for (int k = thread(); k < 16 * UNITS * GROUPS; k += THREADS) {
        int tile = k / (16 * TURNS), row = 16 * (tile % TILES_OF_GROUP * GROUPS + tile / TILES_OF_GROUP) + k % 16;
        int r = k / 16 % TURNS + 1, i = row % M, j = i + r < M ? i + r : i + r - M;
        bool is = row < there && r < M;
        const float* x = places + (is ? block() * PAIRS + row * M + j : 0);
        float t = x[0], counts = x[all], interval = x[5 * all];
        m.places[k] = make_float4(x[2 * all], x[3 * all], x[4 * all], t);
        m.from[k] = (is && counts > 0.f ? (int)interval : intervals) * K;
    }
}

__device__ __forceinline__ int part() { return warp() % WARPS; }  // this warp's channels

// --- B of a unit: coefficients are asked for by `ask`, values (and slopes) written by `answer` ---

// A lane's share: two functions of one of the 16 atoms; of ROUNDS of those, in AHEAD units
struct Asker {
    int place, k, next[ROUNDS];  // where the cubics are that are asked for next
    bool serves;
    float4 c[AHEAD][ROUNDS][2];  // two powers of both functions each
    float t[AHEAD][ROUNDS];
    __device__ __forceinline__ Asker(const Memory& m) {
        k = lane() % (K / 2), serves = lane() < BY_WARP * (K / 2), place = part() * BY_WARP + (serves ? lane() / (K / 2) : 0);
        look(m, 0);
    }
    __device__ __forceinline__ bool has(int i) const { return 16 % (BY_WARP * WARPS) == 0 || place + i * BY_WARP * WARPS < 16; }
    __device__ __forceinline__ int pair(int unit, int i) const { return min(unit, UNITS - 1) * 16 + (has(i) ? place + i * BY_WARP * WARPS : 0); }
    __device__ __forceinline__ void look(const Memory& m, int unit) {
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) next[i] = m.from[pair(unit, i)];
    }
    __device__ __forceinline__ void ask(int odd, const Memory& m, int unit, const float4* basis) {
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            const float4* from = basis + next[i] + k;
            c[odd][i][0] = early(from), c[odd][i][1] = early(from + K / 2), t[odd][i] = m.places[pair(unit, i)].w;
        }
        look(m, unit + 1);
    }
    __device__ __forceinline__ void answer(int odd, const Memory& m, int unit, float slope) const {
#pragma unroll
        for (int i = 0; i < ROUNDS; i++) {
            uint32 *to = m.at(unit) + (place + i * BY_WARP * WARPS) * STRIDE + k, high, low, high_slope, low_slope;
            const float4 &x = c[odd][i][0], &y = c[odd][i][1];
            float4 p = make_float4(x.x, x.z, y.x, y.z), q = make_float4(x.y, x.w, y.y, y.w);
            split(cubic(p, t[odd][i]), cubic(q, t[odd][i]), high, low);
            if (TRANSPOSE) split(slope * cubic_slope(p, t[odd][i]), slope * cubic_slope(q, t[odd][i]), high_slope, low_slope);
            if (serves && has(i)) {
                to[0] = high, to[PART] = low;
                if (TRANSPOSE) to[2 * PART] = high_slope, to[3 * PART] = low_slope;
            }
        }
    }
};

// --- W of a unit ---

struct Weights {  // C of this warp's channels
    uint4 c[FILTERS][STEPS][2];
    __device__ __forceinline__ Weights(const uint4* matrices) {
#pragma unroll
        for (int f = 0; f < FILTERS; f++)
#pragma unroll
            for (int k = 0; k < 2 * STEPS; k++) c[f][k / 2][k % 2] = matrices[((f * WARPS + part()) * 2 * STEPS + k) * 32 + lane()];
    }
};

struct Operand {  // B's values or slopes
    uint32 high[STEPS][4], low[STEPS][4];
    __device__ __forceinline__ void load(const uint32* b) {
#pragma unroll
        for (int s = 0; s < STEPS; s++)
            if (16 * s + 8 < K) {
                load_a(high[s], b + 8 * s, STRIDE), load_a(low[s], b + PART + 8 * s, STRIDE);
            } else {
                load_a_of_8(high[s], low[s], b + 8 * s, PART, STRIDE);
            }
    }
};

struct Filter {
    float4 of[2];  // for the two atoms, the four channels of this lane
    Filter() = default;
    __device__ __forceinline__ Filter(const Operand& b, const uint4 (&c)[STEPS][2]) {
        float acc[2][4];
#pragma unroll
        for (int s = 0; s < STEPS; s++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                if (16 * s + 8 < K) {
                    s ? mma(acc[j], b.low[s], c[s][j].x, c[s][j].y) : mma_new(acc[j], b.low[s], c[s][j].x, c[s][j].y);
                    mma(acc[j], b.high[s], c[s][j].z, c[s][j].w);
                    mma(acc[j], b.high[s], c[s][j].x, c[s][j].y);
                } else {
                    mma_of_8(acc[j], b.low[s], c[s][j].x);
                    mma_of_8(acc[j], b.high[s], c[s][j].z);
                    mma_of_8(acc[j], b.high[s], c[s][j].x);
                }
            }
        EACH_ATOM of[h] = make_float4(acc[0][2 * h], acc[0][2 * h + 1], acc[1][2 * h], acc[1][2 * h + 1]);
    }
};

// what lanes do with the units of a tile, of which each has two atoms
struct Tile {
    int row[2], there;                    // of the block; its atoms
    const float *partner[2], *end[2];     // what the atom that comes r after sends, of this lane's channels; of the next molecule
    __device__ __forceinline__ Tile(const Memory& m, int tile, int count) : there(count) {
        EACH_ATOM {
            row[h] = 16 * tile + 8 * h + (lane() >> 2);
            int here = min(row[h], ALL - 1);
            partner[h] = m.rows + here * WIDTH + channel(), end[h] = partner[h] + (M - here % M) * WIDTH;
        }
    }
    __device__ __forceinline__ void go_on() { EACH_ATOM partner[h] = partner[h] + WIDTH == end[h] ? end[h] - M * WIDTH : partner[h] + WIDTH; }
    __device__ __forceinline__ int channel() const { return 16 * part() + 4 * (lane() & 3); }
    __device__ __forceinline__ float4 heard(int h, int which) const { return *(const float4*)(partner[h] + which * ALL * WIDTH); }
    __device__ __forceinline__ float4 load(int h, const float* x, int width, int offset) const {
        return row[h] < there ? *(const float4*)(x + (block() * ALL + row[h]) * width + offset + channel()) : ZERO;
    }
    __device__ __forceinline__ void store(int h, float* x, int width, int offset, float4 value) const {
        if (row[h] < there) *(float4*)(x + (block() * ALL + row[h]) * width + offset + channel()) = value;
    }
};

#if TRANSPOSE
// of each of 16 pairs U and D over this warp's channels: of the eight sums of two atoms, a lane gets two
__device__ __forceinline__ void keep_sums(float* sums, const float (&x)[2][4]) {
    bool second = lane() & 2, last = lane() & 1;
    float y[4];
#pragma unroll
    for (int k = 0; k < 4; k++) y[k] = (second ? x[1][k] : x[0][k]) + from_lane(second ? x[0][k] : x[1][k], 2);
    float2 z = make_float2((last ? y[2] : y[0]) + from_lane(last ? y[0] : y[2], 1), (last ? y[3] : y[1]) + from_lane(last ? y[1] : y[3], 1));
    *(float2*)(sums + 64 * part() + 4 * ((lane() >> 2) + 8 * second) + 2 * last) = z;
}

// a unit's gradients by pairs, when all warps have theirs; two warps by turns
__device__ __forceinline__ void join(const Memory& m, int unit, float of_u, float of_d) {
    int which = (part() + 2 * unit) % WARPS, k = 32 * which + lane();
    if (unit < 0 || which > 1) return;
    const float* from = m.sums + unit % BUFFERS * SUMS + k;
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) total += from[64 * w];
    ((float*)(m.places + 16 * unit))[k] = total * (k % 4 == 3 ? of_d : of_u);
}
#endif

#if TRANSPOSE
// bars: [4, pairs], D and U of a pair as `whole` joins them, and anything where no pair counts
extern "C" __global__ void __launch_bounds__(THREADS, 1)
pack_transpose(const float* __restrict__ places, const float4* __restrict__ basis, const uint4* __restrict__ matrices,
               const float* __restrict__ scales, const float* __restrict__ p, const float* __restrict__ q,
               const float* __restrict__ a, const float* __restrict__ b, const float* __restrict__ y, int molecules, int intervals,
               float* __restrict__ a_bar, float* __restrict__ b_bar, float* __restrict__ y_bar, float* __restrict__ bars) {
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1)
pack_message(const float* __restrict__ places, const float4* __restrict__ basis, const uint4* __restrict__ matrices,
             const float* __restrict__ scales, const float* __restrict__ a, const float* __restrict__ b,
             const float* __restrict__ y, int molecules, int intervals, float* __restrict__ ds, float* __restrict__ dv) {
#endif
    SHARED(char, memory);
    Memory m(memory);
    if (thread() < BUFFERS * GROUPS) barrier_init(m.answered + thread(), WARPS);
    int there = min(ALL, (molecules - block() * PACK) * M);
    keep_places(m, places, molecules, intervals, there);
    for (int rest = 0; rest < 2; rest++) {  // what the first tiles need, the rest
        int begin = rest ? FIRST : 0, end = rest ? there : min(FIRST, there);
#if TRANSPOSE
        copy_rows<1>(m, 0, p, begin, end), copy_rows<3>(m, 1, q, begin, end);
#else
        copy_rows<1>(m, 0, a, begin, end);
        if (HAS_B) copy_rows<1>(m, B, b, begin, end);
        if (HAS_Y) copy_rows<3>(m, Y, y, begin, end);
#endif
        end_copies();
    }
    Weights weights(matrices);
    float factor = scales[0], slope = scales[1], inverse = scales[2];
    wait_for_copies<1>();
    sync();
    m.of_group(warp() / WARPS);
    stay(basis);
    Asker asker(m);
    Operand values;
#if TRANSPOSE
    for (int k = 0; k < 2; k++) asker.ask(k, m, k, basis);
    for (int k = 0; k < 2; k++) asker.answer(k, m, k, slope), barrier_arrive(m.answered + k), asker.ask(k, m, k + 2, basis);
    barrier_wait(m.answered, 0);
    Operand slopes;
    values.load(m.at(0)), slopes.load(m.at(0) + 2 * PART);
    Filter w(values, weights.c[0]), s(slopes, weights.c[0]);
#else
    asker.ask(0, m, 0, basis), asker.answer(0, m, 0, slope), barrier_arrive(m.answered), asker.ask(0, m, 1, basis);
#endif
    for (int turn = 0; turn < TILES_OF_GROUP; turn++) {
        int tile = turn * GROUPS + warp() / WARPS;
        if (turn == 1) wait_for_copies<0>(), sync();
        Tile own(m, tile, there);
        float4 sums[TRANSPOSE ? SENT : 4][2] = {};
#if TRANSPOSE
        float4 sent[SENT][2];
        EACH_ATOM {
            sent[0][h] = own.load(h, a, F, 0);
            if (HAS_B) sent[B][h] = own.load(h, b, F, 0);
            if (HAS_Y) EACH_AXIS sent[Y + x][h] = own.load(h, y, 3 * F, x * F);
        }
#pragma unroll 1
        for (int begin = 0; begin < TURNS; begin += 2)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                int unit = turn * TURNS + begin + odd;
                bool counts = M % 2 || begin + odd + 1 < M;
                if (unit + 2 < UNITS) asker.answer(odd, m, unit + 2, slope), barrier_arrive(m.answered + (unit + 2) % BUFFERS);
                asker.ask(odd, m, unit + 4, basis);
                own.go_on();
                const float4* here = m.places + 16 * unit + (lane() >> 2);
                float found[2][4];
                float4 d[2];
                Filter wb(values, weights.c[1]), sb(slopes, weights.c[1]);
                if (counts) EACH_ATOM {
                    float4 p_j = own.heard(h, 0);
                    sums[0][h] = sums[0][h] + w.of[h] * p_j, d[h] = sent[0][h] * p_j * s.of[h];
                }
                if (HAS_Y) w = Filter(values, weights.c[FILTERS - 1]), s = Filter(slopes, weights.c[FILTERS - 1]);
                if (counts) EACH_ATOM {
                    float4 u = here[8 * h], along = ZERO, bw = HAS_B ? sent[B][h] * wb.of[h] : wb.of[h];
                    EACH_AXIS {
                        float4 q_j = own.heard(h, 1 + x);
                        along = along + axis_of(u, x) * q_j, found[h][x] = dot(bw, q_j);
                    }
                    if (HAS_B) sums[B][h] = sums[B][h] - wb.of[h] * along;
                    d[h] = d[h] - (HAS_B ? sent[B][h] * along : along) * sb.of[h];
                }
                if (unit + 1 < UNITS) barrier_wait(m.answered + (unit + 1) % BUFFERS, (unit + 1) / BUFFERS % 2);
                values.load(m.at(unit + 1)), slopes.load(m.at(unit + 1) + 2 * PART);
                Filter next(values, weights.c[0]), its(slopes, weights.c[0]);
                if (HAS_Y && counts) EACH_ATOM {
                    float4 ways = ZERO;
                    EACH_AXIS {
                        float4 q_j = own.heard(h, 1 + x);
                        ways = ways + sent[Y + x][h] * q_j, sums[Y + x][h] = sums[Y + x][h] + w.of[h] * q_j;
                    }
                    d[h] = d[h] + ways * s.of[h];
                }
                if (counts) {
                    EACH_ATOM found[h][3] = (d[h].x + d[h].y) + (d[h].z + d[h].w);
                    keep_sums(m.sums + unit % BUFFERS * SUMS, found);
                }
                w = next, s = its;
                join(m, unit - 2, factor, factor * inverse);
            }
        EACH_ATOM {
            own.store(h, a_bar, F, 0, factor * sums[0][h]);
            if (HAS_B) own.store(h, b_bar, F, 0, factor * sums[B][h]);
            if (HAS_Y) EACH_AXIS own.store(h, y_bar, 3 * F, x * F, factor * sums[Y + x][h]);
        }
#else
#pragma unroll 1
        for (int begin = 0; begin < TURNS; begin++) {
            int unit = turn * TURNS + begin;
            if (unit + 1 < UNITS) asker.answer(0, m, unit + 1, slope), barrier_arrive(m.answered + (unit + 1) % BUFFERS);
            asker.ask(0, m, unit + 2, basis);
            own.go_on();
            barrier_wait(m.answered + unit % BUFFERS, unit / BUFFERS % 2);
            values.load(m.at(unit));
            const float4* here = m.places + 16 * unit + (lane() >> 2);
            Filter wa(values, weights.c[0]);
            EACH_ATOM sums[0][h] = sums[0][h] + wa.of[h] * own.heard(h, 0);
            Filter wb(values, weights.c[1]);
            EACH_ATOM {
                float4 u = here[8 * h], from = HAS_B ? wb.of[h] * own.heard(h, B) : wb.of[h];
                EACH_AXIS sums[1 + x][h] = sums[1 + x][h] + axis_of(u, x) * from;
            }
            if (!HAS_Y) continue;
            Filter wc(values, weights.c[FILTERS - 1]);
            EACH_ATOM EACH_AXIS sums[1 + x][h] = sums[1 + x][h] + wc.of[h] * own.heard(h, Y + x);
        }
        EACH_ATOM {
            own.store(h, ds, F, 0, factor * sums[0][h]);
            EACH_AXIS own.store(h, dv, 3 * F, x * F, factor * sums[1 + x][h]);
        }
#endif
    }
#if TRANSPOSE
    sync();
    join(m, UNITS - 2, factor, factor * inverse), join(m, UNITS - 1, factor, factor * inverse);
    sync();
    int all = molecules * M * M;
    for (int k = thread(); k < there * M; k += THREADS) {
        int row = k / M, i = row % M, j = k % M, r = i < j ? j - i : j - i + M, e = block() * PAIRS + k;
        float4 mine = m.places[pair_of(row, r % M ? r : 1)], its = m.places[pair_of(row - i + j, r % M ? M - r : 1)];
        bars[e] = its.w + mine.w, bars[all + e] = its.x - mine.x, bars[2 * all + e] = its.y - mine.y, bars[3 * all + e] = its.z - mine.z;
    }
#endif
}
