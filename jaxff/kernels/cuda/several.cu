// Energies of several molecules of N atoms, and gradients by their positions, in one kernel: PaiNN's phases (jaxff.kernels.painn)
// and their messages, as jaxff.kernels.message has them.
//
// P blocks, each with C channels of all atoms, serve a molecule: products over channels pass between them, messages don't. All
// blocks run at once (a cooperative launch) and hand on what others need in words of four channels and a tag, which are
// written and read as a whole: who needs a word reads it until its tag is that of this launch and turn. Places of words are
// used by turns: a block writes a place again only after it received what its readers sent after they had read it. More than
// half of the multiprocessors have a block (some of them idle), and room for no other.
// Thread 16 a + o keeps what atom a and channel o of the block's have. Where a product makes more rows than it takes, blocks
// send what they have and multiply by columns of the matrix (`Gathered`); else they multiply by rows of it, and send shares of
// what others sum (`Scattered`). Products are of the tensor cores, as in tiles.cu: rows times a power of 2 for each two atoms,
// matrices times a power of 2, both as sums of two halves. Matrices come into shared memory in chunks, which the last warp asks
// for as soon as all have read those before.
// Filters of the distance are W_c(r) = sum_k B_k(r) C_kc with few functions B, the same in all layers (larger.py). A block
// makes those of its channels once for both ends of each pair; pair e = j (j - 1) / 2 + i has the atoms i < j. Then two warps
// sum those of three atoms: lane 8 part + k has channels 2 k and 2 k + 1 of every eighth sender.
// Defined from outside: N, LAYERS, F, H (the readout's hidden channels), FUNCTIONS (of the distance; a multiple of 4), BLOCKS
// (of as many molecules as find room), BACK (whether gradients are wanted).
#define C 16
#define P (F / C)
#define WARPS 16
#define THREADS (32 * WARPS)
#define PAIRS (N * (N - 1) / 2)
#define TILES (PAIRS / 16 + 1)  // of 16 pairs
#define NONE PAIRS              // the pair of an atom and itself, which doesn't count
#define ALL (16 * TILES)
#define FULL ((FUNCTIONS + 7) / 16)       // products of 16 functions,
#define REST (FUNCTIONS > 16 * FULL)      // and one of 8
#define OF_TILE (FULL * 64 + REST * 32)   // B of a tile, or its slopes: words of 16 bytes
#define STEPS ((FUNCTIONS + 15) / 16)     // of C as it comes; as it is kept, OF_TILE words a filter
#define QUADS (F / 4)
#define TRIPLES ((N + 2) / 3)
#define ROUNDS ((N + 7) / 8)  // of eight senders, of which each half has four
static_assert(5 * LAYERS + 16 < 256, "eight bits");
static_assert(2 * TRIPLES <= WARPS, "two warps a triple");
#define SCALARS ((N + 15) / 16)      // tiles of 16 rows: of a number an atom,
#define VECTORS ((3 * N + 15) / 16)  // of three
#define CHUNK THREADS  // words of 16 bytes of a matrix that come at once
#define OF_CHUNK (CHUNK / 32)  // steps of a product that a chunk serves
#define RING 4                 // chunks on their way
#define EACH(i, n) _Pragma("unroll") for (int i = 0; i < (n); i++)
#define ONE_BY_ONE _Pragma("unroll 1")

// what a thread keeps of each layer: the vector's factor, v that was sent, slopes of the gate's hidden channels, which the first
// layer does without; what else was sent, the update's vectors, two gates, slopes of the update's hidden channels
enum { XV, VS, OF_GATE = VS + 3, LATER, XS = LATER, XU, UV, VV = UV + 3, GATES = VV + 3, OF_UPDATE = GATES + 2, ROWS };
// what a message hears of: y; on the way back cotangents of s and v, and y
enum { Y, S_BAR = 3, V_BAR, SENT = V_BAR + 3 };
#define HEARD (4 + BACK)

// constants of a block's channels, by layers: the update's biases, and those of the gate that sends into a layer
#define HIDDEN_BIAS 0
#define GATE_BIAS C
#define HIDDEN_GATE_BIAS (4 * C)
#define SENT_BIAS (5 * C)
#define OF_LAYER (8 * C)
#define OF_READ (LAYERS * OF_LAYER)  // all of the readout's biases, and its last weights
#define OF_SPACE (OF_READ + 2 * H)   // the norm's epsilon, cutoff, intervals of the table
#define OF_SCALES (OF_SPACE + 3)     // factors that undo those of B and C, by layers; of B's slopes, and its inverse
#define OF_FACTORS (OF_SCALES + LAYERS + 2)  // likewise of matrices
#define CONSTANTS (OF_FACTORS + 10 * LAYERS)

// kinds of exchanges, each with places of its own: of all blocks' rows, one or three an atom, or of shares of as many. Words of two
// atoms fill a line of 128 bytes
enum { ROW, ROWS_OF_VECTORS, SHARES, SHARES_OF_VECTORS, KINDS };
#define EVEN ((N + 1) / 2 * 2)
__device__ constexpr int words_of(int kind) { return (kind % 2 ? 3 : 1) * EVEN * (kind < SHARES ? C : F) / 4; }
__device__ constexpr int place_of_kind(int kind) { return kind == 0 ? 0 : place_of_kind(kind - 1) + 2 * words_of(kind - 1); }
// of a launch
__device__ constexpr int exchanges_of(int kind) {
    return kind == ROW ? 2 * LAYERS + BACK * LAYERS : kind == ROWS_OF_VECTORS ? LAYERS : kind == SHARES ? 2 * LAYERS - 1 + BACK * (3 * LAYERS - 2) : BACK * LAYERS;
}
#define OF_GRADIENTS place_of_kind(KINDS)
#define OF_BLOCK ((OF_GRADIENTS + N + 7) / 8 * 8)
__device__ alignas(128) uint4 exchange[BLOCKS * OF_BLOCK];
#define IDLE_LOOKS 1000  // some 0.5 ms
__device__ uint32 launches[BLOCKS / P], finished[BLOCKS / P];  // of a molecule: known to have begun, and to be ended

// words of a row of KS times 16 halves in shared memory: eight of them lie in banks of their own
__device__ constexpr int row_width(int ks) { return 8 * ks + 4; }

