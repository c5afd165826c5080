// The first message of many atoms and its transpose, where what atoms send follows from their elements z:
//     Δs_i = sum_z a_z sum_k C_ak S_zk,  S_zk = sum over the pairs of i with senders of z of B_k(r);
//     Δv_i = sum_z b_z sum_k C_bk V_zk,  V_zk the same with B_k(r) u;
// and of each pair, with P_zk = sum_f C_akf a_zf p_if and Q_zk = sum_f C_bkf b_zf q_if,
//     D = sum_k B_k'(r) (P_zk + u.Q_zk),  U = sum_k B_k(r) Q_zk.
// So a pair costs FUNCTIONS instead of filters; products with C are of atoms. A block has 16 atoms (tiles.cu), a warp some
// of them. Of an atom tensor cores sum over eight pairs at a time: [S_z, V_z] of BATCH elements are the product of 1 and u
// of pairs, in the rows of their elements, with B of pairs; D and U are of the products of P_z and Q_z with B' and B.
// The message has quadratics of B in 64 bits for some pieces of each of the table's intervals, as reading them from L2 is most
// of its work: c0 as a float, and c1 and c2 as a whole number whose last 12 bits are c2. Its transpose has cubics.
// Defined from outside: F, FUNCTIONS, HAS_B; BATCH: elements at once; BESIDE: whether D and U of a pair lie side by side.
#define K ((FUNCTIONS + 15) / 16 * 16)  // as products take them: the last ones are zero
#define TILES ((FUNCTIONS + 7) / 8)     // of functions; each of four lanes that share a pair has as many words of two
#define AHEAD (FUNCTIONS <= 24)         // whether there is room to ask for the next pairs' functions early
#define ROUNDS ((ATOMS + GROUPS - 1) / GROUPS)
#define ROWS (HAS_B ? 4 * BATCH : BATCH + 3)  // of sums of an atom: [S, V_xyz] of each element, or S of each and V_xyz of all
#define STRIDE (K / 2 + 4)                    // words of a row of K halves in shared memory
#define SUMS (ROWS * STRIDE + 4 * (ROWS % 2 == 0))  // of an atom's rows: no two lanes share a bank
#define ABOVE (ATOMS * K + 4)                 // numbers of a row of P and Q of all atoms, likewise
#define ELEMENTS 128
#define AT_ONCE 8  // pairs
#define CHOSEN 64  // pairs of an atom whose places are in shared memory
#define NONE 0xffff
#define NO_ELEMENT 15  // of the batch

__device__ __forceinline__ int place_of_bar(int pair, int row, int all) { return BESIDE ? 4 * pair + row : row * all + pair; }

// a packed B at a pair's t
struct Value {
    float first, second;
    __device__ __forceinline__ Value(float t, const float* units) : first(units[0] * t), second(units[1] * t * t) {}
    __device__ __forceinline__ float operator()(uint2 x) const { return as_float((int)x.x) + ((float)(int)x.y * first + (float)(int)(x.y << 20) * second); }
};

// the pairs of a block's atoms, in shared memory
struct Pairs {
    const int* senders;
    const float* places;
    const char* basis;
    int size;      // of a function's coefficients, in bytes
    float pieces;  // of an interval
    int n, slots;
    float4* chosen;           // [ATOMS, CHOSEN] t, in a piece, and u of pairs in their order
    int* bytes;               // likewise where their functions are, 0 for none, where zeros are; and which of the batch sends
    int* count;               // [ATOMS] of pairs in that order
    int* batch;               // the elements, ELEMENTS for none
    int* sending;             // by element, whether one sends
    unsigned short* order;    // [ATOMS, slots + AT_ONCE] slots of pairs, and which of the batch sends; filled up with NONE
    unsigned char* elements;  // [ATOMS, slots] 1 + z, 0 for pairs that don't count

