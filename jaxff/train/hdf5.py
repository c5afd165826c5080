"""HDF5 files of labelled structures, in the layout of the distillation project: ragged arrays, joined, with splits.

/structures: atomic_numbers int64 [N], atomic_numbers_splits int64 [B+1], positions f64 [N, 3] Å, cells f64 [B, 3, 3],
pbc bool [B, 3], and jaxff's own, optional: molecules, UTF-8 strings [B].
/labels: energy f64 [B] eV, forces f32 [N, 3] eV/Å, forces_splits int64 [B+1], stress f64 [B, 6] with stress_mask bool
[B], structure_indices int64 [B] (which structure a label belongs to). /metadata: attributes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxff.errors import DataError
from jaxff.files import atomic_write
from jaxff.train.checks import Part
from jaxff.train.frames import Frames, cumulative

SUFFIXES = (".h5", ".hdf5")
_SLAB = 1 << 20  # rows that are written at once


def write_hdf5(
    path: str | Path, frames: Frames, attributes: Mapping[str, Any], tables: Mapping[str, Any] | None = None
) -> None:
    """Writes `frames` to `path`, whole or not at all; `attributes` become those of /metadata.

    attributes: strings, numbers, arrays; other values as JSON. tables: more datasets under /metadata, by name. The
    attribute `sha256` is added: `checksum` of the frames. Raises OSError where writing fails.
    """
    import h5py

    text = h5py.string_dtype("utf-8")
    count = len(frames)
    names = sum(len(name.encode()) + 64 for name in frames.molecules)
    room = 44 * len(frames.numbers) + 160 * count + names + (1 << 16)
    with atomic_write(path) as temporary, _with_room(temporary, room, path), h5py.File(temporary, "w") as file:
        structures = file.create_group("structures")
        _write(structures, "atomic_numbers", frames.numbers, np.int64)
        _write(structures, "atomic_numbers_splits", frames.splits, np.int64)
        _write(structures, "positions", frames.positions, np.float64)
        structures.create_dataset("cells", (count, 3, 3), np.float64, fillvalue=0.0)
        structures.create_dataset("pbc", (count, 3), bool, fillvalue=False)
        structures.create_dataset("molecules", data=frames.molecules, dtype=text)
        labels = file.create_group("labels")
        _write(labels, "energy", frames.energies, np.float64)
        _write(labels, "forces", frames.forces, np.float32)
        _write(labels, "forces_splits", frames.splits, np.int64)
        labels.create_dataset("stress", (count, 6), np.float64, fillvalue=0.0)
        labels.create_dataset("stress_mask", (count,), bool, fillvalue=False)
        _write(labels, "structure_indices", np.arange(count), np.int64)
        metadata = file.create_group("metadata")
        for name, value in {**attributes, "sha256": checksum(frames)}.items():
            metadata.attrs[name] = value if isinstance(value, (str, int, float, np.ndarray)) else json.dumps(value)
        for name, rows in (tables or {}).items():
            data = np.asarray(rows)
            is_text = data.dtype.kind in "OU" or data.size == 0
            metadata.create_dataset(
                name, data=data.astype(object) if is_text else data, dtype=text if is_text else None
            )


@contextmanager
def _with_room(temporary: Path, size: int, path: str | Path) -> Iterator[None]:
    """Raises OSError where the disk has no room for `size` bytes: h5py ends the process on a full one."""
    if hasattr(os, "posix_fallocate"):
        with open(temporary, "r+b") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(error.errno, os.strerror(error.errno), str(path)) from None
            file.truncate(0)
    yield


def read_hdf5(path: str | Path) -> Part:
    """The labelled frames of a file, in the order of the labels and in the file's units; no value is checked yet.

    A label whose forces are not as many as its structure's atoms, and one of a periodic structure, are problems of
    the part. Raises DataError for a file of another layout.
    """
    import h5py

    name = str(path)
    try:
        with h5py.File(path, "r") as file:
            return _read(name, file)
    except (OSError, RuntimeError, KeyError) as error:  # what h5py raises at damage
        raise DataError(f"{name}: not an HDF5 file that can be read ({error})") from None


def read_metadata(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Attributes and datasets of /metadata; strings as str. Raises DataError."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            group = file.get("metadata")
            if not isinstance(group, h5py.Group):
                return {}, {}
            tables = {key: table.asstr()[()] if table.dtype.kind == "O" else table[()] for key, table in group.items()}
            return dict(group.attrs), tables
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{path}: not an HDF5 file that can be read ({error})") from None


def checksum(frames: Frames) -> str:
    """SHA-256 over numbers (i4), positions (f8), energies (f8), forces (f4) and splits (i8), little-endian."""
    digest = hashlib.sha256()
    for array, kind in (
        (frames.numbers, "<i4"),
        (frames.positions, "<f8"),
        (frames.energies, "<f8"),
        (frames.forces, "<f4"),
        (frames.splits, "<i8"),
    ):
        digest.update(np.ascontiguousarray(array, dtype=kind).data)
    return digest.hexdigest()


def _write(group: Any, name: str, data: np.ndarray, kind: Any) -> None:
    dataset = group.create_dataset(name, data.shape, kind)
    for start in range(0, len(data), _SLAB):
        dataset[start : start + _SLAB] = data[start : start + _SLAB]


def _read(name: str, file: Any) -> Part:
    numbers = _dataset(name, file, "structures/atomic_numbers", (None,), "iu")
    positions = _dataset(name, file, "structures/positions", (len(numbers), 3), "f")
    splits = _splits(name, file, "structures/atomic_numbers_splits", len(numbers))
    structures = len(splits) - 1
    energies = _dataset(name, file, "labels/energy", (None,), "fiu")
    forces = _dataset(name, file, "labels/forces", (None, 3), "f")
    forces_splits = _splits(name, file, "labels/forces_splits", len(forces), len(energies))
    owners = _owners(name, file, len(energies), structures)
    molecules = np.full(structures, "", object)
    if "structures/molecules" in file:
        molecules = _dataset(name, file, "structures/molecules", (structures,), "OS")

    atoms, given = np.diff(splits)[owners], np.diff(forces_splits)
    problems = {int(b): f"forces of {given[b]} atoms, and {atoms[b]} atoms" for b in np.flatnonzero(atoms != given)}
    if "structures/pbc" in file:
        periodic = _dataset(name, file, "structures/pbc", (structures, 3), "biu").astype(bool).any(axis=1)
        problems |= {
            int(b): "periodic, and jaxff knows molecules only" for b in np.flatnonzero(np.atleast_1d(periodic)[owners])
        }
    kept = np.ones(len(energies), bool)
    kept[list(problems)] = False
    origin = np.flatnonzero(kept)
    owners = owners[origin]
    inside, of_forces = _rows(splits, owners), _rows(forces_splits, origin)
    frames = Frames(
        np.clip(numbers[inside], -1, 1 << 30),  # whatever is no atomic number stays none in int32
        positions[inside],
        energies[origin],
        forces[of_forces],
        cumulative(np.diff(splits)[owners]),
        molecules[owners],
    )
    return Part(name, frames, origin, sorted(problems.items()))


def _rows(splits: Int[np.ndarray, "B+1"], chosen: Int[np.ndarray, "C"]) -> np.ndarray | slice:
    """The rows of the frames `chosen`; a slice, which copies nothing, where they are all in order."""
    if len(chosen) == len(splits) - 1 and np.array_equal(chosen, np.arange(len(chosen))):
        return slice(None)
    counts = np.diff(splits)[chosen]
    return np.repeat(splits[:-1][chosen] - cumulative(counts)[:-1], counts) + np.arange(counts.sum())


def _dataset(name: str, file: Any, key: str, shape: tuple[int | None, ...], kinds: str) -> np.ndarray:
    """A dataset as an array, its shape (None: any length) and kind of dtype checked."""
    import h5py

    dataset = file.get(key)
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"{name}: the dataset {key} is missing; expected the layout of jaxff.train.hdf5")
    fits = len(dataset.shape) == len(shape) and all(b in (None, a) for a, b in zip(dataset.shape, shape, strict=True))
    if not fits:
        wanted = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        raise DataError(f"{name}: {key}: expected shape {wanted}, received {list(dataset.shape)}")
    if dataset.dtype.kind not in kinds:
        raise DataError(f"{name}: {key}: expected a dtype of kind {'/'.join(kinds)}, received {dataset.dtype}")
    if dataset.dtype.kind in "OS":
        return dataset.asstr(errors="replace")[()].astype(object)
    return dataset[()]


def _splits(name: str, file: Any, key: str, rows: int, frames: int | None = None) -> Int[np.ndarray, "B+1"]:
    splits = _dataset(name, file, key, (None if frames is None else frames + 1,), "iu").astype(np.int64)
    if splits.size == 0 or splits[0] != 0 or splits[-1] != rows or np.any(np.diff(splits) < 0):
        raise DataError(f"{name}: {key}: expected splits that rise from 0 to {rows}, the number of rows")
    return splits


def _owners(name: str, file: Any, labels: int, structures: int) -> Int[np.ndarray, "B"]:
    """Which structure each label belongs to; without structure_indices, the one of the same place."""
    key = "labels/structure_indices"
    if key not in file:
        if labels != structures:
            raise DataError(f"{name}: expected {key} for {labels} labels of {structures} structures")
        return np.arange(labels)
    owners = _dataset(name, file, key, (labels,), "iu").astype(np.int64)
    if owners.size and not (owners.min() >= 0 and owners.max() < structures):
        raise DataError(f"{name}: {key}: expected indices of {structures} structures, received {owners.max()}")
    return owners
