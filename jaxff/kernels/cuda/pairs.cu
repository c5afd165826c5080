// Gradients by the vectors of pairs: of [D, U_xyz] of each pair and of its reverse, from the halves that both have of each
// interaction (jaxff.kernels.message.whole, jaxff.ops.distance.distance_bwd).
//
// A warp serves the pairs of one atom with senders after it, and looks for the reverse of each among its sender's: it is
// the only one with this atom, but for those that don't count. Of pairs that don't count: zeros.
// Defined from outside: WARPS of a block; SLOTS of an atom; EACH_ARRAY(x): x(0) x(1) ... for each array of halves.
#define AT_ONCE 8  // pairs
#define ROUNDS ((SLOTS + 31) / 32)
#define ARGUMENT(k) const float4 *__restrict__ halves_##k,
#define ADD(k) r = r + halves_##k[e];

__device__ __forceinline__ float4 operator+(float4 x, float4 y) { return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w); }

// interval, epsilon: a table's interval in Å, and ε of directions u = r / (d + ε), as words
extern "C" __global__ void __launch_bounds__(32 * WARPS)
whole(const int* __restrict__ senders, const float* __restrict__ places, EACH_ARRAY(ARGUMENT) int n, int interval, int epsilon,
      float* __restrict__ by_vectors) {
    int all = n * SLOTS, atom = block() * WARPS + warp();
    const float* mask = places + all;
    auto total = [&](int e) {
        float4 r = make_float4(0.f, 0.f, 0.f, 0.f);
        EACH_ARRAY(ADD)
        return r;
    };
    if (atom >= n) return;
    for (int begin = 0; begin < SLOTS; begin += 32) {
        int slot = begin + lane(), e = atom * SLOTS + slot, reverse = -1;
        bool counts = slot < SLOTS && mask[e] > 0.f;
        int sender = counts ? senders[e] : -1;
        for (uint32 left = lanes_where(sender > atom); left;) {
            int place[AT_ONCE], from[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                place[k] = lowest(left), left &= left - 1;
                from[k] = of_lane(sender, max(place[k], 0));
            }
            uint32 found[AT_ONCE][ROUNDS];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
                for (int m = 0; m < ROUNDS; m++)  // read at any rate: nothing waits then
                    found[k][m] = lanes_where(senders[max(from[k], 0) * SLOTS + min(32 * m + lane(), SLOTS - 1)] == atom & 32 * m + lane() < SLOTS);
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                int several = 0;
#pragma unroll
                for (int m = 0; m < ROUNDS; m++) several += ones(found[k][m]);
#pragma unroll
                for (int m = 0; m < ROUNDS; m++) {
                    uint32 of_one = found[k][m];
                    if (several > 1 && of_one) of_one = lanes_where((of_one >> lane() & 1) && mask[max(from[k], 0) * SLOTS + 32 * m + lane()] > 0.f);
                    if (of_one && lane() == place[k]) reverse = from[k] * SLOTS + 32 * m + lowest(of_one);
                }
            }
        }
        if (reverse >= 0 && !(mask[reverse] > 0.f)) reverse = -1;
        if (slot >= SLOTS || (counts && sender < atom)) continue;
        float g[3] = {0.f, 0.f, 0.f};
        if (counts) {
            float4 here = total(e), there = reverse >= 0 ? total(reverse) : make_float4(0.f, 0.f, 0.f, 0.f);
            float u[3] = {places[2 * all + e], places[3 * all + e], places[4 * all + e]};
            float by_direction[3] = {there.y - here.y, there.z - here.z, there.w - here.w};
            float d = (places[e] + places[5 * all + e]) * as_float(interval), longer = d + as_float(epsilon);
            float t = longer > 0.f ? 1.f / longer : 0.f, of_unit = d > 0.f ? longer / d : 0.f;  // of u, which is a bit shorter
            float along = u[0] * by_direction[0] + u[1] * by_direction[1] + u[2] * by_direction[2];
            float by_distance = (here.x + there.x) / as_float(interval) - t * along;
#pragma unroll
            for (int axis = 0; axis < 3; axis++) g[axis] = by_distance * of_unit * u[axis] + t * by_direction[axis];
        }
#pragma unroll
        for (int axis = 0; axis < 3; axis++) {
            by_vectors[axis * all + e] = g[axis];
            if (reverse >= 0) by_vectors[axis * all + reverse] = -g[axis];
        }
    }
}