    // reads the elements; pair_bars: set to 0 for pairs that don't count
    __device__ Pairs(const int* numbers, const int* s, const float* p, const void* b, int size, float pieces, int n, int slots, void* memory, void* for_chosen,
                     float* pair_bars) : senders(s), places(p), basis((const char*)b), size(size), pieces(pieces), n(n), slots(slots) {
        chosen = (float4*)for_chosen, bytes = (int*)(chosen + ATOMS * CHOSEN);
        count = (int*)memory, batch = count + ATOMS, sending = batch + BATCH;
        order = (unsigned short*)(sending + ELEMENTS), elements = (unsigned char*)(order + ATOMS * row());
        for (int k = thread(); k < ELEMENTS; k += THREADS) sending[k] = 0;
        sync();
        int all = n * slots, begin = block() * ATOMS * slots, end = min(ATOMS * slots, all - begin);
        constexpr int EACH_TIME = 4;  // asked for at once
        for (int from = thread(); from < ATOMS * slots; from += EACH_TIME * THREADS) {
            bool counts[EACH_TIME];
            int z[EACH_TIME];
#pragma unroll
            for (int k = 0; k < EACH_TIME; k++) {
                int e = begin + min(from + k * THREADS, end - 1);
                counts[k] = from + k * THREADS < end && places[all + e] > 0.f, z[k] = senders[e];
            }
#pragma unroll
            for (int k = 0; k < EACH_TIME; k++) z[k] = numbers[counts[k] ? z[k] : 0] % ELEMENTS;
#pragma unroll
            for (int k = 0; k < EACH_TIME; k++) {
                int at = from + k * THREADS;
                if (at >= ATOMS * slots) continue;
                elements[at] = counts[k] ? z[k] + 1 : 0;
                if (counts[k]) sending[z[k]] = 1;
                else if (pair_bars && at < end)
                    for (int row = 0; row < 4; row++) pair_bars[place_of_bar(begin + at, row, all)] = 0.f;
            }
        }
        sync();
    }
    __device__ __forceinline__ int row() const { return slots + AT_ONCE; }
    // the next element that sends, or ELEMENTS
    __device__ __forceinline__ int after(int z) const {
        for (int k = (z + 1) / 32; k < ELEMENTS / 32; k++) {
            uint32 found = lanes_where(32 * k + lane() > z && sending[32 * k + lane()]);
            if (found) return 32 * k + lowest(found);
        }
        return ELEMENTS;
    }

    // the pairs of this warp's atoms with senders of some elements
    __device__ void choose(const int (&z)[BATCH]) const {
        for (int local = warp(); local < ATOMS; local += GROUPS) {
            const unsigned char* of = elements + local * slots;
            unsigned short* at = order + local * row();
            int found = 0;
            for (int begin = 0; begin < slots; begin += 32) {
                int element = begin + lane() < slots ? of[begin + lane()] - 1 : -1, which = NO_ELEMENT;
#pragma unroll
                for (int k = 0; k < BATCH; k++)
                    if (element == z[k]) which = k;
                uint32 lanes = lanes_where(which != NO_ELEMENT);
                if (which != NO_ELEMENT) at[found + ones(lanes & ((1u << lane()) - 1))] = (unsigned short)(begin + lane() | which << 12);
                found += ones(lanes);
            }
            int whole = (found + AT_ONCE - 1) / AT_ONCE * AT_ONCE;
            if (lane() < whole - found) at[found + lane()] = NONE;
            if (lane() == 0) count[local] = whole;
        }
        sync_warp();
    }
    __device__ __forceinline__ int slot_of(int local, int place) const {  // or NONE
        int entry = order[local * row() + place];
        return entry == NONE ? NONE : entry & 0xfff;
    }
    // places of CHOSEN / 2 of an atom's pairs, which are asked for first; where no pair is, those of another
    struct Places {
        float4 t_u;
        float interval;
        int entry;
    };
    __device__ __forceinline__ Places ask(int local, int from) const {
        int all = n * slots, place = from + lane(), entry = place < count[local] ? order[local * row() + place] : NONE;
        const float* at = places + (entry == NONE ? 0 : (block() * ATOMS + local) * slots + (entry & 0xfff));
        return {make_float4(at[0], at[2 * all], at[3 * all], at[4 * all]), at[5 * all], entry};
    }
    __device__ __forceinline__ void keep(int local, int from, const Places& x) const {
        int to = local * CHOSEN + (from + lane()) % CHOSEN;
        float t = pieces * x.t_u.x, piece = min((float)(int)t, pieces - 1.f);
        int row = (int)(pieces * x.interval + piece);
        chosen[to] = make_float4(t - piece, x.t_u.y, x.t_u.z, x.t_u.w);
        bytes[to] = x.entry == NONE ? NO_ELEMENT : (1 + row) * FUNCTIONS * size | x.entry >> 12;
    }
    // what `each` needs to begin with, of all of this warp's atoms, so that nothing is waited for one by one
    __device__ __forceinline__ void begin_all() const {
        Places found[ROUNDS][2];
#pragma unroll
        for (int m = 0; m < 2 * ROUNDS; m++)
            if (has_local(m / 2)) found[m / 2][m % 2] = ask(warp() + m / 2 * GROUPS, m % 2 * CHOSEN / 2);
#pragma unroll
        for (int m = 0; m < 2 * ROUNDS; m++)
            if (has_local(m / 2)) keep(warp() + m / 2 * GROUPS, m % 2 * CHOSEN / 2, found[m / 2][m % 2]);
        sync_warp();
    }
    __device__ static __forceinline__ bool has_local(int round) { return ATOMS % GROUPS == 0 || warp() + round * GROUPS < ATOMS; }
    // a function and those behind it, of a pair
    template <class Piece>
    __device__ __forceinline__ const Piece* functions(int bytes, int first) const {
        return (const Piece*)(basis + (bytes & ~15)) + first;
    }
};

