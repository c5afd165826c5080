// Energies of one molecule of N atoms, and their gradients, in one kernel: the phases of jaxff.kernels.painn or
// jaxff.kernels.student and their messages, as jaxff.kernels.message has them.
//
// F / C blocks, each with C channels, serve a group of A atoms. All blocks run at once (a cooperative launch) and hand on
// what others need in words of four numbers and a tag, which are written and read as a whole: who needs a word reads it
// until its tag is that of this launch and turn. Places of words are used by turns: a block writes a place again only after
// it received what its readers sent after they had read it. More than half of the multiprocessors have a block (some of them
// idle), and room for no other: a launch can't begin before the one before it is known to have begun.
// THREADS threads do this: two share a hidden channel (h, half), 16 a channel of the block's (o, l), of which PARTS share an
// atom (a). They ask for matrices RING chunks ahead. LISTENERS more sum the messages, and hand them over in `heard`.
// Filters of the distance are W_c(r) = sum_k B_k(r) C_kc with few functions B, the same in all layers, which are tabulated as
// cubics. A block evaluates them and their slopes for its pairs once. While the others are busy the tensor cores make a
// message's filters from B and C, both as sums of two halves, in the registers of the listeners: two warps an atom, each
// with half of the channels, of which a lane has two for pairs g and g + 8 of every 16 (mma.m16n8k16).
// Defined from outside: N, A, PAINN, LAYERS, F, H and H2 (the readout's hidden channels; H2 is 0 where it has one layer of
// them), FUNCTIONS (of the distance; a multiple of 4), RING, BLOCKS (of as many groups as find room), BACK (whether gradients
// are wanted), POSITIONS (whether of positions, by which the gradients are then, or of pairs' places in tables).
#define C 16
#define P (F / C)
#define THREADS 256    // that exchange and multiply
#define LISTENERS 256  // that sum messages
#define CHUNK 2      // float4 of each thread's that a copy brings
#define GROUPS ((N + A - 1) / A)
#define TILES ((N + 15) / 16)    // of 16 senders
#define SENDERS (16 * TILES)
#define PAIRS (A * SENDERS)      // of a group: those of an atom that count come first
#define NONE 255
#define STEPS ((FUNCTIONS + 15) / 16)                // of a product
#define PARTS 4  // of an atom: of three, the last lanes have none
#define SENT (4 + PAINN)  // rows that an atom sends: a, y, b of PaiNN
#define HALF (C / 2 * SENDERS + 16)  // of a row of what was sent: of half of the channels
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)
#define ONE_BY_ONE _Pragma("unroll 1")

// what a block's channels keep of each layer
#if PAINN
enum { XS, XU, XV, VS, UV = VS + 3, VV = UV + 3, GATES = VV + 3, ROWS = GATES + 2 };
#define HIDDEN 2  // rows of hidden channels of which slopes are kept: the update's, the gate's
#else
enum { XS, VS, HEARD = VS + 3, GATES = HEARD + 3, ROWS = GATES + 2 };
#define HIDDEN 1
#endif
enum { SCALAR, VECTOR, NOW = VECTOR + 3 };  // and of the atom as it is now; on the way back, cotangents of that

// constants of a block, by layers: biases of hidden rows and of its own channels; update, and the gate that sends into a layer
#define OF_UPDATE 0
#define OF_GATES F
#define OF_HIDDEN_GATE (F + 3 * C)
#define OF_SENT (2 * F + 3 * C)
#define OF_LAYER ((1 + PAINN) * (F + 3 * C))
#define OF_READ (LAYERS * OF_LAYER)
#define OF_SECOND (OF_READ + H)
#define OF_FINAL (OF_SECOND + H2)
#define OF_MIXING (OF_FINAL + (H2 ? H2 : H))  // of the student, 9 a layer
#define OF_EPSILON (OF_MIXING + 9 * LAYERS)  // of PaiNN
#define OF_SPACE (OF_EPSILON + 1)            // cutoff, intervals of the table, what is added to distances
#define OF_SCALES (OF_SPACE + 3)             // factors that undo those of B and C, by layers; of B's slopes, and its inverse
#define CONSTANTS (OF_SCALES + LAYERS + 2)

#define BARRIERS ((RING + 5) / 2 * 2)
#define PRODUCTS (H2 && H > 96 ? 8 : 6)  // of an atom and a channel, at most

// exchanges of a launch: of hidden channels' shares, of what atoms send, of vectors
#define ALL_SHARES (LAYERS + 1 + PAINN * (LAYERS - 1) + BACK * (LAYERS + PAINN * (LAYERS - 1)))
#define ALL_SOURCES (LAYERS - 1 + BACK * LAYERS)
#define ALL_VECTORS (PAINN * (1 + BACK) * LAYERS)

#define SENT_WORDS ((A + PAINN) * C)
#define VECTOR_WORDS (2 * A * C)
#define OF_SHARES 0  // two of each, by turns
#define OF_SOURCES (2 * F)
#define OF_VECTORS (OF_SOURCES + 2 * SENT_WORDS)
#define OF_GRADIENTS (OF_VECTORS + 2 * VECTOR_WORDS)  // of all atoms
#define OF_BLOCK ((OF_GRADIENTS + BLOCKS / P * A + 7) / 8 * 8)  // full lines of 128 bytes
__device__ alignas(128) uint4 exchange[BLOCKS * OF_BLOCK];
#define IDLE_LOOKS 1000  // some 0.5 ms
__device__ uint32 launches, finished;  // of all that are known to have begun, and to be ended

struct Molecule {
    const int g = block() / P, c = block() % P, h = thread() / 2, half = thread() % 2, o = thread() / 16, l = thread() % 16, a = min(l / PARTS, A - 1), part = l % PARTS;
    const bool mine = l < A * PARTS && part == 0;  // whether this thread keeps what atom a and channel o have
    const int listener = thread() - THREADS, served = listener / 64, side = warp() % 2;  // the atom of its warp
    const int first_channel = C / 2 * side + 2 * (lane() % 4);                                                               // of two of this lane's
    uint32 launched, shares, sources_sent, vectors_sent;  // exchanges until now, of all launches
    int slot = 0, round = 0;                              // of the ring of matrices
    int taken = 0, asked = 0, of_forward, chunks, messages = 0;
    const float4 *forward, *backward;
    float4 *x, *y, *directions, *ring;
    uint4 *basis, *weights;            // B of pairs; C of all layers
    uint64 *arrived, *there, *sent, *heard_there, *heard_taken;  // barriers of chunks, of C, of messages
    float *sources, *own, *slopes, *made, *heard, *constants, *energy_parts, *read_slopes;
    int *tiles, my_tiles = 0;           // of 16 pairs, of each atom; of this warp's atom
    unsigned char *sender, *place;      // of each pair; of the pair with each sender, or NONE

