"""Labelled and unlabelled structures from files that ASE reads: extended XYZ, ASE's databases, and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from jaxff.errors import DataError
from jaxff.train.checks import Part
from jaxff.train.frames import CHUNK, Frame, Frames

XYZ_SUFFIXES = (".xyz", ".extxyz")
DB_SUFFIXES = (".db", ".json")
ENERGY_KEYS = ("energy", "REF_energy")
FORCES_KEYS = ("forces", "REF_forces")
_ROWS = 1000  # of a database, read at once
MOLECULE_KEYS = ("molecule", "smiles", "name")


def iterate_atoms(path: str | Path) -> Iterator[tuple[Atoms, dict[str, Any]]]:
    """Each frame of a file and all that stands beside it: info and arrays, a database's key-value pairs and data,
    results of a calculator (they come first). Raises DataError where ASE can't read on."""
    name, suffix = str(path), Path(path).suffix.lower()
    if not Path(path).is_file():
        raise DataError(f"{name}: no such file")
    count = 0
    try:
        for atoms, values in _database(name, suffix) if suffix in DB_SUFFIXES else _frames(name, suffix):
            yield atoms, values
            count += 1
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{name}: ASE can't read frame {count} ({reason})") from error


def iterate_labelled(path: str | Path, energy_key: str | None = None, forces_key: str | None = None) -> Iterator[Part]:
    """The labelled frames of a file in its own units, in parts of bounded size; what lacks a label or is periodic is a
    problem of its part.

    Without keys: the results of a calculator, else `energy` and `forces` or `REF_energy` and `REF_forces`.
    """
    frames: list[Frame] = []
    origin: list[int] = []
    problems: list[tuple[int, str]] = []
    atoms_held = 0

    def part() -> Part:
        return Part(str(path), Frames.of(frames), np.array(origin, np.int64), problems)

    for index, (atoms, values) in enumerate(iterate_atoms(path)):
        try:
            frames.append(_labelled(atoms, values, energy_key, forces_key))
            origin.append(index)
        except DataError as error:
            problems.append((index, str(error)))
        atoms_held += len(atoms)
        if atoms_held >= CHUNK:
            yield part()
            frames, origin, problems, atoms_held = [], [], [], 0
    yield part()


def molecule_of(values: dict[str, Any]) -> str:
    """What a frame's file calls its molecule, or ''."""
    found = [str(values[key]).strip() for key in MOLECULE_KEYS if values.get(key) is not None]
    return next(filter(None, found), "")


def _labelled(atoms: Atoms, values: dict[str, Any], energy_key: str | None, forces_key: str | None) -> Frame:
    if atoms.pbc.any():
        raise DataError("periodic, and jaxff knows molecules only")
    energy = _array(values, "energy", (energy_key,) if energy_key else ENERGY_KEYS)
    forces = _array(values, "forces", (forces_key,) if forces_key else FORCES_KEYS)
    if energy.size != 1:
        raise DataError(f"expected one energy, received {energy.size}")
    if forces.shape != atoms.positions.shape:
        raise DataError(f"expected forces of shape [{len(atoms)}, 3], received {list(forces.shape)}")
    return Frame(atoms.numbers, atoms.positions, float(energy.reshape(())), forces, molecule_of(values))


def _array(values: dict[str, Any], what: str, keys: tuple[str, ...]) -> np.ndarray:
    for key in keys:
        if values.get(key) is not None:
            try:
                return np.asarray(values[key], dtype=np.float64)
            except (TypeError, ValueError):
                raise DataError(f"expected numbers under {key}, received {str(values[key])[:60]!r}") from None
    raise DataError(f"no {what} under {' or '.join(keys)}")


def _frames(name: str, suffix: str) -> Iterator[tuple[Atoms, dict[str, Any]]]:
    import ase.io

    kind = "extxyz" if suffix in XYZ_SUFFIXES else None
    for atoms in ase.io.iread(name, index=":", format=kind, do_not_split_by_at_sign=True):
        yield atoms, {**atoms.info, **atoms.arrays, **_results(atoms)}


def _database(name: str, suffix: str) -> Iterator[tuple[Atoms, dict[str, Any]]]:
    from ase.db import connect

    database = connect(name, type=suffix.removeprefix("."), append=True)
    for row in _rows(database) if suffix == ".db" else database.select():
        atoms = row.toatoms()
        yield atoms, {**row.key_value_pairs, **row.data, **_results(atoms)}


def _rows(database: Any) -> Iterator[Any]:
    """All rows, some at a time: ASE would hold all of them in memory."""
    last = 0
    while rows := list(database.select([("id", ">", last)], sort="id", limit=_ROWS)):
        yield from rows
        last = rows[-1].id


def _results(atoms: Atoms) -> dict[str, Any]:
    return dict(atoms.calc.results) if atoms.calc is not None else {}
