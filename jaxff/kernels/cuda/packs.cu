// Message sums over all pairs of molecules of M atoms, and their transpose, with filters by tensor cores:
// jaxff.kernels.message has the equations.
//
// A filter of the distance is W_c(r) = sum_k B_k(r) C_kc with few functions B, which are tabulated as cubics. A block
// serves molecules one after the other, and takes 16 of their atoms at once, a tile, whose atoms may be of several of
// them; of each the pair with the atom that comes r after it in its molecule. B of these pairs, as sums of two halves,
// is made by a kernel before (FUNCTIONS). A unit is the pairs for one r, or for two that follow each other (the message).
// A warp has 16 channels and holds C for them in registers. The tensor cores make W, or its slopes, of 16 pairs while
// sums are made with what they made before. Sums stay in registers, as a lane has the same two atoms in all units of a
// tile. Carriers, warps without channels, bring what atoms send, and B, by bulk copies, and add pair gradients up over
// channels. All wait for what they read, not for each other.
// Defined from outside: M, K, FUNCTIONS; of messages F, HAS_B and HAS_Y (jaxff.kernels.message.Sources), TRANSPOSE (which
// kernel), SLOTS (molecules), BUFFERS (units) and SHARES (units' pair gradients) in shared memory.
// scales: the factor of W that undoes those of B and C; of slopes, one more and its inverse.
#define TURNS (M / 2 * 2)                // values of r, of which the last is none where M is even
#define TOGETHER ((14 + M) / M + 1)      // molecules that a tile has atoms of, at most
#define STEPS ((K + 15) / 16)
// Of 22 functions (the last is 0) six are left after 16: their halves fill one more operand, so that a product takes four
// steps of the tensor cores instead of six.
#define REST (K == 22)
#define OPERANDS (REST ? 3 : 2 * STEPS)  // of 16 halves of B of a pair: the high ones and the low ones of 16 functions
#define PRODUCTS (REST ? 4 : 3 * STEPS)
#define SET (16 * 8 * OPERANDS)          // words of B of 16 pairs, which their directions follow
#define WAYS 64
#define MADE (2 * SET + WAYS)            // words of a tile and r: values, directions, slopes
#define ZERO make_float4(0.f, 0.f, 0.f, 0.f)

// which of the molecules are a block's
struct Share {
    int first, count, molecules, parts;
    __device__ __forceinline__ Share(int all, int part, int parts) : molecules(all), parts(parts) {
        first = (int)((long long)all * part / parts), count = (int)((long long)all * (part + 1) / parts) - first;
    }
    __device__ __forceinline__ int rows() const { return count * M; }
    __device__ __forceinline__ int tiles() const { return (rows() + 15) / 16; }
    __device__ __forceinline__ int most_tiles() const { return ((molecules + parts - 1) / parts * M + 15) / 16; }  // of a block
    __device__ __forceinline__ int pairs() const { return molecules * M * M; }
    // molecules that no tile after this one has atoms of
    __device__ __forceinline__ int done(int tile) const { return min(count, 16 * (tile + 1) / M); }
};

struct Pair {
    int row, i, j;  // of the block; within the molecule
    bool is;
    __device__ __forceinline__ Pair(const Share& share, int tile, int r, int pair) {
        row = 16 * tile + pair, i = row % M, j = i + r < M ? i + r : i + r - M;
        is = row < share.rows() && r < M;
    }
    __device__ __forceinline__ int edge(const Share& share) const { return (share.first * M + row) * M + j; }
};

// Words of a pair's row of B lie in pieces of four, which change places so that the tensor cores' reads share no bank:
// piece k lies where k ^ swap(pair) would.
__device__ __forceinline__ int swap(int pair) { return REST ? pair >> 2 & 1 : K == 16 ? pair >> 1 & 3 : pair & 7; }

#if FUNCTIONS
#define WARPS 8

