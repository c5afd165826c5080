"""The frames of a run: read, split by molecule, their energies without the elements' references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float, Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.errors import DataError
from jaxff.train.config import DataConfig
from jaxff.train.data import checksum, read_frames, split_by_molecule
from jaxff.train.frames import Frames

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """All frames of a run, and which of them are for what: indices of train, valid and test."""

    frames: Frames
    train: Int[np.ndarray, "a"]
    valid: Int[np.ndarray, "b"]
    test: Int[np.ndarray, "c"]
    checksum: str
    notes: list[str]

    def split_rows(self) -> list[tuple[str, str]]:
        """(molecule, split), sorted."""
        rows: set[tuple[str, str]] = set()
        for name in SPLITS:
            rows |= {(str(molecule), name) for molecule in self.frames.molecules[getattr(self, name)]}
        return sorted(rows)

    def counts(self) -> dict[str, dict[str, int]]:
        """Frames, molecules and atoms of each split."""
        atoms = self.frames.num_atoms
        return {
            name: {
                "frames": len(indices),
                "molecules": len(set(self.frames.molecules[indices])),
                "atoms": int(atoms[indices].sum()),
            }
            for name, indices in ((name, getattr(self, name)) for name in SPLITS)
        }


def load_dataset(
    config: DataConfig, model: PainnConfig | StudentConfig, note: Callable[[str], None] = lambda _: None
) -> Dataset:
    """Everything that `config` names. Raises DataError: bad frames, unknown elements, nothing to validate on."""

    def read(sources: Sequence[str] | None) -> Frames:
        if sources is None:
            return Frames.join([])
        frames, dropped = read_frames(sources, units=config.units, max_force=config.max_force, on_bad=config.on_bad)
        notes.extend(dropped)
        return frames

    notes: list[str] = []
    parts = [read(config.train), read(config.valid), read(config.test)]
    frames = Frames.join(parts)
    limits = np.cumsum([0, *map(len, parts)])
    train, valid, test = (np.arange(a, b) for a, b in pairwise(limits))
    if config.max_frames is not None and len(train) > config.max_frames:
        train = np.sort(np.random.default_rng(config.split_seed).permutation(train)[: config.max_frames])
    if config.valid is None:
        split = split_by_molecule(frames.select(train), config.fractions, config.split_seed)
        rest = train
        train, valid = rest[split[0]], rest[split[1]]
        if config.test is None:
            test = rest[split[2]]
        else:  # what would have been split off for it
            train = np.sort(np.concatenate([train, rest[split[2]]]))
    for line in notes[:5]:
        note(f"dropped: {line}")
    if len(notes) > 5:
        note(f"dropped: {len(notes)} frames in all")
    _check(frames, train, valid, model)
    return Dataset(frames, train, valid, test, checksum(frames), notes)


def remainders(frames: Frames, references: Float[np.ndarray, "Z"]) -> Float[np.ndarray, "B"]:
    """Energies without the sum of the elements' references, [B] eV, in float64."""
    if not len(frames):
        return frames.energies
    return frames.energies - np.add.reduceat(references[frames.numbers], frames.splits[:-1])


def _check(frames: Frames, train: np.ndarray, valid: np.ndarray, model: PainnConfig | StudentConfig) -> None:
    known = np.arange(1, model.max_z + 1) if model.elements is None else np.array(model.elements)
    unknown = sorted(set(np.unique(frames.numbers).tolist()) - set(known.tolist()))
    if unknown:
        raise DataError(f"the model is made for the elements {known.tolist()}, the data hold {unknown}, too")
    if not len(train) or not len(valid):
        missing = "training" if not len(train) else "validation"
        molecules = len(set(frames.molecules))
        raise DataError(
            f"expected frames for training and validation, received none for {missing}: {len(frames)} frames of"
            f" {molecules} molecules; change data.fractions, or name files in data.valid (a molecule is never split)"
        )
