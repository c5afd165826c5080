// Energies of one molecule of N atoms, and their gradients, in one kernel: the phases of jaxff.kernels.painn or
// jaxff.kernels.student and their messages, as jaxff.kernels.message has them.
//
// F / C blocks, each with C channels, serve a group of A atoms. All blocks run at once (a cooperative launch) and hand on
// what others need in words of three numbers and a tag, which are written and read as a whole: who needs a word reads it
// until its tag is that of this launch and stage. Places of words are used by turns: a block writes a place again only after
// it received what its readers sent after they had read it. More than half of the multiprocessors have a block (some of them
// idle), and room for no other: a launch can't begin before the one before it is known to have begun.
// THREADS threads do this: two share a hidden channel (h, half), 16 a channel of the block's (o, l), of which PARTS share an
// atom (a). MAKERS more make the filters of all layers meanwhile, and one asks for the matrices, RING chunks ahead.
// Defined from outside: N, A, PAINN, LAYERS, F, H and H2 (the readout's hidden channels; H2 is 0 where it has one layer of
// them), MAKERS, RING, BLOCKS (of as many groups as find room), TABLES(x) (x(0) x(1) ...: one a layer), BACK (whether gradients
// are wanted), POSITIONS (whether of positions, by which the gradients are then, or of pairs' places in tables).
#define C 16
#define P (F / C)
#define THREADS 256  // that exchange and multiply
#define CHUNK 2      // float4 of each thread's that a copy brings
#define GROUPS ((N + A - 1) / A)
#define PAIRS (A * N)        // of a group
#define PITCH (PAIRS | 1)    // from one channel's pairs to the next
#define PARTS (A == 1 ? 16 : A == 2 ? 8 : 4)  // up to three atoms, as a word has three numbers
#define SENT (4 + PAINN)  // rows that an atom sends: a, b of PaiNN, y
#define Y (1 + PAINN)     // the place of y
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)
#define ONE_BY_ONE _Pragma("unroll 1")
#define ROUNDS(i) _Pragma("unroll 4") for (int i = 0; i < (N + PARTS - 1) / PARTS; i++)  // of senders

// what a block's channels keep of each layer
#if PAINN
enum { XS, XU, XV, VS, UV = VS + 3, VV = UV + 3, GATES = VV + 3, ROWS = GATES + 2 };
#define HIDDEN 2  // rows of hidden channels of which slopes are kept: the update's, the gate's
#else
enum { XS, VS, HEARD = VS + 3, GATES = HEARD + 3, ROWS = GATES + 2 };
#define HIDDEN 1
#endif
enum { SCALAR, VECTOR, SCALAR_BAR = VECTOR + 3, VECTOR_BAR, NOW = VECTOR_BAR + 3 };  // and of the atom as it is now

// constants of a block, by layers: biases of hidden rows and of its own channels (update, and the gate that sends into a layer)
#define OF_UPDATE 0
#define OF_GATES F
#define OF_HIDDEN_GATE (F + 3 * C)
#define OF_SENT (2 * F + 3 * C)
#define OF_LAYER (2 * F + 6 * C)
#define OF_READ (LAYERS * OF_LAYER)
#define OF_SECOND (OF_READ + H)
#define OF_FINAL (OF_SECOND + H2)
#define OF_MIXING (OF_FINAL + (H2 ? H2 : H))  // of the student, 9 a layer
#define OF_EPSILON (OF_MIXING + 9 * LAYERS)  // of PaiNN
#define OF_SPACE (OF_EPSILON + 1)            // cutoff, intervals of a table, what is added to distances
#define CONSTANTS (OF_SPACE + 3)

#define BARRIERS (LAYERS + 2 * RING + LAYERS % 2)
#define PRODUCTS (H2 && H > 96 ? 8 : 6)  // of an atom and a channel, at most

#define SENT_WORDS (2 * A * C)
#define OF_SHARES 0  // two of each, by turns
#define OF_SOURCES (2 * F)
#define OF_VECTORS (OF_SOURCES + 2 * SENT_WORDS)
#define OF_GRADIENTS (OF_VECTORS + 2 * SENT_WORDS)  // of all atoms
#define OF_BLOCK ((OF_GRADIENTS + BLOCKS / P * A + 7) / 8 * 8)  // full lines of 128 bytes
__device__ alignas(128) uint4 exchange[BLOCKS * OF_BLOCK];
#define IDLE_LOOKS 1000  // some 0.5 ms
__device__ uint32 launches, finished;  // of all that are known to have begun, and to be ended

