"""What is measured: random molecules, and periodic boxes with a fixed list of pairs. NumPy alone, for PyTorch, too."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.spatial import cKDTree

CUTOFF = 5.0  # Å
OPEN_LIMIT = 128  # atoms; more of them fill a periodic box
ELEMENTS = (1, 6, 7, 8)


def structure(num_atoms: int) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N 3"]]:
    """Random H, C, N, O at about 0.24 atoms/Å³ in a cube, none closer than 1.1 Å."""
    rng = np.random.default_rng(0)
    side, positions = 1.6 * num_atoms ** (1 / 3) + 0.3, np.zeros((0, 3))
    while len(positions) < num_atoms:
        trial = rng.uniform(0, side, 3)
        if np.all(np.linalg.norm(positions - trial, axis=1) > 1.1):
            positions = np.vstack([positions, trial])
    return rng.choice(ELEMENTS, num_atoms).astype(np.int32), positions


@dataclass(frozen=True)
class Box:
    """A periodic cube of `side` Å and its directed pairs within the cutoff, sorted by receiver, then sender."""

    numbers: Int[np.ndarray, "N"]
    positions: Float[np.ndarray, "N 3"]
    side: float
    senders: Int[np.ndarray, "E"]
    receivers: Int[np.ndarray, "E"]

    @property
    def slots(self) -> int:
        """The largest number of neighbours."""
        return int(np.bincount(self.receivers).max())

    @property
    def shifts(self) -> Float[np.ndarray, "E 3"]:
        """What makes R[sender] - R[receiver] the nearest image."""
        return -self.side * np.round((self.positions[self.senders] - self.positions[self.receivers]) / self.side)


def box(atoms: int) -> Box:
    """A disturbed cubic grid at 0.1 atoms/Å³, about 52 neighbours an atom; some places are empty if no cube fits."""
    rng = np.random.default_rng(0)
    side, m = (atoms / 0.1) ** (1 / 3), math.ceil(round(atoms ** (1 / 3), 6))
    grid = np.stack(np.meshgrid(*[np.arange(m)] * 3, indexing="ij"), -1).reshape(-1, 3) * (side / m)
    if len(grid) > atoms:
        grid = grid[np.sort(rng.permutation(len(grid))[:atoms])]
    positions = (grid + rng.normal(scale=0.15, size=grid.shape)) % side
    half = cKDTree(positions, boxsize=side).query_pairs(CUTOFF, output_type="ndarray")
    senders, receivers = np.concatenate([half, half[:, ::-1]]).T
    order = np.lexsort((senders, receivers))
    numbers = rng.choice(ELEMENTS, atoms).astype(np.int32)
    return Box(numbers, positions, side, senders[order].astype(np.int32), receivers[order].astype(np.int32))