    __device__ __forceinline__ explicit Molecule(float4* memory) {
        launched = latest(&launches);
        shares = launched * ALL_SHARES, sources_sent = launched * ALL_SOURCES, vectors_sent = launched * ALL_VECTORS;
        x = memory, y = x + (PAINN ? 2 * A : 1) * F, directions = y + 3 * C, ring = directions + PAIRS;
        basis = (uint4*)(ring + RING * CHUNK * THREADS), weights = basis + PAIRS / 16 * STEPS * (2 + 2 * BACK) * 32;
        arrived = (uint64*)(weights + (3 * LAYERS - 1) * STEPS * 2 * 32), there = arrived + RING, sent = there + 1, heard_there = there + 2, heard_taken = there + 3;
        sources = (float*)(arrived + BARRIERS), own = sources + SENT * 2 * HALF, slopes = own + (LAYERS * ROWS + NOW) * A * C;
        made = slopes + LAYERS * HIDDEN * A * F, heard = made + PRODUCTS * A * C, constants = heard + SENT * A * C;
        tiles = (int*)(constants + CONSTANTS), sender = (unsigned char*)(tiles + A), place = sender + PAIRS;
        energy_parts = sources, read_slopes = sources + A * C;  // when no message is left to sum on the way there
    }
    __device__ __forceinline__ int atom() const { return g * A + a; }
    __device__ __forceinline__ float& now(int row) const { return own[(row * A + a) * C + o]; }
    __device__ __forceinline__ float& kept(int layer, int row) const { return own[((NOW + layer * ROWS + row) * A + a) * C + o]; }
    __device__ __forceinline__ float& slope(int layer, int which, int atom) const { return slopes[((layer * HIDDEN + which) * A + atom) * F + h]; }
    __device__ __forceinline__ void to_inward(int row, float value) const { ((float*)y)[(row * C + o) * 4 + a] = value; }
    __device__ __forceinline__ float product(int which, int atom) const { return made[(which * A + atom) * C + o]; }
    __device__ __forceinline__ float constant(int layer, int offset) const { return constants[layer * OF_LAYER + offset]; }
    // where and how the words of an exchange are told from those before it: of the same place, the last but one
    static __device__ __forceinline__ int turn(uint32 exchanges) { return exchanges & 1; }
    static __device__ __forceinline__ uint32 tag(uint32 exchanges) { return 8 | exchanges >> 1 & 7; }
    __device__ __forceinline__ uint4* words(int of, int offset) const { return exchange + (g * P + of) * OF_BLOCK + offset; }

    // --- filters ---

    // B of 16 pairs (values, slopes: high, low) as a warp's lanes multiply them; 0 of pairs that don't count. Of 16 functions
    // lane 4 g + t has 4 i + t, i < 4. table: [intervals, FUNCTIONS] cubics
    __device__ __forceinline__ void evaluate(const float* table) const {
        constexpr int AT_ONCE = STEPS < 2 ? 1 : 2;
        float slope = constants[OF_SCALES + LAYERS];
        int last = (int)constants[OF_SPACE + 1] - 1;
        ONE_BY_ONE for (int tile = warp(); tile < PAIRS / 16; tile += (THREADS + LISTENERS) / 32) {
            if (tile % TILES >= tiles[tile / TILES]) continue;
            const float4* at[2];
            float t[2];
            bool counts[2];
            EACH(r, 2) {
                float place = directions[16 * tile + lane() / 4 + 8 * r].w;
                int interval = min(max((int)place, 0), last);
                counts[r] = place >= 0.f, t[r] = place - (float)interval, at[r] = (const float4*)table + interval * FUNCTIONS + lane() % 4;
            }
            EACH(some, (STEPS + AT_ONCE - 1) / AT_ONCE) {
                float4 w[AT_ONCE][2][4];
                EACH(k, AT_ONCE) EACH(r, 2) EACH(i, 4) {
                    int first = 16 * (some * AT_ONCE + k) + 4 * i;
                    w[k][r][i] = first < FUNCTIONS ? early(at[r] + first) : make_float4(0.f, 0.f, 0.f, 0.f);
                }
                EACH(k, AT_ONCE) if (some * AT_ONCE + k < STEPS) {
                    uint4* to = basis + (tile * STEPS + some * AT_ONCE + k) * (2 + 2 * BACK) * 32 + lane();
                    EACH(which, 1 + BACK) {
                        uint32 high[4], low[4];
                        EACH(r, 2) EACH(m, 2) {
                            float pair[2];
                            EACH(i, 2) {
                                float4 cubics = w[k][r][2 * m + i];
                                pair[i] = !counts[r] ? 0.f : which ? slope * cubic_slope(cubics, t[r]) : cubic(cubics, t[r]);
                            }
                            split(pair[0], pair[1], high[2 * m + r], low[2 * m + r]);
                        }
                        to[2 * which * 32] = {high[0], high[1], high[2], high[3]}, to[(2 * which + 1) * 32] = {low[0], low[1], low[2], low[3]};
                    }
                }
            }
        }
    }
    __device__ __forceinline__ bool has(int tile) const { return tile < my_tiles; }
    // of COUNT tiles of this warp: the layer's filters, or their slopes
    template <int COUNT>
    __device__ __forceinline__ void make_filters(int layer, int which, int first, float (&w)[COUNT][3][4]) const {
        EACH(tile, COUNT) EACH(kind, 3) EACH(k, 4) w[tile][kind][k] = 0.f;
        const uint4* from = weights + (layer ? 3 * layer - 1 : 0) * STEPS * 64 + side * 32 + lane();
        EACH(step, STEPS) {
            uint4 b[3];
            EACH(kind, 3) if (kind < 2 || layer > 0) b[kind] = from[(kind * STEPS + step) * 64];
            EACH(tile, COUNT) if (has(first + tile)) {
                const uint4* at = basis + (((served * TILES + first + tile) * STEPS + step) * (2 + 2 * BACK) + 2 * which) * 32 + lane();
                uint4 h = at[0], s = at[32];
                uint32 high[4] = {h.x, h.y, h.z, h.w}, low[4] = {s.x, s.y, s.z, s.w};
                EACH(kind, 3) if (kind < 2 || layer > 0) mma(w[tile][kind], low, b[kind].x, b[kind].y);
                EACH(kind, 3) if (kind < 2 || layer > 0) mma(w[tile][kind], high, b[kind].z, b[kind].w);
                EACH(kind, 3) if (kind < 2 || layer > 0) mma(w[tile][kind], high, b[kind].x, b[kind].y);
            }
        }
    }

    // --- matrices ---