struct Molecule {
    const int g = block() / P, c = block() % P, h = thread() / 2, half = thread() % 2, o = thread() / 16, l = thread() % 16, a = min(l / PARTS, A - 1), part = l % PARTS;
    const bool mine = l < A * PARTS && part == 0;  // whether this thread keeps what atom a and channel o have
    uint32 launched, stage = 0;
    int shares_turn = 0, sources_turn = 0, vectors_turn = 0;
    int slot = 0, round = 0;  // of the ring of matrices
    float4 *x, *y, *directions, *gradients, *ring;
    uint64 *made_filters, *arrived, *drained;  // barriers of filters, and of chunks
    float *filters, *sources, *own, *slopes, *made, *constants, *energy_parts, *read_slopes;
    int* intervals;

    __device__ __forceinline__ explicit Molecule(float4* memory) {
        launched = latest(&launches);
        x = memory, y = x + 2 * A * F, directions = y + 3 * C, gradients = directions + PAIRS;
        ring = gradients + C / 2 * PAIRS, made_filters = (uint64*)(ring + RING * CHUNK * THREADS), arrived = made_filters + LAYERS, drained = arrived + RING;
        filters = (float*)(made_filters + BARRIERS), sources = filters + LAYERS * 6 * C * PITCH, own = sources + SENT * C * N;
        slopes = own + (LAYERS * ROWS + NOW) * A * C, made = slopes + LAYERS * HIDDEN * A * F, constants = made + PRODUCTS * A * C;
        energy_parts = constants + CONSTANTS, read_slopes = energy_parts + A * C, intervals = (int*)(read_slopes + A * H);
    }
    __device__ __forceinline__ int atom() const { return g * A + a; }
    __device__ __forceinline__ float& now(int row) const { return own[(row * A + a) * C + o]; }
    __device__ __forceinline__ float& kept(int layer, int row) const { return own[((NOW + layer * ROWS + row) * A + a) * C + o]; }
    __device__ __forceinline__ float& slope(int layer, int which, int atom) const { return slopes[((layer * HIDDEN + which) * A + atom) * F + h]; }
    __device__ __forceinline__ void to_inward(int row, float value) const { ((float*)y)[(row * C + o) * 4 + a] = value; }
    __device__ __forceinline__ float product(int which, int atom) const { return made[(which * A + atom) * C + o]; }
    __device__ __forceinline__ float constant(int layer, int offset) const { return constants[layer * OF_LAYER + offset]; }
    __device__ __forceinline__ uint32 tag() const { return launched * 128 + stage; }
    __device__ __forceinline__ uint4* words(int of, int offset) const { return exchange + (g * P + of) * OF_BLOCK + offset; }

    // --- filters ---

