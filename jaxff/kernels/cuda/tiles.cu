// What happens to atoms between two messages: rows of channels, of 16 atoms that F/16 warps share.
//
// A lane has four channels of two atoms, g and g + 8, as mma.m16n8k16 leaves a product of two 8-column tiles whose
// columns were permuted. What is multiplied by a matrix passes through shared memory as sums of two halves, times a
// power of 2 for each atom that brings its largest number to about 128. Matrices come as two halves, too, times a
// power of 2, in the order in which lanes read them, a step ahead of the products.
// Defined from outside: F, RESIDENT (blocks of a multiprocessor at once). The kernel itself is generated (tiles.py).
#define GROUPS (F / 16)  // of channels, a warp for each
#define ATOMS 16
#define THREADS (32 * GROUPS)
#define WORDS (F / 2 + 4)  // of a row of halves in shared memory: no two lanes share a bank
#define HALF (ATOMS * WORDS)
#define EACH _Pragma("unroll") for (int i = 0; i < 8; i++)

struct Row {
    float v[8];  // four channels of atom g, the same of atom g + 8
};

struct Here {
    int n, atom, local, channel;  // first atom of this lane, of all and of the 16; first channel
    int left[2];                  // of the first and the second eight atoms, which block of message.cu left a part of their sums
    // parts: blocks of message.cu, if those have equal parts of all groups of eight atoms and leave what they sum within one
    __device__ Here(int atoms, int parts = 1) : n(atoms) {
        local = lane() >> 2;
        atom = block() * ATOMS + local;
        channel = warp() * 16 + 4 * (lane() & 3);
        int groups = (n + 7) / 8;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            int group = 2 * block() + k, next = group * parts / groups + 1;  // the first block that begins behind its beginning
            left[k] = parts > 1 && groups * next / parts == group ? next - 1 : -1;
        }
    }
    __device__ __forceinline__ bool has(int second, int width) const { return atom + 8 * second < n && channel < width; }
};

__device__ __forceinline__ Row load_row(const Here& h, const float* x, int stride, int offset, int width) {
    Row r;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float4 q = make_float4(0.f, 0.f, 0.f, 0.f);
        if (h.has(k, width)) q = passing((const float4*)(x + (long long)(h.atom + 8 * k) * stride + offset + h.channel));
        r.v[4 * k] = q.x, r.v[4 * k + 1] = q.y, r.v[4 * k + 2] = q.z, r.v[4 * k + 3] = q.w;
    }
    return r;
}

// four channels more, of the k-th of a lane's two atoms
__device__ __forceinline__ void add_four(Row& r, int k, const float* from) {
    float4 q = *(const float4*)from;
    r.v[4 * k] += q.x, r.v[4 * k + 1] += q.y, r.v[4 * k + 2] += q.z, r.v[4 * k + 3] += q.w;
}

// sums of a message, with what was left, [8 parts, all], from `column` on
__device__ __forceinline__ Row load_sums(const Here& h, const float* x, int stride, int offset, int width, const float* rest, int all, int column) {
    Row r = load_row(h, x, stride, offset, width);
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (h.left[k] >= 0 && h.has(k, width)) add_four(r, k, rest + (8 * h.left[k] + h.local) * all + column + h.channel);
    return r;
}

__device__ __forceinline__ void store_row(const Here& h, float* x, int stride, int offset, int width, const Row& r) {
#pragma unroll
    for (int k = 0; k < 2; k++)
        if (h.has(k, width))
            *(float4*)(x + (long long)(h.atom + 8 * k) * stride + offset + h.channel) =
                make_float4(r.v[4 * k], r.v[4 * k + 1], r.v[4 * k + 2], r.v[4 * k + 3]);
}

// four rows as three (`pack`), at `offset` and behind it
__device__ __forceinline__ void store_packed(const Here& h, float* x, int stride, int offset, int width, const Row& a, const Row& b, const Row& c, const Row& d) {
    Row packed[3];
    EACH {
        float words[3];
        pack({a.v[i], b.v[i], c.v[i], d.v[i]}, words);
        packed[0].v[i] = words[0], packed[1].v[i] = words[1], packed[2].v[i] = words[2];
    }
#pragma unroll
    for (int k = 0; k < 3; k++) store_row(h, x, stride, offset + k * width, width, packed[k]);
}