    // for the stages' matrices for this block, in their order, where those before were taken by all threads: a warp for a chunk
    __device__ __forceinline__ void ask() {
        constexpr int WARPS = THREADS / 32;
        static_assert(RING <= WARPS, "a chunk a warp");
        int k = asked + (warp() - asked & WARPS - 1);
        asked = min(taken + RING, chunks);
        if (k >= asked || lane()) return;
        const float4* from = BACK && k >= of_forward ? backward + (k - of_forward) * CHUNK * THREADS : forward + k * CHUNK * THREADS;
        copy(ring + k % RING * CHUNK * THREADS, from, CHUNK * THREADS * (int)sizeof(float4), arrived + k % RING);
    }
    // all threads wait for each other
    __device__ __forceinline__ void meet() { sync_first<THREADS>(), ask(); }
    // the next numbers of them, while other blocks' words are awaited; ASKING: which may be more than RING chunks
    template <bool ASKING = false, int COUNT>
    __device__ __forceinline__ void take(float (&w)[COUNT]) {
        EACH(chunk, (COUNT + 4 * CHUNK - 1) / (4 * CHUNK)) {
            if (ASKING && taken == asked) meet();
            barrier_wait(arrived + slot, round & 1);
            EACH(i, CHUNK) if (4 * (CHUNK * chunk + i) < COUNT) {
                float4 four = ring[(slot * CHUNK + i) * THREADS + thread()];
                float numbers[4] = {four.x, four.y, four.z, four.w};
                EACH(k, 4) if (4 * (CHUNK * chunk + i) + k < COUNT) w[4 * (CHUNK * chunk + i) + k] = numbers[k];
            }
            taken++;
            if (++slot == RING) slot = 0, round++;
        }
    }
    // over LANES lanes, APART from each other: a lane has the sum of x[lane() / APART % COUNT] then
    template <int LANES, int APART = 1, int COUNT>
    static __device__ __forceinline__ float spread(float (&x)[COUNT]) {
        static_assert(COUNT <= LANES && (COUNT & COUNT - 1) == 0, "a power of 2");
        EACH(step, 5) {
            int left = COUNT >> step >> 1;
            if (left > 0) {
                bool upper = lane() & left * APART;
                EACH(i, COUNT / 2) if (i < left) {
                    float keep = upper ? x[left + i] : x[i], give = upper ? x[i] : x[left + i];
                    x[i] = keep + from_lane(give, left * APART);
                }
            }
        }
        EACH(step, 5) if (1 << step >= COUNT && 1 << step < LANES) x[0] += from_lane(x[0], APART << step);
        return x[0];
    }
    // sums over LANES lanes, of channel o or, with all lanes of a warp, of its two channels one after the other
    template <int LANES, int COUNT>
    __device__ __forceinline__ void store_products(const float (&sums)[COUNT]) const {
        constexpr int AT_ONCE = COUNT <= 2 ? 2 : COUNT <= 4 ? 4 : COUNT <= 8 ? 8 : COUNT <= 16 ? 16 : LANES, EACH_CHANNEL = COUNT / (LANES / 16);
        EACH(from, (COUNT + AT_ONCE - 1) / AT_ONCE) {
            float some[AT_ONCE];
            EACH(i, AT_ONCE) some[i] = from * AT_ONCE + i < COUNT ? sums[from * AT_ONCE + i] : 0.f;
            float sum = spread<LANES>(some);
            int own = lane() % LANES, at = from * AT_ONCE + own;
            if (own < AT_ONCE && at < COUNT) made[at % EACH_CHANNEL * C + (LANES == 16 ? o : 2 * warp() + at / EACH_CHANNEL)] = sum;
        }
        sync_warp();
    }
    // x of the atoms [K] times columns of a matrix that this block has: `parts` of them for each of its channels
    template <int OUT, int K>
    __device__ __forceinline__ void outward(const float (&w)[OUT * (K / 16)], const float4* x) const {
        float sums[OUT * A] = {};
        EACH(m, K / 16) {
            float4 q = x[l + 16 * m];
            float of_atoms[4] = {q.x, q.y, q.z, q.w};
            EACH(p, OUT) EACH(k, A) sums[p * A + k] += w[p * (K / 16) + m] * of_atoms[k];
        }
        store_products<16>(sums);
    }
    // rows of this block [IN C] times rows of a matrix: its share of the hidden channels, which others wait for. A
    // thread multiplies an eighth of the rows by four columns
    template <int IN>
    __device__ __forceinline__ void inward(const float (&w)[IN * C / 2], int width) {
        float sums[A][4] = {};
        EACH(i, IN * C / 8) {
            float4 q = y[thread() % 8 + 8 * i];
            float of_atoms[4] = {q.x, q.y, q.z, q.w};
            EACH(k, A) EACH(column, 4) sums[k][column] += w[4 * i + column] * of_atoms[k];
        }
        shares++;
        EACH(k, A) spread<8>(sums[k]);
        int column = thread() / 8 * 4 + thread() % 4;
        if (column < width && thread() / 4 % 2 == 0) {
            float share[4] = {};
            EACH(k, A) share[k] = sums[k][0];
            put(words(c, OF_SHARES + turn(shares) * F + column), share[0], share[1], share[2], share[3], tag(shares));
        }
    }
    // those shares of all blocks of a group: x[K] = to_x(atom, sum)
    template <class ToX>
    __device__ __forceinline__ void receive_shares(int width, ToX to_x) {
        constexpr int OF = P < 2 ? 1 : P / 2;
        const uint4* from = words(half * OF % P, OF_SHARES + turn(shares) * F + min(h, width - 1));
        float4 w[OF];
        receive(w, tag(shares), [&](int k) { return from + k * OF_BLOCK; });
        float sums[4] = {}, of_atoms[4] = {};
        EACH(k, OF) sums[0] += w[k].x, sums[1] += w[k].y, sums[2] += w[k].z, sums[3] += w[k].w;
        EACH(k, A) {
            if (P > 1) sums[k] += from_lane(sums[k], 1);
            of_atoms[k] = to_x(k, sums[k]);
        }
        if (h < width && half == 0) x[h] = make_float4(of_atoms[0], of_atoms[1], of_atoms[2], of_atoms[3]);
    }
    // z of hidden channels: SiLU, whose slope is kept
    __device__ __forceinline__ void receive_hidden(int layer, int which, int bias) {
        float b = h < F ? constant(layer, bias + h) : 0.f;
        receive_shares(F, [&](int atom, float sum) {
            float z = sum + b, sigmoid = logistic(z);
            if (h < F && half == 0) slope(layer, which, atom) = silu_slope(z, sigmoid);
            return z * sigmoid;
        });
        meet();
    }
    __device__ __forceinline__ void receive_hidden_bar(int layer, int which) {
        receive_shares(F, [&](int atom, float sum) { return h < F && half == 0 ? sum * slope(layer, which, atom) : 0.f; });
        meet();
    }