// Some words of B, which lanes make: of each pair as many as LANES from FIRST on, of two functions each
template <int FIRST, int LANES>
__device__ __forceinline__ void make(uint32* set, const float4* basis, int from_of_lane, float t_of_lane, float slope) {
    constexpr int PAIRS = 32 / LANES, ROUNDS = 16 / PAIRS;  // at once
    int word = FIRST + lane() % LANES;
    bool single = REST && word == 10;  // its high half twice, so that it meets both halves of C
    int of_high = single ? 22 : FIRST ? word + 8 : word, of_low = !FIRST ? word + 8 : REST ? single ? 23 : word + 12 : word + 16;
    float4 c[ROUNDS][2];  // two powers of both functions each
#pragma unroll
    for (int n = 0; n < ROUNDS; n++) {
        const float4* from = basis + of_lane(from_of_lane, lane() / LANES + n * PAIRS) + 2 * min(word, K / 2 - 1);
        c[n][0] = from[0], c[n][1] = from[1];
    }
#pragma unroll
    for (int n = 0; n < ROUNDS; n++) {
        int pair = lane() / LANES + n * PAIRS;
        float t = of_lane(t_of_lane, pair);
        const float4 &x = c[n][0], &y = c[n][1];
        float4 p = make_float4(x.x, x.z, y.x, y.z), q = make_float4(x.y, x.w, y.y, y.w);
        uint32 *to = set + pair * 8 * OPERANDS, high, low;
        auto at = [&](int word) { return (word / 4 ^ swap(pair)) * 4 + word % 4; };
#pragma unroll
        for (int s = 0; s < 2; s++, to += SET + WAYS) {
            if (s) split(slope * cubic_slope(p, t), slope * cubic_slope(q, t), high, low);
            else split(cubic(p, t), cubic(q, t), high, low);
            if (word >= K / 2) continue;
            to[at(of_low)] = low, to[at(of_high)] = single ? (high & 0xffff) * 0x10001u : high;
            if (REST && FIRST && !single) to[at(of_high + 2)] = high;
        }
    }
}

// B of all pairs for `parts` blocks of a message: [parts, tiles, TURNS, MADE]. A warp makes that of 16 pairs, and has it
// written for their reverses, too. intervals: of the table, after which are zeros for pairs that don't count
extern "C" __global__ void __launch_bounds__(32 * WARPS)
pack_functions(const float* __restrict__ places, const float4* __restrict__ basis, const float* __restrict__ scales,
               int molecules, int intervals, int parts, float4* __restrict__ made) {
    SHARED(uint32, memory);
    int most = Share(molecules, 0, parts).most_tiles(), unit = block() * WARPS + warp(), r = unit % (M / 2) + 1, tile = unit / (M / 2);
    Share share(molecules, tile / most, parts);
    if (tile / most >= parts || tile % most >= share.tiles()) return;
    Pair pair(share, tile % most, r, lane() % 16);
    int all = share.pairs();
    const float* x = places + (pair.is ? pair.edge(share) : 0);
    float t = x[0], counts = x[all], interval = x[5 * all];
    float4 u = make_float4(x[2 * all], x[3 * all], x[4 * all], 0.f);
    uint32* set = memory + warp() * MADE;
    if (lane() < 16) ((float4*)(set + SET))[lane()] = u;
    int from = (pair.is && counts > 0.f ? (int)interval : intervals) * K;
    make<0, 8>(set, basis, from, t, scales[1]);
    if (K > 16) make<8, REST ? 4 : 8>(set, basis, from, t, scales[1]);
    sync_warp();
    const float4* mine = (const float4*)set;
    float4* to = made + (long long)(tile / most * most) * TURNS * (MADE / 4);
    for (int k = lane(); k < MADE / 4; k += 32) to[(long long)(tile % most * TURNS + r - 1) * (MADE / 4) + k] = mine[k];
    // the reverse of a pair, if that is another one; where M is even, none where r would be M
    bool none = 2 * r == M;
    int reverse = pair.is && !none ? pair.row - pair.i + pair.j : pair.row, place = (reverse / 16 * TURNS + (none ? M : M - r) - 1) * 16 + reverse % 16;
    if (lane() < 16) to[(long long)(place / 16) * (MADE / 4) + SET / 4 + place % 16] = make_float4(-u.x, -u.y, -u.z, 0.f);
    for (int k = lane(); k < 2 * 16 * 2 * OPERANDS; k += 32) {
        int piece = k % (2 * OPERANDS), row = k / (2 * OPERANDS) % 16, where = of_lane(place, row), second = k / (32 * OPERANDS) * ((SET + WAYS) / 4);
        float4 words = none ? ZERO : mine[second + row * 2 * OPERANDS + (piece ^ swap(row))];
        to[(long long)(where / 16) * (MADE / 4) + second + where % 16 * 2 * OPERANDS + (piece ^ swap(where % 16))] = words;
    }
}
#else
#define WARPS (F / 16)  // with channels
#define CARRIERS 4
#define THREADS (32 * (WARPS + CARRIERS))
#define FEW 56                              // registers of carriers, and of others, where there are twice as many of those
#define MANY 224
#define UNITS (TRANSPOSE ? M - 1 : M / 2)    // of a tile
#define UNIT (TRANSPOSE ? MADE : 2 * (SET + WAYS))  // words in shared memory
#define FILTERS (2 + HAS_Y)                  // Wa, Wb, Wc
#define SENT (1 + HAS_B + 3 * HAS_Y)         // rows that an atom sends: a, b, y
#define ROWS (TRANSPOSE ? 4 : SENT)          // that it is heard with: p, q, or these
#define WIDTH (ROWS * F + 16)                // of an atom in shared memory: the two that lanes read at once share no bank
#define EACH_ATOM _Pragma("unroll") for (int h = 0; h < 2; h++)
#define EACH_AXIS _Pragma("unroll") for (int x = 0; x < 3; x++)
#define B (HAS_B)                            // the place of b, or any
#define Y (HAS_Y ? 1 + HAS_B : 0)            // and of y

