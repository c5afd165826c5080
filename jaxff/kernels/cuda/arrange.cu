// The pairs of eight atoms at a time in the order in which message.cu takes them.
//
// A filter takes few functions where distances differ little, so a bin is BIN intervals of the table, and another begins
// every STEP of them. A turn is up to eight pairs of each atom in one bin: the least that no turn had yet is in it, and
// so are the next of all atoms up to its end; but where few atoms have so many that the next 16 pairs, two of each, would
// be less than ENOUGH, a later bin has the rest. Every other group has its turns from the last bin to the first, so that
// message.cu begins it with the bin that it has at hand.
// Defined from outside: BIN, STEP, BINS; WARPS of a block, which share its atoms.
#define GROUP 8
#define NO_PAIR 0x7fff    // an interval beyond all
#define ENOUGH 12

// over a group, of which four lanes have an atom each
__device__ __forceinline__ int most_of_group(int x) { return largest_of_warp(x); }
__device__ __forceinline__ int least_of_group(int x) { return -largest_of_warp(-x); }

// How many times two pairs of each atom a turn takes of a bin's `count`: until less than ENOUGH would be in the next two, or
// all of them; lane k looks at k times two.
__device__ __forceinline__ int enough_of(int count) {
    int next = 0;
#pragma unroll
    for (int atom = 0; atom < GROUP; atom++) next += min(max(of_lane(count, atom) - 2 * lane(), 0), 2);
    return lowest(lanes_where(lane() && next < ENOUGH) | 1u << 31);
}

// vectors: [3, E]; counting: which pairs are to count, if no longer than `within`; cutoff, within, per_angstrom, epsilon: in Å,
// the table's intervals in one, ε of directions u = r / (d + ε), as words.
// places: rows [t, whether it counts, u_xyz, interval], as jaxff.kernels.chain makes them for other kernels.
// pairs: rows [t, u_xyz, sender, interval and slot] in the order of intervals, those that don't count last.
// turns: [groups, capacity, GROUP], of each atom: its first pair (16 bits), how many pairs (4), how many times two of
// the eight atoms at most (3), whether it is their last turn (1), bin (8).
extern "C" __global__ void __launch_bounds__(32 * WARPS)
arrange(const int* __restrict__ senders, const float* __restrict__ vectors, const unsigned char* __restrict__ counting,
        int n, int slots, int capacity, int intervals, int cutoff, int within, int per_angstrom, int epsilon,
        float* __restrict__ places, float* __restrict__ pairs, uint32* __restrict__ turns) {
    SHARED(float4, shared);  // [GROUP, padded] t and u of pairs; senders; interval and slot, as one number; intervals in order; turns
    float4* t_u = in_register(shared);
    int all = n * slots, padded = (slots + 3) / 4 * 4, *sending = (int*)(t_u + GROUP * padded), *memory = sending + GROUP * padded;
    for (int local = warp(); local < GROUP; local += WARPS) {
        int *mine = memory + local * padded, atom = block() * GROUP + local;
        for (int slot = lane(); slot < padded; slot += 32) {
            int key = NO_PAIR;
            if (atom < n && slot < slots) {
                int e = atom * slots + slot;
                float r[3] = {vectors[e], vectors[all + e], vectors[2 * all + e]}, square = r[0] * r[0] + r[1] * r[1] + r[2] * r[2];
                float d = root(square), longer = d + as_float(epsilon), shrink = longer != 0.f ? 1.f / longer : 0.f;
                float place = min(d, as_float(cutoff)) * as_float(per_angstrom);
                int interval = min((int)place, intervals - 1), to = local * padded + slot;
                bool counts = counting[e] && d <= as_float(within);
                t_u[to] = make_float4(place - interval, shrink * r[0], shrink * r[1], shrink * r[2]), sending[to] = senders[e];
                places[e] = t_u[to].x, places[all + e] = counts, places[5 * all + e] = interval;
#pragma unroll
                for (int k = 0; k < 3; k++) places[(2 + k) * all + e] = shrink * r[k];
                if (counts) key = interval;
            }
            mine[slot] = key << 16 | slot;
        }
    }
    sync_warp();
    for (int local = warp(); local < GROUP; local += WARPS) {
        int *mine = memory + local * padded, *ordered = mine + GROUP * padded, atom = block() * GROUP + local;
        for (int slot = lane(); slot < padded; slot += 64) {
            int key[2], rank[2] = {0, 0};
#pragma unroll
            for (int i = 0; i < 2; i++) key[i] = slot + 32 * i < padded ? mine[slot + 32 * i] : 0;
            for (int k = 0; k < padded; k += 4) {
                int4 other = *(const int4*)(mine + k);
#pragma unroll
                for (int i = 0; i < 2; i++)
                    rank[i] += (other.x < key[i]) + (other.y < key[i]) + (other.z < key[i]) + (other.w < key[i]);
            }
#pragma unroll
            for (int i = 0; i < 2; i++) {
                if (slot + 32 * i >= padded) continue;
                ordered[rank[i]] = key[i] >> 16;
                if (atom >= n || slot + 32 * i >= slots) continue;
                int from = local * padded + slot + 32 * i, to = atom * slots + rank[i];
                float4 x = t_u[from];
                pairs[to] = x.x, pairs[all + to] = x.y, pairs[2 * all + to] = x.z, pairs[3 * all + to] = x.w;
                pairs[4 * all + to] = (float)sending[from], pairs[5 * all + to] = as_float(key[i]);
            }
        }
    }
    sync();
    if (warp()) return;
    const int* row = memory + (GROUP + lane() % GROUP) * padded;  // four lanes do the same for an atom
    uint32* made = (uint32*)(memory + 2 * GROUP * padded);
    auto interval_of = [&](int place) { return place < slots ? row[place] : NO_PAIR; };
    int rank = 0, all_turns = 0, end = 0, half = 1, first = least_of_group(interval_of(0));
    while (2 * half <= slots) half *= 2;
    do {
        int bin = first < NO_PAIR ? min(first / STEP, BINS - 1) : 0, after = NO_PAIR;
        if (first < NO_PAIR) {
            for (int step = half; step; step /= 2)  // where the bin ends, as they begin one after the other
                if (interval_of(end + step - 1) < bin * STEP + BIN) end += step;
            after = least_of_group(interval_of(end));
        }
        int count = end - rank, most = max(1, (most_of_group(count) + 1) / 2), chunks = most;
        if (after < NO_PAIR)
            for (chunks = min(enough_of(count), most); chunks < most; chunks++)
                if (least_of_group(interval_of(rank + min(count, 2 * chunks))) >= (bin + 1) * STEP) break;
        count = min(count, 2 * chunks), first = least_of_group(interval_of(rank + count));
        for (int left = (chunks + 3) / 4; left; left--, all_turns++) {
            int now = (int)((chunks + left - 0.5f) * reciprocal(left)), here = min(2 * now, count);  // of chunks / left, rounded up
            if (lane() < GROUP) made[all_turns * GROUP + lane()] = rank | here << 16 | now << 20 | bin << 24;
            rank += here, count -= here, chunks -= now;
        }
    } while (first < NO_PAIR);
    sync_warp();
    for (int k = lane(); k < all_turns * GROUP; k += 32) {
        int turn = k / GROUP, from = block() % 2 ? all_turns - 1 - turn : turn;
        turns[block() * capacity * GROUP + k] = made[from * GROUP + k % GROUP] | (uint32)(turn + 1 == all_turns) << 23;
    }
}
