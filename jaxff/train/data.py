"""Training data from files: read, converted to eV and Å, checked, and split so that no molecule is on two sides."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field

from jaxff import units as known
from jaxff.config import Settings
from jaxff.errors import DataError
from jaxff.train.ase_files import DB_SUFFIXES, XYZ_SUFFIXES, iterate_labelled
from jaxff.train.checks import Part, check
from jaxff.train.frames import Frames, Ragged
from jaxff.train.hdf5 import SUFFIXES as HDF5_SUFFIXES
from jaxff.train.hdf5 import checksum, iterate_hdf5, write_hdf5

__all__ = ["Frames", "Units", "checksum", "iterate_frames", "read_frames", "split_by_molecule", "write_hdf5"]

Progress = Callable[[str, int], None]

_ENERGIES = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": known.kcal / known.mol,
    "kJ/mol": known.kJ / known.mol,
    "Hartree": known.Hartree,
}
_LENGTHS = {"Å": 1.0, "Bohr": known.Bohr, "nm": known.nm}
_SHOWN = 3  # problems that an error quotes


class Units(Settings):
    """Units of the files; forces are in energy/length."""

    energy: Literal["eV", "kcal/mol", "kJ/mol", "Hartree", "meV"] = Field(
        default="eV", description="unit of the energies"
    )
    length: Literal["Å", "Bohr", "nm"] = Field(default="Å", description="unit of the positions")

    @property
    def in_ev(self) -> float:
        """One unit of energy in eV."""
        return _ENERGIES[self.energy]

    @property
    def in_angstrom(self) -> float:
        """One unit of length in Å."""
        return _LENGTHS[self.length]


def read_frames(
    sources: Sequence[str | Path],
    *,
    units: Units = Units(),  # noqa: B008  (immutable)
    max_force: float = 100.0,
    on_bad: Literal["refuse", "drop"] = "refuse",
    closed_shell: bool = False,
    progress: Progress | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
) -> tuple[Frames, list[str]]:
    """All labelled frames of `sources` in memory, and what was dropped and why: `iterate_frames`, joined."""
    dropped: list[str] = []
    pieces = iterate_frames(
        sources,
        dropped,
        units=units,
        max_force=max_force,
        on_bad=on_bad,
        closed_shell=closed_shell,
        progress=progress,
        energy_key=energy_key,
        forces_key=forces_key,
    )
    return Frames.join(list(pieces)), dropped


def iterate_frames(
    sources: Sequence[str | Path],
    dropped: list[str],
    *,
    units: Units = Units(),  # noqa: B008  (immutable)
    max_force: float = 100.0,
    on_bad: Literal["refuse", "drop"] = "refuse",
    closed_shell: bool = False,
    progress: Progress | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    folder: Path | None = None,
) -> Iterator[Frames]:
    """All labelled frames of `sources`, in eV and Å, in pieces of bounded size; `dropped` gets what was dropped and why
    (file and frame named).

    sources: files, folders (all files of a known suffix in them) or globs: extended XYZ (.xyz, .extxyz), ASE databases
    (.db, .json), HDF5 (.h5, .hdf5; jaxff.train.hdf5). A file that is found twice is read once. closed_shell: frames
    with an odd number of electrons are bad. energy_key, forces_key: where extended XYZ and databases have the labels.
    progress: told each file and how many frames it gave. folder: for temporary files.

    A frame's molecule is what its file says (`molecule`, `smiles`, `name`), else its Hill formula: isomers then count
    as one. Raises DataError: nothing found, a file that can't be read; after its last piece, units of a file that can't
    be right (jaxff.train.checks); and after all, unless on_bad is "drop", bad frames: NaN, a force component above
    max_force (eV/Å), shapes that disagree, periodic ones, overlapping atoms, a net force.
    """
    if on_bad not in ("refuse", "drop"):
        raise DataError(f"expected on_bad 'refuse' or 'drop', received {on_bad!r}")
    total = 0
    for path in find_files(sources):
        count = 0
        converted = (_in_ev_and_angstrom(part, units) for part in _read(path, energy_key, forces_key, folder))
        for part in check(converted, max_force, closed_shell):
            dropped.extend(f"{part.path}, frame {index}: {what}" for index, what in part.problems)
            count += len(part.frames)
            yield part.frames
        total += count
        if progress is not None:
            progress(str(path), count)
    if dropped and (on_bad == "refuse" or not total):
        quoted = "; ".join(dropped[:_SHOWN]) + ("; ..." if len(dropped) > _SHOWN else "")
        raise DataError(f"{len(dropped)} of {total + len(dropped)} frames can't be used: {quoted}")
    if not total:
        raise DataError(f"expected labelled frames in {', '.join(map(str, sources))}, found none")


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """The files that `sources` (files, folders, globs) stand for, each once. Raises DataError where one has none."""
    if isinstance(sources, (str, Path)):
        sources = [sources]
    if not sources:
        raise DataError("expected at least one file, folder or glob of labelled structures, received none")
    found: dict[Path, Path] = {}
    for source in sources:
        paths = list(_matches(source))
        if not paths:
            raise DataError(f"{source}: no such file, and no files where it is a folder or a glob")
        found |= {path.resolve(): path for path in paths if path.resolve() not in found}
    return list(found.values())


def split_by_molecule(
    frames: Ragged, fractions: tuple[float, float, float] = (0.9, 0.05, 0.05), seed: int = 0
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "valid"], Int[np.ndarray, "test"]]:
    """Indices of frames for training, validation and test; all frames of a molecule are in one of them.

    A molecule's place follows from a hash of (seed, molecule) alone: adding data never moves one. `fractions`
    hold for many molecules, roughly; with few, a part may be empty. Raises DataError for fractions that don't add up.
    """
    return split_names(frames.molecules, fractions, seed)


def split_names(
    molecules: Sequence[str] | np.ndarray, fractions: tuple[float, float, float], seed: int
) -> tuple[Int[np.ndarray, "train"], Int[np.ndarray, "valid"], Int[np.ndarray, "test"]]:
    """`split_by_molecule` of frames whose molecules have these names."""
    if len(fractions) != 3 or min(fractions) < 0.0 or abs(sum(fractions) - 1.0) > 1e-6:
        raise DataError(f"expected three fractions that are not negative and add up to 1, received {fractions}")
    part_of = {name: _part(name, fractions, seed) for name in dict.fromkeys(molecules)}
    parts = np.fromiter((part_of[name] for name in molecules), np.int64, len(molecules))
    train, valid, test = (np.flatnonzero(parts == k) for k in range(3))
    return train, valid, test


def _part(molecule: str, fractions: tuple[float, float, float], seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{molecule}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2.0**64
    if place < fractions[0]:
        return 0
    return 1 if place < fractions[0] + fractions[1] or fractions[2] == 0.0 else 2


def _matches(source: str | Path) -> Iterator[Path]:
    path = Path(source)
    if path.is_file():
        yield path
    elif path.is_dir():
        # a .json in a folder is rarely a database; one that is can be named
        suffixes = (*XYZ_SUFFIXES, *HDF5_SUFFIXES, ".db")
        inside = (p for p in sorted(path.rglob("*")) if p.is_file() and not p.name.startswith("."))
        yield from (p for p in inside if p.suffix.lower() in suffixes)
    else:
        yield from (Path(name) for name in sorted(glob.glob(str(source), recursive=True)) if Path(name).is_file())


def _read(path: Path, energy_key: str | None, forces_key: str | None, folder: Path | None) -> Iterator[Part]:
    suffix = path.suffix.lower()
    if suffix in HDF5_SUFFIXES:
        return iterate_hdf5(path, folder)
    if suffix in (*XYZ_SUFFIXES, *DB_SUFFIXES):
        return iterate_labelled(path, energy_key, forces_key)
    wanted = ", ".join((*XYZ_SUFFIXES, *DB_SUFFIXES, *HDF5_SUFFIXES))
    raise DataError(f"{path}: expected a file with one of the suffixes {wanted}")


def _in_ev_and_angstrom(part: Part, units: Units) -> Part:
    frames, energy, length = part.frames, units.in_ev, units.in_angstrom
    converted = Frames(
        frames.numbers,
        frames.positions * length if length != 1.0 else frames.positions,
        frames.energies * energy if energy != 1.0 else frames.energies,
        frames.forces * np.float32(energy / length) if energy != length else frames.forces,
        frames.splits,
        with_formulas(frames),
    )
    return Part(part.path, converted, part.origin, part.problems)


def with_formulas(frames: Frames) -> np.ndarray:
    """The molecules [B], Hill's formula where a frame has no name."""
    unnamed = np.flatnonzero(frames.molecules == "")
    if not unnamed.size:
        return frames.molecules
    chosen = frames if unnamed.size == len(frames) else frames.select(unnamed)
    numbers = np.where((chosen.numbers > 0) & (chosen.numbers <= 118), chosen.numbers, 0)
    elements, columns = np.unique(numbers, return_inverse=True)
    places = chosen.frame_of_atom * len(elements) + columns
    counts = np.bincount(places, minlength=len(chosen) * len(elements)).reshape(len(chosen), len(elements))
    rows, which = np.unique(counts, axis=0, return_inverse=True)
    formulas = np.array([_hill(elements, row) for row in rows] or [""], dtype=object)
    named = frames.molecules.copy()
    named[unnamed] = formulas[which.reshape(-1)]
    return named


def _hill(elements: Int[np.ndarray, "Z"], counts: Int[np.ndarray, "Z"]) -> str:
    """Carbon, hydrogen, then the rest by name; without carbon, all by name."""
    amounts = {known.chemical_symbols[z]: int(n) for z, n in zip(elements, counts, strict=True) if n}
    first = [s for s in ("C", "H") if s in amounts and "C" in amounts]
    return "".join(
        s + (str(amounts[s]) if amounts[s] > 1 else "") for s in [*first, *sorted(set(amounts) - set(first))]
    )
