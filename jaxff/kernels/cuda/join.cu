// Adds what message.cu left in `rest`: of the group within which blocks ended, to what the last one found. The first of
// them does it for all, in their order.
// Defined from outside: THREADS; WIDTH_0, WIDTH_1, WIDTH_2 of the arrays, which an atom's row of `rest` has side by side; 0 for none.
#define GROUP 8  // atoms
#define ALL (WIDTH_0 + WIDTH_1 + WIDTH_2)
#if WIDTH_2
#define THREE(x) float *x##_0, float *x##_1, float *x##_2
#elif WIDTH_1
#define THREE(x) float *x##_0, float *x##_1
#else
#define THREE(x) float* x##_0
#endif

// before, after: the same memory
extern "C" __global__ void __launch_bounds__(THREADS)
join(const float* __restrict__ rest, THREE(before), int n, int parts, THREE(after)) {
    const long long groups = (n + GROUP - 1) / GROUP;
    const int group = (int)(groups * (block() + 1) / parts);
    if (groups * (block() + 1) % parts == 0 || (groups * block() / parts == group && groups * block() % parts)) return;
    int end = block() + 1;
    while (end + 1 < parts && groups * (end + 1) / parts == group) end++;
    for (int k = thread(); k < GROUP * ALL / 4; k += THREADS) {
        int row = k / (ALL / 4), column = k % (ALL / 4) * 4, atom = group * GROUP + row;
        if (atom >= n) return;
        float* at = after_0 + atom * WIDTH_0 + column;
#if WIDTH_1
        if (column >= WIDTH_0) at = after_1 + atom * WIDTH_1 + column - WIDTH_0;
#endif
#if WIDTH_2
        if (column >= WIDTH_0 + WIDTH_1) at = after_2 + atom * WIDTH_2 + column - WIDTH_0 - WIDTH_1;
#endif
        float4 x = *(float4*)at;
        for (int of = block(); of < end; of++) {
            float4 more = *(const float4*)(rest + (of * GROUP + row) * ALL + column);
            x = make_float4(x.x + more.x, x.y + more.y, x.z + more.z, x.w + more.w);
        }
        *(float4*)at = x;
    }
}
