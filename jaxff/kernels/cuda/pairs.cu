// [D, U_xyz] of each pair minus those of its reverse, from the halves that both have: jaxff.kernels.message.whole.
//
// A warp serves the pairs of one atom with senders after it, and looks for the reverse of each among its sender's: it is
// the only one with this atom, but for those that don't count. Of pairs that don't count: zeros.
// Defined from outside: WARPS of a block; SLOTS of an atom.
#define AT_ONCE 8  // pairs
#define ROUNDS ((SLOTS + 31) / 32)
extern "C" __global__ void __launch_bounds__(32 * WARPS)
whole(const int* __restrict__ senders, const float* __restrict__ places, const float* __restrict__ halves, int n,
      float* __restrict__ pair_bars) {
    int all = n * SLOTS, atom = block() * WARPS + warp();
    const float* mask = places + all;
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
#pragma unroll
        for (int row = 0; row < 4; row++) {
            float here = counts ? halves[row * all + e] : 0.f, there = reverse >= 0 ? halves[row * all + reverse] : 0.f;
            pair_bars[row * all + e] = row ? there - here : here + there;
            if (reverse >= 0) pair_bars[row * all + reverse] = row ? here - there : here + there;
        }
    }
}