    // --- vectors of all channels of a group's atoms ---

#if PAINN
    __device__ __forceinline__ void begin_vectors() { vectors_sent++; }
    __device__ __forceinline__ void send_vector(int which, const float (&v)[3]) const {
        put(words(c, OF_VECTORS + turn(vectors_sent) * VECTOR_WORDS + (which * A + a) * C + o), v[0], v[1], v[2], 0.f, tag(vectors_sent));
    }
    // x [WHICH, A, F], of three components
    template <int WHICH>
    __device__ __forceinline__ void receive_vectors() {
        constexpr int ALL = WHICH * A * F, EACH_TIME = (ALL + THREADS - 1) / THREADS;
        float4 w[EACH_TIME];
        receive(w, tag(vectors_sent), [&](int k) {
            int i = min(thread() + k * THREADS, ALL - 1), of = i / (WHICH * A * C);
            return words(of, OF_VECTORS + turn(vectors_sent) * VECTOR_WORDS + i % (WHICH * A * C));
        });
        if (WHICH == 2) sync_first<THREADS>();  // x may still be read
        EACH(k, EACH_TIME) {
            int i = thread() + k * THREADS, of = i / (WHICH * A * C), row = i % (WHICH * A * C) / C;
            if (i < ALL) x[row * F + of * C + i % C] = w[k];
        }
        meet();
    }
    // made[which, component, atom]: `BOTH`: the sum of two products of vectors, or else two products of the same vectors.
    // Lanes of a warp have its two channels' rows by turns
    template <bool BOTH>
    __device__ __forceinline__ void outward_vectors(const float (&w)[2 * P]) const {
        constexpr int OUT = BOTH ? 1 : 2, M = P / 2;
        float sums[2 * OUT * 3 * A] = {};
        EACH(m, M) EACH(atom, A) {
            float4 u = x[atom * F + lane() + 32 * m], v = x[((BOTH ? A : 0) + atom) * F + lane() + 32 * m];
            float first[3] = {u.x, u.y, u.z}, second[3] = {v.x, v.y, v.z};
            EACH(channel, 2) EACH(k, 3) {
                sums[(channel * OUT * 3 + k) * A + atom] += w[channel * M + m] * first[k];
                sums[((channel * OUT + OUT - 1) * 3 + k) * A + atom] += w[P + channel * M + m] * second[k];
            }
        }
        store_products<32>(sums);
    }
#endif

    // --- what an update needs ---

    // of two vectors that are kept, or by which v is
    __device__ __forceinline__ float inner(int layer, int u, int v) const {
        return kept(layer, u) * kept(layer, v) + kept(layer, u + 1) * kept(layer, v + 1) + kept(layer, u + 2) * kept(layer, v + 2);
    }
    __device__ __forceinline__ float inner_bar(int layer, int v) const {
        return now(VECTOR) * kept(layer, v) + now(VECTOR + 1) * kept(layer, v + 1) + now(VECTOR + 2) * kept(layer, v + 2);
    }
#if !PAINN
    // a component of M v, and of the transpose of M times the cotangent of v'
    __device__ __forceinline__ float mixed(int layer, int k) const {
        float sum = 0.f;
        EACH(j, 3) sum += constants[OF_MIXING + 9 * layer + 3 * k + j] * kept(layer, HEARD + j);
        return sum;
    }
    __device__ __forceinline__ float mixed_bar(int layer, int k) const {
        float sum = 0.f;
        EACH(j, 3) sum += constants[OF_MIXING + 9 * layer + 3 * j + k] * now(VECTOR + j);
        return sum;
    }
#endif
    // cotangents of the update's gates
    __device__ __forceinline__ void above(int layer) {
        float s_bar = now(SCALAR);
        to_inward(0, s_bar);
#if PAINN
        to_inward(1, s_bar * inner(layer, UV, VV)), to_inward(2, inner_bar(layer, UV));
#else
        float along = 0.f;
        EACH(k, 3) along += now(VECTOR + k) * mixed(layer, k);
        to_inward(1, inner_bar(layer, HEARD)), to_inward(2, along);
#endif
    }

    // --- messages ---