// What all blocks sent, MT tiles of 16 rows and KS times 16 columns, times NT times 8 columns of a matrix: a warp has one of
// MPARTS parts of the rows, NPARTS of the columns and KPARTS of the sums. LOW: whether what is made begins before `made`.
template <int MT, int NT, int KS, int MPARTS, int NPARTS, int KPARTS, bool LOW = false>
struct Gathered {
    static constexpr int EACH_K = (KS + KPARTS - 1) / KPARTS, EACH_M = (MT + MPARTS - 1) / MPARTS, EACH_N = NT / NPARTS, WIDTH = 8 * NT + 8;
    static constexpr bool IS_LOW = LOW;
    static constexpr int ROW = row_width(KS), PART = 16 * MT * ROW;
    static constexpr int MADE = KPARTS * MT * 16 * WIDTH, CHUNKS = (NT * KS * 32 + CHUNK - 1) / CHUNK;
    static constexpr int EACH_CHUNK = (EACH_N * KS + OF_CHUNK - 1) / OF_CHUNK;  // that a warp's columns are in
    static_assert(MPARTS * NPARTS * KPARTS <= WARPS && NT % NPARTS == 0 && OF_CHUNK % KS == 0 && (EACH_CHUNK * OF_CHUNK) % (EACH_N * KS) == 0, "a warp each");
    uint4 w[EACH_N][EACH_K];
    // this warp's part of the matrix; all have theirs when they have met
    template <class Matrices>
    __device__ __forceinline__ void take(int warp, int lane, const Matrices& matrices) {
        int first = warp % NPARTS * EACH_N * KS, k_part = warp / (NPARTS * MPARTS);
        if (k_part >= KPARTS) return;
        EACH(chunk, EACH_CHUNK) matrices.await(first / OF_CHUNK + chunk);
        EACH(n, EACH_N) {
            const uint4* column = matrices.step((first + n * KS) / OF_CHUNK, (first + n * KS) % OF_CHUNK + k_part * EACH_K) + lane;
            EACH(k, EACH_K) if (KS % KPARTS == 0 || k_part * EACH_K + k < KS) w[n][k] = column[32 * k];
        }
    }
    __device__ __forceinline__ void run(int warp, int lane, const uint32* rows, float* made) const {
        int first = warp % NPARTS * EACH_N, m_part = warp / NPARTS % MPARTS, k_part = warp / (NPARTS * MPARTS);
        if (k_part >= KPARTS) return;
        float sums[3][EACH_M][EACH_N][4] = {};  // of each of three products, so that none waits for another
        const uint32* own = rows + (m_part * 16 + lane % 16) * ROW + lane / 16 * 4 + 8 * EACH_K * k_part;
        EACH(k, EACH_K) if (KS % KPARTS == 0 || k_part * EACH_K + k < KS) EACH(m, EACH_M) {
            int tile = m_part + MPARTS * m;
            if (MT % MPARTS && tile >= MT) continue;
            uint32 high[4], low[4];
            load_a_at(high, own + m * MPARTS * 16 * ROW + 8 * k), load_a_at(low, own + PART + m * MPARTS * 16 * ROW + 8 * k);
            EACH(n, EACH_N) mma(sums[0][m][n], high, w[n][k].x, w[n][k].y);
            EACH(n, EACH_N) mma(sums[1][m][n], low, w[n][k].x, w[n][k].y);
            EACH(n, EACH_N) mma(sums[2][m][n], high, w[n][k].z, w[n][k].w);
        }
        EACH(m, EACH_M) {
            int tile = m_part + MPARTS * m;
            if (MT % MPARTS && tile >= MT) continue;
            EACH(r, 2) EACH(n, EACH_N) {
                float2* to = (float2*)(made + ((k_part * MT + tile) * 16 + lane / 4 + 8 * r) * WIDTH + 8 * (first + n)) + lane % 4;
                *to = make_float2(sum_of_three(sums, m, n, 2 * r), sum_of_three(sums, m, n, 2 * r + 1));
            }
        }
    }
    static __device__ __forceinline__ float sum_of_three(const float (&x)[3][EACH_M][EACH_N][4], int m, int n, int i) { return x[0][m][n][i] + (x[1][m][n][i] + x[2][m][n][i]); }
    static __device__ __forceinline__ float sum(const float* made, int row, int column) {
        float total = 0.f;
        EACH(k, KPARTS) total += made[(k * MT * 16 + row) * WIDTH + column];
        return total;
    }
};
using OfVectors = Gathered<VECTORS, 4, P, 4, 2, 2>;
using OfHidden = Gathered<SCALARS, 6, P, 2, 3, 2, true>;
using OfReadout = Gathered<SCALARS, H / 8, P, 2, (H < 32 ? 2 : 4), (H > 64 ? 1 : 2), true>;
using FromReadout = Gathered<SCALARS, 2, H / 16, 2, 2, (H < 32 ? 1 : 2)>;
using FromHidden = Gathered<SCALARS, 4, P, 2, 2, (P < 4 ? 2 : 4), true>;

// What this block has, MT tiles of 16 rows and up to KS times 16 columns, times C columns of a matrix for each block: a warp has
// one block's, of one or more tiles.
template <int MT, int KS>
struct Scattered {
    static constexpr int WIDTH = row_width(KS), PART = 16 * MT * WIDTH;  // of a row, and of either half of all: words
    static __device__ constexpr int chunks(int ks) { return (P * ks * 64 + CHUNK - 1) / CHUNK; }
    uint4 w[KS][2];
    const int ks;
    __device__ __forceinline__ Scattered(int ks) : ks(ks) {}
    template <class Matrices>
    __device__ __forceinline__ void take(int warp, int lane, const Matrices& matrices) {
        EACH(k, KS) if (k == 0 || k < ks) {
            if (k * P * 2 % OF_CHUNK == 0) matrices.await(k * P * 2 / OF_CHUNK);
            EACH(n, 2) w[k][n] = matrices.step(k * P * 2 / OF_CHUNK, k * P * 2 % OF_CHUNK + warp % P * 2 + n)[lane];
        }
    }
    // store(block, row, t, four channels): its 4 t and those after it
    template <class Store>
    __device__ __forceinline__ void run(int warp, int lane, const uint32* rows, const Store& store) const {
        EACH(m, (P * MT + WARPS - 1) / WARPS) {
            int tile = warp / P + WARPS / P * m;
            if (tile >= MT) continue;
            float sums[3][2][4] = {};
            EACH(k, KS) if (k == 0 || k < ks) {
                uint32 high[4], low[4];
                const uint32* at = rows + (tile * 16 + lane % 16) * WIDTH + lane / 16 * 4 + 8 * k;
                load_a_at(high, at), load_a_at(low, at + PART);
                EACH(n, 2) mma(sums[0][n], high, w[k][n].x, w[k][n].y);
                EACH(n, 2) mma(sums[1][n], low, w[k][n].x, w[k][n].y);
                EACH(n, 2) mma(sums[2][n], high, w[k][n].z, w[k][n].w);
            }
            EACH(r, 2) {
                float x[4];
                EACH(i, 4) x[i] = sums[0][i / 2][2 * r + i % 2] + (sums[1][i / 2][2 * r + i % 2] + sums[2][i / 2][2 * r + i % 2]);
                store(warp % P, 16 * tile + lane / 4 + 8 * r, lane % 4, x);
            }
        }
    }
};
template <int KS>
using OfScalars = Scattered<SCALARS, KS>;
using FromVectors = Scattered<VECTORS, 2>;

__device__ constexpr int most(int a) { return a; }
template <class... More>
__device__ constexpr int most(int a, int b, More... more) { return most(a > b ? a : b, more...); }
#define GATHERED (8 * most(VECTORS * row_width(P), SCALARS * row_width(H / 16)))  // words of 16 bytes
// of which there are two, before and behind what is made: one of them is free then
#define SCATTERED (2 * most(OfScalars<3>::PART, FromVectors::PART))
#define MADE (most(OfVectors::MADE, OfHidden::MADE, OfReadout::MADE, FromReadout::MADE + SCATTERED, FromHidden::MADE) - SCATTERED)
#define OF_FILTERS (3 * ALL * C)
// What products take and make, or filters and what messages make: behind what the next product takes, which some warps may
// write while others still read this.
#define OF_HEARD most(OF_FILTERS, 4 * GATHERED + SCATTERED)
#define REGION most(OF_HEARD + 2 * HEARD * N * C, 4 * GATHERED + MADE + 2 * SCATTERED)