// [k, row] of a product's rows of an atom, of which a lane has lane / 4 and that plus 8: which of the batch and which component,
// 0 of a scalar, 1 to 3 of a vector. Without b the rows are S of four elements, none, V_xyz of all, and no more.
__device__ __forceinline__ int element_of(int k) { return HAS_B ? lane() / 16 + 2 * k : lane() / 4; }
__device__ __forceinline__ int component() { return HAS_B ? lane() / 4 % 4 : max(lane() / 4 - 4, 0); }
__device__ __forceinline__ bool has_row(int k) {
    return HAS_B ? element_of(k) < BATCH : k == 0 && (lane() < 16 ? lane() / 4 < BATCH : lane() >= 20);
}
// where it is among the ROWS
__device__ __forceinline__ int row_of(int which, int component) { return HAS_B ? 4 * which + component : component ? BATCH + component - 1 : which; }

// asks for the functions of the next pairs, if there are any
template <class Functions>
struct Next {
    Functions& functions;
    const Pairs& pairs;
    const int* bytes;
    bool there;
    __device__ __forceinline__ void operator()() const {
        if (there) functions.ask(pairs, bytes);
    }
};

// Of an atom's pairs, AT_ONCE at a time: use(functions, chosen and bytes of these, which of the order they are, next), which
// calls next() when it has read the functions: those of the next ones are asked for. `begin_all` came before.
template <class Functions, class Use>
__device__ __forceinline__ void each(const Pairs& pairs, int local, Use use) {
    const int* bytes = pairs.bytes + local * CHOSEN;
    const float4* chosen = pairs.chosen + local * CHOSEN;
    int all = pairs.count[local];
    Functions functions;
    if (all) functions.ask(pairs, bytes);
#pragma unroll 1
    for (int at = 0; at < all; at += AT_ONCE) {
        if (at && at % (CHOSEN / 2) == 0 && at + CHOSEN / 2 < all) {
            sync_warp();
            pairs.keep(local, at + CHOSEN / 2, pairs.ask(local, at + CHOSEN / 2));
            sync_warp();
        }
        Next<Functions> next{functions, pairs, bytes + (at + AT_ONCE) % CHOSEN, at + AT_ONCE < all};
        use(functions, chosen + at % CHOSEN, bytes + at % CHOSEN, at, next);
    }
}

// COUNT functions of one or two pairs, each asked for early, or where it is needed
template <class Piece, int PAIRS, int COUNT, int STEP>
struct Pieces {
    const Piece* from[PAIRS];
    Piece c[AHEAD ? PAIRS : 1][COUNT];
    __device__ __forceinline__ Piece read(int pair, int k, int first) const {
        if (STEP * (k + 1) > FUNCTIONS && first + STEP * k >= FUNCTIONS) return Piece();
        return from[pair][STEP * k];
    }
    __device__ __forceinline__ void ask(const Pairs& pairs, const int* bytes, int of, int first) {
#pragma unroll
        for (int pair = 0; pair < PAIRS; pair++) {
            from[pair] = pairs.functions<Piece>(bytes[of + pair], first);
#pragma unroll
            for (int k = 0; k < (AHEAD ? COUNT : 0); k++) c[pair][k] = read(pair, k, first);
        }
    }
    __device__ __forceinline__ Piece get(int pair, int k, int first) const { return AHEAD ? c[pair][k] : read(pair, k, first); }
};

