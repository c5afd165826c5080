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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from jaxff.errors import DataError
from jaxff.files import atomic_write
from jaxff.train.checks import Part
from jaxff.train.frames import CHUNK, Frames, cumulative, rows_of, slabs
from jaxff.train.records import Records
from jaxff.train.scratch import Scratch

SUFFIXES = (".h5", ".hdf5")
_SLAB = 1 << 20  # rows that are written at once
_SPAN = 4  # chunks that are read for one
_PERIODIC = "periodic, and jaxff knows molecules only"


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
    """The labelled frames of a file as one part in memory: `iterate_hdf5`, joined."""
    return Part.join(str(path), list(iterate_hdf5(path)))


def iterate_hdf5(path: str | Path, folder: Path | None = None) -> Iterator[Part]:
    """The labelled frames of a file, in the order of the labels and in the file's units, in parts of bounded size; no
    value is checked yet.

    A label whose forces are not as many as its structure's atoms, and one of a periodic structure, are problems of
    its part. folder: where what the labels take in another order is unpacked. Raises DataError for a file of another
    layout.
    """
    import h5py

    name = str(path)
    try:
        with h5py.File(path, "r") as file:
            yield from _parts(name, file, folder)
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


def checksum(frames: Frames | Records) -> str:
    """SHA-256 over numbers (i4), positions (f8), energies (f8), forces (f4) and splits (i8), little-endian."""
    digest = hashlib.sha256()

    def add(arrays: Iterable[np.ndarray], kind: str) -> None:
        for array in arrays:
            digest.update(np.ascontiguousarray(array, dtype=kind).data)

    add(frames.slabs("numbers"), "<i4")
    add(frames.slabs("positions"), "<f8")
    add([frames.energies], "<f8")
    add(frames.slabs("forces"), "<f4")
    add([frames.splits], "<i8")
    return digest.hexdigest()


def _write(group: Any, name: str, data: np.ndarray, kind: Any) -> None:
    dataset = group.create_dataset(name, data.shape, kind)
    for start in range(0, len(data), _SLAB):
        dataset[start : start + _SLAB] = data[start : start + _SLAB]


def _parts(name: str, file: Any, folder: Path | None) -> Iterator[Part]:
    numbers = _dataset(name, file, "structures/atomic_numbers", (None,), "iu")
    positions = _dataset(name, file, "structures/positions", (len(numbers), 3), "f")
    splits = _splits(name, file, "structures/atomic_numbers_splits", len(numbers))
    structures = len(splits) - 1
    energies = _dataset(name, file, "labels/energy", (None,), "fiu")[()]
    forces = _dataset(name, file, "labels/forces", (None, 3), "f")
    forces_splits = _splits(name, file, "labels/forces_splits", len(forces), len(energies))
    owners = _owners(name, file, len(energies), structures)
    molecules, periodic = _molecules(name, file, structures), _periodic(name, file, structures)
    numbers_of, positions_of = _Rows(numbers, splits, folder), _Rows(positions, splits, folder)
    forces_of = _Rows(forces, forces_splits, folder)

    atoms, given = np.diff(splits)[owners], np.diff(forces_splits)
    bad = (atoms != given) | periodic[owners]
    for slab in slabs(cumulative(np.maximum(atoms, given))):
        labels = np.arange(slab.start, slab.stop)
        problems = [
            (b, _PERIODIC if periodic[owners[b]] else f"forces of {given[b]} atoms, and {atoms[b]} atoms")
            for b in labels[bad[slab]].tolist()
        ]
        origin = labels[~bad[slab]]
        own = owners[origin]
        frames = Frames(
            np.clip(numbers_of(own), -1, 1 << 30),  # whatever is no atomic number stays none in int32
            positions_of(own),
            energies[origin],
            forces_of(origin),
            cumulative(atoms[origin]),
            molecules[own],
        )
        yield Part(name, frames, origin, problems)


class _Rows:
    """The rows of a ragged dataset that frames own, splits[b]:splits[b+1].

    Frames that lie near each other are read in one piece. Where they don't, every piece would cost h5py 100 µs and,
    compressed, a chunk: the dataset is then unpacked once.
    """

    def __init__(self, dataset: Any, splits: Int[np.ndarray, "B+1"], folder: Path | None) -> None:
        self._dataset, self._splits, self._folder = dataset, splits, folder
        self._unpacked: Scratch | None = None

    def __call__(self, frames: Int[np.ndarray, "b"]) -> np.ndarray:
        """The rows of `frames`, joined, in their order."""
        starts, counts = self._splits[frames], self._splits[frames + 1] - self._splits[frames]
        if not len(frames):
            return self._dataset[:0]
        first, last = starts.min(), (starts + counts).max()
        if last - first > _SPAN * CHUNK:
            return self._scattered(starts, counts)
        span = self._dataset[first:last]
        in_order = len(span) == counts.sum() and np.all(np.diff(frames) > 0)
        return span if in_order else span[rows_of(starts - first, counts)]

    def _scattered(self, starts: Int[np.ndarray, "b"], counts: Int[np.ndarray, "b"]) -> np.ndarray:
        if self._unpacked is None:
            self._unpacked = Scratch(self._folder)
            for first in range(0, len(self._dataset), CHUNK):
                self._unpacked.append(np.ascontiguousarray(self._dataset[first : first + CHUNK]))
        rows = np.empty((counts.sum(), *self._dataset.shape[1:]), self._dataset.dtype)
        size = rows[:1].nbytes or 1
        target, to = rows.reshape(-1).view(np.uint8).data, cumulative(counts * size).tolist()
        for start, (a, b) in zip((starts * size).tolist(), pairwise(to), strict=True):
            self._unpacked.read(start, [target[a:b]])
        return rows


def _dataset(name: str, file: Any, key: str, shape: tuple[int | None, ...], kinds: str) -> Any:
    """A dataset, not read yet, its shape (None: any length) and kind of dtype checked."""
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
    return dataset


def _molecules(name: str, file: Any, structures: int) -> np.ndarray:
    """The molecule of each structure, '' without; equal names are one string."""
    key = "structures/molecules"
    found = np.full(structures, "", object)
    if key in file:
        dataset = _dataset(name, file, key, (structures,), "OS").asstr(errors="replace")
        seen: dict[str, str] = {}
        for first in range(0, structures, CHUNK):
            names = dataset[first : first + CHUNK]
            found[first : first + CHUNK] = [seen.setdefault(molecule, molecule) for molecule in names]
    return found


def _periodic(name: str, file: Any, structures: int) -> Bool[np.ndarray, "S"]:
    """Which structures are periodic in some direction."""
    key = "structures/pbc"
    if key not in file:
        return np.zeros(structures, bool)
    return _dataset(name, file, key, (structures, 3), "biu")[()].astype(bool).any(axis=1)


def _splits(name: str, file: Any, key: str, rows: int, frames: int | None = None) -> Int[np.ndarray, "B+1"]:
    splits = _dataset(name, file, key, (None if frames is None else frames + 1,), "iu")[()].astype(np.int64)
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
    owners = _dataset(name, file, key, (labels,), "iu")[()].astype(np.int64)
    if owners.size and not (owners.min() >= 0 and owners.max() < structures):
        raise DataError(f"{name}: {key}: expected indices of {structures} structures, received {owners.max()}")
    return owners