// a row that all atoms share
__device__ __forceinline__ Row load_shared_row(const Here& h, const float* x, int offset, int width) {
    Row r;
    float4 q = make_float4(0.f, 0.f, 0.f, 0.f);
    if (h.channel < width) q = *(const float4*)(x + offset + h.channel);
    r.v[0] = r.v[4] = q.x, r.v[1] = r.v[5] = q.y, r.v[2] = r.v[6] = q.z, r.v[3] = r.v[7] = q.w;
    return r;
}

// the largest number of each atom in some rows, into memory that was 0
template <class... Rows>
__device__ __forceinline__ void largest(const Here& h, int* memory, int width, const Rows&... rows) {
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float m = 0.f;
        (..., (m = fmaxf(fmaxf(fmaxf(m, fabsf(rows.v[4 * k])), fmaxf(fabsf(rows.v[4 * k + 1]), fabsf(rows.v[4 * k + 2]))),
                         fabsf(rows.v[4 * k + 3]))));
        m = fmaxf(m, from_lane(m, 1));
        m = fmaxf(m, from_lane(m, 2));
        if ((lane() & 3) == 0 && h.channel < width) max_at(memory + h.local + 8 * k, as_int(m));
    }
}

// for this lane's two atoms the power of 2 that brings the largest number to 128..256, and its inverse
struct Scale {
    int exponent[2];
    __device__ __forceinline__ Scale(const Here& h, const int* largest) : Scale(largest[h.local], largest[h.local + 8]) {}
    __device__ __forceinline__ Scale(int first, int second) : exponent{of(first), of(second)} {}
    __device__ static __forceinline__ int of(int largest) { return min(max((largest >> 23) & 255, 40), 230); }
    __device__ __forceinline__ float up(int k) const { return as_float((127 + 7 + 127 - exponent[k]) << 23); }
    __device__ __forceinline__ float down(int k) const { return as_float((exponent[k] - 7) << 23); }
};

__device__ __forceinline__ void put_row(const Here& h, uint32* operand, const Scale& scale, const Row& r, int width) {
    if (h.channel >= width) return;
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float s = scale.up(k);
        uint32* at = operand + (h.local + 8 * k) * WORDS + h.channel / 2;
        split(s * r.v[4 * k], s * r.v[4 * k + 1], at[0], at[HALF]);
        split(s * r.v[4 * k + 2], s * r.v[4 * k + 3], at[1], at[HALF + 1]);
    }
}

// a row of this thread's, in shared memory until it is needed, where a unit would hold an operand
__device__ __forceinline__ void park(uint32* operands, int unit, const Row& r) {
    float4* at = (float4*)(operands + unit * 2 * HALF) + thread();
    at[0] = make_float4(r.v[0], r.v[1], r.v[2], r.v[3]), at[THREADS] = make_float4(r.v[4], r.v[5], r.v[6], r.v[7]);
}
__device__ __forceinline__ Row parked(const uint32* operands, int unit) {
    const float4* at = (const float4*)(operands + unit * 2 * HALF) + thread();
    float4 x = at[0], y = at[THREADS];
    return {x.x, x.y, x.z, x.w, y.x, y.y, y.z, y.w};
}

// two matrices that rows are multiplied by at once
struct Both {
    const uint4 *first, *second;
};
// where a part's columns begin
__device__ __forceinline__ const uint4* columns(const uint4* matrix, int part, int words) { return matrix + part * words; }
__device__ __forceinline__ const uint4* columns(const Both& matrices, int part, int) { return part ? matrices.second : matrices.first; }

