"""Pairs of many small frames at once: those within a cutoff, of each frame on its own."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from jaxff import neighbors
from jaxff.errors import DataError

CHUNK = 1 << 21  # distances at once
LARGEST = 1 << 15  # atoms of a frame: pairs are kept as int16
DENSE_LIMIT = 400  # atoms; larger frames take a tree


def find_pairs(
    positions: Float[np.ndarray, "A 3"], splits: Int[np.ndarray, "B+1"], cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers (int16, local), start and count of each frame's directed pairs, receivers sorted.

    Frames of one size are taken together, in chunks of dense distances in float64. Raises DataError for a frame of
    more than 32768 atoms.
    """
    counts = np.diff(splits)
    if counts.max(initial=0) > LARGEST:
        raise DataError(f"expected frames of at most {LARGEST} atoms, received one of {counts.max()}")
    pair_start, pair_count = np.zeros(len(counts), np.int64), np.zeros(len(counts), np.int64)
    senders: list[np.ndarray] = [np.zeros(0, np.int16)]
    receivers: list[np.ndarray] = [np.zeros(0, np.int16)]
    total = 0
    for n in np.unique(counts):
        members = np.flatnonzero(counts == n)
        chunk = max(1, CHUNK // int(n) ** 2)
        for first in range(0, len(members), chunk):
            own = members[first : first + chunk]
            found = _pairs_of_equal_frames(positions, splits[own], int(n), cutoff)
            pair_count[own] = found[2]
            pair_start[own] = total + np.cumsum(found[2]) - found[2]
            senders.append(found[0])
            receivers.append(found[1])
            total += len(found[0])
    return np.concatenate(senders), np.concatenate(receivers), pair_start, pair_count


def _pairs_of_equal_frames(
    positions: Float[np.ndarray, "A 3"], start: Int[np.ndarray, "b"], n: int, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers and counts of frames that all have n atoms."""
    if n > DENSE_LIMIT:
        lists = [neighbors.neighbor_pairs(positions[s : s + n], cutoff) for s in start]
        parts = [np.concatenate([pair[k] for pair in lists]).astype(np.int16) for k in (0, 1)]
        return parts[0], parts[1], np.array([len(pair[0]) for pair in lists])
    r = positions[start[:, None] + np.arange(n)]
    square = np.zeros((len(start), n, n))
    for axis in range(3):
        x = np.ascontiguousarray(r[:, :, axis])
        difference = x[:, None, :] - x[:, :, None]
        difference *= difference
        square += difference
    inside = np.sqrt(square, out=square) <= cutoff
    inside[:, np.arange(n), np.arange(n)] = False
    flat = np.flatnonzero(inside.reshape(-1)).astype(np.int32) % np.int32(n * n)
    receivers, senders = np.divmod(flat, np.int32(n))
    return senders.astype(np.int16), receivers.astype(np.int16), np.count_nonzero(inside, axis=(1, 2))
