// What happens to few atoms between two messages: a block has OWN channels of ATOMS atoms, as a program of
// jaxff.kernels.programs has its channels of one, so that matrices are read by many multiprocessors.
//
// 16 threads serve an atom, each some channels of every row. What is multiplied by a matrix passes through shared
// memory as sums of two halves, times a power of 2 for each atom that brings its largest number to about 128. Matrices
// come as two halves, too (tiles.cu), before they are needed; warps share columns and, where those are few, rows.
// Defined from outside: F, OWN, and ATOMS, a multiple of 16. The kernel itself is generated (cut.py), or that of a
// message (few.cu), which runs its lines.
#define LANES (OWN < 16 ? OWN : 16)  // of an atom
#define WARPS (LANES * ATOMS / 32)
#define CUTS (F / OWN)  // blocks that share an atom
#define EACH(N) _Pragma("unroll") for (int i = 0; i < N; i++)

template <int N>
struct Row {  // a thread's numbers of a row of 16 N
    float v[N];
    static constexpr int RUN = N % 4 == 0 ? 4 : N % 2 == 0 ? 2 : 1;  // that lie side by side
};

struct Here {
    int n, cut, local, atom, first;  // atom: n, if it is not the block's; first: of this thread's lanes
    __device__ __forceinline__ Here(int atoms, int of_block) : n(atoms) {
        cut = block() % CUTS, local = thread() / LANES, first = thread() % LANES;
        atom = local < of_block ? block() / CUTS * of_block + local : n;
    }
    template <int N>
    __device__ __forceinline__ int channel(int i) const {
        constexpr int RUN = Row<N>::RUN;
        return i / RUN * LANES * RUN + RUN * first + i % RUN;
    }
};

template <int RUN>
struct alignas(4 * RUN) Run {
    float v[RUN];
};

// from what lies at x, the same for all atoms
template <int N>
__device__ __forceinline__ Row<N> shared_row(const Here& h, const float* x) {
    constexpr int RUN = Row<N>::RUN;
    Row<N> r;
#pragma unroll
    for (int i = 0; i < N; i += RUN) {
        Run<RUN> run = *(const Run<RUN>*)(x + h.channel<N>(i));
#pragma unroll
        for (int k = 0; k < RUN; k++) r.v[i + k] = run.v[k];
    }
    return r;
}

template <int N>
__device__ __forceinline__ Row<N> load_row(const Here& h, const float* x, int stride, int offset) {
    if (h.atom < h.n) return shared_row<N>(h, x + h.atom * stride + offset);
    Row<N> r = {};
    return r;
}

template <int N>
__device__ __forceinline__ void store_row(const Here& h, float* x, int stride, int offset, const Row<N>& r) {
    constexpr int RUN = Row<N>::RUN;
    if (h.atom >= h.n) return;
#pragma unroll
    for (int i = 0; i < N; i += RUN) {
        Run<RUN> run;
#pragma unroll
        for (int k = 0; k < RUN; k++) run.v[k] = r.v[i + k];
        *(Run<RUN>*)(x + h.atom * stride + offset + h.channel<N>(i)) = run;
    }
}

// the sum of what all SHARES blocks of an atom had of a row of WIDTH channels; N of those, from `offset`
template <int N, int SHARES, int WIDTH>
__device__ __forceinline__ Row<N> load_shares(const Here& h, const float* x, int offset) {
    Row<N> shares[SHARES], r;
#pragma unroll
    for (int k = 0; k < SHARES; k++) shares[k] = load_row<N>(h, x, SHARES * WIDTH, k * WIDTH + offset);
    r = shares[0];
#pragma unroll
    for (int k = 1; k < SHARES; k++) EACH(N) r.v[i] += shares[k].v[i];
    return r;
}

template <int N>
__device__ __forceinline__ float row_sum(const Row<N>& r) {
    float s = r.v[0];
#pragma unroll
    for (int i = 1; i < N; i++) s += r.v[i];
#pragma unroll
    for (int mask = 1; mask < LANES; mask *= 2) s += from_lane(s, mask);
    return s;
}

__device__ __forceinline__ void store_number(const Here& h, float* x, float value) {
    if (h.atom < h.n && h.cut == 0 && h.first == 0) x[h.atom] = value;
}

// for this thread's atom the power of 2 that brings the largest number of some rows to 128..256, and its inverse
struct Scale {
    int exponent;
    template <class... Rows>
    __device__ __forceinline__ Scale(const Rows&... rows) {
        float m = 0.f;
        (..., put(m, rows));
#pragma unroll
        for (int mask = 1; mask < LANES; mask *= 2) m = fmaxf(m, from_lane(m, mask));
        exponent = min(max((as_int(m) >> 23) & 255, 40), 230);
    }
    template <int N>
    static __device__ __forceinline__ void put(float& m, const Row<N>& r) {
        EACH(N) m = fmaxf(m, fabsf(r.v[i]));
    }
    __device__ __forceinline__ float up() const { return as_float((127 + 7 + 127 - exponent) << 23); }
    __device__ __forceinline__ float down() const { return as_float((exponent - 7) << 23); }
};

