// Message sums and their transpose for many atoms: jaxff.kernels.message has the equations.
//
// A filter of the distance is W_c(r) = sum_k B_k(r) C_kc with 14 functions B, which are tabulated as cubics, in each of
// some bins of distances (arrange.cu). A block serves eight atoms after the other eight, and of each up to eight pairs in
// a turn, all in one bin. A warp has 32 channels of Wa, or of Wb and Wc for four of the atoms, and holds C for them in
// registers. The tensor cores make W of 16 pairs, two of each atom, from C and B, of the first nine functions both as
// sums of two halves (filters.py): channels are rows and pairs columns. Carriers, warps without channels, bring turns and
// what senders have some time before, by bulk copies into a ring in shared memory, and make B of the next turn; each has
// four of 16 pairs. All wait for what they read, not for each other.
// Defined from outside: F, HAS_B, HAS_Y; PACKED: whether a, b and y of an atom lie side by side, in the array a, b and y as
// `pack` (device.cu) makes them; BIN, STEP: intervals of a bin, and from one's beginning to the next one's; STAGES of the ring.
// scales: the factor of W that undoes those of B and C; of slopes, one more and its inverse.
#define SCALARS ((F + 31) / 32)  // warps with Wa
#define VECTORS (2 * SCALARS)    // warps with Wb and Wc
#define WARPS (SCALARS + VECTORS)
#define CARRIERS 4
#define THREADS (32 * (WARPS + CARRIERS))
#define SOURCES (HAS_B + 3 * HAS_Y)  // of vectors
#define SENT (PACKED ? 4 : 1 + SOURCES)  // rows of F words that an atom sends
#define GROUP 8                // atoms
#define PAIRS 64               // of a turn: four times 16, of which 2 a and 2 a + 1 are of the a-th atom
#define TURNS 4                // in shared memory
#define FUNCTIONS 14           // in a table of them those of even number first
#define K 16                   // of a product: they, and twice the ninth
#define STRIDE (K / 2)         // words of a row of B in shared memory, whose halves change places: `swapped`
#define PART (PAIRS * STRIDE)  // words of B's values, or slopes, in one of their two halves
#define ZERO make_float4(0.f, 0.f, 0.f, 0.f)

__device__ __forceinline__ float4 operator*(float4 x, float4 y) { return make_float4(x.x * y.x, x.y * y.y, x.z * y.z, x.w * y.w); }
__device__ __forceinline__ float4 operator*(float x, float4 y) { return make_float4(x * y.x, x * y.y, x * y.z, x * y.w); }
__device__ __forceinline__ float4 operator+(float4 x, float4 y) { return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w); }
__device__ __forceinline__ float4 operator-(float4 x, float4 y) { return make_float4(x.x - y.x, x.y - y.y, x.z - y.z, x.w - y.w); }
// x.y + before
__device__ __forceinline__ float dot(float4 x, float4 y) { return x.w * y.w + (x.z * y.z + (x.y * y.y + x.x * y.x)); }
__device__ __forceinline__ float dot(float4 x, float4 y, float before) { return x.w * y.w + (x.z * y.z + (x.y * y.y + (x.x * y.x + before))); }
__device__ __forceinline__ float4 four(const float* x) { return *(const float4*)x; }
// b and y of four channels
struct Vectors {
    float4 b, y[3];
    // from where b, or what is packed, has the first of these channels, and y
    __device__ __forceinline__ void read(const float* of_b, const float* of_y) {
#if PACKED
        b = four(of_b), y[0] = four(of_b + F), y[1] = four(of_b + 2 * F);
        y[2] = make_float4(fourth_of(b.x, y[0].x, y[1].x), fourth_of(b.y, y[0].y, y[1].y),
                           fourth_of(b.z, y[0].z, y[1].z), fourth_of(b.w, y[0].w, y[1].w));
#else
        if (HAS_B) b = four(of_b);
#pragma unroll
        for (int axis = 0; axis < 3 * HAS_Y; axis++) y[axis] = four(of_y + axis * F);
#endif
    }
};

__device__ __forceinline__ bool of_scalars() { return warp() < SCALARS; }
// of 32 channels, which this warp has; of vectors, whether the first or the last four atoms
__device__ __forceinline__ int part() { return of_scalars() ? warp() : (warp() - SCALARS) / 2; }
__device__ __forceinline__ int half() { return (warp() - SCALARS) & 1; }
// the first four channels of this lane, or the first of all where it has none
__device__ __forceinline__ bool has_channels() { return F % 32 == 0 || 32 * part() + 4 * (lane() >> 2) < F; }
__device__ __forceinline__ int channel() { return has_channels() ? 32 * part() + 4 * (lane() >> 2) : 0; }

