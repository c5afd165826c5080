"""Labelled frames on disk, one record a frame, written once in a file's order and read in any.

A training run visits frames at random. Each is one read: its positions (float64, Å, as the file gave them), forces
(float32, eV/Å) and pairs (sender and receiver, int16) lie together, 36 bytes an atom and 4 a pair. HDF5, compressed
or not, would take several reads a frame, of about 100 µs each. In memory stays what orders, splits and packs frames:
about 60 bytes a frame, and a byte an atom for its element.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxff.train.frames import Frames, Ragged, cumulative, slabs
from jaxff.train.pairs import find_pairs
from jaxff.train.scratch import Scratch

_BYTES_OF_ATOM = 36
_BYTES_OF_PAIR = 4


class Contents(NamedTuple):
    """What lies on disk of some frames, joined: a atoms, p pairs."""

    positions: Float[np.ndarray, "a 3"]  # float64, Å
    forces: Float[np.ndarray, "a 3"]  # float32, eV/Å
    pairs: Int[np.ndarray, "p 2"]  # int16: sender and receiver within the frame, receivers sorted


@dataclass(frozen=True, eq=False)
class Records(Ragged):
    """Labelled frames whose positions, forces and pairs lie on disk; made by `Writer`."""

    numbers: Int[np.ndarray, "A"]  # uint8
    energies: Float[np.ndarray, "B"]
    splits: Int[np.ndarray, "B+1"]
    molecules: np.ndarray
    pair_count: Int[np.ndarray, "B"]  # int32
    starts: Int[np.ndarray, "B"]  # bytes
    scratch: Scratch

    def atoms_of(self, ids: np.ndarray) -> Int[np.ndarray, "b"]:
        """Atoms of the frames `ids`, without a count of all."""
        return self.splits[ids + 1] - self.splits[ids]

    def read(self, ids: np.ndarray) -> Contents:
        """The records of the frames `ids`, in this order; memory grows with them."""
        atoms = cumulative(self.atoms_of(ids)).tolist()
        pairs = cumulative(self.pair_count[ids]).tolist()
        contents = Contents(
            np.empty((atoms[-1], 3)), np.empty((atoms[-1], 3), np.float32), np.empty((pairs[-1], 2), np.int16)
        )
        r, f, p = (array.reshape(-1).view(np.uint8).data for array in contents)
        for start, (a, b), (c, d) in zip(self.starts[ids].tolist(), pairwise(atoms), pairwise(pairs), strict=True):
            self.scratch.read(start, (r[24 * a : 24 * b], f[12 * a : 12 * b], p[4 * c : 4 * d]))
        return contents

    def numbers_of(self, ids: np.ndarray) -> Int[np.ndarray, "a"]:
        """Atomic numbers of the frames `ids`, joined."""
        own = zip(self.splits[ids].tolist(), self.splits[ids + 1].tolist(), strict=True)
        return np.concatenate([self.numbers[:0], *(self.numbers[a:b] for a, b in own)])

    def select(self, indices: np.ndarray) -> Frames:
        """The frames `indices` in memory, in that order."""
        ids = np.asarray(indices, np.int64)
        contents = self.read(ids)
        splits = cumulative(self.atoms_of(ids))
        return Frames(
            self.numbers_of(ids), contents.positions, self.energies[ids], contents.forces, splits, self.molecules[ids]
        )

    def slabs(self, name: Literal["numbers", "positions", "forces"]) -> Iterator[np.ndarray]:
        """All of an atomic property in pieces that memory bears."""
        for slab in slabs(self.splits):
            if name == "numbers":
                yield self.numbers[self.splits[slab.start] : self.splits[slab.stop]]
            else:
                yield getattr(self.read(np.arange(slab.start, slab.stop)), name)


class Writer:
    """Makes Records from pieces; pairs are those within `cutoff` Å, inclusive."""

    def __init__(self, cutoff: float, folder: Path | None = None) -> None:
        self._cutoff, self._scratch = cutoff, Scratch(folder)
        self._numbers: list[np.ndarray] = [np.zeros(0, np.uint8)]
        self._energies: list[np.ndarray] = [np.zeros(0)]
        self._molecules: list[np.ndarray] = [np.zeros(0, object)]
        self._atom_counts: list[np.ndarray] = [np.zeros(0, np.int64)]
        self._pair_counts: list[np.ndarray] = [np.zeros(0, np.int32)]
        self._names: dict[str, str] = {}

    def __len__(self) -> int:
        return sum(map(len, self._energies))

    def append(self, frames: Frames) -> None:
        """Adds frames, whose numbers are in 1..118. Raises DataError: no room on disk, a frame of too many atoms."""
        for slab in slabs(frames.splits):
            self._append(frames.select(np.arange(slab.start, slab.stop)))

    def finish(self) -> Records:
        """All that was appended."""
        splits = cumulative(np.concatenate(self._atom_counts))
        pair_count = np.concatenate(self._pair_counts)
        sizes = _BYTES_OF_ATOM * np.diff(splits) + _BYTES_OF_PAIR * pair_count.astype(np.int64)
        return Records(
            np.concatenate(self._numbers),
            np.concatenate(self._energies),
            splits,
            np.concatenate(self._molecules),
            pair_count,
            cumulative(sizes)[:-1],
            self._scratch,
        )

    def _append(self, frames: Frames) -> None:
        counts = frames.num_atoms
        senders, receivers, pair_start, pair_count = find_pairs(
            centred(frames.positions, counts), frames.splits, self._cutoff
        )
        pairs = np.stack([senders, receivers], axis=1).view(np.int32).reshape(-1)
        positions, forces = (x.reshape(-1).view(np.int32) for x in (frames.positions, frames.forces))
        parts = [positions[:0]]
        for (a, b), c, d in zip(
            pairwise(frames.splits.tolist()), pair_start.tolist(), pair_count.tolist(), strict=True
        ):
            parts += (positions[6 * a : 6 * b], forces[3 * a : 3 * b], pairs[c : c + d])
        self._scratch.append(np.concatenate(parts))
        # one string for all frames of a molecule
        molecules = np.array([self._names.setdefault(name, name) for name in frames.molecules], object)
        self._numbers.append(frames.numbers.astype(np.uint8))
        self._energies.append(frames.energies)
        self._molecules.append(molecules)
        self._atom_counts.append(counts)
        self._pair_counts.append(pair_count.astype(np.int32))


def centred(positions: Float[np.ndarray, "A 3"], counts: Int[np.ndarray, "B"]) -> Float[np.ndarray, "A 3"]:
    """Positions from each frame's centroid; every frame has atoms."""
    if not len(counts):
        return positions
    sums = np.add.reduceat(positions, cumulative(counts)[:-1], axis=0)
    return positions - np.repeat(sums / counts[:, None], counts, axis=0)
