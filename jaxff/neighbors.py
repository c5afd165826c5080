"""Pairs of a structure on the host: all pairs for small ones, a padded dense list for large ones.

Shapes come in few sizes (buckets), so that compiled code is reused when a molecule moves and when sizes vary.
Distances are decided here in float64, whatever the model computes in.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

from jaxff.system import Pairs

ALL_PAIRS_LIMIT = 64  # atoms; up to here every pair is computed and masked
SLOT_STEP = 8
HEADROOM = 1.25


def bucket(num_atoms: int) -> int:
    """The padded number of atoms: steps of 4 to 32, of 16 to 128, then about 12 % apart."""
    if num_atoms <= 32:
        return max(4, -(-num_atoms // 4) * 4)
    if num_atoms <= 128:
        return -(-num_atoms // 16) * 16
    step = 2 ** (int(num_atoms).bit_length() - 4)
    return -(-num_atoms // step) * step


def all_pairs(
    positions: Float[np.ndarray, "N 3"], cutoff: float, padded: int
) -> tuple[Float[np.ndarray, "E 3"], Pairs]:
    """Every ordered pair of `padded` atoms, E = padded²; mask: two real atoms within the cutoff, inclusive."""
    n = len(positions)
    r = np.zeros((padded, 3))
    r[:n] = positions
    vectors = r[None, :, :] - r[:, None, :]
    mask = np.zeros((padded, padded), bool)
    mask[:n, :n] = np.linalg.norm(vectors[:n, :n], axis=-1) <= cutoff
    np.fill_diagonal(mask, False)
    index = np.arange(padded * padded, dtype=np.int32)
    pairs = Pairs(index % padded, index // padded, mask.reshape(-1), padded, layout="all", symmetric=True)
    return np.where(mask[:, :, None], vectors, 0).reshape(-1, 3), pairs


def neighbor_pairs(
    positions: Float[np.ndarray, "N 3"], cutoff: float
) -> tuple[Int[np.ndarray, "E"], Int[np.ndarray, "E"]]:
    """Senders and receivers of all directed pairs within the cutoff, inclusive, sorted by receiver, then sender."""
    half = cKDTree(positions).query_pairs(cutoff * (1 + 1e-9), output_type="ndarray")
    distance = np.linalg.norm(positions[half[:, 0]] - positions[half[:, 1]], axis=1)
    half = half[distance <= cutoff]
    senders, receivers = np.concatenate([half, half[:, ::-1]]).T
    order = np.lexsort((senders, receivers))
    return senders[order], receivers[order]


def slots_needed(receivers: Int[np.ndarray, "E"], num_atoms: int) -> int:
    """The largest number of neighbours that an atom has."""
    return int(np.bincount(receivers, minlength=num_atoms).max(initial=0))


def slot_pairs(
    positions: Float[np.ndarray, "N 3"],
    senders: Int[np.ndarray, "E"],
    receivers: Int[np.ndarray, "E"],
    padded: int,
    slots: int,
) -> tuple[Float[np.ndarray, "E 3"], Pairs]:
    """The same pairs as a dense list of `padded` atoms with `slots` places each; an empty place points to its atom."""
    first = np.searchsorted(receivers, np.arange(padded))
    place = receivers * slots + np.arange(len(receivers)) - first[receivers]
    at = np.repeat(np.arange(padded, dtype=np.int32), slots)
    sender = at.copy()
    sender[place] = senders
    mask = np.zeros(padded * slots, bool)
    mask[place] = True
    vectors = np.zeros((padded * slots, 3))
    vectors[place] = positions[senders] - positions[receivers]
    return vectors, Pairs(sender, at, mask, padded, layout="slots", symmetric=True)


def round_slots(needed: int) -> int:
    """Places for a list that needs `needed` of them now, with headroom for motion."""
    return max(SLOT_STEP, -(-int(needed * HEADROOM) // SLOT_STEP) * SLOT_STEP)
