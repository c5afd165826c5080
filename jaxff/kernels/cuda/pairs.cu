// [D, U_xyz] of each pair minus those of its reverse, from the halves that both have: jaxff.kernels.message.whole.
//
// A warp serves the pairs of one atom with senders after it, and looks for the reverse of each among its sender's; of
// pairs that don't count: zeros.
// Defined from outside: WARPS of a block; SLOTS of an atom.
#define AT_ONCE 4  // pairs
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
#pragma unroll
            for (int k = 0; k < AT_ONCE; k++)
#pragma unroll
                for (int first = 0; first < SLOTS; first += 32) {
                    int there = max(from[k], 0) * SLOTS + min(first + lane(), SLOTS - 1);  // read at any rate: nothing waits then
                    int found = lowest(lanes_where(senders[there] == atom & mask[there] > 0.f & place[k] >= 0 & first + lane() < SLOTS));
                    if (found >= 0 && lane() == place[k]) reverse = from[k] * SLOTS + first + found;
                }
        }
        if (slot >= SLOTS || (counts && sender < atom)) continue;
#pragma unroll
        for (int row = 0; row < 4; row++) {
            float here = counts ? halves[row * all + e] : 0.f, there = reverse >= 0 ? halves[row * all + reverse] : 0.f;
            pair_bars[row * all + e] = row ? there - here : here + there;
            if (reverse >= 0) pair_bars[row * all + reverse] = row ? here - there : here + there;
        }
    }
}