    __device__ __forceinline__ float* filters_of(int layer) const { return filters + layer * 6 * C * PITCH; }
    __device__ __forceinline__ float filter(int layer, int which, int pair) const { return filters_of(layer)[(2 * which * C + o) * PITCH + pair]; }
    __device__ __forceinline__ float filter_slope(int layer, int which, int pair) const { return filters_of(layer)[((2 * which + 1) * C + o) * PITCH + pair]; }
    // a layer's, and their slopes, 0 of pairs that don't count. table: [F / C, intervals, kinds, C] cubics
    __device__ __forceinline__ void make_filters(const float* table, int layer, int table_size) const {
        constexpr int STEP = MAKERS / C, NEEDED = (PAIRS + STEP - 1) / STEP, AT_ONCE = NEEDED < 7 ? NEEDED : 7;
        int kinds = layer ? 3 : 2, worker = (thread() - THREADS) / C;
        const float4* at = (const float4*)table + c * table_size * kinds * C + l;
        ONE_BY_ONE for (int first = worker; first < PAIRS; first += AT_ONCE * STEP) {
            float4 w[AT_ONCE][3];
            EACH(k, AT_ONCE) {
                int e = min(first + k * STEP, PAIRS - 1), row = intervals[e] * kinds;
                bool counts = directions[e].w >= 0.f;
                EACH(which, 3) w[k][which] = counts && which < kinds ? early(at + (row + which) * C) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            EACH(k, AT_ONCE) {
                int e = first + k * STEP;
                if (e < PAIRS) EACH(which, 3) if (which < kinds) {
                    float* to = filters_of(layer) + (2 * which * C + l) * PITCH + e;
                    float t = directions[e].w;
                    to[0] = cubic(w[k][which], t), to[C * PITCH] = cubic_slope(w[k][which], t);
                }
            }
        }
    }
    __device__ __forceinline__ void wait_for_filters(int layer) const { barrier_wait(made_filters + layer, 0); }

    // --- matrices ---

    // the stages' matrices for this block, in their order, by one thread
    __device__ __forceinline__ void carry(const float* matrices, int first, int count) const {
        const float4* from = (const float4*)matrices + c * count * CHUNK * THREADS;
        ONE_BY_ONE for (int k = first; k < first + count; k++, from += CHUNK * THREADS) {
            int at = k % RING;
            if (k >= RING) barrier_wait(drained + at, k / RING - 1 & 1);
            copy(ring + at * CHUNK * THREADS, from, CHUNK * THREADS * (int)sizeof(float4), arrived + at);
        }
    }
    // the next numbers of them, while other blocks' words are awaited
    template <int COUNT>
    __device__ __forceinline__ void take(float (&w)[COUNT]) {
        EACH(chunk, (COUNT + 4 * CHUNK - 1) / (4 * CHUNK)) {
            barrier_wait(arrived + slot, round & 1);
            EACH(i, CHUNK) if (4 * (CHUNK * chunk + i) < COUNT) {
                float4 four = ring[(slot * CHUNK + i) * THREADS + thread()];
                float numbers[4] = {four.x, four.y, four.z, four.w};
                EACH(k, 4) if (4 * (CHUNK * chunk + i) + k < COUNT) w[4 * (CHUNK * chunk + i) + k] = numbers[k];
            }
            barrier_arrive(drained + slot);
            if (++slot == RING) slot = 0, round++;
        }
    }
    // over LANES lanes side by side: a lane has the sum of x[lane() % COUNT] then
    template <int LANES, int COUNT>
    static __device__ __forceinline__ float spread(float (&x)[COUNT]) {
        static_assert(COUNT <= LANES && (COUNT & COUNT - 1) == 0, "a power of 2");
        EACH(step, 5) {
            int left = COUNT >> step >> 1;
            if (left > 0) {
                bool upper = lane() & left;
                EACH(i, COUNT / 2) if (i < left) {
                    float keep = upper ? x[left + i] : x[i], give = upper ? x[i] : x[left + i];
                    x[i] = keep + from_lane(give, left);
                }
            }
        }
        EACH(step, 5) if (1 << step >= COUNT && 1 << step < LANES) x[0] += from_lane(x[0], 1 << step);
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
            float4 four = x[l + 16 * m];
            float three[3] = {four.x, four.y, four.z};
            EACH(p, OUT) EACH(k, A) sums[p * A + k] += w[p * (K / 16) + m] * three[k];
        }
        store_products<16>(sums);
    }
    // rows of this block [IN C] times rows of a matrix: its share of the hidden channels, which others wait for. A
    // thread multiplies an eighth of the rows by four columns
    template <int IN>
    __device__ __forceinline__ void inward(const float (&w)[IN * C / 2], int width) {
        float sums[A][4] = {};
        EACH(i, IN * C / 8) {
            float4 four = y[thread() % 8 + 8 * i];
            float three[3] = {four.x, four.y, four.z};
            EACH(k, A) EACH(column, 4) sums[k][column] += w[4 * i + column] * three[k];
        }
        stage++, shares_turn ^= 1;
        EACH(k, A) spread<8>(sums[k]);
        int column = thread() / 8 * 4 + thread() % 4;
        if (column < width && thread() / 4 % 2 == 0) {
            float three[3] = {};
            EACH(k, A) three[k] = sums[k][0];
            put(words(c, OF_SHARES + shares_turn * F + column), three[0], three[1], three[2], tag());
        }
    }
    // those shares of all blocks of a group: x[K] = to_x(atom, sum)
    template <class ToX>
    __device__ __forceinline__ void receive_shares(int width, ToX to_x) {
        constexpr int OF = P < 2 ? 1 : P / 2;
        const uint4* from = words(half * OF % P, OF_SHARES + shares_turn * F + min(h, width - 1));
        Word w[OF];
        receive(w, tag(), [&](int k) { return from + k * OF_BLOCK; });
        float sums[3] = {}, three[3] = {};
        EACH(k, OF) sums[0] += w[k].x, sums[1] += w[k].y, sums[2] += w[k].z;
        EACH(k, A) {
            if (P > 1) sums[k] += from_lane(sums[k], 1);
            three[k] = to_x(k, sums[k]);
        }
        if (h < width && half == 0) x[h] = make_float4(three[0], three[1], three[2], 0.f);
    }
    // z of hidden channels: SiLU, whose slope is kept
    __device__ __forceinline__ void receive_hidden(int layer, int which, int bias) {
        float b = h < F ? constant(layer, bias + h) : 0.f;
        receive_shares(F, [&](int atom, float sum) {
            float z = sum + b, sigmoid = logistic(z);
            if (h < F && half == 0) slope(layer, which, atom) = silu_slope(z, sigmoid);
            return z * sigmoid;
        });
        sync_first<THREADS>();
    }
    __device__ __forceinline__ void receive_hidden_bar(int layer, int which) {
        receive_shares(F, [&](int atom, float sum) { return h < F && half == 0 ? sum * slope(layer, which, atom) : 0.f; });
        sync_first<THREADS>();
    }

