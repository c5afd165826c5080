"""Labelled structures, joined into a few long arrays: what the readers give and the training loop takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxff.errors import DataError

CHUNK = 1 << 16  # atoms that are read, checked and written at once


class Frame(NamedTuple):
    """One labelled structure of n atoms: eV, Å, eV/Å."""

    numbers: Int[np.ndarray, "n"]
    positions: Float[np.ndarray, "n 3"]
    energy: float
    forces: Float[np.ndarray, "n 3"]
    molecule: str


class Ragged:
    """B frames of A atoms in all, joined; frame b owns atoms splits[b]:splits[b+1]."""

    numbers: Int[np.ndarray, "A"]
    energies: Float[np.ndarray, "B"]  # float64, eV: the total energy as the teacher gave it
    splits: Int[np.ndarray, "B+1"]  # int64
    molecules: np.ndarray  # [B] str: which molecule a frame belongs to; the unit of splitting

    def __len__(self) -> int:
        return len(self.energies)

    @property
    def num_atoms(self) -> Int[np.ndarray, "B"]:
        """Atoms of each frame, [B]."""
        return np.diff(self.splits)


@dataclass(frozen=True, eq=False)
class Frames(Ragged):
    """Labelled structures, joined: B frames, A atoms in all; frame b owns atoms splits[b]:splits[b+1].

    Raises DataError where the arrays' lengths disagree; the values are checked by jaxff.train.data.
    """

    numbers: Int[np.ndarray, "A"]  # int32
    positions: Float[np.ndarray, "A 3"]  # float64, Å
    energies: Float[np.ndarray, "B"]  # float64, eV: the total energy as the teacher gave it
    forces: Float[np.ndarray, "A 3"]  # float32, eV/Å
    splits: Int[np.ndarray, "B+1"]  # int64
    molecules: np.ndarray  # [B] str: which molecule a frame belongs to; the unit of splitting

    def __post_init__(self) -> None:
        kinds = {
            "numbers": np.int32,
            "positions": np.float64,
            "energies": np.float64,
            "forces": np.float32,
            "splits": np.int64,
            "molecules": object,
        }
        for name, kind in kinds.items():
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=kind))
        if self.splits.ndim != 1 or self.splits.size == 0:
            raise DataError(f"expected splits of shape [B+1], received {list(self.splits.shape)}")
        frames, atoms = self.splits.size - 1, int(self.splits[-1])
        if self.splits[0] != 0 or np.any(np.diff(self.splits) < 0):
            raise DataError("expected splits that start at 0 and never fall")
        expected = {
            "numbers": (atoms,),
            "positions": (atoms, 3),
            "energies": (frames,),
            "forces": (atoms, 3),
            "molecules": (frames,),
        }
        for name, shape in expected.items():
            received = getattr(self, name).shape
            if received != shape:
                raise DataError(
                    f"expected {name} of shape {list(shape)} for {frames} frames of {atoms} atoms, "
                    f"received {list(received)}"
                )

    def __getitem__(self, index: int) -> Frame:
        """Frame `index` (negative: from the end); its arrays are views. Raises IndexError."""
        b = range(len(self))[index]
        own = slice(self.splits[b], self.splits[b + 1])
        return Frame(
            self.numbers[own], self.positions[own], float(self.energies[b]), self.forces[own], self.molecules[b]
        )

    def __iter__(self) -> Iterator[Frame]:
        return (self[b] for b in range(len(self)))

    @property
    def frame_of_atom(self) -> Int[np.ndarray, "A"]:
        """The frame that each atom belongs to, [A]."""
        return np.repeat(np.arange(len(self)), self.num_atoms)

    def slabs(self, name: str) -> Iterator[np.ndarray]:
        """A property of the atoms in pieces; here, one."""
        yield getattr(self, name)

    def select(self, indices: Sequence[int] | np.ndarray) -> Frames:
        """The frames `indices` (integers, or a mask [B]), copied, in that order."""
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        counts = self.num_atoms[chosen]
        atoms = rows_of(self.splits[:-1][chosen], counts)
        return Frames(
            self.numbers[atoms],
            self.positions[atoms],
            self.energies[chosen],
            self.forces[atoms],
            cumulative(counts),
            self.molecules[chosen],
        )

    @staticmethod
    def join(parts: Sequence[Frames]) -> Frames:
        """All frames of `parts`, one after the other; no parts, no frames."""
        empty = _empty()
        parts = [empty, *parts]
        return Frames(
            np.concatenate([part.numbers for part in parts]),
            np.concatenate([part.positions for part in parts]),
            np.concatenate([part.energies for part in parts]),
            np.concatenate([part.forces for part in parts]),
            cumulative(np.concatenate([part.num_atoms for part in parts])),
            np.concatenate([part.molecules for part in parts]),
        )

    @staticmethod
    def of(frames: Sequence[Frame]) -> Frames:
        """Frames from single ones, in their order."""
        if not frames:
            return _empty()
        return Frames(
            np.concatenate([frame.numbers for frame in frames]),
            np.concatenate([frame.positions for frame in frames]),
            np.array([frame.energy for frame in frames]),
            np.concatenate([frame.forces for frame in frames]),
            cumulative(np.array([len(frame.numbers) for frame in frames])),
            np.array([frame.molecule for frame in frames], dtype=object),
        )


def cumulative(counts: Int[np.ndarray, "B"]) -> Int[np.ndarray, "B+1"]:
    """Splits from counts: 0 and the running sums."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def rows_of(starts: Int[np.ndarray, "B"], counts: Int[np.ndarray, "B"]) -> Int[np.ndarray, "R"]:
    """The rows start:start+count of each of B pieces, one piece after the other."""
    return np.repeat(starts - cumulative(counts)[:-1], counts) + np.arange(counts.sum())


def slabs(splits: Int[np.ndarray, "B+1"]) -> Iterator[slice]:
    """Slices of frames, which together are all of them, of at most CHUNK atoms and CHUNK frames each; a larger frame
    is a slice of its own."""
    first, count = 0, len(splits) - 1
    while first < count:
        last = int(np.searchsorted(splits, splits[first] + CHUNK, "right")) - 1
        last = min(max(last, first + 1), first + CHUNK, count)
        yield slice(first, last)
        first = last


def _empty() -> Frames:
    return Frames(
        np.zeros(0, np.int32), np.zeros((0, 3)), np.zeros(0), np.zeros((0, 3)), np.zeros(1, np.int64), np.zeros(0, "O")
    )