    // what atom a sends through channel o: a word, and b of all atoms in another, which is sent first
    __device__ __forceinline__ void send(float a_, const float (&y_)[3]) {
        sources_sent++;
        if (mine) put(words(c, OF_SOURCES + turn(sources_sent) * SENT_WORDS + a * C + o), a_, y_[0], y_[1], y_[2], tag(sources_sent));
        barrier_arrive(sent);  // listeners look from now on: others' words wait for looks
    }
    __device__ __forceinline__ void send_second(float b) const {
        float of_atoms[4] = {};
        EACH(k, A) of_atoms[k] = of_lane(b, (lane() & 16) + k * PARTS);
        if (l == 0) put(words(c, OF_SOURCES + turn(sources_sent + 1) * SENT_WORDS + A * C + o), of_atoms[0], of_atoms[1], of_atoms[2], of_atoms[3], tag(sources_sent + 1));
    }
    __device__ __forceinline__ float* source(int row, int channel, int atom) const { return sources + (2 * row + channel / (C / 2)) * HALF + atom * (C / 2) + channel % (C / 2); }
    // of all atoms, through this block's channels, by the listeners; SECOND: also b
    template <bool SECOND>
    __device__ __forceinline__ void receive_sources() {
        constexpr int EACH_GROUP = (A + SECOND) * C, ALL = GROUPS * EACH_GROUP, EACH_TIME = (ALL + LISTENERS - 1) / LISTENERS;
        float4 w[EACH_TIME];
        barrier_wait(sent, sources_sent++ - launched * ALL_SOURCES & 1);
        receive(w, tag(sources_sent), [&](int k) {
            int i = min(listener + k * LISTENERS, ALL - 1);
            return exchange + (i / EACH_GROUP * P + c) * OF_BLOCK + OF_SOURCES + turn(sources_sent) * SENT_WORDS + i % EACH_GROUP;
        });
        sync_others<LISTENERS>();  // those before may still be read
        EACH(k, EACH_TIME) {
            int i = listener + k * LISTENERS, rest = i % EACH_GROUP, first = i / EACH_GROUP * A, atom = first + rest / C, channel = rest % C;
            float numbers[4] = {w[k].x, w[k].y, w[k].z, w[k].w};
            if (SECOND && i < ALL && rest >= A * C) {
                EACH(m, A) if (first + m < N) *source(4, channel, first + m) = numbers[m];
            } else if (i < ALL && atom < N) EACH(row, 4) *source(row, channel, atom) = numbers[row];
        }
        sync_others<LISTENERS>();
    }
    __device__ __forceinline__ int pair_of(int tile, int r) const { return served * SENDERS + 16 * tile + lane() / 4 + 8 * r; }
    // a number of this lane's channels
    struct Two {
        float x[2];
    };
    static __device__ __forceinline__ Two two(const float* at) {
        float2 q = *(const float2*)at;
        return {q.x, q.y};
    }
    __device__ __forceinline__ Two two_kept(int layer, int row) const { return two(own + ((NOW + layer * ROWS + row) * A + served) * C + first_channel); }
    __device__ __forceinline__ float& heard_at(int row, int atom, int channel) const { return heard[(row * A + atom) * C + channel]; }
    // hands over the sums over this warp's pairs: four numbers, and of PaiNN's cotangents a fifth, of two channels each
    __device__ __forceinline__ void hand_over(float (&some)[8], float (&of_b)[2], bool fifth) {
        float sum = spread<8, 4>(some), second = fifth ? spread<8, 4>(of_b) : 0.f;
        int own = lane() / 4;
        if (messages > 0) barrier_wait(heard_taken, messages - 1 & 1);
        if (served < A) {
            heard_at(own / 2, served, first_channel + own % 2) = sum;
            if (fifth && own < 2) heard_at(SENT - 1, served, first_channel + own) = second;
        }
        barrier_arrive(heard_there), messages++;
    }
    // what they handed over
    template <int ROWS_HEARD>
    __device__ __forceinline__ void hear(int layer, float (&sums)[ROWS_HEARD]) {
        barrier_wait(heard_there, messages++ & 1);
        if (mine) EACH(row, ROWS_HEARD) sums[row] = factor(layer) * heard_at(row, a, o);
        barrier_arrive(heard_taken);
    }
    __device__ __forceinline__ float factor(int layer) const { return constants[OF_SCALES + layer]; }
    // the sums of a message: one number, and three
    __device__ __forceinline__ void message(int layer, const float (&w)[TILES][3][4]) {
        float some[8] = {}, none[2];  // [row, channel]
        EACH(tile, TILES) if (has(tile)) EACH(r, 2) {
            int e = pair_of(tile, r), j = sender[e];
            float4 u = directions[e];
            float along[3] = {u.x, u.y, u.z};
            Two a_ = two(source(0, first_channel, j)), b, ys[3];
            if (PAINN) b = two(source(4, first_channel, j));
            if (layer > 0) EACH(axis, 3) ys[axis] = two(source(1 + axis, first_channel, j));
            EACH(k, 2) {
                float wb = w[tile][1][2 * r + k] * (PAINN ? b.x[k] : 1.f);
                some[k] += w[tile][0][2 * r + k] * a_.x[k];
                EACH(axis, 3) some[2 + 2 * axis + k] += along[axis] * wb;
                if (layer > 0) EACH(axis, 3) some[2 + 2 * axis + k] += w[tile][2][2 * r + k] * ys[axis].x[k];
            }
        }
        hand_over(some, none, false);
    }
    // of its transpose: a, y, b of PaiNN
    __device__ __forceinline__ void message_transpose(const float (&w)[TILES][3][4]) {
        float some[8] = {}, of_b[2] = {};
        EACH(tile, TILES) if (has(tile)) EACH(r, 2) {
            int e = pair_of(tile, r), j = sender[e];
            float4 u = directions[e];
            Two p = two(source(0, first_channel, j)), q[3];
            EACH(axis, 3) q[axis] = two(source(1 + axis, first_channel, j));
            EACH(k, 2) {
                some[k] += w[tile][0][2 * r + k] * p.x[k];
                EACH(axis, 3) some[2 + 2 * axis + k] += w[tile][2][2 * r + k] * q[axis].x[k];
                of_b[k] -= (u.x * q[0].x[k] + u.y * q[1].x[k] + u.z * q[2].x[k]) * w[tile][1][2 * r + k];
            }
        }
        hand_over(some, of_b, PAINN);
    }
    // and the gradients of this lane's pairs grow, of COUNT tiles
    template <int COUNT>
    __device__ __forceinline__ void add_gradients(int layer, int first, const float (&w)[TILES][3][4], const float (&slopes)[COUNT][3][4], float (&pair_bars)[TILES][2][4]) const {
        float f = factor(layer);
        Two a_ = two_kept(layer, XS), b = {1.f, 1.f}, ys[3] = {};
#if PAINN
        b = two_kept(layer, XU);
#endif
        if (layer > 0) EACH(axis, 3) {
            ys[axis] = two_kept(layer, VS + axis);
#if PAINN
            EACH(k, 2) ys[axis].x[k] *= two_kept(layer, XV).x[k];
#endif
        }
        EACH(k, 2) {
            a_.x[k] *= f, b.x[k] *= f;
            EACH(axis, 3) ys[axis].x[k] *= f;
        }
        EACH(m, COUNT) if (has(first + m)) EACH(r, 2) {
            int tile = first + m, e = pair_of(tile, r), j = sender[e];
            float4 u = directions[e];
            float(&bar)[4] = pair_bars[tile][r];
            Two p = two(source(0, first_channel, j)), q[3];
            EACH(axis, 3) q[axis] = two(source(1 + axis, first_channel, j));
            EACH(k, 2) {
                float along = u.x * q[0].x[k] + u.y * q[1].x[k] + u.z * q[2].x[k], bw = b.x[k] * w[tile][1][2 * r + k];
                bar[0] += a_.x[k] * p.x[k] * slopes[m][0][2 * r + k] - b.x[k] * along * slopes[m][1][2 * r + k];
                if (layer > 0) bar[0] += (ys[0].x[k] * q[0].x[k] + ys[1].x[k] * q[1].x[k] + ys[2].x[k] * q[2].x[k]) * slopes[m][2][2 * r + k];
                EACH(axis, 3) bar[1 + axis] += bw * q[axis].x[k];
            }
        }
    }
    // what the listeners do
    __device__ __forceinline__ void listen() {
        float filters[TILES][3][4];
        my_tiles = served < A ? tiles[served] : 0;
        barrier_wait(there, 0);
        ONE_BY_ONE for (int i = 0; i < LAYERS; i++) {
            make_filters(i, 0, 0, filters);
            if (i > 0) receive_sources<PAINN>();
            message(i, filters);
        }
#if BACK
        float pair_bars[TILES][2][4] = {};
        ONE_BY_ONE for (int i = LAYERS - 1; i > 0; i--) {
            make_filters(i, 0, 0, filters);
            receive_sources<false>();
            message_transpose(filters);
            EACH(tile, TILES) {
                float slopes[1][3][4];
                make_filters(i, 1, tile, slopes);
                add_gradients(i, tile, filters, slopes, pair_bars);
            }
        }
        float slopes[TILES][3][4];  // of the last one before it is needed: no more exchanges hide them
        make_filters(0, 0, 0, filters), make_filters(0, 1, 0, slopes);
        receive_sources<false>();
        add_gradients(0, 0, filters, slopes, pair_bars);
        store_gradients(pair_bars);
        barrier_arrive(heard_there);
#endif
    }

    // --- the beginning and the end ---