    // --- vectors of all channels of a group's atoms ---

#if PAINN
    __device__ __forceinline__ void begin_vectors() { stage++, vectors_turn ^= 1; }
    __device__ __forceinline__ void send_vector(int which, const float (&v)[3]) const {
        put(words(c, OF_VECTORS + vectors_turn * SENT_WORDS + (which * A + a) * C + o), v[0], v[1], v[2], tag());
    }
    // x [WHICH, A, F], of three components
    template <int WHICH>
    __device__ __forceinline__ void receive_vectors() {
        constexpr int ALL = WHICH * A * F, EACH_TIME = (ALL + THREADS - 1) / THREADS;
        Word w[EACH_TIME];
        receive(w, tag(), [&](int k) {
            int i = min(thread() + k * THREADS, ALL - 1), of = i / (WHICH * A * C);
            return words(of, OF_VECTORS + vectors_turn * SENT_WORDS + i % (WHICH * A * C));
        });
        if (WHICH == 2) sync_first<THREADS>();  // x may still be read
        EACH(k, EACH_TIME) {
            int i = thread() + k * THREADS, of = i / (WHICH * A * C), row = i % (WHICH * A * C) / C;
            if (i < ALL) x[row * F + of * C + i % C] = make_float4(w[k].x, w[k].y, w[k].z, 0.f);
        }
        sync_first<THREADS>();
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
        return now(VECTOR_BAR) * kept(layer, v) + now(VECTOR_BAR + 1) * kept(layer, v + 1) + now(VECTOR_BAR + 2) * kept(layer, v + 2);
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
        EACH(j, 3) sum += constants[OF_MIXING + 9 * layer + 3 * j + k] * now(VECTOR_BAR + j);
        return sum;
    }
#endif
    // cotangents of the update's gates
    __device__ __forceinline__ void above(int layer) {
        float s_bar = now(SCALAR_BAR);
        to_inward(0, s_bar);
#if PAINN
        to_inward(1, s_bar * inner(layer, UV, VV)), to_inward(2, inner_bar(layer, UV));
#else
        float along = 0.f;
        EACH(k, 3) along += now(VECTOR_BAR + k) * mixed(layer, k);
        to_inward(1, inner_bar(layer, HEARD)), to_inward(2, along);
#endif
    }

    // --- messages ---