// of two pairs of eight every eighth function, as an operand of a product over pairs
struct OfTwo : Pieces<uint2, 2, TILES, 8> {
    __device__ __forceinline__ void ask(const Pairs& pairs, const int* bytes) { Pieces::ask(pairs, bytes, 2 * (lane() % 4), lane() / 4); }
    __device__ __forceinline__ uint2 operator()(int pair, int tile) const { return get(pair, tile, lane() / 4); }
};

// of one pair of eight every fourth, as an operand of a product over functions
struct OfOne : Pieces<float4, 1, 2 * TILES, 4> {
    __device__ __forceinline__ void ask(const Pairs& pairs, const int* bytes) { Pieces::ask(pairs, bytes, lane() / 4, lane() % 4); }
    __device__ __forceinline__ float4 operator()(int k) const { return get(0, k, lane() % 4); }
};

// the next elements after the last of these; whether there is one
__device__ __forceinline__ bool next_elements(const Pairs& pairs, int (&z)[BATCH]) {
    int last = z[BATCH - 1];
#pragma unroll
    for (int k = 0; k < BATCH; k++) pairs.batch[k] = last = z[k] = pairs.after(last);
    return z[0] < ELEMENTS;
}

// [S, V_xyz] of an atom, as halves in rows of K, times `shrink`
__device__ __forceinline__ void sum_pairs(const Pairs& pairs, int local, const float* units, float shrink, uint32* rows) {
    float sums[TILES][4] = {};
    each<OfTwo>(pairs, local, [&](const OfTwo& functions, const float4* chosen, const int* bytes, int, Next<OfTwo> next) {
        int pair = 2 * (lane() % 4), which[2] = {bytes[pair] & 15, bytes[pair + 1] & 15};
        const float *first = (const float*)(chosen + pair), *second = first + 4;  // t and u
        Value of_first(first[0], units), of_second(second[0], units);
        uint32 of_high[TILES], of_low[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++)
            split(of_first(functions(0, tile)), of_second(functions(1, tile)), of_high[tile], of_low[tile]);
        next();
        uint32 high, low, highs[4] = {}, lows[4] = {};
        split(component() ? first[component()] : 1.f, component() ? second[component()] : 1.f, high, low);
#pragma unroll
        for (int k = 0; k < 1 + HAS_B; k++) {
            bool all = !HAS_B && component();
            uint32 mask = (all || which[0] == element_of(k) ? 0xffffu : 0) | (all || which[1] == element_of(k) ? 0xffff0000u : 0);
            highs[k] = high & mask, lows[k] = low & mask;
        }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            mma_of_8(sums[tile], lows, of_high[tile]);
            mma_of_8(sums[tile], highs, of_low[tile]);
            mma_of_8(sums[tile], highs, of_high[tile]);
        }
    });
#pragma unroll
    for (int k = 0; k < 1 + HAS_B; k++) {
        if (!has_row(k)) continue;
        uint32* at = rows + row_of(element_of(k), component()) * STRIDE + lane() % 4;
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) split(shrink * sums[tile][2 * k], shrink * sums[tile][2 * k + 1], at[4 * tile], at[ATOMS * SUMS + 4 * tile]);
    }
}

// what this thread stored, which a read that takes no place in L1 might miss
__device__ __forceinline__ void add_stored(const Here& h, Row& r, const float* x, int stride, int offset) {
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (h.has(k, F)) add_four(r, k, x + (long long)(h.atom + 8 * k) * stride + offset + h.channel);
}