__device__ __forceinline__ bool carries() { return warp() >= WARPS; }
__device__ __forceinline__ int carrier() { return warp() - WARPS; }

// --- what carriers bring ---

struct Turn {
    float4 u_t[PAIRS];     // direction and place in the interval
    int edge[PAIRS];       // -1: no pair
    int chunks, bin;       // of 16 pairs, 0: no turn
    int first, last, cut;  // whether this block's first of these atoms; their last; its last, if that is not theirs
    int atom, unused[2];   // the first of the eight
};

template <int COUNT>
struct Place {  // of COUNT, one after the other and again
    int at = 0, parity = 0;
    bool again = false;
    __device__ __forceinline__ void next() {
        if (++at == COUNT) at = 0, parity ^= 1, again = true;
    }
};

// PARTS: 2 for B's values [halves, what those leave], 4 with slopes; ROW: words of what a sender has, and four, so that no two lanes
// share a bank; SHARES: words of a turn's shares of pair gradients.
template <int PARTS, int WIDTH, int SHARES>
struct Memory {
    static constexpr int ROW = WIDTH;
    Turn* turns;
    uint64 *made, *used;   // a turn by the carriers; by warps with channels
    uint64 *full, *empty;  // a stage of the ring by the carriers; by warps with channels
    uint32* values;
    float *shares, *rows;
    __device__ __forceinline__ Memory(char* memory) {
        memory = in_register(memory);
        turns = (Turn*)memory, made = (uint64*)(turns + TURNS), used = made + TURNS, full = used + TURNS, empty = full + STAGES;
        values = (uint32*)(empty + STAGES), shares = (float*)(values + TURNS * PARTS * PART), rows = shares + TURNS * SHARES;
        if (thread() == 0) {
            for (int k = 0; k < TURNS; k++) barrier_init(made + k, CARRIERS), barrier_init(used + k, WARPS);
            for (int k = 0; k < STAGES; k++) barrier_init(full + k, CARRIERS), barrier_init(empty + k, WARPS);
        }
        barriers_made();
        sync();
    }
    // B of a turn
    __device__ __forceinline__ uint32* of(int turn) const { return values + turn * PARTS * PART; }
    __device__ __forceinline__ float* shares_of(int turn) const { return shares + turn * SHARES; }
};

// A stage of the ring, and places in it that move on with it, so that they are not made anew.
template <int ROW>
struct Ring {
    Place<STAGES> stage;
    uint64* full;  // `empty` lies STAGES behind it
    float* rows;
    __device__ __forceinline__ void next() {
        stage.next(), full++, rows += 16 * ROW;
        if (!stage.at) full -= STAGES, rows -= STAGES * 16 * ROW;
    }
};

// Where a warp with channels reads and writes next, in shared memory. SCALAR: one with Wa, which has all of 16 pairs.
template <bool SCALAR, class Memory>
struct Reader {
    const Memory& m;
    Ring<Memory::ROW> ring;   // rows of this lane's first pair of eight
    const uint32* functions;  // of the next 16 pairs, as this lane loads eight of them
    const float4* u_t;
    float* share;
    __device__ __forceinline__ Reader(const Memory& memory)
        : m(memory), ring{{}, memory.full, memory.rows + (first() + 2 * (lane() & 3)) * Memory::ROW + channel()} {}
    // of 16 pairs, the first of this warp's
    __device__ static __forceinline__ int first() { return SCALAR ? 0 : 8 * half(); }
    // to the first pairs of a turn
    __device__ __forceinline__ void begin(int turn) {
        int which = lane() >> 3, row = lane() & 7;  // of four parts of eight rows: the first, the last, what the first leave, the first
        functions = m.of(turn) + (which == 2 ? PART : 0) + (first() + row) * STRIDE + 4 * swapped(row, which == 1);
        u_t = m.turns[turn].u_t + first() + 2 * (lane() & 3);
        int pair = 2 * (lane() & 3) + (lane() >> 2 & 1);
        share = m.shares_of(turn);
        if (SCALAR) share += (4 * SCALARS + part()) * PAIRS + pair + (lane() & 8);
        else share += 4 * (part() * PAIRS + pair + first()) + 2 * (lane() >> 3 & 1) + (lane() >> 4);
    }
    // the rows of this stage, when they are there
    __device__ __forceinline__ const float* wait() const {
        barrier_wait(ring.full, ring.stage.parity);
        return ring.rows;
    }
    // when this warp has read them
    __device__ __forceinline__ void leave() { barrier_arrive(ring.full + STAGES), ring.next(); }
    // to the next 16 pairs, of each of which a warp gives one number or four
    __device__ __forceinline__ void next() { functions += 16 * STRIDE, u_t += 16, share += SCALAR ? 16 : 64; }
};