    // what atom a sends through channel o, as two words: five numbers, or four
    __device__ __forceinline__ void send(const float (&sent)[SENT]) {
        stage++, sources_turn ^= 1;
        if (mine) {
            uint4* to = words(c, OF_SOURCES + sources_turn * SENT_WORDS + a * C + o);
            put(to, sent[0], sent[1], sent[2], tag());
            put(to + A * C, sent[3], SENT > 4 ? sent[SENT - 1] : 0.f, 0.f, tag());
        }
    }
    __device__ __forceinline__ float& source(int row, int atom) const { return sources[(row * C + o) * N + atom]; }
    // of all atoms, through this block's channels
    __device__ __forceinline__ void receive_sources() {
        constexpr int all = GROUPS * SENT_WORDS, NEEDED = (all + THREADS - 1) / THREADS, AT_ONCE = NEEDED < 8 ? NEEDED : 8;
        ONE_BY_ONE for (int turn = 0; AT_ONCE * THREADS * turn < all; turn++) {
            const int first = thread() + AT_ONCE * THREADS * turn;
            Word w[AT_ONCE];
            receive(w, tag(), [&](int k) {
                int i = min(first + k * THREADS, all - 1);
                return exchange + (i / SENT_WORDS * P + c) * OF_BLOCK + OF_SOURCES + sources_turn * SENT_WORDS + i % SENT_WORDS;
            });
            EACH(k, AT_ONCE) {
                int i = first + k * THREADS, rest = i % SENT_WORDS, atom = i / SENT_WORDS * A + rest % (A * C) / C, later = rest / (A * C);
                if (i < all && atom < N) {
                    float* to = sources + (3 * later * C + rest % C) * N + atom;
                    to[0] = w[k].x;
                    if (3 * later + 1 < SENT) to[C * N] = w[k].y;
                    if (!later) to[2 * C * N] = w[k].z;
                }
            }
        }
        sync_first<THREADS>();
    }
    template <int COUNT>
    __device__ __forceinline__ void over_parts(float (&sums)[COUNT]) const {
        EACH(step, 4) if (1 << step < PARTS) EACH(k, COUNT) sums[k] += from_lane(sums[k], 1 << step);
    }
    // the sums of a message: one number, and three
    __device__ __forceinline__ void message(int layer, float (&sums)[4]) const {
        EACH(k, 4) sums[k] = 0.f;
        ROUNDS(round) {
            int j = part + round * PARTS, e = j * A + a;
            if (j < N) {
                float4 u = directions[e];
                float wb = filter(layer, 1, e) * (PAINN ? source(PAINN, j) : 1.f);
                sums[0] += filter(layer, 0, e) * source(0, j), sums[1] += u.x * wb, sums[2] += u.y * wb, sums[3] += u.z * wb;
                if (layer > 0) {
                    float wc = filter(layer, 2, e);
                    EACH(axis, 3) sums[1 + axis] += wc * source(Y + axis, j);
                }
            }
        }
        over_parts(sums);
    }
    // of its transpose: a, b of PaiNN, y; and the gradients of this block's pairs grow
    __device__ __forceinline__ void message_transpose(int layer, float (&sums)[5]) const {
        EACH(k, 5) sums[k] = 0.f;
        float xs = kept(layer, XS), xu = 1.f, ys[3] = {};
#if PAINN
        xu = kept(layer, XU);
#endif
        if (layer > 0) EACH(k, 3) ys[k] = (PAINN ? kept(layer, XS + 2 * PAINN) : 1.f) * kept(layer, VS + k);
        ROUNDS(round) {
            bool more = part + round * PARTS < N;
            int j = min(part + round * PARTS, N - 1), e = j * A + a;
            float4 u = directions[e];
            float p = source(0, j), q[3] = {source(1, j), source(2, j), source(3, j)};
            float wa = filter(layer, 0, e), wb = filter(layer, 1, e), wc = layer > 0 ? filter(layer, 2, e) : 0.f;
            float slope_a = filter_slope(layer, 0, e), slope_b = filter_slope(layer, 1, e), slope_c = layer > 0 ? filter_slope(layer, 2, e) : 0.f;
            float along = u.x * q[0] + u.y * q[1] + u.z * q[2], bw = xu * wb;
            float d[4] = {xs * p * slope_a - xu * along * slope_b + (ys[0] * q[0] + ys[1] * q[1] + ys[2] * q[2]) * slope_c, bw * q[0], bw * q[1], bw * q[2]};
            if (more) {
                sums[0] += wa * p, sums[1] -= along * wb;
                EACH(axis, 3) sums[2 + axis] += wc * q[axis];
            }
            // of both channels of the warp, half of it each
            bool upper = lane() & 16;
            float give[2] = {upper ? d[0] : d[2], upper ? d[1] : d[3]}, keep[2] = {upper ? d[2] : d[0], upper ? d[3] : d[1]};
            EACH(axis, 2) keep[axis] += from_lane(give[axis], 16);
            if (more && l < A * PARTS) {
                float* to = (float*)(gradients + warp() * PAIRS + e) + (upper ? 2 : 0);
                EACH(axis, 2) to[axis] = layer == LAYERS - 1 ? keep[axis] : to[axis] + keep[axis];
            }
        }
        over_parts(sums);
    }

    // --- the beginning and the end ---