// a row as halves from column `from` of an operand's rows of `words` words, the low ones after `low` words
template <int N>
__device__ __forceinline__ void put_row(const Here& h, uint32* operand, int words, int low, int from, float up, const Row<N>& r) {
    uint32* at = operand + h.local * words + from / 2;
    if (N == 1) {
        float other = from_lane(r.v[0], 1);
        if (h.first % 2 == 0) split(up * r.v[0], up * other, at[h.first / 2], at[low + h.first / 2]);
        return;
    }
#pragma unroll
    for (int i = 0; i + 1 < N; i += 2) {
        int word = h.channel<N>(i) / 2;
        split(up * r.v[i], up * r.v[i + 1], at[word], at[low + word]);
    }
}

__device__ constexpr int common(int n) { return n % 8 == 0 ? 8 : n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1; }

// GROUPS of 16 columns and STEPS of 16 rows of a matrix with ALL steps: of every PART groups IN, of every BLOCK steps DEEP
template <int GROUPS, int IN, int PART, int STEPS, int DEEP, int BLOCK, int ALL>
struct Matrix {
    static constexpr int SIDE = common(GROUPS), SHARES = WARPS / SIDE;  // warps that share columns, and rows
    static constexpr int MINE = GROUPS / SIDE, STEP = (STEPS + SHARES - 1) / SHARES;
    static constexpr int WORDS = 8 * STEPS + 4, STRIDE = 16 * GROUPS + 4;  // of a row of halves, of products
    uint4 m[MINE][STEP][2];

    // from that group and step
    __device__ __forceinline__ Matrix(const uint4* matrix, int group, int step) {
#pragma unroll
        for (int g = 0; g < MINE; g++)
#pragma unroll
            for (int s = 0; s < STEP; s++) {
                int column = warp() % SIDE * MINE + g, row = warp() / SIDE * STEP + s;
                column = group + column / IN * PART + column % IN;
#pragma unroll
                for (int j = 0; j < 2; j++)
                    if (row < STEPS)
                        m[g][s][j] = matrix[((column * ALL + step + row / DEEP * BLOCK + row % DEEP) * 2 + j) * 32 + lane()];
            }
    }
    // operand rows times it, a sum for each share of its rows
    template <int ROWS>
    __device__ __forceinline__ void multiply(float* products, const uint32* operand) const {
        // few sums are three each, so that no product waits long for the one before
        constexpr int TILES = ROWS * ATOMS / 16, LOW = ROWS * ATOMS * WORDS, CHAINS = TILES * MINE == 1 ? 3 : 1;
        float acc[TILES][MINE][2][CHAINS][4] = {};
#pragma unroll
        for (int s = 0; s < STEP; s++) {
            int row = warp() / SIDE * STEP + s;
            if (row >= STEPS) break;
#pragma unroll
            for (int r = 0; r < TILES; r++) {
                uint32 high[4], low[4];
                const uint32* from = operand + r * 16 * WORDS + 8 * row;
                load_a(high, from, WORDS);
                load_a(low, from + LOW, WORDS);
#pragma unroll
                for (int g = 0; g < MINE; g++)
#pragma unroll
                    for (int j = 0; j < 2; j++) {
                        const uint4& b = m[g][s][j];
                        mma(acc[r][g][j][0], low, b.x, b.y);
                        mma(acc[r][g][j][1 % CHAINS], high, b.z, b.w);
                        mma(acc[r][g][j][2 % CHAINS], high, b.x, b.y);
                    }
            }
        }
#pragma unroll
        for (int r = 0; r < TILES; r++)
#pragma unroll
            for (int g = 0; g < MINE; g++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    float x[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const auto& terms = acc[r][g][k / 2];
                        x[k] = terms[0][2 * half + k % 2];
#pragma unroll
                        for (int i = 1; i < CHAINS; i++) x[k] += terms[i][2 * half + k % 2];
                    }
                    int atom = ((warp() / SIDE * TILES + r) * 16 + lane() / 4 + 8 * half) * STRIDE;
                    *(float4*)(products + atom + 16 * (warp() % SIDE * MINE + g) + 4 * (lane() % 4)) = make_float4(x[0], x[1], x[2], x[3]);
                }
    }
    // N channels a thread of what it left for row r, from a column, times a number
    template <int N, int ROWS>
    __device__ __forceinline__ Row<N> row(const Here& h, const float* products, int r, int from, float factor) const {
        Row<N> sums;
#pragma unroll
        for (int k = 0; k < SHARES; k++) {
            Row<N> share = shared_row<N>(h, products + ((k * ROWS + r) * ATOMS + h.local) * STRIDE + from);
            EACH(N) sums.v[i] = k == 0 ? share.v[i] : sums.v[i] + share.v[i];
        }
        EACH(N) sums.v[i] *= factor;
        return sums;
    }
};