__device__ __forceinline__ float4 operator*(float4 x, float4 y) { return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w); }
__device__ __forceinline__ float4 operator*(float x, float4 y) { return make_float4(x * y.x, x * y.y, x * y.z, x * y.w); }
__device__ __forceinline__ float4 operator+(float4 x, float4 y) { return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w); }
__device__ __forceinline__ float4 operator-(float4 x, float4 y) { return make_float4(x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w); }
__device__ __forceinline__ float dot(float4 x, float4 y) { return (x.x * y.x + x.y * y.y) + (x.z * y.z + x.w * y.w); }
__device__ __forceinline__ float axis_of(float4 u, int x) { return x == 0 ? u.x : x == 1 ? u.y : u.z; }

__device__ __forceinline__ int carrier() { return warp() - WARPS; }
// of carriers: what follows from it is made again where it is needed, as they have few registers
__device__ __forceinline__ int own_lane() {
    int own = lane();
    stay(own);
    return own;
}
__device__ __forceinline__ int part() { return warp(); }  // this warp's channels

struct Memory {
    float* rows;                         // [SLOTS, M, WIDTH]
    float* made;                         // [BUFFERS, UNIT]
    float4* shares;                      // [U, D] of SHARES units' pairs by each warp's lanes, [WARPS, 2, 32]
    float4* ends;                        // [U, D] of pairs of TOGETHER molecules, [M, M]
    uint64 *full, *there, *used, *free;  // a slot; a buffer; by warps with channels; shares of a unit, by a carrier
    __device__ __forceinline__ Memory(char* memory) {
        rows = (float*)memory, made = rows + SLOTS * M * WIDTH, shares = (float4*)(made + BUFFERS * UNIT);
        ends = shares + TRANSPOSE * SHARES * WARPS * 64, full = (uint64*)(ends + TRANSPOSE * TOGETHER * M * M);
        there = full + SLOTS, used = there + BUFFERS, free = used + BUFFERS;
        if (thread() == 0) {
            for (int k = 0; k < SLOTS; k++) barrier_init(full + k, CARRIERS);
            for (int k = 0; k < BUFFERS; k++) barrier_init(there + k, 1), barrier_init(used + k, WARPS);
            for (int k = 0; k < SHARES; k++) barrier_init(free + k, 1);
        }
        barriers_made();
        sync();
    }
};

template <int COUNT>
struct Place {  // of COUNT, one after the other and again
    int at = 0, parity = 0;
    __device__ __forceinline__ void next() {
        if (++at == COUNT) at = 0, parity ^= 1;
    }
};

// --- carriers ---

struct Carrier {
    const Memory& m;
    const Share& share;
    int flushed = 0, written = 0;  // tiles; molecules whose pair gradients are written