// a matrix, in registers, of this warp's columns
struct Held {
    uint4 m[K / 16][2];
    __device__ __forceinline__ Held(const uint4* matrix) {
#pragma unroll
        for (int step = 0; step < K / 16; step++)
#pragma unroll
            for (int j = 0; j < 2; j++) m[step][j] = matrix[((warp() * (K / 16) + step) * 2 + j) * 32 + lane()];
    }
    // the product of a row of halves of each atom
    __device__ __forceinline__ Row times(const uint32* operands, float factor) const {
        float acc[2][4] = {};
#pragma unroll
        for (int step = 0; step < K / 16; step++) {
            uint32 high[4], low[4];
            load_a(high, operands + 8 * step, SUMS);
            load_a(low, operands + ATOMS * SUMS + 8 * step, SUMS);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                mma(acc[j], low, m[step][j].x, m[step][j].y);
                mma(acc[j], high, m[step][j].z, m[step][j].w);
                mma(acc[j], high, m[step][j].x, m[step][j].y);
            }
        }
        return as_row(acc, factor, factor);
    }
};

// a, b: what elements send; without b a row of ones. Matrices: C of either filter; factors undo theirs.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
first_message(const int* __restrict__ senders, const float* __restrict__ places, const int* __restrict__ numbers,
              const uint2* __restrict__ basis, const float* __restrict__ a, const float* __restrict__ b, const uint4* __restrict__ of_a,
              const uint4* __restrict__ of_b, const float* __restrict__ factors, int n, int slots, float* ds, float* dv) {
    SHARED(uint32, memory);
    uint32* operands = in_register(memory);  // S and V: [high and low, ATOMS, SUMS]
    float4* for_chosen = (float4*)(operands + 2 * ATOMS * SUMS);
    Pairs pairs(numbers, senders, places, basis, sizeof(uint2), factors[8], n, slots, (float*)for_chosen + 5 * ATOMS * CHOSEN, for_chosen, nullptr);
    Here here(n);
    float shrink = 1.f, grow = 1.f;  // B is at most 16384, a half at most 65504
    while (16384.f * slots * shrink > 32768.f) shrink *= 0.5f, grow *= 2.f;
    for (int k = thread(); k < ATOMS * SUMS / 2; k += THREADS) ((uint4*)operands)[k] = {0, 0, 0, 0};  // where no functions are
    sync();
    bool first = true;
    int z[BATCH];
    for (z[BATCH - 1] = -1; next_elements(pairs, z) || first; first = false) {
        pairs.choose(z);
        pairs.begin_all();
        for (int local = warp(); local < ATOMS; local += GROUPS) sum_pairs(pairs, local, factors + 6, shrink, operands + local * SUMS);
        // products of a component's sums of each element, times what that sends, and what the elements before gave
        auto products = [&](const Held& matrix, int component, const float* sent, float factor, float* to, int stride, int offset) {
            bool by_elements = HAS_B || component == 0;
            Row sum = {};
            if (!first) add_stored(here, sum, to, stride, offset);
#pragma unroll 1
            for (int k = 0; k < (by_elements ? BATCH : 1) && pairs.batch[k] < ELEMENTS; k++) {
                Row x = matrix.times(operands + row_of(k, component) * STRIDE, grow * factor);
                Row times = load_shared_row(here, sent, by_elements ? pairs.batch[k] * F : 0, F);
                EACH sum.v[i] += times.v[i] * x.v[i];
            }
            store_row(here, to, stride, offset, F, sum);
        };
        Held for_scalars(of_a);
        sync();
        products(for_scalars, 0, a, factors[0], ds, F, 0);
        Held for_vectors(of_b);
#pragma unroll
        for (int axis = 0; axis < 3; axis++) products(for_vectors, 1 + axis, b, factors[1], dv, 3 * F, axis * F);
        sync();
    }
}

// 16 columns of a row of K numbers of each atom
__device__ __forceinline__ void keep(const Here& h, float* rows, int part, const Row& r) {
#pragma unroll
    for (int k = 0; k < 2; k++)
        *(float4*)(rows + (h.local + 8 * k) * K + 16 * part + 4 * (lane() & 3)) = make_float4(r.v[4 * k], r.v[4 * k + 1], r.v[4 * k + 2], r.v[4 * k + 3]);
}