// Shared memory, in words of 16 bytes.
enum {
    AT_BASIS = 0,  // B of pairs
    AT_REGION = AT_BASIS + TILES * (1 + BACK) * OF_TILE,
    AT_WEIGHTS = AT_REGION + REGION / 4,                      // C of all layers
    AT_DIRECTIONS = AT_WEIGHTS + (3 * LAYERS - 1) * OF_TILE,  // of pairs,
    AT_BARS = AT_DIRECTIONS + ALL,                            // and gradients by their distances and directions
    AT_OWN = AT_BARS + BACK * ALL,
    AT_SOURCES = AT_OWN + (LAYERS * ROWS - LATER) * N * C / 4,
    AT_RING = AT_SOURCES + (BACK ? SENT : 3) * N * C / 4,
    AT_BARRIERS = AT_RING + RING * CHUNK,
    AT_LAUNCHED = AT_BARRIERS + (RING + 1) / 2,  // how often the kernel was launched before
    AT_INVERSE = AT_LAUNCHED + 1                 // of each atom's power of 2, of three kinds; then constants, and pairs' atoms
};
template <class Type>
__device__ __forceinline__ Type* shared_at(int place) {
    SHARED(float4, memory);
    return (Type*)(memory + place);
}

// Chunks of matrices, in the order in which they are used: each into the place of the last but RING, which all have read.
struct Matrices {
    const uint4* from;  // of all blocks
    int words;          // of each
    uint32 taken = 0;   // chunks of products until now
    int stage = 0;      // products until now

    static __device__ __forceinline__ uint4* ring() { return shared_at<uint4>(AT_RING); }
    static __device__ __forceinline__ uint64* arrived() { return shared_at<uint64>(AT_BARRIERS); }  // of the places in the ring
    // by one warp
    __device__ __forceinline__ void ask(uint32 first, uint32 count) const {
        int own = words;
        stay(own);  // not a pointer that waits in registers
        if (elected()) ONE_BY_ONE for (uint32 chunk = first; chunk < min(first + count, (uint32)own / CHUNK); chunk++)
            copy(ring() + chunk % RING * CHUNK, from + block() % P * own + chunk * CHUNK, CHUNK * (int)sizeof(uint4), arrived() + chunk % RING);
    }
    // chunks of the next product
    __device__ __forceinline__ void await(uint32 chunk) const { barrier_wait(arrived() + (taken + chunk) % RING, (taken + chunk) / RING & 1); }
    // 32 words of 16 bytes for a warp
    __device__ __forceinline__ const uint4* step(uint32 chunk, int step) const { return ring() + (taken + chunk) % RING * CHUNK + step * 32; }
    // all have read the product's
    __device__ __forceinline__ void end(int chunks, int warp) {
        if (warp == WARPS - 1) ask(taken + RING, chunks);
        taken += chunks, stage++;
    }
};

struct Two {  // of two channels
    float x[2];
};
__device__ __forceinline__ Two two(const float* at) {
    float2 q = *(const float2*)at;
    return {q.x, q.y};
}
struct Four {  // of four channels
    float x[4];
    __device__ __forceinline__ explicit Four(const float* at) {
        float4 q = *(const float4*)at;
        x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
    }
};
// over four lanes, APART from each other: a lane has the sum of x[lane() / APART % 4] then
template <int APART>
__device__ __forceinline__ float spread(const float (&x)[4], int lane) {
    bool upper = lane & 2 * APART, odd = lane & APART;
    float first = (upper ? x[2] : x[0]) + from_lane(upper ? x[0] : x[2], 2 * APART);
    float second = (upper ? x[3] : x[1]) + from_lane(upper ? x[1] : x[3], 2 * APART);
    return (odd ? second : first) + from_lane(odd ? first : second, APART);
}

struct Molecule {
    const int g = block() / P, c = block() % P;
    int t = ::thread();
    Matrices matrices;
    uint32 sent = 0;  // exchanges until now, of all launches: the lowest bits of their numbers, eight a kind

    // What follows from the thread is made again from here on, or it would wait in registers that are not there
    __device__ __forceinline__ void again() { stay(t); }
    __device__ __forceinline__ int thread() const { return t; }
    __device__ __forceinline__ int lane() const { return t & 31; }
    __device__ __forceinline__ int warp() const { return (uint32)t >> 5; }
    __device__ __forceinline__ int a() const { return (uint32)t / C; }
    __device__ __forceinline__ int o() const { return (uint32)t % C; }
    // where a row has this thread's channel: beside those that a lane has of two products of 8 columns
    __device__ __forceinline__ int spot() const { return a() * C + 4 * (o() % 8 / 2) + 2 * (o() / 8) + o() % 2; }
    __device__ __forceinline__ bool mine() const { return a() < N; }         // whether there is such an atom,
    __device__ __forceinline__ bool busy() const { return 2 * warp() < N; }  // or such a one of this warp's
    // of messages: where two channels are, and which senders; three atoms, and which half
    __device__ __forceinline__ int channel() const { return 2 * ((uint32)t % 8); }
    __device__ __forceinline__ int part() const { return lane() / 8; }
    __device__ __forceinline__ int triple() const { return warp() % TRIPLES; }
    __device__ __forceinline__ int half() const { return warp() / TRIPLES; }
    static __device__ __forceinline__ uint4* basis() { return shared_at<uint4>(AT_BASIS); }
    static __device__ __forceinline__ uint4* weights() { return shared_at<uint4>(AT_WEIGHTS); }
    // what is multiplied, and what that makes; what is multiplied for others
    static __device__ __forceinline__ uint32* gathered() { return shared_at<uint32>(AT_REGION); }
    static __device__ __forceinline__ float* made(bool low) { return shared_at<float>(AT_REGION + GATHERED + (low ? 0 : SCATTERED / 4)); }
    static __device__ __forceinline__ uint32* scattered(int which) { return shared_at<uint32>(AT_REGION + GATHERED + which * (SCATTERED + MADE) / 4); }
    // [kind, pair, channel], and sums of messages, in their place
    static __device__ __forceinline__ float* filters() { return shared_at<float>(AT_REGION); }
    static __device__ __forceinline__ float* heard() { return shared_at<float>(AT_REGION) + OF_HEARD; }
    static __device__ __forceinline__ float4* directions() { return shared_at<float4>(AT_DIRECTIONS); }
    static __device__ __forceinline__ float4* bars() { return shared_at<float4>(AT_BARS); }
    static __device__ __forceinline__ float* own() { return shared_at<float>(AT_OWN); }
    static __device__ __forceinline__ float* sources() { return shared_at<float>(AT_SOURCES); }
    static __device__ __forceinline__ uint32* launched() { return shared_at<uint32>(AT_LAUNCHED); }
    static __device__ __forceinline__ float* inverse() { return shared_at<float>(AT_INVERSE); }
    static __device__ __forceinline__ float* constants() { return inverse() + 3 * N; }
    static __device__ __forceinline__ unsigned char* ends() { return (unsigned char*)(constants() + CONSTANTS); }
    // [receiver, sender]: 16 times their pair, and the highest bit if it has the direction of another sign
    static __device__ __forceinline__ unsigned short* ways() { return (unsigned short*)(ends() + 2 * ALL); }
    __device__ __forceinline__ float* row_of(int layer, int row) const { return own() + (layer * ROWS + row - LATER) * N * C; }
    __device__ __forceinline__ float& kept(int layer, int row) const { return row_of(layer, row)[spot()]; }
    __device__ __forceinline__ float* source_row(int row) const { return sources() + row * N * C; }
    __device__ __forceinline__ float& source(int row) const { return source_row(row)[spot()]; }
    __device__ __forceinline__ float constant(int layer, int offset) const { return constants()[layer * OF_LAYER + offset + o()]; }
    __device__ __forceinline__ float inner(int layer, int u, int v) const {
        return kept(layer, u) * kept(layer, v) + kept(layer, u + 1) * kept(layer, v + 1) + kept(layer, u + 2) * kept(layer, v + 2);
    }