    // of a molecule's atom i, WIDE times F channels of an array of all atoms into its slot; or into L2 for now
    template <int WIDE>
    __device__ __forceinline__ const float* row(int molecule, int i, const float* x) const {
        return x + ((long long)(share.first + molecule) * M + i) * WIDE * F;
    }
    template <int WIDE>
    __device__ __forceinline__ void copy_row(int molecule, int i, const float* x, int place) const {
        bulk_copy(m.rows + (molecule % SLOTS * M + i) * WIDTH + place * F, row<WIDE>(molecule, i, x), WIDE * F * 4, m.full + molecule % SLOTS);
    }
    template <class Copy>
    __device__ __forceinline__ void bring(int molecule, Copy copy) const {
        if (molecule < share.count && elected()) {
            for (int i = carrier(); i < M; i += CARRIERS) copy(*this, molecule, i);
            arrive_with(m.full + molecule % SLOTS, (M - carrier() + CARRIERS - 1) / CARRIERS * ROWS * F * 4);
        }
        sync_warp();
    }
    // B of a unit and directions; made: of this block
    __device__ __forceinline__ void bring_made(int unit, const float* made) const {
        int buffer = unit % BUFFERS;
        if (unit < share.tiles() * UNITS && elected()) {
            float* to = m.made + buffer * UNIT;
            const float* from = made + (unit / UNITS * TURNS + unit % UNITS * (2 - TRANSPOSE)) * MADE;
            if (TRANSPOSE) bulk_copy(to, from, 4 * MADE, m.there + buffer);
            else
                for (int k = 0; k < 2; k++) bulk_copy(to + k * (SET + WAYS), from + k * MADE, 4 * (SET + WAYS), m.there + buffer);
            arrive_with(m.there + buffer, 4 * UNIT);
        }
        sync_warp();
    }

    // when all warps are through with a tile: pair gradients of its last molecules, whose slots others get
    template <class Copy>
    __device__ __forceinline__ void flush(int tile, float* bars, Copy copy) {
        sync_others<32 * CARRIERS>();
        int done = share.done(tile), all = share.pairs();
        for (; written < done; written++) {
            bring(written + SLOTS, copy);
#if TRANSPOSE
            const float4* ends = m.ends + written % TOGETHER * M * M;
#pragma unroll 1
            for (int k = 32 * carrier() + own_lane(); k < M * M; k += 32 * CARRIERS) {
                int i = k / M, j = k % M, e = (share.first + written) * M * M + k;
                float4 mine = i == j ? ZERO : ends[k], its = i == j ? ZERO : ends[j * M + i];
                bars[e] = its.w + mine.w, bars[all + e] = its.x - mine.x, bars[2 * all + e] = its.y - mine.y, bars[3 * all + e] = its.z - mine.z;
            }
#endif
        }
        sync_others<32 * CARRIERS>();
    }

    // a unit's pair gradients
    __device__ __forceinline__ void add_up(int unit, float of_u, float of_d) const {
        int own = own_lane();
        const float4* from = m.shares + unit % SHARES * WARPS * 64 + own;
        float4 x[2] = {from[0], from[32]};
#pragma unroll
        for (int w = 1; w < WARPS; w++) EACH_ATOM x[h] = x[h] + from[(2 * w + h) * 32];
        // sums over the four lanes of two pairs, of which each lane gets two numbers
        bool second = own & 2, last = own & 1;
        float4 keep = second ? x[1] : x[0], send = second ? x[0] : x[1];
        keep.x += from_lane(send.x, 2), keep.y += from_lane(send.y, 2), keep.z += from_lane(send.z, 2), keep.w += from_lane(send.w, 2);
        float2 z = make_float2((last ? keep.z : keep.x) + from_lane(last ? keep.x : keep.z, 1),
                               (last ? keep.w : keep.y) + from_lane(last ? keep.y : keep.w, 1));
        Pair pair(share, unit / UNITS, unit % UNITS + 1, (own >> 2) + 8 * second);
        float* to = (float*)(m.ends + (pair.row / M % TOGETHER * M + pair.i) * M + pair.j) + 2 * last;
        if (pair.is) *(float2*)to = make_float2(of_u * z.x, (last ? of_d : of_u) * z.y);
        barrier_arrive(m.free + unit % SHARES);
    }