    // of a pair's vector
    struct Space {
        float cutoff, intervals, epsilon;
        __device__ __forceinline__ explicit Space(const float* constants) : cutoff(constants[OF_SPACE]), intervals(constants[OF_SPACE + 1]), epsilon(constants[OF_SPACE + 2]) {}
    };
    // the direction of a pair and its place in the table, < 0 where it doesn't count
#if POSITIONS
    __device__ __forceinline__ float4 read_pair(int i, int j, const float* positions, const unsigned char* mask, const Space& space) const {
        float r[3], square = 0.f;
        bool counts = mask[i * N + j];
        EACH(k, 3) r[k] = positions[3 * j + k] - positions[3 * i + k], square += r[k] * r[k];
        float d = root(square), factor = d > 0.f ? 1.f / (d + space.epsilon) : 0.f, at = min(d, space.cutoff) * (space.intervals / space.cutoff);
        return make_float4(factor * r[0], factor * r[1], factor * r[2], counts && d <= space.cutoff ? at : -1.f);
    }
#else
    static __device__ __forceinline__ float4 read_pair(int i, int j, const float* places) {
        constexpr int all = N * N;
        const float* at = places + i * N + j;
        return make_float4(at[2 * all], at[3 * all], at[4 * all], at[all] > 0.f ? at[0] + at[5 * all] : -1.f);
    }
#endif
    // of an atom's pairs those that count, in the order of senders, by a warp; read(i, j): a pair
    template <class Read>
    __device__ __forceinline__ void gather_pairs(Read read) const {
        if (served >= A || side) return;
        int i = g * A + served, count = 0;
        EACH(k, (SENDERS + 31) / 32) {
            int j = 32 * k + lane();
            float4 u = read(min(i, N - 1), min(j, N - 1));
            bool counts = u.w >= 0.f && i < N && j < N;
            uint32 all = lanes_where(counts);
            int at = served * SENDERS + count + ones(all & (1u << lane()) - 1);
            if (counts) directions[at] = u, sender[at] = (unsigned char)j;
            if (j < SENDERS) place[served * SENDERS + j] = (unsigned char)(counts ? at - served * SENDERS : NONE);
            count += ones(all);
        }
        for (int k = count + lane(); k < SENDERS; k += 32) directions[served * SENDERS + k] = make_float4(0.f, 0.f, 0.f, -1.f), sender[served * SENDERS + k] = 0;
        if (lane() == 0) tiles[served] = (count + 15) / 16;
    }
    // what elements give: what atoms send before they heard of each other; and 0 of atoms that are not there
    __device__ __forceinline__ void begin(const float* of_blocks, const int* atom_numbers, const float* of_elements) {
        constexpr int EACH_TIME = (CONSTANTS + THREADS - 1) / THREADS, ELEMENT = (1 + 2 * PAINN) * F, AT_ONCE = 4;
        float some[EACH_TIME];
        EACH(k, EACH_TIME) some[k] = of_blocks[c * CONSTANTS + min(thread() + k * THREADS, CONSTANTS - 1)];
        int number = atom_numbers[min(atom(), N - 1)];
        ONE_BY_ONE for (int first = o; first < SENDERS; first += AT_ONCE * C) {
            const float* at[AT_ONCE];
            float sent[AT_ONCE][1 + PAINN];
            EACH(k, AT_ONCE) at[k] = of_elements + atom_numbers[min(first + k * C, N - 1)] * ELEMENT + c * C + l;
            EACH(k, AT_ONCE) EACH(row, 1 + PAINN) sent[k][row] = at[k][row * F];
            EACH(k, AT_ONCE) if (first + k * C < SENDERS) {
                bool is = first + k * C < N;
                *source(0, l, first + k * C) = is ? sent[k][0] : 0.f;
                if (PAINN) *source(4, l, first + k * C) = is ? sent[k][PAINN] : 0.f;
                EACH(axis, 3) *source(1 + axis, l, first + k * C) = 0.f;
            }
        }
        const float* at = of_elements + number * ELEMENT + c * C + o;
        float sent = at[0], second = at[PAINN * F], scalar = at[2 * PAINN * F];
        EACH(k, EACH_TIME) if (thread() + k * THREADS < CONSTANTS) constants[thread() + k * THREADS] = some[k];
        for (int k = thread(); k < 3 * C; k += THREADS) y[k] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (mine) {
            kept(0, XS) = sent, now(SCALAR) = scalar;
            if (PAINN) kept(0, XS + 1) = second;
            EACH(k, 3) now(VECTOR + k) = 0.f;
        }
    }
    // what i sends to j gives [D, U_xyz] of this block's channels: by each half of them, where B was
    __device__ __forceinline__ void store_gradients(float (&pair_bars)[TILES][2][4]) const {
        sync_others<LISTENERS>();  // the last filters are made
        EACH(tile, TILES) if (has(tile)) EACH(r, 2) {
            float sum = spread<4>(pair_bars[tile][r]);
            ((float*)basis)[4 * (side * PAIRS + pair_of(tile, r)) + lane() % 4] = sum;
        }
    }
    __device__ __forceinline__ float4 gradient(int e) const {
        if (directions[e].w < 0.f) return make_float4(0.f, 0.f, 0.f, 0.f);
        float4 first = ((const float4*)basis)[e], second = ((const float4*)basis)[PAIRS + e];
        return make_float4((first.x + second.x) * constants[OF_SCALES + LAYERS + 1], first.y + second.y, first.z + second.z, first.w + second.w);
    }
#if POSITIONS
    // gradients by positions [N, 3]: each block's of all atoms, of which a warp somewhere adds those of an atom up
    __device__ __forceinline__ void end(float* position_bars) const {
        Space space(constants);
        float an_angstrom = space.intervals / space.cutoff;
        float4* gradients = (float4*)basis;
        for (int e = thread(); e < PAIRS; e += THREADS) {
            float4 sum = gradient(e), u = directions[e];
            float d = u.w * (space.cutoff / space.intervals), along = u.x * sum.y + u.y * sum.z + u.z * sum.w;
            float t = u.w > 0.f ? reciprocal(d + space.epsilon) : 0.f, radial = u.w >= 0.f ? sum.x * an_angstrom + t * along : 0.f;
            gradients[e] = make_float4(t * sum.y - radial * u.x, t * sum.z - radial * u.y, t * sum.w - radial * u.z, 0.f);
        }
        sync_first<THREADS>();
        const uint32 ended = 2 * launched;  // one place of each
        if (warp() < A) {  // an own atom's: of what it sends, and of what is sent to it
            float sums[3] = {};
            for (int k = lane(); k < SENDERS; k += 32) add(sums, 1.f, warp() * SENDERS + k);
            if (lane() < A && g * A + warp() < N) subtract(sums, lane(), g * A + warp());
            over_warp(sums);
            if (lane() == 0 && g * A + warp() < N) put(words(c, OF_GRADIENTS + g * A + warp()), sums[0], sums[1], sums[2], 0.f, tag(ended));
        }
        for (int j = THREADS - 1 - thread(); j < N; j += THREADS) if (j / A != g) {
            float sums[3] = {};
            EACH(k, A) subtract(sums, k, j);
            put(words(c, OF_GRADIENTS + j), sums[0], sums[1], sums[2], 0.f, tag(ended));
        }
        ONE_BY_ONE for (int atom = block() + GROUPS * P * warp(); atom < N; atom += GROUPS * P * (THREADS / 32)) {
            constexpr int EACH_LANE = (GROUPS * P + 31) / 32;
            float4 word[EACH_LANE];
            receive(word, tag(ended), [&](int k) { return exchange + min(lane() + 32 * k, GROUPS * P - 1) * OF_BLOCK + OF_GRADIENTS + atom; });
            float sums[3] = {};
            EACH(k, EACH_LANE) if (lane() + 32 * k < GROUPS * P) sums[0] += word[k].x, sums[1] += word[k].y, sums[2] += word[k].z;
            over_warp(sums);
            if (lane() < 3) position_bars[3 * atom + lane()] = lane() == 0 ? sums[0] : lane() == 1 ? sums[1] : sums[2];
        }
    }
    __device__ __forceinline__ void add(float (&sums)[3], float factor, int pair) const {
        float4 more = ((const float4*)basis)[pair];
        sums[0] += factor * more.x, sums[1] += factor * more.y, sums[2] += factor * more.z;
    }
    // what an atom of the group gives to one that sends to it
    __device__ __forceinline__ void subtract(float (&sums)[3], int receiver, int atom) const {
        int at = place[receiver * SENDERS + atom];
        if (at != NONE) add(sums, -1.f, receiver * SENDERS + at);
    }
    static __device__ __forceinline__ void over_warp(float (&sums)[3]) {
        EACH(step, 5) EACH(k, 3) sums[k] += from_lane(sums[k], 1 << step);
    }
#else
    __device__ __forceinline__ void end(float* pair_bars) const {
        for (int e = thread(); e < PAIRS; e += THREADS) {
            int i = g * A + e / SENDERS, j = e % SENDERS, all = N * N;
            float4 sum = place[e] == NONE ? make_float4(0.f, 0.f, 0.f, 0.f) : gradient(e / SENDERS * SENDERS + place[e]);
            float* to = pair_bars + c * 4 * all + i * N + j;
            if (i < N && j < N) to[0] = sum.x, to[all] = sum.y, to[2 * all] = sum.z, to[3 * all] = sum.w;
        }
    }
#endif