// P and Q of an atom as halves, times a power of 2 for each row, in two rows of a lane
struct Above {
    uint32 high[2 * TILES], low[2 * TILES];  // by words, then by rows
    float down[2];                                          // undoes the power
    __device__ __forceinline__ Above(const float* rows) {
        float x[2][2 * TILES], most[2] = {0.f, 0.f};
#pragma unroll
        for (int k = 0; k < 2; k++) {
            const float* row = rows + row_of(element_of(k), component()) * ABOVE + lane() % 4;
#pragma unroll
            for (int f = 0; f < 2 * TILES; f++) x[k][f] = has_row(k) ? row[4 * f] : 0.f, most[k] = fmaxf(most[k], fabsf(x[k][f]));
            most[k] = fmaxf(most[k], from_lane(most[k], 1)), most[k] = fmaxf(most[k], from_lane(most[k], 2));
        }
        Scale scale(as_int(most[0]), as_int(most[1]));
#pragma unroll
        for (int k = 0; k < 2; k++) {
            down[k] = scale.down(k);
#pragma unroll
            for (int w = 0; w < TILES; w++)
                split(scale.up(k) * x[k][2 * w], scale.up(k) * x[k][2 * w + 1], high[2 * w + k], low[2 * w + k]);
        }
    }
};

// products of those rows with functions of eight pairs, of which a lane has two words of halves: [row, pair]
__device__ __forceinline__ void multiply_pairs(float (&sums)[4], const uint32 (&rows)[2 * TILES], const uint32 (&of)[TILES]) {
#pragma unroll
    for (int w = 0; w < TILES; w += 2) {
        const uint32 a[4] = {rows[2 * w], rows[2 * w + 1], rows[(2 * w + 2) % (2 * TILES)], rows[(2 * w + 3) % (2 * TILES)]};
        if (w + 1 < TILES) mma(sums, a, of[w], of[(w + 1) % TILES]);
        else mma_of_8(sums, a, of[w]);
    }
}