    // --- what blocks send each other ---

    // where words are, and how they are told from those before: of the same place, the last but one
    template <int KIND>
    __device__ __forceinline__ uint4* place(int of, int word) const {
        constexpr int first = place_of_kind(KIND), words = words_of(KIND);
        return exchange + (uint32)((g * P + of) * OF_BLOCK + first + (sent >> 8 * KIND & 1) * words + word);
    }
    __device__ __forceinline__ uint32 tag(int kind) const { return 8 | sent >> (8 * kind + 1) & 7; }
    __device__ __forceinline__ float& power(int atom, int kind = 0) const { return inverse()[kind * N + atom]; }
    // The power of 2 that brings the largest number of a warp's two atoms to between 2^14 and 2^15; its inverse is kept
    __device__ __forceinline__ float scale(float largest, int kind = 0) const {
        int exponent = min(268 - (largest_of_warp(as_int(largest)) >> 23), 250);
        if (mine() && o() == 0) power(a(), kind) = as_float(254 - exponent << 23);
        return as_float(exponent << 23);
    }
    // four lanes have four numbers each: then lane k has their k-th
    __device__ __forceinline__ void transpose(float (&x)[4]) const {
        EACH(step, 2) {
            int apart = 1 << step;
            bool upper = lane() & apart;
            EACH(k, 4) if (!(k & apart)) {
                float other = from_lane(upper ? x[k] : x[k + apart], apart);
                if (upper) x[k] = other;
                else x[k + apart] = other;
            }
        }
    }
    // rows of this thread's atom and channel, to all blocks of the molecule
    template <int R>
    __device__ __forceinline__ void send(const float (&x)[R]) {
        again();
        constexpr int kind = R == 1 ? ROW : ROWS_OF_VECTORS;
        sent += 1u << 8 * kind;
        float four[4];
        if (R == 1) EACH(k, 4) four[k] = k ? from_lane(x[0], k) : x[0];  // as the first of four lanes wants it
        else {
            EACH(k, 4) four[k] = k < R ? x[k < R ? k : 0] : 0.f;
            transpose(four);
        }
        int row = o() % 4;
        if (mine() && row < R) put(place<kind>(c, (row * EVEN + a()) * 4 + o() / 4), four[0], four[1], four[2], four[3], tag(kind));
    }
    // four numbers of a row, as two halves of each, where a product takes them
    template <class Of>
    __device__ __forceinline__ void operand(int row, int quad, const float (&x)[4]) const {
        uint2 high, low;
        split(x[0], x[1], high.x, low.x), split(x[2], x[3], high.y, low.y);
        uint2* to = (uint2*)(gathered() + row * Of::ROW) + quad;
        to[0] = high, to[Of::PART / 2] = low;
    }
    // what all blocks sent, a row an atom, or one for each of three components, times a matrix
    template <class Of, int R = 1>
    __device__ __forceinline__ void gather() {
        again();
        constexpr int EACH_THREAD = (QUADS + C - 1) / C, kind = R == 1 ? ROW : ROWS_OF_VECTORS;
        if (busy()) {
            float4 w[EACH_THREAD * R];
            int atom = min(a(), N - 1);
            pause_for<R == 1 ? 200 : 300>();
            receive(w, tag(kind), [&](int k) {
                int quad = min(o() + k / R * C, QUADS - 1);
                return place<kind>(quad / 4, (k % R * EVEN + atom) * 4 + quad % 4);
            });
            float largest = 0.f;
            EACH(k, EACH_THREAD * R) largest = max(largest, max(max(fabsf(w[k].x), fabsf(w[k].y)), max(fabsf(w[k].z), fabsf(w[k].w))));
            float factor = scale(largest);
            EACH(k, EACH_THREAD * R) if (mine() && o() + k / R * C < QUADS) {
                int quad = o() + k / R * C;
                float x[4] = {factor * w[k].x, factor * w[k].y, factor * w[k].z, factor * w[k].w};
                operand<Of>(k % R * N + a(), quad, x);
            }
        }
        again();
        Of of;
        if (R == 1) of.take(warp(), lane(), matrices);  // of vectors there is no room for it in registers
        sync();
        if (R > 1) of.take(warp(), lane(), matrices);
        else matrices.end(Of::CHUNKS, warp());
        of.run(warp(), lane(), gathered(), made(Of::IS_LOW));
        sync();
        if (R > 1) matrices.end(Of::CHUNKS, warp());
    }
    // a sum of the product, of the part-th of this block's columns
    template <class Of>
    __device__ __forceinline__ float result(int part, int row) const {
        return Of::sum(made(Of::IS_LOW), row, part * C + o()) * (power(a()) * constants()[OF_FACTORS + matrices.stage - 1]);
    }
    template <class Of>
    __device__ __forceinline__ float result(int part) const { return result<Of>(part, a()); }
    // Up to KS rows of this thread's atom and channel, or, of COMPONENTS, as many by turns, times a matrix: shares for all blocks
    // through one of two places
    template <int COMPONENTS, int KS, class Of = Scattered<COMPONENTS == 1 ? SCALARS : VECTORS, KS>>
    __device__ __forceinline__ void scatter(const float (&x)[KS * COMPONENTS], int which, int ks = KS) {
        again();
        constexpr int kind = COMPONENTS == 1 ? SHARES : SHARES_OF_VECTORS;
        sent += 1u << 8 * kind;
        uint32* rows = scattered(which);
        if (busy()) {
            float largest = 0.f;
            EACH(k, KS * COMPONENTS) largest = max(largest, fabsf(x[k]));
            float factor = scale(largest, 1 + which);
            EACH(k, KS) EACH(component, COMPONENTS) if (mine()) {
                uint32 high, low;
                split(factor * x[k * COMPONENTS + component], 0.f, high, low);
                unsigned short* to = (unsigned short*)(rows + (component * N + a()) * Of::WIDTH + 8 * k) + o();
                to[0] = (unsigned short)high, to[2 * Of::PART] = (unsigned short)low;
            }
        }
        again();
        Of of(ks);
        of.take(warp(), lane(), matrices);
        sync();
        float factor = constants()[OF_FACTORS + matrices.stage];
        matrices.end(Of::chunks(ks), warp());
        of.run(warp(), lane(), rows, [&](int to, int row, int t, const float (&share)[4]) {
            if (row >= COMPONENTS * N) return;
            int component = COMPONENTS > 1 ? row / N : 0, atom = COMPONENTS > 1 ? row % N : row;
            float by = factor * power(atom, 1 + which);
            put(place<kind>(c, ((to * COMPONENTS + component) * EVEN + atom) * 4 + t), by * share[0], by * share[1], by * share[2], by * share[3], tag(kind));
        });
    }
    // the sums of all blocks' shares
    template <int COMPONENTS>
    __device__ __forceinline__ void collect(float (&sums)[COMPONENTS]) {
        again();
        constexpr int EACH_THREAD = (P + 3) / 4, kind = COMPONENTS == 1 ? SHARES : SHARES_OF_VECTORS;
        if (!busy()) return;
        float4 w[EACH_THREAD * COMPONENTS];
        int atom = min(a(), N - 1);
        pause_for<COMPONENTS == 1 ? 200 : 300>();
        receive(w, tag(kind), [&](int k) { return place<kind>(min(o() % 4 + 4 * (k / COMPONENTS), P - 1), ((c * COMPONENTS + k % COMPONENTS) * EVEN + atom) * 4 + o() / 4); });
        EACH(component, COMPONENTS) {
            float x[4] = {};
            EACH(k, EACH_THREAD) if (o() % 4 + 4 * k < P) {
                float4 q = w[k * COMPONENTS + component];
                x[0] += q.x, x[1] += q.y, x[2] += q.z, x[3] += q.w;
            }
            sums[component] = spread<1>(x, lane());
        }
    }
    // a hidden channel, whose slope is kept
    __device__ __forceinline__ float silu(int layer, int which, float z) const {
        float sigmoid = logistic(z);
        kept(layer, which) = silu_slope(z, sigmoid);
        return z * sigmoid;
    }