// The turns of this block: a carrier's lane 4 c + q, of the first 16, has pair 16 c + 4 carrier + q, and before it the word
// that tells which.
//
// Blocks have equal shares of all groups, so that most end within one, and of few groups several within each; what they
// leave there for the last one to add to (join.cu) goes to `rest`.
struct Turns {
    const uint32* words;
    const float* pairs;
    int n, slots, capacity, of;  // which of the eight atoms is this lane's
    int group, turn, end, stop;  // the next turn; the first that is not of this block
    bool first;                  // whether it is this block's first of its atoms
    uint32 word;

    __device__ Turns(const uint32* w, const float* p, int atoms, int s, int c) : words(w), pairs(p), n(atoms), slots(s), capacity(c), first(true) {
        of = (4 * carrier() + lane() % 4) / 2;
        long long groups = (n + GROUP - 1) / GROUP, from = groups * block(), to = from + groups;
        group = (int)(from / blocks()), end = (int)(to / blocks());
        int in_first = (int)(from % blocks()), in_last = (int)(to % blocks());
        uint32 of_first = in_first ? word_of(group, 0) : 0, of_last = in_last ? word_of(end, 0) : 0;  // asked for at once
        turn = until(group, in_first, of_first), stop = until(end, in_last, of_last);
        read();
    }
    // of 32 turns of a group, this lane's
    __device__ __forceinline__ uint32 word_of(int group, int begin) const {
        return words[(group * capacity + min(begin + lane(), capacity - 1)) * GROUP];
    }
    // the turns in this part, of `blocks()`, of a group, of whose first 32 this is the lane's
    __device__ int until(int group, int part, uint32 word) const {
        if (!part) return 0;
        int begin = 0;
        uint32 found = lanes_where(word >> 23 & 1);
        while (!found) {
            begin += 32;
            found = lanes_where(word_of(group, begin) >> 23 & 1);
        }
        return (int)((long long)(begin + lowest(found) + 1) * part / blocks());
    }
    __device__ __forceinline__ void read() {
        word = group < end || (group == end && turn < stop) ? words[(group * capacity + turn) * GROUP + of] : 0;
    }
    __device__ __forceinline__ int chunks() const { return word >> 20 & 7; }
    __device__ __forceinline__ bool last() const { return word >> 23 & 1; }
    __device__ __forceinline__ void advance() {
        first = last();
        group += first, turn = first ? 0 : turn + 1;
        read();
    }
};

// a turn, with this lane's pair as it lies in memory: nothing is made of it before it has arrived
struct Loaded {
    float4 u_t;
    float from, both;  // sender, -1: no pair; interval and slot
    int begin;         // of the atom's slots
    int chunks, bin, first, last, cut, atom;
    __device__ __forceinline__ int sender() const { return (int)from; }
    __device__ __forceinline__ int interval() const { return as_int(both) >> 16; }  // -1: no pair
    __device__ __forceinline__ int edge() const { return interval() < 0 ? -1 : begin + (as_int(both) & 0xffff); }
    // of the table of functions, whose first row is zero
    __device__ __forceinline__ int row() const { return interval() < 0 ? 0 : 1 + interval() + bin * (BIN - STEP); }
};

// asks for a turn, and goes on to the next one
__device__ __forceinline__ Loaded load_turn(Turns& turns) {
    int group = turns.group * GROUP, all = turns.n * turns.slots, place = lane() / 4 * 2 + lane() % 2;
    Loaded r = {ZERO, -1.f, as_float(-1), (group + turns.of) * turns.slots, turns.chunks(), (int)(turns.word >> 24), turns.first, turns.last(),
                turns.group == turns.end && turns.turn + 1 == turns.stop, group};
    if (lane() < 16 && place < (int)(turns.word >> 16 & 15)) {
        const float* from = turns.pairs + r.begin + (int)(turns.word & 0xffff) + place;
        r.u_t = make_float4(from[all], from[2 * all], from[3 * all], from[0]);
        r.from = from[4 * all], r.both = from[5 * all];
    }
    turns.advance();
    return r;
}

// --- B of a turn ---