    // of a pair's vector
    struct Space {
        float cutoff, intervals, epsilon;
        __device__ __forceinline__ explicit Space(const float* constants) : cutoff(constants[OF_SPACE]), intervals(constants[OF_SPACE + 1]), epsilon(constants[OF_SPACE + 2]) {}
    };
#if POSITIONS
    // directions of pairs and places in tables, t < 0 where a pair doesn't count; e = sender A + receiver
    __device__ __forceinline__ void read_pairs(const float* positions, const unsigned char* mask, const float* of_blocks) const {
        Space space(of_blocks);
        for (int e = thread() - THREADS; e < PAIRS; e += MAKERS) {
            int i = min(g * A + e % A, N - 1), j = e / A;
            float r[3], square = 0.f;
            bool counts = mask[i * N + j] && g * A + e % A < N;
            EACH(k, 3) r[k] = positions[3 * j + k] - positions[3 * i + k], square += r[k] * r[k];
            float d = root(square), factor = d > 0.f ? 1.f / (d + space.epsilon) : 0.f, place = min(d, space.cutoff) * (space.intervals / space.cutoff);
            int interval = min((int)place, (int)space.intervals - 1);
            counts = counts && d <= space.cutoff;
            directions[e] = counts ? make_float4(factor * r[0], factor * r[1], factor * r[2], place - (float)interval) : make_float4(0.f, 0.f, 0.f, -1.f);
            intervals[e] = interval;
        }
        sync_others<MAKERS>();
    }
#else
    // directions of pairs and places in tables, t < 0 where a pair doesn't count; e = sender A + receiver
    __device__ __forceinline__ void read_pairs(const float* places) const {
        for (int e = thread() - THREADS; e < PAIRS; e += MAKERS) {
            int i = min(g * A + e % A, N - 1), all = N * N;
            const float* at = places + i * N + e / A;
            float t = at[0], mask = at[all], ux = at[2 * all], uy = at[3 * all], uz = at[4 * all], interval = at[5 * all];
            bool counts = mask > 0.f && g * A + e % A < N;
            directions[e] = counts ? make_float4(ux, uy, uz, t) : make_float4(0.f, 0.f, 0.f, -1.f);
            intervals[e] = (int)interval;
        }
        sync_others<MAKERS>();
    }
#endif
    // what elements give: what atoms send before they heard of each other
    __device__ __forceinline__ void begin(const float* of_blocks, const int* atom_numbers, const float* of_elements) {
        constexpr int EACH_TIME = (CONSTANTS + THREADS - 1) / THREADS, ELEMENT = (1 + 2 * PAINN) * F, AT_ONCE = 4;
        float some[EACH_TIME];
        EACH(k, EACH_TIME) some[k] = of_blocks[c * CONSTANTS + min(thread() + k * THREADS, CONSTANTS - 1)];
        int number = atom_numbers[min(atom(), N - 1)];
        ONE_BY_ONE for (int first = o; first < N; first += AT_ONCE * C) {
            const float* at[AT_ONCE];
            float sent[AT_ONCE][1 + PAINN];
            EACH(k, AT_ONCE) at[k] = of_elements + atom_numbers[min(first + k * C, N - 1)] * ELEMENT + c * C + l;
            EACH(k, AT_ONCE) EACH(row, 1 + PAINN) sent[k][row] = at[k][row * F];
            EACH(k, AT_ONCE) EACH(row, 1 + PAINN) if (first + k * C < N) sources[(row * C + l) * N + first + k * C] = sent[k][row];
        }
        const float* at = of_elements + number * ELEMENT + c * C + o;
        float sent = at[0], second = at[PAINN * F], scalar = at[2 * PAINN * F];
        EACH(k, EACH_TIME) if (thread() + k * THREADS < CONSTANTS) constants[thread() + k * THREADS] = some[k];
        for (int k = thread(); k < 3 * C; k += THREADS) y[k] = make_float4(0.f, 0.f, 0.f, 0.f);
        if (mine) {
            kept(0, XS) = sent, now(SCALAR) = scalar;
            if (PAINN) kept(0, XS + 1) = second;
            EACH(k, 3) now(VECTOR + k) = now(VECTOR_BAR + k) = 0.f;
        }
        sync_first<THREADS>();
    }
#if POSITIONS
    // gradients by positions [N, 3]: each block's of all atoms, of which a warp somewhere adds those of an atom up
    __device__ __forceinline__ void end(float* position_bars) {
        Space space(constants);
        float an_angstrom = space.intervals / space.cutoff;
        sync_first<THREADS>();
        for (int e = thread(); e < PAIRS; e += THREADS) {
            float4 sum = gradients[e], u = directions[e];
            EACH(k, C / 2 - 1) {
                float4 more = gradients[(k + 1) * PAIRS + e];
                sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
            }
            float d = (u.w + (float)intervals[e]) * (space.cutoff / space.intervals), along = u.x * sum.y + u.y * sum.z + u.z * sum.w;
            float t = u.w >= 0.f && d > 0.f ? reciprocal(d + space.epsilon) : 0.f, radial = u.w >= 0.f ? sum.x * an_angstrom + t * along : 0.f;
            gradients[e] = make_float4(t * sum.y - radial * u.x, t * sum.z - radial * u.y, t * sum.w - radial * u.z, 0.f);
        }
        sync_first<THREADS>();
        stage++;
        if (warp() < A) {  // an own atom's: of what it sends, and of what is sent to it
            float sums[3] = {};
            for (int j = lane(); j < N; j += 32) add(sums, 1.f, j * A + warp());
            if (lane() < A && g * A + warp() < N) add(sums, -1.f, (g * A + warp()) * A + lane());
            over_warp(sums);
            if (lane() == 0 && g * A + warp() < N) put(words(c, OF_GRADIENTS + g * A + warp()), sums[0], sums[1], sums[2], tag());
        }
        for (int j = THREADS - 1 - thread(); j < N; j += THREADS) if (j / A != g) {
            float sums[3] = {};
            EACH(k, A) add(sums, -1.f, j * A + k);
            put(words(c, OF_GRADIENTS + j), sums[0], sums[1], sums[2], tag());
        }
        ONE_BY_ONE for (int atom = block() + GROUPS * P * warp(); atom < N; atom += GROUPS * P * (THREADS / 32)) {
            constexpr int EACH_LANE = (GROUPS * P + 31) / 32;
            Word word[EACH_LANE];
            receive(word, tag(), [&](int k) { return exchange + min(lane() + 32 * k, GROUPS * P - 1) * OF_BLOCK + OF_GRADIENTS + atom; });
            float sums[3] = {};
            EACH(k, EACH_LANE) if (lane() + 32 * k < GROUPS * P) sums[0] += word[k].x, sums[1] += word[k].y, sums[2] += word[k].z;
            over_warp(sums);
            if (lane() < 3) position_bars[3 * atom + lane()] = lane() == 0 ? sums[0] : lane() == 1 ? sums[1] : sums[2];
        }
    }
    __device__ __forceinline__ void add(float (&sums)[3], float factor, int pair) const {
        float4 more = gradients[pair];
        sums[0] += factor * more.x, sums[1] += factor * more.y, sums[2] += factor * more.z;
    }
    static __device__ __forceinline__ void over_warp(float (&sums)[3]) {
        EACH(step, 5) EACH(k, 3) sums[k] += from_lane(sums[k], 1 << step);
    }
#else
    // what i sends to j gives [D, U_xyz] of this block's channels
    __device__ __forceinline__ void end(float* pair_bars) const {
        sync_first<THREADS>();
        for (int e = thread(); e < PAIRS; e += THREADS) {
            float4 sum = gradients[e];
            EACH(k, C / 2 - 1) {
                float4 more = gradients[(k + 1) * PAIRS + e];
                sum = make_float4(sum.x + more.x, sum.y + more.y, sum.z + more.z, sum.w + more.w);
            }
            int i = g * A + e % A, all = N * N;
            float* to = pair_bars + c * 4 * all + i * N + e / A;
            if (i < N) to[0] = sum.x, to[all] = sum.y, to[2 * all] = sum.z, to[3 * all] = sum.w;
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

#define TABLE_ARGUMENT(k) const float *__restrict__ table##k,
#define TABLE_AT(k) layer == k ? table##k :

extern "C" __global__ void __launch_bounds__(THREADS + MAKERS + 32, 1) one(TABLES(TABLE_ARGUMENT) const float* of_blocks, const int* numbers, const float* of_elements, const float* forward,
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
    if (thread() == THREADS + MAKERS) {
        EACH(k, LAYERS) barrier_init(m.made_filters + k, MAKERS / 32);
        EACH(k, RING) barrier_init(m.arrived + k, 1), barrier_init(m.drained + k, THREADS / 32);
        barriers_made();
    }
    sync();
    ready(of_blocks);
    if (thread() >= THREADS + MAKERS) {
        if (thread() == THREADS + MAKERS) {
            m.carry(forward, 0, of_forward);
#if BACK
            m.carry(backward, of_forward, of_backward);
#endif
        }
        return;
    }
    if (thread() >= THREADS) {
#if POSITIONS
        m.read_pairs(positions, mask, of_blocks);
#else
        m.read_pairs(places);
#endif
        ONE_BY_ONE for (int layer = 0; layer < LAYERS; layer++) {
            m.make_filters(TABLES(TABLE_AT) nullptr, layer, (int)of_blocks[OF_SPACE + 1]);
            barrier_arrive(m.made_filters + layer);
        }
        return;
    }
    const int a = m.a, o = m.o;
    const bool mine = m.mine;
    float w_in[3 * C / 2], w_gates[3 * P], w_above[2 * P];
    BEGIN_STAGES;
    STAGE(PAIRS);
    m.begin(of_blocks, numbers, of_elements);
    ONE_BY_ONE for (int i = 0; i < LAYERS; i++) {
        const bool last = i == LAYERS - 1;
        float sums[4], w_norm[C], w_next[C / 2], sent[SENT] = {};
#if PAINN
        m.take(w_above);
#endif
        m.take(w_norm);
        STAGE(EXCHANGE);
        if (i > 0) m.receive_sources();
        STAGE(FILTERS);
        m.wait_for_filters(i);
        STAGE(MESSAGE);
        m.message(i, sums);
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
        sync_first<THREADS>();
        m.inward<2>(w_norm, F);
        m.take(w_gates);
        if (PAINN || last) m.take(w_next);
        STAGE(EXCHANGE);
        m.receive_hidden(i, 0, OF_UPDATE);
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
            sync_first<THREADS>();
            m.inward<1>(w_next, last ? H : F);
        }
        if (last) break;
#if PAINN
        m.take(w_gates);
        STAGE(EXCHANGE);
        m.receive_hidden(i + 1, 1, OF_HIDDEN_GATE);
        STAGE(GATE);
        m.outward<3, F>(w_gates, m.x);
        if (mine) EACH(k, 3) sent[k] = m.kept(i + 1, XS + k) = m.product(k, a) + m.constant(i + 1, OF_SENT + k * C + o);
        float factor = sent[2];
#else
        if (mine) sent[0] = m.kept(i + 1, XS) = m.now(SCALAR);
        float factor = 1.f;
#endif
        if (mine) EACH(k, 3) sent[Y + k] = factor * (m.kept(i + 1, VS + k) = m.now(VECTOR + k));
        m.send(sent);
    }
    STAGE(READOUT);
#if H2
    float w_second[H / 16 * (H2 / 16)], w_second_bar[H / 16 * (H2 / 16)];
    m.take(w_second), m.take(w_second_bar);
    m.readout(energies, w_second, w_second_bar);
#else
    m.readout(energies);
#endif
    if (block() == 0 && thread() == 0) launches = m.launched + 1;  // each block has read it, or none of these words were here
#if BACK
    float w_read[H / 16];
    m.take(w_read), m.take(w_in);
    m.outward<1, H>(w_read, m.x);
    if (mine) m.now(SCALAR_BAR) = m.product(0, a), m.above(LAYERS - 1);
    sync_first<THREADS>();
    m.inward<3>(w_in, F);
    ONE_BY_ONE for (int i = LAYERS - 1; i >= 0; i--) {
        float sums[5], sent[SENT] = {};
        m.take(w_above);
        STAGE(EXCHANGE);
        m.receive_hidden_bar(i, 0);
        STAGE(UPDATE_BACK);
        m.outward<2, F>(w_above, m.x);
#if PAINN
        m.begin_vectors();
        if (mine) {
            float epsilon = m.constants[OF_EPSILON], norm = square_root(m.inner(i, VV, VV) + epsilon * epsilon);
            float along = m.now(SCALAR_BAR) * m.kept(i, GATES), factor = norm > 0.f ? m.product(1, a) * reciprocal(norm) : 0.f;
            m.now(SCALAR_BAR) += m.product(0, a);
            float uv[3], vv[3];
            EACH(k, 3) uv[k] = along * m.kept(i, VV + k) + m.kept(i, GATES + 1) * m.now(VECTOR_BAR + k);
            EACH(k, 3) vv[k] = along * m.kept(i, UV + k) + factor * m.kept(i, VV + k);
            m.send_vector(0, uv), m.send_vector(1, vv);
        }
        m.take(w_above);
        STAGE(EXCHANGE);
        m.receive_vectors<2>();
        STAGE(VECTORS_BACK);
        m.outward_vectors<true>(w_above);
        if (mine) EACH(k, 3) m.now(VECTOR_BAR + k) += m.product(k, a);
#else
        if (mine) {
            float norm = square_root(m.inner(i, HEARD, HEARD)), factor = norm > 0.f ? m.product(1, a) * reciprocal(norm) : 0.f, bar[3];
            m.now(SCALAR_BAR) += m.product(0, a);
            EACH(k, 3) bar[k] = factor * m.kept(i, HEARD + k) + m.kept(i, GATES) * m.now(VECTOR_BAR + k) + m.kept(i, GATES + 1) * m.mixed_bar(i, k);
            EACH(k, 3) m.now(VECTOR_BAR + k) = bar[k];
        }
#endif
        if (mine) {
            sent[0] = m.now(SCALAR_BAR);
            EACH(k, 3) sent[1 + k] = m.now(VECTOR_BAR + k);
        }
        m.send(sent);
        if (i > 0) m.take(w_in);
        STAGE(EXCHANGE);
        m.receive_sources();
        STAGE(MESSAGE_BACK);
        m.message_transpose(i, sums);
        if (i == 0) break;
#if PAINN
        if (mine) {
            float factor = m.kept(i, XV), along = 0.f;
            EACH(k, 3) along += sums[2 + k] * m.kept(i, VS + k), m.now(VECTOR_BAR + k) += factor * sums[2 + k];
            m.to_inward(0, sums[0]), m.to_inward(1, sums[1]), m.to_inward(2, along);
        }
        STAGE(GATE_BACK);
        sync_first<THREADS>();
        m.inward<3>(w_in, F);
        float w_scalar[P];
        m.take(w_scalar), m.take(w_in);
        STAGE(EXCHANGE);
        m.receive_hidden_bar(i, 1);
        STAGE(UPDATE_BACK);
        m.outward<1, F>(w_scalar, m.x);
        if (mine) m.now(SCALAR_BAR) += m.product(0, a), m.above(i - 1);
#else
        STAGE(UPDATE_BACK);
        if (mine) {
            m.now(SCALAR_BAR) += sums[0];
            EACH(k, 3) m.now(VECTOR_BAR + k) += sums[2 + k];
            m.above(i - 1);
        }
#endif
        sync_first<THREADS>();
        m.inward<3>(w_in, F);
    }
    STAGE(PAIRS_BACK);
    m.end(bars);
#endif
    STAGE(END);
    if (block() == 0 && thread() == 0) finished = m.launched + 1;
}