    template <class Copy>
    __device__ __forceinline__ void run(const float* made, const float* scales, float* bars, Copy copy) {
        made += (long long)block() * share.most_tiles() * TURNS * MADE;
        for (int k = carrier(); k < BUFFERS; k += CARRIERS) bring_made(k, made);
        for (int k = 0; k < SLOTS; k++) bring(k, copy);
        float of_u = scales[0], of_d = of_u * scales[2];
        int units = share.tiles() * UNITS;
        for (int unit = carrier(); unit < units; unit += CARRIERS) {
            while (flushed < unit / UNITS) flush(flushed++, bars, copy);
            barrier_wait(m.used + unit % BUFFERS, unit / BUFFERS % 2);
            bring_made(unit + BUFFERS, made);
            if (TRANSPOSE) add_up(unit, of_u, of_d);
        }
        while (flushed < share.tiles()) flush(flushed++, bars, copy);
    }
};

// --- W of 16 pairs ---

struct Weights {  // C of this warp's channels
    uint32 c[FILTERS][OPERANDS][2][2];
    __device__ __forceinline__ Weights(const uint4* matrices) {
#pragma unroll
        for (int f = 0; f < FILTERS; f++)
#pragma unroll
            for (int k = 0; k < 2 * STEPS; k++) {
                uint4 x = matrices[((f * WARPS + part()) * 2 * STEPS + k) * 32 + lane()];
                uint32(&first)[2] = c[f][k / 2 * 2][k % 2];
                first[0] = x.x, first[1] = x.y;
                if (REST && k > 1) continue;
                uint32(&second)[2] = c[f][k / 2 * 2 + 1][k % 2];
                second[0] = x.z, second[1] = x.w;
            }
    }
};

// what a lane reads of B, of 16 pairs that lie at the beginning
struct Mine {
    const uint32* first;
    int swapped;  // pieces, but for the lowest bit
    __device__ __forceinline__ Mine(const uint32* x) {
        int pair = lane() & 15;
        first = x + pair * 8 * OPERANDS + ((lane() >> 4 ^ swap(pair)) & 1) * 4, swapped = swap(pair) & 6;
    }
    __device__ __forceinline__ const uint32* of(int words, int operand) const {
        return first + words + (K == 16 || K == 32 ? (2 * operand ^ swapped) * 4 : 8 * operand);
    }
};

struct Filters {
    float4 of[FILTERS][2];  // for the two atoms, the four channels of this lane
    // words: from the first set in shared memory to this one
    __device__ __forceinline__ Filters(const Mine& mine, int words, const Weights& weights) {
        uint32 b[OPERANDS][4];
        float acc[FILTERS][2][4];
#pragma unroll
        for (int k = 0; k < OPERANDS; k++) load_a_at(b[k], mine.of(words, k));
#pragma unroll
        for (int p = 0; p < PRODUCTS; p++) {
            int step = p / 3 * 2, x = step + (p % 3 == 0 && p < 3 * STEPS), y = step + (p % 3 == 1);  // low high, high low, high high
            if (REST && p == 3) x = y = 2;
#pragma unroll
            for (int f = 0; f < FILTERS; f++)
#pragma unroll
                for (int j = 0; j < 2; j++) {
                    const uint32(&c)[2] = weights.c[f][y][j];
                    p ? mma(acc[f][j], b[x], c[0], c[1]) : mma_new(acc[f][j], b[x], c[0], c[1]);
                }
        }
#pragma unroll
        for (int f = 0; f < FILTERS; f++) EACH_ATOM of[f][h] = make_float4(acc[f][0][2 * h], acc[f][0][2 * h + 1], acc[f][1][2 * h], acc[f][1][2 * h + 1]);
    }
};