// What a carrier does for its own pairs, with two functions of four pairs a lane: `begin` asks for coefficients, `end` writes
// values, and slopes, as two halves in a word; of the first eight functions also what they leave. The last word is what
// the ninth leaves, and that. For missing pairs all are zero.
template <int PARTS>
struct Maker {
    const float4* basis;
    float slope;  // the factor of slopes
    float4 c[4][2];
    float t[4];

    __device__ __forceinline__ void begin(const Loaded& x) {
        int row = x.row(), word = lane() % STRIDE, ninth = word == STRIDE - 1;
        const char *first = (const char*)(basis + (ninth ? STRIDE / 2 : word)), *second = first + (ninth ? 0 : FUNCTIONS / 2 * 16);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            int pair = 4 * k + lane() / STRIDE;
            uint32 at = (uint32)of_lane(row, pair) * (FUNCTIONS * 16);
            t[k] = of_lane(x.u_t.w, pair), c[k][0] = *(const float4*)(first + at), c[k][1] = *(const float4*)(second + at);
        }
    }
    __device__ __forceinline__ void end(uint32* b) const {
        int pair = 4 * carrier() + lane() / STRIDE, word = lane() % STRIDE;
        uint32 which = word == STRIDE - 1 ? 0x7610 : 0x7654;
        b += pair * STRIDE + swapped(pair, word / 4) * 4 + word % 4;
        auto put = [&](uint32* to, float x, float y) {
            uint32 high, low;
            split(x, y, high, low);
            to[0] = bytes_of(low, high, which);
            if (word < STRIDE / 2) to[PART] = low;
        };
#pragma unroll
        for (int k = 0; k < 4; k++) {
            uint32* to = b + 16 * k * STRIDE;
            put(to, cubic(c[k][0], t[k]), cubic(c[k][1], t[k]));
            if (PARTS == 4) put(to + 2 * PART, slope * cubic_slope(c[k][0], t[k]), slope * cubic_slope(c[k][1], t[k]));
        }
    }
};

// --- what carriers do ---

struct Piece {  // of what an atom has: so many words, whose place in a row is `at`
    const float* from;
    int width, at;
};

// zeros where rows of no pair would be, which are numbers ever after
template <int ROW>
__device__ __forceinline__ void clear_missing(float* row, const int (&of)[4]) {
#pragma unroll
    for (int q = 0; q < 4; q++)
#pragma unroll 1
        for (int k = lane(); of[q] < 0 && k < ROW; k += 32) row[q * ROW + k] = 0.f;
    barriers_made();
    sync_warp();
}

// finish(turn) is called when all warps are through with one of those in shared memory.
template <int PARTS, int ROW, int SHARES, int PIECES, class Finish>
__device__ __forceinline__ void carry(
    const Memory<PARTS, ROW, SHARES>& m, Turns& turns, const Piece (&pieces)[PIECES], Maker<PARTS> maker, Finish finish) {
    Place<TURNS> turn;
    Ring<ROW> ring{{}, m.full, m.rows + 4 * carrier() * ROW};
    auto free = [&] {
        if (!turn.again) return;
        barrier_wait(m.used + turn.at, turn.parity ^ 1);
        finish(turn.at);
        sync_warp();
    };
    Loaded next = load_turn(turns);
    int chunks = 0, sender = -1;  // of the turn before it
    do {
        Loaded after = load_turn(turns);
        free();
        Turn& to = m.turns[turn.at];
        if (lane() < 16) {
            int p = lane() / 4 * 16 + 4 * carrier() + lane() % 4;
            to.u_t[p] = next.u_t, to.edge[p] = next.edge();
        }
        if (carrier() == 0 && lane() == 0) {
            to.chunks = next.chunks, to.bin = next.bin, to.first = next.first, to.last = next.last, to.cut = next.cut, to.atom = next.atom;
        }
        maker.begin(next);
#pragma unroll 1
        for (int c = 0; c < chunks; c++) {
            int of[4];
#pragma unroll
            for (int q = 0; q < 4; q++) of[q] = of_lane(sender, 4 * c + q);
            if (ring.stage.again) barrier_wait(ring.full + STAGES, ring.stage.parity ^ 1);
            else clear_missing<ROW>(ring.rows, of);
            if (elected()) {
                int there = 0;
#pragma unroll
                for (int q = 0; q < 4; q++) {
                    if (of[q] < 0) continue;
#pragma unroll
                    for (int k = 0; k < PIECES; k++)
                        bulk_copy(ring.rows + q * ROW + pieces[k].at, pieces[k].from + (long long)of[q] * pieces[k].width, 4 * pieces[k].width, ring.full);
                    there++;
                }
                arrive_with(ring.full, there * 4 * (ROW - 4));
            }
            sync_warp();
            ring.next();
        }
        maker.end(m.of(turn.at));
        barrier_arrive(m.made + turn.at);
        turn.next();
        chunks = next.chunks, sender = next.sender(), next = after;
    } while (chunks);
    for (int k = 1; k < TURNS; k++) free(), turn.next();
}