    // --- filters ---

    // B of 16 pairs (values, slopes: high, low) as a warp's lanes multiply them; 0 of pairs that don't count. Of 16 functions
    // lane 4 g + t has 4 i + t, i < 4. table: [intervals, FUNCTIONS] cubics
    __device__ __forceinline__ void evaluate(const float* table) const {
        float slope = constants()[OF_SCALES + LAYERS];
        int last = (int)constants()[OF_SPACE + 2] - 1;
        ONE_BY_ONE for (int tile = warp(); tile < TILES; tile += WARPS) {
            const float4* at[2];
            float t[2];
            bool counts[2];
            EACH(r, 2) {
                float place = directions()[16 * tile + lane() / 4 + 8 * r].w;
                int interval = min(max((int)place, 0), last);
                counts[r] = place >= 0.f, t[r] = place - (float)interval, at[r] = (const float4*)table + interval * FUNCTIONS + lane() % 4;
            }
            float4 w[STEPS][2][4];
            EACH(k, STEPS) EACH(r, 2) EACH(i, 4) {
                int first = 16 * k + 4 * i;
                w[k][r][i] = first < FUNCTIONS ? early(at[r] + first) : make_float4(0.f, 0.f, 0.f, 0.f);
            }
            EACH(which, 1 + BACK) EACH(k, STEPS) {
                uint32 high[4], low[4];
                EACH(r, 2) EACH(m, 2) {
                    float pair[2];
                    EACH(i, 2) {
                        float4 cubics = w[k][r][2 * m + i];
                        pair[i] = !counts[r] ? 0.f : which ? slope * cubic_slope(cubics, t[r]) : cubic(cubics, t[r]);
                    }
                    split(pair[0], pair[1], high[2 * m + r], low[2 * m + r]);
                }
                uint4* to = basis() + (tile * (1 + BACK) + which) * OF_TILE + k * 64 + lane();
                if (k < FULL) to[0] = {high[0], high[1], high[2], high[3]}, to[32] = {low[0], low[1], low[2], low[3]};
                else to[0] = {high[0], high[1], low[0], low[1]};
            }
        }
    }
    __device__ __forceinline__ float* filter(int kind, int e) const { return filters() + (kind * ALL + e) * C; }
    // B of a tile, or its slopes
    struct Operand {
        uint32 high[STEPS][4], low[STEPS][4];
        const int lane;
        __device__ __forceinline__ Operand(const uint4* at, int lane) : lane(lane) {
            EACH(k, FULL) {
                uint4 h = at[64 * k + lane], l = at[64 * k + 32 + lane];
                high[k][0] = h.x, high[k][1] = h.y, high[k][2] = h.z, high[k][3] = h.w, low[k][0] = l.x, low[k][1] = l.y, low[k][2] = l.z, low[k][3] = l.w;
            }
            if (REST) {
                uint4 both = at[64 * FULL + lane];
                high[STEPS - 1][0] = both.x, high[STEPS - 1][1] = both.y, low[STEPS - 1][0] = both.z, low[STEPS - 1][1] = both.w;
            }
        }
        // times C: of pairs g and g + 8 channels 2 t and 2 t + 1 of either half of the block's
        __device__ __forceinline__ void times(const uint4* from, float (&sums)[2][4]) const {
            float more[2][4] = {};
            EACH(side, 2) EACH(i, 4) sums[side][i] = 0.f;
            EACH(k, FULL) EACH(side, 2) {
                uint4 b = from[64 * k + 32 * side + lane];
                mma(sums[side], high[k], b.x, b.y), mma(more[side], low[k], b.x, b.y), mma(more[side], high[k], b.z, b.w);
            }
            if (REST) EACH(side, 2) {
                uint2 b = ((const uint2*)(from + 64 * FULL))[32 * side + lane];
                mma_of_8(sums[side], high[STEPS - 1], b.x), mma_of_8(more[side], low[STEPS - 1], b.x), mma_of_8(more[side], high[STEPS - 1], b.y);
            }
            EACH(side, 2) EACH(i, 4) sums[side][i] += more[side][i];
        }
    };
    __device__ __forceinline__ const uint4* weights_of(int layer, int kind) const { return weights() + ((layer ? 3 * layer - 1 : 0) + kind) * OF_TILE; }
    // of pairs g and g + 8 four channels that lie side by side
    __device__ __forceinline__ void store_filter(int kind, int tile, const float (&w)[2][4]) const {
        EACH(r, 2) ((float4*)filter(kind, 16 * tile + lane() / 4 + 8 * r))[lane() % 4] = make_float4(w[0][2 * r], w[0][2 * r + 1], w[1][2 * r], w[1][2 * r + 1]);
    }
    // a layer's
    __device__ __forceinline__ void make_filters(int layer) const {
        ONE_BY_ONE for (int tile = warp(); tile < TILES; tile += WARPS) {
            Operand values(basis() + tile * (1 + BACK) * OF_TILE, lane());
            EACH(kind, 3) if (kind < 2 || layer > 0) {
                float w[2][4];
                values.times(weights_of(layer, kind), w);
                store_filter(kind, tile, w);
            }
        }
        sync();
    }
    __device__ __forceinline__ float factor(int layer) const { return constants()[OF_SCALES + layer]; }

    // --- messages ---