// what lanes do with the units of a tile, of which each has two atoms
struct Tile {
    const Share& share;
    int tile;
    int partner[2], wrapped[2];  // where the atom lies that comes r after, this lane's channels; where the next molecule does
    __device__ __forceinline__ Tile(const Share& share, int tile) : share(share), tile(tile) {
        EACH_ATOM {
            int there = min(row(h, tile), share.rows() - 1), molecule = there / M % SLOTS * M * WIDTH + channel();
            partner[h] = molecule + there % M * WIDTH, wrapped[h] = molecule + M * WIDTH;
        }
    }
    __device__ __forceinline__ static int row(int h, int tile) { return 16 * tile + 8 * h + (lane() >> 2); }  // of the block
    __device__ __forceinline__ bool is(int h, int tile) const { return row(h, tile) < share.rows(); }
    // where an atom's channels lie in an array of so many a row
    __device__ __forceinline__ long long at(int h, int tile, int width, int offset) const {
        return (long long)(share.first * M + row(h, tile)) * width + offset + channel();
    }
    __device__ __forceinline__ void go_on() {
        EACH_ATOM {
            partner[h] += WIDTH;
            if (partner[h] == wrapped[h]) partner[h] -= M * WIDTH;
        }
    }
    __device__ __forceinline__ int channel() const { return 16 * part() + 4 * (lane() & 3); }
    __device__ __forceinline__ float4 heard(const Memory& m, int h, int which) const { return *(const float4*)(m.rows + partner[h] + which * F); }
    // of this tile, or of one after it
    __device__ __forceinline__ float4 load(int h, int after, const float* x, int width, int offset) const {
        return is(h, tile + after) ? *(const float4*)(x + at(h, tile + after, width, offset)) : ZERO;
    }
    __device__ __forceinline__ void store(int h, float* x, int width, int offset, float4 value) const {
        if (is(h, tile)) *(float4*)(x + at(h, tile, width, offset)) = value;
    }
};

