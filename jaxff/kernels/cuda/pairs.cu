// [D, U_xyz] of each pair minus those of its reverse, from the halves that both have: jaxff.kernels.message.whole.
//
// A warp serves the pairs of one atom, and looks for each among those of its sender; of pairs that don't count: zeros.
extern "C" __global__ void whole(const int* __restrict__ senders, const float* __restrict__ places, const float* __restrict__ halves,
                                 int n, int slots, float* __restrict__ pair_bars) {
    int all = n * slots, atom = block() * WARPS + warp();
    const float* mask = places + all;
    if (atom >= n) return;
    for (int begin = 0; begin < slots; begin += 32) {
        int slot = begin + lane(), e = atom * slots + slot, reverse = -1;
        bool counts = slot < slots && mask[e] > 0.f;
        int sender = counts ? senders[e] : -1;
        for (int k = 0; k < 32 && begin + k < slots; k++) {
            int from = of_lane(sender, k);
            if (from < 0) continue;
            for (int first = 0; first < slots; first += 32) {
                int place = from * slots + first + lane();
                int found = first_lane(first + lane() < slots && senders[place] == atom && mask[place] > 0.f);
                if (found < 0) continue;
                if (lane() == k) reverse = from * slots + first + found;
                break;
            }
        }
        if (slot >= slots) continue;
        for (int row = 0; row < 4; row++) {
            float here = counts ? halves[row * all + e] : 0.f, there = reverse >= 0 ? halves[row * all + reverse] : 0.f;
            pair_bars[row * all + e] = row ? there - here : here + there;
        }
    }
}