// Of each pair (i, j) [D, -U_xyz], the half that belongs to what j sends to i. Matrices: of each element a C and, with b, b C,
// or else C, transposed; factors[4] and what undoes it bring slopes of B to what halves can hold.
extern "C" __global__ void __launch_bounds__(THREADS, 3)
first_transpose(const int* __restrict__ senders, const float* __restrict__ places, const int* __restrict__ numbers,
                const float4* __restrict__ basis, const uint4* __restrict__ of_a, const uint4* __restrict__ of_b,
                const float* __restrict__ factors, const float* __restrict__ p, const float* __restrict__ q, int n, int slots,
                float* __restrict__ pair_bars) {
    constexpr int PARTS = K / 16, COLUMN = F / 16 * 64;  // words of 16 columns of a matrix, by four
    SHARED(uint32, memory);
    uint32* operands = in_register(memory);  // rows of F, [4, high and low, ATOMS, WORDS]; when they are no longer needed, places of pairs
    float* above = (float*)(operands + max(8 * HALF, 5 * ATOMS * CHOSEN));  // P and Q, [ROWS, ATOMS, K]
    int* maxima = (int*)(above + ROWS * ABOVE);                            // of p's rows, of q's
    Pairs pairs(numbers, senders, places, basis, sizeof(float4), 1.f, n, slots, maxima + 2 * ATOMS, operands, pair_bars);
    Here here(n);
    float grow = factors[4], shrink = factors[5];
    int z[BATCH];
    for (z[BATCH - 1] = -1; next_elements(pairs, z);) {
        if (thread() < 2 * ATOMS) maxima[thread()] = 0;
        Row own[4];
        own[0] = load_row(here, p, F, 0, F);
#pragma unroll
        for (int axis = 0; axis < 3; axis++) own[1 + axis] = load_row(here, q, 3 * F, axis * F, F);
        sync();
        largest(here, maxima, F, own[0]);
        largest(here, maxima + ATOMS, F, own[1], own[2], own[3]);
        sync();
        Scale of_p(here, maxima), of_q(here, maxima + ATOMS);
        put_row(here, operands, of_p, own[0], F);
#pragma unroll
        for (int axis = 0; axis < 3; axis++) put_row(here, operands + 2 * (1 + axis) * HALF, of_q, own[1 + axis], F);
        pairs.choose(z);
        sync();
#pragma unroll 1
        for (int job = warp(); job < BATCH * PARTS; job += GROUPS) {
            int k = job / PARTS, part = job % PARTS, of = pairs.batch[k];
            if (of >= ELEMENTS) break;
            float scalar[1][1][2][4] = {};  // columns of a warp's own are 16 warp() and on
            accumulate<1, 1, F, 1, F>(scalar, operands, of_a + (of * PARTS + part - warp()) * COLUMN);
            keep(here, above + row_of(k, 0) * ABOVE, part, as_row(scalar[0][0], factors[2] * of_p.down(0), factors[2] * of_p.down(1)));
            if (!HAS_B && k) continue;
            float vector[3][1][2][4] = {};
            accumulate<3, 1, F, 1, F>(vector, operands + 2 * HALF, of_b + ((HAS_B ? of : 0) * PARTS + part - warp()) * COLUMN);
#pragma unroll
            for (int axis = 0; axis < 3; axis++)
                keep(here, above + row_of(k, 1 + axis) * ABOVE, part, as_row(vector[axis][0], factors[3] * of_q.down(0), factors[3] * of_q.down(1)));
        }
        sync();
        pairs.begin_all();
        for (int local = warp(); local < ATOMS; local += GROUPS) {
            Above rows(above + local * K);
            each<OfOne>(pairs, local, [&](const OfOne& functions, const float4* chosen, const int* bytes, int from, Next<OfOne> next) {
                float t = chosen[lane() / 4].x;
                uint32 high[2][TILES], low[2][TILES];  // of B, of its slopes
#pragma unroll
                for (int w = 0; w < TILES; w++) {
                    float4 c = functions(2 * w), d = functions(2 * w + 1);
                    split(cubic(c, t), cubic(d, t), high[0][w], low[0][w]);
                    split(grow * cubic_slope(c, t), grow * cubic_slope(d, t), high[1][w], low[1][w]);
                }
                next();
                // of a lane's row two pairs; of either pair the lanes of 16 take what those of the other half have
                int upper = lane() / 16, two = 2 * (lane() % 4), pair = two + upper, axis = lane() / 4 % 4;
                float sums[2][4] = {};
#pragma unroll
                for (int slope = 0; slope < 2; slope++) {
                    multiply_pairs(sums[slope], rows.low, high[slope]);
                    multiply_pairs(sums[slope], rows.high, low[slope]);
                    multiply_pairs(sums[slope], rows.high, high[slope]);
                }
                const float *at = (const float*)(chosen + pair), *at_other = (const float*)(chosen + two + 1 - upper);
                float d, minus_u;
                if (HAS_B) {
                    float own[2];
#pragma unroll
                    for (int slope = 0; slope < 2; slope++) {
                        float x[2];
#pragma unroll
                        for (int k = 0; k < 2; k++)
                            x[k] = bytes[two + k] & 2 ? rows.down[1] * sums[slope][2 + k] : rows.down[0] * sums[slope][k];
                        own[slope] = upper ? x[1] : x[0];
                        float given = from_lane(upper ? x[0] : x[1], 16);
                        if ((bytes[pair] & 1) != upper) own[slope] = given;
                    }
                    d = axis ? at[axis] * own[1] : own[1], minus_u = -own[0];
                } else {
                    // the lower lanes have P of their elements, the upper ones Q
                    auto share = [&](const float* at, int place, float x) {
                        return upper ? (axis ? at[axis] * x : 0.f) : (bytes[place] & 15) == axis ? x : 0.f;
                    };
                    float mine = upper ? sums[1][1] : sums[1][0], theirs = upper ? sums[1][0] : sums[1][1];
                    d = share(at, pair, rows.down[0] * mine) + from_lane(share(at_other, two + 1 - upper, rows.down[0] * theirs), 16);
                    float given = from_lane(rows.down[0] * sums[0][0], 16);
                    minus_u = upper ? -rows.down[0] * sums[0][1] : -given;
                }
                d += from_lane(d, 4), d += from_lane(d, 8);
                int slot = pairs.slot_of(local, from + pair);
                if (slot != NONE)
                    pair_bars[place_of_bar((block() * ATOMS + local) * slots + slot, axis, n * slots)] = axis ? minus_u : shrink * d;
            });
        }
    }
}