// --- W of 16 pairs: lane 4 g + t has channels 4 g to 4 g + 3 of pairs 2 t and 2 t + 1 of eight ---

// C of this warp's channels, as mma takes its first operand: of two tiles, rows g and g + 8 are channels 4 g + 2 tile
// and the one after it
template <int FILTERS>
struct Weights {
    uint32 c[FILTERS][2][2][4];  // [tile][of all functions, of what eight leave and of these]
    __device__ __forceinline__ void load(const uint4* matrices, int bin, int first) {
#pragma unroll
        for (int f = 0; f < FILTERS; f++)
#pragma unroll
            for (int k = 0; k < 4; k++) {
                int of = ((bin * (2 + HAS_Y) + first + f) * (F / 16) + 2 * part() + lane() / 16) * 64;
                uint4 x = {0, 0, 0, 0};
                if (has_channels()) x = matrices[of + k * 16 + lane() % 16];
                uint32(&to)[4] = c[f][k / 2][k % 2];
                to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;
            }
    }
    // waits until they are there; nothing: 0, which the compiler must not know
    __device__ __forceinline__ void arrive(uint32 nothing) {
#pragma unroll
        for (int f = 0; f < FILTERS; f++)
#pragma unroll
            for (int k = 0; k < 16; k++) c[f][k / 8][k / 4 % 2][k % 4] |= nothing;
    }
};

// B of eight pairs, values or slopes: of the first and of the last functions, what the first leave, the first
struct Functions {
    uint32 x[4];
    __device__ __forceinline__ Functions(const uint32* of_lane) { load_a_at(x, of_lane); }
};

struct Filter {
    float4 w[2];  // of two pairs
};

template <int FILTERS>
__device__ __forceinline__ Filter evaluate(const Functions& b, const Weights<FILTERS>& c, int f) {
    float acc[2][4] = {};
#pragma unroll
    for (int j = 0; j < 2; j++) {
        mma(acc[j], c.c[f][j][1], b.x[2], b.x[3]);
        mma(acc[j], c.c[f][j][0], b.x[0], b.x[1]);
    }
    Filter r;
#pragma unroll
    for (int k = 0; k < 2; k++) r.w[k] = make_float4(acc[0][k], acc[0][2 + k], acc[1][k], acc[1][2 + k]);
    return r;
}

__device__ __forceinline__ void store_four(float* out, int row, int width, int channel, float4 x, float factor) {
    *(float4*)(out + row * width + channel) = factor * x;
}

// zeros where a block leaves nothing there, by the carriers
__device__ __forceinline__ void clear_rest(const Turns& turns, float* rest, int width) {
    bool nothing = !turns.stop || (turns.group == turns.end && turns.turn == turns.stop);
    if (block() + 1 < blocks() && nothing)
        for (int k = thread() - 32 * WARPS; k < GROUP * width; k += 32 * CARRIERS) rest[block() * GROUP * width + k] = 0.f;
}

// a warp's way to the next turn, from which on this one's place is free; chunks: its, bin: whose C the warp has; whether it
// asked for another
template <class Memory, class Weights>
__device__ __forceinline__ bool turn_to(const Memory& m, const Place<TURNS>& turn, const uint4* matrices, Weights& c, int filter, int& chunks, int& bin) {
    barrier_wait(m.made + turn.at, turn.parity);
    chunks = m.turns[turn.at].chunks;
    int other = m.turns[turn.at].bin;
    if (!chunks || other == bin) return false;
    c.load(matrices, bin = other, filter);
    return true;
}