#if TRANSPOSE
// bars: [4, pairs], D and U of a pair as `whole` joins them, and anything where no pair counts
extern "C" __global__ void __launch_bounds__(THREADS, 1)
pack_transpose(const float* __restrict__ made, const uint4* __restrict__ matrices,
               const float* __restrict__ scales, const float* __restrict__ p, const float* __restrict__ q,
               const float* __restrict__ a, const float* __restrict__ b, const float* __restrict__ y, int molecules,
               float* __restrict__ a_bar, float* __restrict__ b_bar, float* __restrict__ y_bar, float* __restrict__ bars) {
#else
extern "C" __global__ void __launch_bounds__(THREADS, 1)
pack_message(const float* __restrict__ made, const uint4* __restrict__ matrices,
             const float* __restrict__ scales, const float* __restrict__ a, const float* __restrict__ b,
             const float* __restrict__ y, int molecules, float* __restrict__ ds, float* __restrict__ dv) {
#endif
    SHARED(char, memory);
    Memory m(memory);
    Share share(molecules, block(), blocks());
    float factor = scales[0];
    if (warp() >= WARPS) {
        if (WARPS == 8) registers<FEW, false>();
#if TRANSPOSE
        auto copy = [&](const Carrier& c, int molecule, int i) {
            c.copy_row<1>(molecule, i, p, 0), c.copy_row<3>(molecule, i, q, 1);
            soon(c.row<1>(molecule, i, a), F * 4);
            if (HAS_B) soon(c.row<1>(molecule, i, b), F * 4);
            if (HAS_Y) soon(c.row<3>(molecule, i, y), 3 * F * 4);
        };
#else
        float* bars = nullptr;
        auto copy = [&](const Carrier& c, int molecule, int i) {
            c.copy_row<1>(molecule, i, a, 0);
            if (HAS_B) c.copy_row<1>(molecule, i, b, B);
            if (HAS_Y) c.copy_row<3>(molecule, i, y, Y);
        };
#endif
        Carrier{m, share}.run(made, scales, bars, copy);
        return;
    }
    if (WARPS == 8) registers<MANY, true>();
    Weights weights(matrices);
    Mine mine((const uint32*)m.made);
    Place<BUFFERS> buffer;
    Place<SHARES> free;
    int unit = 0, units = share.tiles() * UNITS, there = 0;
    barrier_wait(m.there, 0);
    Filters w(mine, 0, weights);
#if TRANSPOSE
    float4 sent[SENT][2];
    auto load = [&](const Tile& own, int after) {
        EACH_ATOM {
            sent[0][h] = own.load(h, after, a, F, 0);
            if (HAS_B) sent[B][h] = own.load(h, after, b, F, 0);
            if (HAS_Y) EACH_AXIS sent[Y + x][h] = own.load(h, after, y, 3 * F, x * F);
        }
    };
#endif
#pragma unroll 1
    for (int tile = 0; tile < share.tiles(); tile++) {
        for (; there < min(share.count, (16 * tile + 15) / M + 1); there++) barrier_wait(m.full + there % SLOTS, there / SLOTS % 2);
        Tile own(share, tile);
        float4 sums[TRANSPOSE ? SENT : 4][2] = {};
#if TRANSPOSE
        if (tile == 0) load(own, 0);
#endif
#pragma unroll 1
        for (int begin = 0; begin < UNITS; begin++) {
            const float4* ways = (const float4*)(m.made + buffer.at * UNIT + SET) + (lane() >> 2);
            Place<BUFFERS> next = buffer;
            next.next();
            Filters more(mine, buffer.at * UNIT + SET + WAYS, weights);  // slopes, or W of the next r
            own.go_on();
#if TRANSPOSE
            float4 ap[2], along[2], yq[2];
            if (unit >= SHARES) barrier_wait(m.free + free.at, free.parity ^ 1);  // what lies there is added up
            float4* shares = m.shares + (free.at * WARPS + part()) * 64 + lane();
            EACH_ATOM {
                float found[3];
                float4 u = ways[8 * h], heard = own.heard(m, h, 0), bw = HAS_B ? sent[B][h] * w.of[1][h] : w.of[1][h];
                sums[0][h] = sums[0][h] + w.of[0][h] * heard, ap[h] = sent[0][h] * heard;
                along[h] = yq[h] = ZERO;
                EACH_AXIS {
                    heard = own.heard(m, h, 1 + x);
                    along[h] = along[h] + axis_of(u, x) * heard, found[x] = dot(bw, heard);
                    if (HAS_Y) sums[Y + x][h] = sums[Y + x][h] + w.of[FILTERS - 1][h] * heard, yq[h] = yq[h] + sent[Y + x][h] * heard;
                }
                if (HAS_B) sums[B][h] = sums[B][h] - w.of[1][h] * along[h], along[h] = sent[B][h] * along[h];
                shares[32 * h] = make_float4(found[0], found[1], found[2], 0.f);  // D comes later
            }
#else
            auto add = [&](const Filters& w, int r) {
                EACH_ATOM {
                    float4 u = ways[r * (SET + WAYS) / 4 + 8 * h], from = HAS_B ? w.of[1][h] * own.heard(m, h, B) : w.of[1][h];
                    sums[0][h] = sums[0][h] + w.of[0][h] * own.heard(m, h, 0);
                    EACH_AXIS {
                        sums[1 + x][h] = sums[1 + x][h] + axis_of(u, x) * from;
                        if (HAS_Y) sums[1 + x][h] = sums[1 + x][h] + w.of[FILTERS - 1][h] * own.heard(m, h, Y + x);
                    }
                }
            };
            add(w, 0);
#endif
#if TRANSPOSE
            if (begin == UNITS - 1) load(own, 1);  // they are there when the next tile begins
#endif
            if (++unit < units) barrier_wait(m.there + next.at, next.parity);
            w = Filters(mine, next.at * UNIT, weights);
#if TRANSPOSE
            EACH_ATOM {
                float4 d = ap[h] * more.of[0][h] - along[h] * more.of[1][h];
                if (HAS_Y) d = d + yq[h] * more.of[FILTERS - 1][h];
                ((float*)(shares + 32 * h))[3] = (d.x + d.y) + (d.z + d.w);
            }
#else
            own.go_on();
            add(more, 1);
#endif
            barrier_arrive(m.used + buffer.at);
            buffer = next, free.next();
        }
#if TRANSPOSE
        EACH_ATOM {
            own.store(h, a_bar, F, 0, factor * sums[0][h]);
            if (HAS_B) own.store(h, b_bar, F, 0, factor * sums[B][h]);
            if (HAS_Y) EACH_AXIS own.store(h, y_bar, 3 * F, x * F, factor * sums[Y + x][h]);
        }
#else
        EACH_ATOM {
            own.store(h, ds, F, 0, factor * sums[0][h]);
            EACH_AXIS own.store(h, dv, 3 * F, x * F, factor * sums[1 + x][h]);
        }
#endif
    }
}
#endif
