// Gradients by the vectors of pairs: of [D, U_xyz] of each pair and of its reverse, from the halves that both have of each
// interaction (jaxff.kernels.message.whole, jaxff.ops.distance.distance_bwd).
//
// A warp serves the pairs of one atom with senders after it, and looks for the reverse of each among its sender's: it is
// the only one with this atom, but for those that don't count. Of pairs that don't count: zeros.
// Defined from outside: WARPS of a block; SLOTS of an atom; EACH_ARRAY(x): x(0) x(1) ... for each array of halves.
#define AT_ONCE 8   // pairs
#define RESIDENT 5  // blocks of a multiprocessor: more leave no registers for all rows, which are asked for before one is waited for
#define ROUNDS ((SLOTS + 31) / 32)
#define ARGUMENT(k) const float4 *__restrict__ halves_##k,
#define ADD(k) r = r + halves_##k[e];
// of the lanes that read a row of slots, the last of them the last 32: which slots these are, and which have not been read before
#define FIRST(m) ((m) + 1 < ROUNDS || SLOTS < 32 ? 32 * (m) : SLOTS - 32)
#define LANES(m) (SLOTS < 32 ? (1u << SLOTS % 32) - 1 : ~0u << (32 * (m) - FIRST(m)))

__device__ __forceinline__ float4 operator+(float4 x, float4 y) { return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w); }

// interval, epsilon: a table's interval in Å, and ε of directions u = r / (d + ε), as words
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT)
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
        int slot = begin + lane(), e = atom * SLOTS + min(slot, SLOTS - 1), reverse = -1;
        float counting = mask[e];
        int sender = senders[e];
        float4 here = total(e);
        float u[3] = {places[2 * all + e], places[3 * all + e], places[4 * all + e]}, place = places[e] + places[5 * all + e];
        bool counts = slot < SLOTS && counting > 0.f;
        uint32 candidates[ROUNDS] = {};  // for this lane's pair, among those of its sender
        for (uint32 left = lanes_where(counts && sender > atom); left;) {
            int of[AT_ONCE], found[AT_ONCE][ROUNDS];
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++) {
                of[k] = lowest(left), left &= left - 1;
                const int* row = senders + max(of_lane(sender, of[k] & 31), 0) * SLOTS + min(lane(), SLOTS - 1);
#pragma unroll
                for (int m = 0; m < ROUNDS; m++) found[k][m] = row[FIRST(m)];
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
                for (int m = 0; m < ROUNDS; m++) {
                    uint32 same = lanes_where(found[k][m] == atom) & LANES(m);
                    if (lane() == of[k]) candidates[m] = same;
                }
        }
        while (reverse < 0) {
            int at = -1;
#pragma unroll
            for (int m = 0; m < ROUNDS; m++)
                if (at < 0 && candidates[m]) at = FIRST(m) + lowest(candidates[m]), candidates[m] &= candidates[m] - 1;
            if (at < 0) break;
            at += sender * SLOTS;
            if (mask[at] > 0.f) reverse = at;
        }
        if (slot >= SLOTS || (counts && sender < atom)) continue;
        float g[3] = {0.f, 0.f, 0.f};
        if (counts) {
            float4 there = reverse >= 0 ? total(reverse) : make_float4(0.f, 0.f, 0.f, 0.f);
            float by_direction[3] = {there.y - here.y, there.z - here.z, there.w - here.w};
            float d = place * as_float(interval), longer = d + as_float(epsilon);
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