// a row: a, then b and y where there are
typedef Memory<2, SENT * F + 4, 0> Forward;
template <bool SCALAR>
__device__ __forceinline__ void sum_up(const Forward& m, const uint4* matrices, float factor, int n, float* ds, float* dv, float* rest) {
    constexpr int FILTERS = SCALAR ? 1 : 1 + HAS_Y, ROW = SENT * F + 4;
    Place<TURNS> turn;
    Reader<SCALAR, Forward> at(m);
    Weights<FILTERS> c;
    float4 sums[3] = {ZERO, ZERO, ZERO};  // of the vectors, or of the scalars of two atoms
    int chunks, bin = -1;
    bool asked = turn_to(m, turn, matrices, c, SCALAR ? 0 : 1, chunks, bin);
    while (chunks) {
        const Turn& now = m.turns[turn.at];
        at.begin(turn.at);
        if (asked) c.arrive((uint32)chunks >> 8);
        for (int chunk = 0; chunk < chunks; chunk++, at.next()) {
            if constexpr (SCALAR) {
                Filter a[2] = {evaluate(Functions(at.functions), c, 0), evaluate(Functions(at.functions + 8 * STRIDE), c, 0)};
                const float* rows = at.wait();
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int k = 0; k < 2; k++) sums[h] = sums[h] + a[h].w[k] * four(rows + (8 * h + k) * ROW);
            } else {
                Functions functions(at.functions);
                Filter b = evaluate(functions, c, 0), y;
                if (HAS_Y) y = evaluate(functions, c, FILTERS - 1);
                const float* rows = at.wait();
#pragma unroll
                for (int k = 0; k < 2; k++, rows += ROW) {
                    float4 u = at.u_t[k];
                    Vectors sent;
                    sent.read(rows + F, rows + (1 + HAS_B) * F);
                    float4 w = HAS_B ? b.w[k] * sent.b : b.w[k];
                    sums[0] = sums[0] + u.x * w;
                    sums[1] = sums[1] + u.y * w;
                    sums[2] = sums[2] + u.z * w;
#pragma unroll
                    for (int axis = 0; axis < 3 * HAS_Y; axis++) sums[axis] = sums[axis] + y.w[k] * sent.y[axis];
                }
            }
            at.leave();
        }
        bool last = now.last, cut = now.cut;
        int first = now.atom;
        barrier_arrive(m.used + turn.at);
        turn.next();
        asked = turn_to(m, turn, matrices, c, SCALAR ? 0 : 1, chunks, bin);
        if (last || cut) {
            float *to_s = cut ? rest : ds, *to_v = cut ? rest + F : dv;
            int of_s = cut ? 4 * F : F, of_v = cut ? 4 * F : 3 * F;
#pragma unroll
            for (int k = 0; k < (SCALAR ? 2 : 3); k++) {
                int place = 4 * (SCALAR ? k : half()) + (lane() & 3), atom = cut ? block() * GROUP + place : first + place;
                if (has_channels() && (cut || atom < n)) {
                    if (SCALAR) store_four(to_s, atom, of_s, channel(), sums[k], factor);
                    else store_four(to_v, atom, of_v, channel() + k * F, sums[k], factor);
                }
                sums[k] = ZERO;
            }
        }
    }
}

// b where there is none, y where there is none: not read
extern "C" __global__ void __launch_bounds__(THREADS, 1)
message(const float* __restrict__ pairs, const uint32* __restrict__ words, const float4* __restrict__ basis,
        const uint4* __restrict__ matrices, const float* __restrict__ scales, const float* __restrict__ a,
        const float* __restrict__ b, const float* __restrict__ y, int n, int slots, int capacity, float* __restrict__ ds,
        float* __restrict__ dv, float* __restrict__ rest) {
    SHARED(char, memory);
    Forward m(memory);
    if (carries()) {
        Turns turns(words, pairs, n, slots, capacity);
        clear_rest(turns, rest, 4 * F);
#if PACKED
        Piece pieces[] = {{a, SENT * F, 0}};
#elif HAS_B && HAS_Y
        Piece pieces[] = {{a, F, 0}, {b, F, F}, {y, 3 * F, 2 * F}};
#elif HAS_B
        Piece pieces[] = {{a, F, 0}, {b, F, F}};
#elif HAS_Y
        Piece pieces[] = {{a, F, 0}, {y, 3 * F, F}};
#else
        Piece pieces[] = {{a, F, 0}};
#endif
        carry(m, turns, pieces, Maker<2>{basis, 0.f}, [](int) {});
    } else if (of_scalars()) sum_up<true>(m, matrices, scales[0], n, ds, dv, rest);
    else sum_up<false>(m, matrices, scales[0], n, ds, dv, rest);
}

// Sums over the eight lanes of a pair: one of two numbers each, by the first bit of g; by the others which of more.
__device__ __forceinline__ float one_of(bool second, float x, float y, int mask) {
    return (second ? y : x) + from_lane(second ? x : y, mask);
}

