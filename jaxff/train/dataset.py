"""The frames of a run: read, checked and written to a file of their own, split by molecule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.errors import DataError
from jaxff.train.config import DataConfig
from jaxff.train.data import checksum, iterate_frames, split_names
from jaxff.train.records import Records, Writer

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """All frames of a run, and which of them are for what: indices of train, valid and test."""

    frames: Records
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
        return {
            name: {
                "frames": len(indices),
                "molecules": len(set(self.frames.molecules[indices])),
                "atoms": int(self.frames.atoms_of(indices).sum()),
            }
            for name, indices in ((name, getattr(self, name)) for name in SPLITS)
        }


def load_dataset(
    config: DataConfig,
    model: PainnConfig | StudentConfig,
    note: Callable[[str], None] = lambda _: None,
    folder: Path | None = None,
) -> Dataset:
    """Everything that `config` names, with its pairs within the model's cutoff; memory holds an index alone.

    folder: on whose disk the frames are kept until the data set is gone; None: where the system keeps such files.
    Raises DataError: bad frames, unknown elements, nothing to validate on, a molecule on two sides, no room on disk.
    """
    notes: list[str] = []
    closed_shell = isinstance(model, PainnConfig) and model.closed_shell
    writer = Writer(model.cutoff, folder)
    limits = [0]
    for sources in (config.train, config.valid, config.test):
        if sources is not None:
            for frames in iterate_frames(
                sources,
                notes,
                units=config.units,
                max_force=config.max_force,
                on_bad=config.on_bad,
                closed_shell=closed_shell,
                folder=folder,
            ):
                writer.append(frames)
        limits.append(len(writer))
    records = writer.finish()
    train, valid, test = _split(config, records.molecules, [np.arange(a, b) for a, b in pairwise(limits)])
    for line in notes[:5]:
        note(f"dropped: {line}")
    if len(notes) > 5:
        note(f"dropped: {len(notes)} frames in all")
    dataset = Dataset(records, train, valid, test, checksum(records), notes)
    _check(dataset, model)
    _check_overlap(dataset, config.allow_overlap, note)
    return dataset


def _split(config: DataConfig, molecules: np.ndarray, named: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Indices of train, valid and test, from those of the frames that were named for each."""
    train, valid, test = named
    if config.max_frames is not None and len(train) > config.max_frames:
        train = np.sort(np.random.default_rng(config.split_seed).permutation(train)[: config.max_frames])
    if config.valid is None:
        rest = train
        split = split_names(molecules[rest], config.fractions, config.split_seed)
        train, valid = rest[split[0]], rest[split[1]]
        if config.test is None:
            test = rest[split[2]]
        else:  # what would have been split off for it
            train = np.sort(np.concatenate([train, rest[split[2]]]))
    return train, valid, test


def _check(dataset: Dataset, model: PainnConfig | StudentConfig) -> None:
    frames = dataset.frames
    known = np.arange(1, model.max_z + 1) if model.elements is None else np.array(model.elements)
    unknown = sorted(set(np.unique(frames.numbers).tolist()) - set(known.tolist()))
    if unknown:
        raise DataError(f"the model is made for the elements {known.tolist()}, the data hold {unknown}, too")
    if not len(dataset.train) or not len(dataset.valid):
        missing = "training" if not len(dataset.train) else "validation"
        molecules = len(set(frames.molecules))
        raise DataError(
            f"expected frames for training and validation, received none for {missing}: {len(frames)} frames of"
            f" {molecules} molecules; change data.fractions, or name files in data.valid (a molecule is never split)"
        )


def _check_overlap(dataset: Dataset, allowed: bool, note: Callable[[str], None]) -> None:
    """A molecule that is trained on and tested makes the errors told too small; files that are named can share some."""
    names = {name: set(dataset.frames.molecules[getattr(dataset, name)]) for name in SPLITS}
    for one, other in combinations(SPLITS, 2):
        shared = sorted(names[one] & names[other])
        if not shared:
            continue
        quoted = ", ".join(shared[:3]) + (", ..." if len(shared) > 3 else "")
        found = f"{len(shared)} of {len(names[other])} molecules of data.{other} are in data.{one}, too ({quoted})"
        if not allowed:
            raise DataError(
                f"{found}: errors on them would be too small. Take them out of one; or set data.allow_overlap: true"
                " where this is meant, or where these are formulas that isomers share (files without molecules' names)"
            )
        note(f"{found}: errors on them may be too small (data.allow_overlap)")