    static __device__ __forceinline__ int pair_of(int i, int j) {
        int upper = max(i, j), lower = min(i, j);
        return i == j || upper >= N ? NONE : upper * (upper - 1) / 2 + lower;
    }
    // of a receiver and a sender: the direction, filters of two channels, and -0 if the direction has another sign, or 0
    struct Way {
        float u[3];
        const float* filter;
        int sign;
        __device__ __forceinline__ Way(uint32 way, int channel) {
            float4 q = *(const float4*)((const char*)directions() + (way & 0x7fff));
            u[0] = q.x, u[1] = q.y, u[2] = q.z;
            filter = filters() + (way & 0x7fff) + channel, sign = (int)(way << 16 & 0x80000000u);
        }
        __device__ __forceinline__ Two of(int kind) const { return two(filter + kind * ALL * C); }
        __device__ __forceinline__ float turned(float x) const { return as_float(as_int(x) ^ sign); }
    };
    // of this lane's first sender, and the first of three atoms
    __device__ __forceinline__ const unsigned short* first_way() const { return ways() + 3 * triple() * 8 * ROUNDS + 4 * half() + part(); }
    __device__ __forceinline__ int sender(int round) const { return min(8 * round + 4 * half() + part(), N - 1); }
    // rows 0 to 3 of three atoms' sums, which all parts share
    __device__ __forceinline__ void hand_over(const float (&sums)[3][2][4]) const {
        EACH(k, 3) {
            float x[2] = {spread<8>(sums[k][0], lane()), spread<8>(sums[k][1], lane())};
            int i = 3 * triple() + k;
            if (i < N) *(float2*)(heard() + ((half() * HEARD + part()) * N + i) * C + channel()) = make_float2(x[0], x[1]);
        }
    }
    // sums of a message: one number, and three
    __device__ __forceinline__ void message(int layer) {
        again(), stay(layer);
        make_filters(layer);
        if (half() < 2) {
            float sums[3][2][4] = {};  // [atom, channel, row]
            EACH(round, ROUNDS) {
                int at = sender(round) * C + channel();
                Two a_ = two(row_of(layer, XS) + at), b = two(row_of(layer, XU) + at), ys[3];
                if (layer > 0) EACH(axis, 3) ys[axis] = two(source_row(Y + axis) + at);
                EACH(k, 3) {
                    Way way(first_way()[8 * (k * ROUNDS + round)], channel());
                    Two wa = way.of(0), wb = way.of(1), wc;
                    if (layer > 0) wc = way.of(2);
                    EACH(x, 2) {
                        float along = way.turned(wb.x[x] * b.x[x]);
                        sums[k][x][0] += wa.x[x] * a_.x[x];
                        EACH(axis, 3) sums[k][x][1 + axis] += way.u[axis] * along;
                        if (layer > 0) EACH(axis, 3) sums[k][x][1 + axis] += wc.x[x] * ys[axis].x[x];
                    }
                }
            }
            hand_over(sums);
        }
        sync();
    }
    __device__ __forceinline__ float sum(int layer, int row) const { return factor(layer) * (heard()[row * N * C + spot()] + heard()[(HEARD + row) * N * C + spot()]); }
    // of its transpose: a, y, b
    __device__ __forceinline__ void message_transpose(int layer) {
        again(), stay(layer);
        if (half() < 2) {
            float sums[3][2][4] = {}, of_b[8] = {};
            EACH(round, ROUNDS) {
                int at = sender(round) * C + channel();
                Two p = two(source_row(S_BAR) + at), q[3];
                EACH(axis, 3) q[axis] = two(source_row(V_BAR + axis) + at);
                EACH(k, 3) {
                    Way way(first_way()[8 * (k * ROUNDS + round)], channel());
                    Two wa = way.of(0), wb = way.of(1), wc = way.of(2);
                    EACH(x, 2) {
                        sums[k][x][0] += wa.x[x] * p.x[x];
                        EACH(axis, 3) sums[k][x][1 + axis] += wc.x[x] * q[axis].x[x];
                        of_b[2 * k + x] -= (way.u[0] * q[0].x[x] + way.u[1] * q[1].x[x] + way.u[2] * q[2].x[x]) * way.turned(wb.x[x]);
                    }
                }
            }
            hand_over(sums);
            EACH(some, 2) {
                float x[4];
                EACH(k, 4) x[k] = of_b[4 * some + k];
                float b = spread<8>(x, lane());
                int k = 2 * some + part() / 2, i = 3 * triple() + k;
                if (k < 3 && i < N) heard()[((half() * HEARD + 4) * N + i) * C + channel() + part() % 2] = b;
            }
        }
        sync();
    }
    // A layer's filters, if there is a layer before it; and gradients of pairs grow, by tiles: a lane has those of two pairs
    // through four channels, then one of their four numbers
    __device__ __forceinline__ void add_gradients(int layer) {
        again(), stay(layer);
        ONE_BY_ONE for (int tile = warp(); tile < TILES; tile += WARPS) {
            const uint4* at = basis() + tile * (1 + BACK) * OF_TILE;
            Operand values(at, lane()), slopes(at + OF_TILE, lane());
            float bar[2][4] = {}, wb[2][4], sa[2][4], sb[2][4], sc[2][4];
            values.times(weights_of(layer, 1), wb);
            if (layer > 0) {
                float w[2][4];
                store_filter(1, tile, wb);
                values.times(weights_of(layer, 0), w), store_filter(0, tile, w);
                values.times(weights_of(layer, 2), w), store_filter(2, tile, w);
                slopes.times(weights_of(layer, 2), sc);
            }
            slopes.times(weights_of(layer, 0), sa), slopes.times(weights_of(layer, 1), sb);
            EACH(r, 2) {
                int e = 16 * tile + lane() / 4 + 8 * r, i = ends()[2 * e] * C + 4 * (lane() % 4), j = ends()[2 * e + 1] * C + 4 * (lane() % 4);
                const float* q = source_row(V_BAR);
                Four qi[3] = {Four(q + i), Four(q + N * C + i), Four(q + 2 * N * C + i)}, qj[3] = {Four(q + j), Four(q + N * C + j), Four(q + 2 * N * C + j)};
                if (layer > 0) EACH(axis, 3) {
                    Four yi(source_row(Y + axis) + i), yj(source_row(Y + axis) + j);
                    EACH(x, 4) bar[r][0] += sc[x / 2][2 * r + x % 2] * (yi.x[x] * qj[axis].x[x] + yj.x[x] * qi[axis].x[x]);
                }
                Four ai(row_of(layer, XS) + i), aj(row_of(layer, XS) + j), pi(source_row(S_BAR) + i), pj(source_row(S_BAR) + j);
                EACH(x, 4) bar[r][0] += sa[x / 2][2 * r + x % 2] * (ai.x[x] * pj.x[x] + aj.x[x] * pi.x[x]);
                float4 d = directions()[e];
                float u[3] = {d.x, d.y, d.z};
                Four bi(row_of(layer, XU) + i), bj(row_of(layer, XU) + j);
                EACH(x, 4) {
                    float along = 0.f;
                    EACH(axis, 3) {
                        float more = bj.x[x] * qi[axis].x[x] - bi.x[x] * qj[axis].x[x];
                        bar[r][1 + axis] += wb[x / 2][2 * r + x % 2] * more, along += u[axis] * more;
                    }
                    bar[r][0] += sb[x / 2][2 * r + x % 2] * along;
                }
            }
            EACH(r, 2) ((float*)(bars() + 16 * tile + lane() / 4 + 8 * r))[lane() % 4] += factor(layer) * spread<1>(bar[r], lane());
        }
        sync();
    }

    // --- the beginning and the end ---