// 32 channels' share of [D, U_xyz] of two pairs, of which lane 4 g + t keeps one number of one pair
__device__ __forceinline__ void keep_share(float* share, const float (&d)[2], const float (&u)[2][3]) {
    bool odd = (lane() & 4) != 0, upper = (lane() & 8) != 0, last = (lane() & 16) != 0;
    float k0 = one_of(odd, d[0], d[1], 4), k1 = one_of(odd, u[0][0], u[1][0], 4);
    float k2 = one_of(odd, u[0][1], u[1][1], 4), k3 = one_of(odd, u[0][2], u[1][2], 4);
    float x = one_of(last, one_of(upper, k0, k2, 8), one_of(upper, k1, k3, 8), 16);
    *share = x;
}

// the same of D alone, of two times two pairs
__device__ __forceinline__ void keep_share(float* share, const float (&d)[2][2]) {
    bool odd = (lane() & 4) != 0, upper = (lane() & 8) != 0;
    float x = one_of(upper, one_of(odd, d[0][0], d[0][1], 4), one_of(odd, d[1][0], d[1][1], 4), 8);
    x += from_lane(x, 16);
    if (lane() < 16) *share = x;
}

// [D, U_xyz] of vectors, by 32 channels and pairs, then D of scalars
#define SHARES (5 * SCALARS * PAIRS)
// the sums of all shares of a carrier's pairs in a turn; each half warp has every other 32 channels
__device__ __forceinline__ void add_shares(const float* shares, const Turn& turn, const float* scales, float* pair_bars) {
    int pair = lane() % 16 / 4 * 16 + 4 * carrier() + lane() % 4, edge = turn.edge[pair];
    float4 sum = ZERO;
#pragma unroll
    for (int k = 0; k < SCALARS; k += 2) {
        int part = k + lane() / 16;
        if (SCALARS % 2 && part == SCALARS) break;
        sum = sum + four(shares + 4 * (part * PAIRS + pair)), sum.x += shares[(4 * SCALARS + part) * PAIRS + pair];
    }
    sum = sum + make_float4(from_lane(sum.x, 16), from_lane(sum.y, 16), from_lane(sum.z, 16), from_lane(sum.w, 16));
    sum.x *= scales[2];
    if (edge >= 0 && lane() < 16) ((float4*)pair_bars)[edge] = scales[0] * sum;
}

// what a transposed message reads of receivers, and makes
struct Ends {
    const float *a, *b, *y;
    float *a_bar, *b_bar, *y_bar, *rest;
};