    // --- the readout ---

#if H2
    // energies, and their slopes by the first hidden channels before the SiLU, x [H]
    __device__ __forceinline__ void readout(float* energies, const float (&second)[H / 16 * (H2 / 16)], const float (&second_bar)[H / 16 * (H2 / 16)]) {
        float b = h < H ? constants[OF_READ + h] : 0.f, energy = 0.f;
        receive_shares(H, [&](int atom, float sum) {
            float z = sum + b, sigmoid = logistic(z);
            if (h < H && half == 0) read_slopes[atom * H + h] = silu_slope(z, sigmoid);
            return z * sigmoid;
        });
        sync_first<THREADS>();
        outward<H2 / 16, H>(second, x);
        if (mine) EACH(k, H2 / 16) {
            float z = product(k, a) + constants[OF_SECOND + k * 16 + o], final = constants[OF_FINAL + k * 16 + o], sigmoid = logistic(z);
            energy += final * z * sigmoid;
            ((float*)y)[(k * 16 + o) * 4 + a] = final * silu_slope(z, sigmoid);
        }
        if (mine) energy_parts[a * C + o] = energy;
        sync_first<THREADS>();
        outward<H / 16, H2>(second_bar, y);
        if (mine) EACH(k, H / 16) ((float*)x)[(k * 16 + o) * 4 + a] = product(k, a) * read_slopes[a * H + k * 16 + o];
        store_energies(energies);
    }
#else
    // likewise
    __device__ __forceinline__ void readout(float* energies) {
        float b = h < H ? constants[OF_READ + h] : 0.f, final = h < H ? constants[OF_FINAL + h] : 0.f, energy[A];
        receive_shares(H, [&](int atom, float sum) {
            float z = sum + b, sigmoid = logistic(z);
            energy[atom] = half == 0 ? final * z * sigmoid : 0.f;
            return final * silu_slope(z, sigmoid);
        });
        EACH(k, A) {
            EACH(step, 4) energy[k] += from_lane(energy[k], 2 << step);
            if (lane() == 0) energy_parts[k * C + warp()] = energy[k];
            if (lane() == 1) energy_parts[k * C + C / 2 + warp()] = energy[k];
        }
        store_energies(energies);
    }
#endif
    __device__ __forceinline__ void store_energies(float* energies) const {
        sync_first<THREADS>();
        if (c > 0 || thread() >= A || g * A + thread() >= N) return;
        float sum = 0.f;
        EACH(k, C) sum += energy_parts[thread() * C + k];
        energies[g * A + thread()] = sum;
    }
};