// acc += ROWS products of operands with BLOCKS parts of DEPTH channels each, rows of STRIDE words; columns in PARTS parts
// of WIDTH, of one matrix or two; it has 16 ALL rows
template <int ROWS, int BLOCKS, int DEPTH, int PARTS, int WIDTH, int STRIDE = WORDS, int ALL = BLOCKS * DEPTH / 16, class Matrix>
__device__ __forceinline__ void accumulate(float (&acc)[ROWS][PARTS][2][4], const uint32* operands, const Matrix& matrix) {
    if (16 * warp() >= WIDTH) return;  // never where WIDTH is F; left out there, ptxas moves more about, and spills more
    constexpr int PART = ATOMS * STRIDE, STEPS = DEPTH / 16;
    uint4 m[2][2];  // what is in use, what comes next
    uint32 high[ROWS][4], low[ROWS][4];
#pragma unroll
    for (int unit = -1; unit < BLOCKS * STEPS * PARTS; unit++) {
        int next = unit + 1, step = unit / PARTS, p = unit % PARTS;
        if (next < BLOCKS * STEPS * PARTS)
#pragma unroll
            for (int j = 0; j < 2; j++)
                m[next % 2][j] = columns(matrix, next % PARTS, WIDTH / 16 * ALL * 64)[((warp() * ALL + next / PARTS) * 2 + j) * 32 + lane()];
        if (unit < 0) continue;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (p == 0) {
                const uint32* rows = operands + (r * BLOCKS + step / STEPS) * 2 * PART + 8 * (step % STEPS);
                load_a(high[r], rows, STRIDE);
                load_a(low[r], rows + PART, STRIDE);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint4& b = m[unit % 2][j];
                mma(acc[r][p][j], low[r], b.x, b.y);
                mma(acc[r][p][j], high[r], b.z, b.w);
                mma(acc[r][p][j], high[r], b.x, b.y);
            }
        }
    }
}

// what a product left in two tiles, times a number for each of the two atoms
__device__ __forceinline__ Row as_row(const float (&acc)[2][4], float first, float second) {
    Row r;
#pragma unroll
    for (int j = 0; j < 2; j++) {
        r.v[2 * j] = first * acc[j][0], r.v[2 * j + 1] = first * acc[j][1];
        r.v[4 + 2 * j] = second * acc[j][2], r.v[5 + 2 * j] = second * acc[j][3];
    }
    return r;
}

// those products, as rows; each part has a factor, or all have the same
template <int ROWS, int PARTS, class... Factor>
__device__ __forceinline__ void as_rows(Row (&out)[ROWS][PARTS], const float (&acc)[ROWS][PARTS][2][4], const Scale& scale, Factor... factor) {
    const float factors[] = {factor...};
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
        float of_part = factors[p % sizeof...(factor)], first = of_part * scale.down(0), second = of_part * scale.down(1);
#pragma unroll
        for (int r = 0; r < ROWS; r++) out[r][p] = as_row(acc[r][p], first, second);
    }
}

template <int ROWS, int BLOCKS, int DEPTH, int PARTS, int WIDTH>
__device__ __forceinline__ void multiply(Row (&out)[ROWS][PARTS], const uint32* operands, const Scale& scale, const uint4* matrix, float factor) {
    float acc[ROWS][PARTS][2][4] = {};
    accumulate<ROWS, BLOCKS, DEPTH, PARTS, WIDTH>(acc, operands, matrix);
    as_rows(out, acc, scale, factor);
}

// one number an atom: the sum over channels
__device__ __forceinline__ void store_row_sum(const Here& h, float* x, float* memory, const Row& r, int width) {
    sync();
#pragma unroll
    for (int k = 0; k < 2; k++) {
        float s = h.channel < width ? (r.v[4 * k] + r.v[4 * k + 1]) + (r.v[4 * k + 2] + r.v[4 * k + 3]) : 0.f;
        s += from_lane(s, 1);
        s += from_lane(s, 2);
        if ((lane() & 3) == 0) memory[warp() * ATOMS + h.local + 8 * k] = s;
    }
    sync();
    int atom = block() * ATOMS + thread();
    if (thread() < ATOMS && atom < h.n) {
        float s = 0.f;
#pragma unroll
        for (int k = 0; k < GROUPS; k++) s += memory[k * ATOMS + thread()];
        x[atom] = s;
    }
}