// a row: p, then q
typedef Memory<4, 4 * F + 4, SHARES> Backward;
template <bool SCALAR>
__device__ __forceinline__ void transpose(const Backward& m, const uint4* matrices, float factor, int n, const Ends& of) {
    constexpr int FILTERS = SCALAR ? 1 : 1 + HAS_Y, ROW = 4 * F + 4, ALL = (1 + SOURCES) * F;  // what an atom has in `rest`
    Place<TURNS> turn;
    Reader<SCALAR, Backward> at(m);
    Weights<FILTERS> c;
    float4 a[2], bars[4];  // of b and y, or of a for two atoms
    Vectors own;
    int chunks, bin = -1;
    bool asked = turn_to(m, turn, matrices, c, SCALAR ? 0 : 1, chunks, bin);
    while (chunks) {
        const Turn& now = m.turns[turn.at];
        at.begin(turn.at);
        if (asked) c.arrive((uint32)chunks >> 8);
        if (now.first) {
#pragma unroll
            for (int h = 0; h < 1 + SCALAR; h++) {
                int atom = min(now.atom + 4 * (SCALAR ? h : half()) + (lane() & 3), n - 1);
                long long row = (long long)atom * F;
                if (SCALAR) a[h] = four(of.a + (PACKED ? SENT : 1) * row + channel());
                else own.read(of.b + (PACKED ? SENT : 1) * row + channel(), of.y + 3 * row + channel());
            }
#pragma unroll
            for (int k = 0; k < 4; k++) bars[k] = ZERO;
        }
        for (int chunk = 0; chunk < chunks; chunk++, at.next()) {
            if constexpr (SCALAR) {
                float d[2][2];
                const float* rows = at.wait();
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    Filter value = evaluate(Functions(at.functions + 8 * h * STRIDE), c, 0), slope = evaluate(Functions(at.functions + 2 * PART + 8 * h * STRIDE), c, 0);
#pragma unroll
                    for (int k = 0; k < 2; k++) {
                        float4 pj = four(rows + (8 * h + k) * ROW);
                        bars[h] = bars[h] + value.w[k] * pj, d[h][k] = dot(a[h] * pj, slope.w[k]);
                    }
                }
                at.leave();
                keep_share(at.share, d);
            } else {
                float4 along[2], yq[2];
                float d[2], u_bar[2][3];
                Functions values(at.functions);
                Filter b = evaluate(values, c, 0), y;
                if (HAS_Y) y = evaluate(values, c, FILTERS - 1);
                const float* rows = at.wait();
#pragma unroll
                for (int k = 0; k < 2; k++, rows += ROW) {
                    float4 qj[3] = {four(rows + F), four(rows + 2 * F), four(rows + 3 * F)};
                    float4 u = at.u_t[k], w = b.w[k];
                    along[k] = u.x * qj[0] + u.y * qj[1] + u.z * qj[2];
                    if (HAS_B) {
                        bars[0] = bars[0] - w * along[k];
                        w = own.b * w;
                        along[k] = (ZERO - own.b) * along[k];
                    } else along[k] = ZERO - along[k];
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) u_bar[k][axis] = dot(w, qj[axis]);
#if HAS_Y
#pragma unroll
                    for (int axis = 0; axis < 3; axis++) bars[HAS_B + axis] = bars[HAS_B + axis] + y.w[k] * qj[axis];
                    yq[k] = own.y[0] * qj[0] + own.y[1] * qj[1] + own.y[2] * qj[2];
#endif
                }
                at.leave();
                Functions slopes(at.functions + 2 * PART);
                b = evaluate(slopes, c, 0);
                if (HAS_Y) y = evaluate(slopes, c, FILTERS - 1);
#pragma unroll
                for (int k = 0; k < 2; k++) d[k] = HAS_Y ? dot(yq[k], y.w[k], dot(along[k], b.w[k])) : dot(along[k], b.w[k]);
                keep_share(at.share, d, u_bar);
            }
        }
        bool last = now.last, cut = now.cut;
        int first = now.atom;
        barrier_arrive(m.used + turn.at);
        turn.next();
        asked = turn_to(m, turn, matrices, c, SCALAR ? 0 : 1, chunks, bin);
        if (!last && !cut) continue;
        float *to_a = cut ? of.rest : of.a_bar, *to_b = cut ? of.rest + F : of.b_bar, *to_y = cut ? of.rest + (1 + HAS_B) * F : of.y_bar;
        int of_one = cut ? ALL : F, of_y = cut ? ALL : 3 * F;
#pragma unroll
        for (int h = 0; h < 1 + SCALAR; h++) {
            int place = 4 * (SCALAR ? h : half()) + (lane() & 3), atom = cut ? block() * GROUP + place : first + place;
            if (!has_channels() || (!cut && atom >= n)) continue;
            if (SCALAR) store_four(to_a, atom, of_one, channel(), bars[h], factor);
            else {
                if (HAS_B) store_four(to_b, atom, of_one, channel(), bars[0], factor);
#pragma unroll
                for (int axis = 0; axis < 3 * HAS_Y; axis++)
                    store_four(to_y, atom, of_y, channel() + axis * F, bars[HAS_B + axis], factor);
            }
        }
    }
}

// Cotangents of the sources; and of each pair (i, j) that counts the half [D, U_xyz], side by side, that belongs to what i sends to j:
// D = sum_f a_i p_j Wa' - b_i (u.q_j) Wb' + (y_i.q_j) Wc',  U = sum_f b_i q_j Wb.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
message_transpose(const float* __restrict__ pairs, const uint32* __restrict__ words, const float4* __restrict__ basis,
                  const uint4* __restrict__ matrices, const float* __restrict__ scales, const float* __restrict__ p,
                  const float* __restrict__ q, const float* __restrict__ a, const float* __restrict__ b,
                  const float* __restrict__ y, int n, int slots, int capacity, float* __restrict__ a_bar,
                  float* __restrict__ b_bar, float* __restrict__ y_bar, float* __restrict__ rest, float* __restrict__ pair_bars) {
    SHARED(char, memory);
    Backward m(memory);
    Ends of = {a, PACKED ? a + F : b, y, a_bar, b_bar, y_bar, rest};
    if (carries()) {
        Turns turns(words, pairs, n, slots, capacity);
        clear_rest(turns, rest, (1 + SOURCES) * F);
        Piece pieces[] = {{p, F, 0}, {q, 3 * F, F}};
        carry(m, turns, pieces, Maker<4>{basis, scales[1]}, [&](int k) { add_shares(m.shares_of(k), m.turns[k], scales, pair_bars); });
    } else if (of_scalars()) transpose<true>(m, matrices, scales[0], n, of);
    else transpose<false>(m, matrices, scales[0], n, of);
}