extern "C" __global__ void __launch_bounds__(THREADS + LISTENERS, 1) larger(const float* __restrict__ table, const uint4* of_weights, const float* of_blocks, const int* numbers, const float* of_elements, const float* forward,
#if POSITIONS
    const float* positions, const unsigned char* mask,
#else
    const float* places,
#endif
#if BACK
    const float* backward, int of_forward, int of_backward, float* energies, float* bars WITH_CLOCKS) {
#else
    int of_forward, float* energies WITH_CLOCKS) {
#endif
    SHARED(float4, memory);
    Molecule m(memory);
    if (block() >= GROUPS * P) {  // one that came after all others had ended would wait for the next launch
        for (int k = 0; k < IDLE_LOOKS && thread() == 0 && latest(&finished) == m.launched; k++) other_blocks();
        return;
    }
    if (thread() == 0) {
        EACH(k, RING) barrier_init(m.arrived + k, 1);
        barrier_init(m.there, 1), barrier_init(m.sent, THREADS / 32), barrier_init(m.heard_there, LISTENERS / 32), barrier_init(m.heard_taken, THREADS / 32);
        barriers_made();
    }
    sync();
    ready(of_blocks);
    m.forward = (const float4*)forward + m.c * of_forward * CHUNK * THREADS, m.chunks = m.of_forward = of_forward;
#if BACK
    m.backward = (const float4*)backward + m.c * of_backward * CHUNK * THREADS, m.chunks += of_backward;
#endif
    if (thread() >= THREADS) {
#if POSITIONS
        Molecule::Space space(of_blocks);
        m.gather_pairs([&](int i, int j) { return m.read_pair(i, j, positions, mask, space); });
#else
        m.gather_pairs([&](int i, int j) { return m.read_pair(i, j, places); });
#endif
    } else {
        constexpr int OF_WEIGHTS = (3 * LAYERS - 1) * STEPS * 2 * 32;
        if (thread() == 0) copy(m.weights, of_weights + m.c * OF_WEIGHTS, OF_WEIGHTS * (int)sizeof(uint4), m.there);
        m.begin(of_blocks, numbers, of_elements);
        m.ask();
    }
    BEGIN_STAGES;
    STAGE(PAIRS);
    sync();
    m.evaluate(table);
    sync();
    if (thread() >= THREADS) return m.listen();
    const int a = m.a, o = m.o;
    const bool mine = m.mine;
    float w_in[3 * C / 2], w_gates[3 * P], w_above[2 * P];
    ONE_BY_ONE for (int i = 0; i < LAYERS; i++) {
        const bool last = i == LAYERS - 1;
        float sums[4], w_norm[C], w_next[C / 2];
#if PAINN
        m.take(w_above);
#endif
        m.take(w_norm);
        STAGE(MESSAGE);
        m.hear(i, sums);
        if (mine) {
            m.now(SCALAR) += sums[0];
            EACH(k, 3) m.now(VECTOR + k) += sums[1 + k];
        }
#if PAINN
        m.begin_vectors();
        if (mine) {
            float v[3] = {m.now(VECTOR), m.now(VECTOR + 1), m.now(VECTOR + 2)};
            m.send_vector(0, v);
        }
        STAGE(EXCHANGE);
        m.receive_vectors<1>();
        STAGE(VECTORS);
        m.outward_vectors<false>(w_above);
        if (mine) {
            float square = 0.f, epsilon = m.constants[OF_EPSILON];
            EACH(k, 3) {
                float vv = m.product(3 + k, a);
                m.kept(i, UV + k) = m.product(k, a), m.kept(i, VV + k) = vv, square += vv * vv;
            }
            m.to_inward(0, m.now(SCALAR)), m.to_inward(1, square_root(square + epsilon * epsilon) - epsilon);
        }
#else
        if (mine) {
            EACH(k, 3) m.kept(i, HEARD + k) = m.now(VECTOR + k);
            m.to_inward(0, m.now(SCALAR)), m.to_inward(1, square_root(m.inner(i, HEARD, HEARD)));
        }
#endif
        STAGE(UPDATE);
        m.meet();
        m.inward<2>(w_norm, F);
        m.take(w_gates);
        if (PAINN) m.take(w_next);
        STAGE(EXCHANGE);
        m.receive_hidden(i, 0, OF_UPDATE);
        if (!PAINN && last) m.take(w_next);  // with the three before it would be more than RING
        STAGE(UPDATE);
        m.outward<3, F>(w_gates, m.x);
        if (mine) {
            float gates[3];
            EACH(k, 3) gates[k] = m.product(k, a) + m.constant(i, OF_GATES + k * C + o);
            EACH(k, 2) m.kept(i, GATES + k) = gates[1 + k];
#if PAINN
            m.now(SCALAR) += gates[0] + gates[1] * m.inner(i, UV, VV);
            EACH(k, 3) m.now(VECTOR + k) += gates[2] * m.kept(i, UV + k);
#else
            m.now(SCALAR) += gates[0];
            EACH(k, 3) m.now(VECTOR + k) = gates[1] * m.kept(i, HEARD + k) + gates[2] * m.mixed(i, k);
#endif
            m.to_inward(0, m.now(SCALAR));
        }
        if (PAINN || last) {
            STAGE(GATE);
            m.meet();
            m.inward<1>(w_next, last ? H : F);
        }
        if (last) break;
#if PAINN
        m.take(w_gates);
        STAGE(EXCHANGE);
        m.receive_hidden(i + 1, 1, OF_HIDDEN_GATE);
        STAGE(GATE);
        m.outward<3, F>(w_gates, m.x);
        float sent[3];
        if (mine) EACH(k, 3) sent[k] = m.kept(i + 1, XS + k) = m.product(k, a) + m.constant(i + 1, OF_SENT + k * C + o);
#else
        float sent[3] = {0.f, 0.f, 1.f};
        if (mine) sent[0] = m.kept(i + 1, XS) = m.now(SCALAR);
#endif
        float vector[3];
        if (mine) EACH(k, 3) vector[k] = sent[2] * (m.kept(i + 1, VS + k) = m.now(VECTOR + k));
        if (PAINN) m.send_second(sent[1]);
        m.send(sent[0], vector);
    }
    STAGE(READOUT);
#if H2
    float w_second[H / 16 * (H2 / 16)], w_second_bar[H / 16 * (H2 / 16)];
    m.take<true>(w_second), m.take<true>(w_second_bar);
    m.readout(energies, w_second, w_second_bar);
#else
    m.readout(energies);
#endif
    if (block() == 0 && thread() == 0) launches = m.launched + 1;  // each block has read it, or none of these words were here
#if BACK
    float w_read[H / 16];
    m.take<true>(w_read), m.take<true>(w_in);
    m.outward<1, H>(w_read, m.x);
    if (mine) {
        m.now(SCALAR) = m.product(0, a);
        EACH(k, 3) m.now(VECTOR + k) = 0.f;
        m.above(LAYERS - 1);
    }
    m.meet();
    m.inward<3>(w_in, F);
    ONE_BY_ONE for (int i = LAYERS - 1; i >= 0; i--) {
        float sums[SENT];
        m.take(w_above);
        STAGE(EXCHANGE);
        m.receive_hidden_bar(i, 0);
        STAGE(UPDATE_BACK);
        m.outward<2, F>(w_above, m.x);
#if PAINN
        m.begin_vectors();
        if (mine) {
            float epsilon = m.constants[OF_EPSILON], norm = square_root(m.inner(i, VV, VV) + epsilon * epsilon);
            float along = m.now(SCALAR) * m.kept(i, GATES), factor = norm > 0.f ? m.product(1, a) * reciprocal(norm) : 0.f;
            m.now(SCALAR) += m.product(0, a);
            float uv[3], vv[3];
            EACH(k, 3) uv[k] = along * m.kept(i, VV + k) + m.kept(i, GATES + 1) * m.now(VECTOR + k);
            EACH(k, 3) vv[k] = along * m.kept(i, UV + k) + factor * m.kept(i, VV + k);
            m.send_vector(0, uv), m.send_vector(1, vv);
        }
        m.take(w_above);
        STAGE(EXCHANGE);
        m.receive_vectors<2>();
        STAGE(VECTORS_BACK);
        m.outward_vectors<true>(w_above);
        if (mine) EACH(k, 3) m.now(VECTOR + k) += m.product(k, a);
#else
        if (mine) {
            float norm = square_root(m.inner(i, HEARD, HEARD)), factor = norm > 0.f ? m.product(1, a) * reciprocal(norm) : 0.f, bar[3];
            m.now(SCALAR) += m.product(0, a);
            EACH(k, 3) bar[k] = factor * m.kept(i, HEARD + k) + m.kept(i, GATES) * m.now(VECTOR + k) + m.kept(i, GATES + 1) * m.mixed_bar(i, k);
            EACH(k, 3) m.now(VECTOR + k) = bar[k];
        }
#endif
        float scalar, vector[3];
        if (mine) {
            scalar = m.now(SCALAR);
            EACH(k, 3) vector[k] = m.now(VECTOR + k);
        }
        m.send(scalar, vector);
        if (i == 0) break;
        m.take(w_in);
        STAGE(MESSAGE_BACK);
        m.hear(i, sums);
#if PAINN
        if (mine) {
            float factor = m.kept(i, XV), along = 0.f;
            EACH(k, 3) along += sums[1 + k] * m.kept(i, VS + k), m.now(VECTOR + k) += factor * sums[1 + k];
            m.to_inward(0, sums[0]), m.to_inward(1, sums[SENT - 1]), m.to_inward(2, along);
        }
        STAGE(GATE_BACK);
        m.meet();
        m.inward<3>(w_in, F);
        float w_scalar[P];
        m.take(w_scalar), m.take(w_in);
        STAGE(EXCHANGE);
        m.receive_hidden_bar(i, 1);
        STAGE(UPDATE_BACK);
        m.outward<1, F>(w_scalar, m.x);
        if (mine) m.now(SCALAR) += m.product(0, a), m.above(i - 1);
#else
        STAGE(UPDATE_BACK);
        if (mine) {
            m.now(SCALAR) += sums[0];
            EACH(k, 3) m.now(VECTOR + k) += sums[1 + k];
            m.above(i - 1);
        }
#endif
        m.meet();
        m.inward<3>(w_in, F);
    }
    STAGE(MESSAGE_BACK);
    barrier_wait(m.heard_there, m.messages & 1);
    STAGE(PAIRS_BACK);
    m.end(bars);
#endif
    STAGE(END);
    if (block() == 0 && thread() == 0) finished = m.launched + 1;
}