    // C of all filters (of the last eight functions, half of each word as it comes), constants, pairs, what elements give
    __device__ __forceinline__ float begin(const float* table, const uint4* of_weights, const float* of_blocks, const int* numbers, const float* of_elements, const float* positions, const unsigned char* mask) {
        constexpr int WORDS = (3 * LAYERS - 1) * STEPS * 64, SOME = (WORDS + THREADS - 1) / THREADS, EACH_THREAD = (CONSTANTS + THREADS - 1) / THREADS;
        constexpr int EACH_PAIR = (N * N + THREADS - 1) / THREADS;
        int number = numbers[g * N + min(a(), N - 1)];
        float cutoff = of_blocks[OF_SPACE + 1], intervals = of_blocks[OF_SPACE + 2], some[EACH_THREAD], r[EACH_PAIR][3];
        uint4 word[SOME];
        bool counts[EACH_PAIR];
        uint32 before = latest(launches + g);
        EACH(k, SOME) word[k] = early(of_weights + c * WORDS + min(thread() + k * THREADS, WORDS - 1));
        EACH(k, EACH_THREAD) some[k] = of_blocks[c * CONSTANTS + min(thread() + k * THREADS, CONSTANTS - 1)];
        EACH(k, EACH_PAIR) {
            int pair = min(thread() + k * THREADS, N * N - 1), i = pair / N, j = pair % N;
            counts[k] = mask[g * N * N + pair];
            EACH(axis, 3) r[k][axis] = positions[3 * (g * N + j) + axis] - positions[3 * (g * N + i) + axis];
        }
        const float* at = of_elements + number * (3 * F) + c * C + o();
        float first = at[0], second = at[F], scalar = at[2 * F];
        EACH(k, SOME) if (thread() + k * THREADS < WORDS) {
            int kind = (thread() + k * THREADS) / (STEPS * 64), step = (thread() + k * THREADS) / 64 % STEPS, lane_of = thread() % 64;
            uint4* to = weights() + kind * OF_TILE + step * 64;
            if (step < FULL) to[lane_of] = word[k];
            else ((uint2*)to)[lane_of] = {word[k].x, word[k].z};
        }
        EACH(k, EACH_THREAD) if (thread() + k * THREADS < CONSTANTS) constants()[thread() + k * THREADS] = some[k];
        EACH(k, EACH_PAIR) {
            int pair = thread() + k * THREADS, i = pair / N, j = pair % N, e = pair_of(i, j);
            if (pair >= N * N) continue;
            ways()[i * 8 * ROUNDS + j] = (unsigned short)(16 * e | (i > j) << 15);
            if (i >= j) continue;
            float d = root(r[k][0] * r[k][0] + r[k][1] * r[k][1] + r[k][2] * r[k][2]), t = d > 0.f ? 1.f / d : 0.f;
            directions()[e] = make_float4(t * r[k][0], t * r[k][1], t * r[k][2], counts[k] && d <= cutoff ? min(d, cutoff) * (intervals / cutoff) : -1.f);
            ends()[2 * e] = (unsigned char)i, ends()[2 * e + 1] = (unsigned char)j;
        }
        for (int e = PAIRS + thread(); e < ALL; e += THREADS) directions()[e] = make_float4(0.f, 0.f, 0.f, -1.f), ends()[2 * e] = ends()[2 * e + 1] = 0;
        for (int e = thread(); e < BACK * ALL; e += THREADS) bars()[e] = make_float4(0.f, 0.f, 0.f, 0.f);
        for (int k = thread(); k < 8 * ROUNDS * 3 * TRIPLES; k += THREADS) if (k >= 8 * ROUNDS * N || k % (8 * ROUNDS) >= N) ways()[k] = 16 * NONE;
        if (::thread() == 0) *launched() = before;
        sync();
        EACH(kind, KINDS) sent |= (*launched() * exchanges_of(kind) & 15) << 8 * kind;
        evaluate(table);
        if (mine()) kept(0, XS) = first, kept(0, XU) = second;  // these came latest
        sync();
        return scalar;
    }
    // gradients by positions [N, 3]: of an atom in each block, and then of all blocks by a warp
    __device__ __forceinline__ void end(float* position_bars) const {
        const float cutoff = constants()[OF_SPACE + 1], intervals = constants()[OF_SPACE + 2], an_angstrom = intervals / cutoff * constants()[OF_SCALES + LAYERS + 1];
        const uint32 ended = 8 | *launched() & 7;
        if (busy()) {  // a half warp an atom
            float sums[3] = {};
            EACH(k, (N + C - 1) / C) {
                int j = o() + k * C, e = pair_of(a(), j);
                float4 u = directions()[e], bar = bars()[e];
                float t = u.w > 0.f ? reciprocal(u.w * (cutoff / intervals)) : 0.f, along = an_angstrom * bar.x - t * (u.x * bar.y + u.y * bar.z + u.z * bar.w);
                float sign = u.w < 0.f ? 0.f : a() < j ? -1.f : 1.f;
                sums[0] += sign * (along * u.x + t * bar.y), sums[1] += sign * (along * u.y + t * bar.z), sums[2] += sign * (along * u.z + t * bar.w);
            }
            EACH(step, 4) EACH(axis, 3) sums[axis] += from_lane(sums[axis], 1 << step);
            if (mine() && o() == 0) put(exchange + (g * P + c) * OF_BLOCK + OF_GRADIENTS + a(), sums[0], sums[1], sums[2], 0.f, ended);
        }
        ONE_BY_ONE for (int i = c + P * warp(); i < N; i += P * WARPS) {
            float4 word[1];
            receive(word, ended, [&](int) { return exchange + (g * P + lane() % P) * OF_BLOCK + OF_GRADIENTS + i; });
            float sums[3] = {word[0].x, word[0].y, word[0].z};
            EACH(step, 5) if (1 << step < P) EACH(axis, 3) sums[axis] += from_lane(sums[axis], 1 << step);
            if (lane() < 3) position_bars[3 * (g * N + i) + lane()] = lane() == 0 ? sums[0] : lane() == 1 ? sums[1] : sums[2];
        }
    }
    // energies; and their slopes by the hidden channels before the SiLU, times a matrix
    __device__ __forceinline__ void readout(float* energies) {
        constexpr int EACH_THREAD = (H / 4 + C - 1) / C;
        if (busy()) {
            float by = power(min(a(), N - 1)) * constants()[OF_FACTORS + matrices.stage - 1], energy = 0.f, largest = 0.f, bar[EACH_THREAD][4];
            EACH(m, EACH_THREAD) EACH(k, 4) {
                int channel = min(4 * (o() + m * C) + k, H - 1);
                float z = OfReadout::sum(made(OfReadout::IS_LOW), min(a(), N - 1), channel) * by + constants()[OF_READ + channel];
                float final = constants()[OF_READ + H + channel], sigmoid = logistic(z);
                if (4 * (o() + m * C) < H) energy += final * z * sigmoid;
                bar[m][k] = final * silu_slope(z, sigmoid), largest = max(largest, fabsf(bar[m][k]));
            }
            EACH(step, 4) energy += from_lane(energy, 1 << step);
            if (c == 0 && mine() && o() == 0) energies[g * N + a()] = energy;
            float factor = scale(largest);
            EACH(m, EACH_THREAD) if (mine() && 4 * (o() + m * C) < H) {
                EACH(k, 4) bar[m][k] *= factor;
                operand<FromReadout>(a(), o() + m * C, bar[m]);
            }
        }
#if BACK
        FromReadout of;
        of.take(warp(), lane(), matrices);
        sync();
        matrices.end(FromReadout::CHUNKS, warp());
        of.run(warp(), lane(), gathered(), made(FromReadout::IS_LOW));
        sync();
#endif
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
several(const float* __restrict__ table, const uint4* __restrict__ of_weights, const float* __restrict__ of_blocks, const int* __restrict__ numbers,
        const float* __restrict__ of_elements, const uint4* __restrict__ matrices, const float* __restrict__ positions, const unsigned char* __restrict__ mask,
        int molecules, int words, float* energies
#if BACK
        , float* bars
#endif
        WITH_CLOCKS) {
    Molecule m;
    if (block() >= molecules * P) {  // one that came after all others had ended would wait for the next launch
        if (thread() >= molecules) return;
        uint32 now = latest(launches + thread());
        for (int k = 0; k < IDLE_LOOKS && latest(finished + thread()) == now; k++) other_blocks();
        return;
    }
    m.matrices.from = matrices, m.matrices.words = words;
    if (warp() == WARPS - 1) {
        if (elected()) {
            EACH(k, RING) barrier_init(m.matrices.arrived() + k, 1);
            barriers_made();
        }
        m.matrices.ask(0, RING);
    }
    BEGIN_STAGES;
    STAGE(PAIRS);
    float s = m.begin(table, of_weights, of_blocks, numbers, of_elements, positions, mask), v[3] = {};
    ONE_BY_ONE for (int i = 0; i < LAYERS; i++) {
        stay(i);
        STAGE(MESSAGE);
        m.message(i);
        if (m.mine()) {
            s += m.sum(i, 0);
            EACH(k, 3) v[k] += m.sum(i, 1 + k);
        }
        STAGE(VECTORS);
        m.send(v);
        m.gather<OfVectors, 3>();
        float both[2] = {s, 0.f}, z[1];
        if (m.mine()) {
            float square = 0.f, epsilon = m.constants()[OF_SPACE];
            EACH(k, 3) {
                float vv = m.result<OfVectors>(1, k * N + m.a());
                m.kept(i, UV + k) = m.result<OfVectors>(0, k * N + m.a()), m.kept(i, VV + k) = vv, square += vv * vv;
            }
            both[1] = square_root(square + epsilon * epsilon) - epsilon;
        }
        ONE_BY_ONE for (int gate = 0;; gate = 1) {  // the update's hidden channels, and those of the gate of the next layer
            int layer = i + gate;
            float hidden[1] = {};
            if (gate) STAGE(GATE);
            else STAGE(UPDATE);
            m.scatter<1, 2>(both, gate, 2 - gate);
            m.collect(z);
            if (m.mine()) hidden[0] = m.silu(layer, gate ? OF_GATE : OF_UPDATE, z[0] + m.constant(layer, gate ? HIDDEN_GATE_BIAS : HIDDEN_BIAS));
            m.send(hidden);
            m.gather<OfHidden>();
            if (gate) break;
            if (m.mine()) {
                float gates[3];
                EACH(k, 3) gates[k] = m.result<OfHidden>(k) + m.constant(i, GATE_BIAS + k * C);
                EACH(k, 2) m.kept(i, GATES + k) = gates[1 + k];
                s += gates[0] + gates[1] * m.inner(i, UV, VV);
                EACH(k, 3) v[k] += gates[2] * m.kept(i, UV + k);
            }
            if (i == LAYERS - 1) break;
            both[0] = s, both[1] = 0.f;  // or the norm, which isn't multiplied, would scale s
        }
        if (i == LAYERS - 1) break;
        if (m.mine()) {
            constexpr int sent[3] = {XS, XU, XV};
            EACH(k, 3) m.kept(i + 1, sent[k]) = m.result<OfHidden>(k) + m.constant(i + 1, SENT_BIAS + k * C);
            EACH(k, 3) m.source(Y + k) = m.kept(i + 1, XV) * (m.kept(i + 1, VS + k) = v[k]);
        }
        sync();
    }
    STAGE(READOUT);
    float scalar[1] = {s};
    m.send(scalar);
    m.gather<OfReadout>();
    if (m.c == 0 && thread() == 0) launches[m.g] = *m.launched() + 1;  // each block has read it, or none of these words were here
    m.readout(energies);
#if BACK
    float three[3] = {};
    if (m.mine()) s = m.result<FromReadout>(0);  // cotangents from here on
    EACH(k, 3) v[k] = 0.f;
    int i = LAYERS - 1;
    ONE_BY_ONE for (int gate = 0;; gate ^= 1) {  // an update, and the gate before its layer
        stay(i);
        if (!gate && m.mine()) three[0] = s, three[1] = s * m.inner(i, UV, VV), three[2] = v[0] * m.kept(i, UV) + v[1] * m.kept(i, UV + 1) + v[2] * m.kept(i, UV + 2);
        float z[1], hidden[1] = {};
        if (gate) STAGE(GATE_BACK);
        else STAGE(UPDATE_BACK);
        m.scatter<1, 3>(three, 0);
        m.collect(z);
        if (m.mine()) hidden[0] = z[0] * m.kept(i, gate ? OF_GATE : OF_UPDATE);
        if (gate) {
            m.scatter<1, 1>(hidden, 1);
            m.collect(z);
            if (m.mine()) s += z[0];
            i--;
            continue;
        }
        m.send(hidden);
        m.gather<FromHidden>();
        float both[6] = {}, more[3], sums[HEARD];
        if (m.mine()) {
            float epsilon = m.constants()[OF_SPACE], norm = square_root(m.inner(i, VV, VV) + epsilon * epsilon);
            float along = s * m.kept(i, GATES), factor = norm > 0.f ? m.result<FromHidden>(1) * reciprocal(norm) : 0.f;
            s += m.result<FromHidden>(0);
            EACH(k, 3) both[k] = along * m.kept(i, VV + k) + m.kept(i, GATES + 1) * v[k];
            EACH(k, 3) both[3 + k] = along * m.kept(i, UV + k) + factor * m.kept(i, VV + k);
        }
        STAGE(VECTORS_BACK);
        m.scatter<3, 2>(both, 1);
        m.collect(more);
        if (m.mine()) {
            EACH(k, 3) v[k] += more[k];
            m.source(S_BAR) = s;
            EACH(k, 3) m.source(V_BAR + k) = v[k];
            if (i > 0) EACH(k, 3) m.source(Y + k) = m.kept(i, XV) * m.kept(i, VS + k);
        }
        sync();
        STAGE(PAIRS_BACK);
        m.add_gradients(i);
        if (i == 0) break;
        STAGE(MESSAGE_BACK);
        m.message_transpose(i);
        if (m.mine()) {
            EACH(k, HEARD) sums[k] = m.sum(i, k);
            float along = 0.f;
            EACH(k, 3) along += sums[1 + k] * m.kept(i, VS + k), v[k] += m.kept(i, XV) * sums[1 + k];
            three[0] = sums[0], three[1] = sums[HEARD - 1], three[2] = along;
        }
    }
    STAGE(PAIRS_BACK);
    m.end(bars);
#endif
    STAGE(END);
    if (m.c == 0 && thread() == 0) finished[m.g] = *m.launched() + 1;
}
