"""Training data stay on disk: the same frames in pieces of any size, and memory that doesn't grow with them."""

import errno
import gc
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.db import connect

from jaxff.config import PainnConfig
from jaxff.errors import DataError
from jaxff.train import ase_files, frames, hdf5, records
from jaxff.train.batches import Packer, Position, Store, batch_shape, stream
from jaxff.train.checks import work_ratio
from jaxff.train.config import DataConfig
from jaxff.train.data import checksum, read_frames
from jaxff.train.dataset import Dataset, load_dataset
from jaxff.train.frames import Frames
from jaxff.train.hdf5 import read_hdf5, write_hdf5
from jaxff.train.records import Records, Writer
from jaxff.train.references import fit_references, remainders
from jaxff.train.scratch import Scratch
from tests.train.teacher import labelled

MODEL = PainnConfig.model_validate({"max_z": 8, "cutoff": 3.5})


def shrink(monkeypatch: pytest.MonkeyPatch, atoms: int) -> None:
    """Pieces of so many atoms; of each frame on its own, where they are fewer than its."""
    for module in (frames, hdf5, ase_files):
        monkeypatch.setattr(module, "CHUNK", atoms)
    monkeypatch.setattr(ase_files, "_ROWS", 7)


@pytest.fixture(params=[1, 30])
def small_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch, request.param)


def equal(a: Frames, b: Frames) -> None:
    for name in ("numbers", "positions", "energies", "forces", "splits", "molecules"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def write_h5(path: Path, data: Frames) -> None:
    write_hdf5(path, data, {})


def write_packed_h5(path: Path, data: Frames) -> None:
    """Compressed and in chunks, as other programs write it."""
    write_hdf5(path, data, {})
    with h5py.File(path, "a") as file:
        for key in ("structures/positions", "labels/forces", "structures/atomic_numbers"):
            values = file[key][()]
            del file[key]
            file.create_dataset(key, data=values, chunks=(13, *values.shape[1:]), compression="gzip")


def write_shuffled_h5(path: Path, data: Frames) -> None:
    """Structures in another order than the labels."""
    order = np.random.default_rng(0).permutation(len(data))
    write_hdf5(path, data.select(order), {})
    with h5py.File(path, "a") as file:
        for key in ("energy", "forces", "forces_splits", "structure_indices"):
            del file[f"labels/{key}"]
        file["labels/energy"], file["labels/forces"] = data.energies, data.forces
        file["labels/forces_splits"], file["labels/structure_indices"] = data.splits, np.argsort(order)


def as_atoms(data: Frames) -> Iterator[tuple[Atoms, dict]]:
    for z, r, energy, forces, molecule in data:
        yield Atoms(z, r), {"energy": energy, "forces": forces.astype(float), "molecule": f"the {molecule}"}


def write_db(path: Path, data: Frames) -> None:
    with connect(path) as database:
        for atoms, values in as_atoms(data):
            database.write(atoms, data=values)


def write_xyz(path: Path, data: Frames) -> None:
    images = []
    for atoms, values in as_atoms(data):
        atoms.arrays["REF_forces"] = values["forces"]
        atoms.info |= {"REF_energy": values["energy"], "molecule": values["molecule"]}
        images.append(atoms)
    ase.io.write(path, images, format="extxyz")


WRITERS = [
    ("a.h5", write_h5),
    ("a.h5", write_packed_h5),
    ("a.h5", write_shuffled_h5),
    ("a.db", write_db),
    ("a.xyz", write_xyz),
]


@pytest.mark.parametrize("atoms", [1, 30])
@pytest.mark.parametrize(("name", "write"), WRITERS, ids=lambda x: getattr(x, "__name__", x))
def test_pieces_of_any_size_are_the_same_frames(
    name: str, write: Callable[[Path, Frames], None], atoms: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad ones, dropped, in between."""
    data = labelled(each=3)
    data.energies[[5, 6, 20]] = np.nan
    data.forces[data.splits[11]] = 200.0
    write(tmp_path / name, data)
    whole, dropped = read_frames([tmp_path / name], on_bad="drop")
    assert len(dropped) == 4
    assert len(whole) == len(data) - 4
    shrink(monkeypatch, atoms)
    again, also_dropped = read_frames([tmp_path / name], on_bad="drop")
    equal(again, whole)
    assert also_dropped == dropped
    with pytest.raises(DataError, match=rf"4 of {len(data)} frames"):
        read_frames([tmp_path / name])


@pytest.mark.usefixtures("small_pieces")
def test_units_are_judged_by_the_whole_file(tmp_path: Path) -> None:
    """Energies of neighbours on both sides of a seam, too."""
    path = labelled(["CH3CHO"], each=1)
    one = path.select([0] * 12)
    step = np.linspace(0.0, 0.02, 12)[:, None, None] * np.random.default_rng(0).normal(0.0, 1.0, (1, 7, 3))
    one.positions[:] += (step - step.mean(axis=1, keepdims=True)).reshape(-1, 3)
    forces = np.full((12, 7, 3), 3.0) * [[-1.0], [1.0], [-1.0], [1.0], [-1.0], [1.0], [0.0]]
    one.forces[:] = forces.reshape(-1, 3)
    work = np.sum(forces * step, axis=(1, 2))
    assert np.all(np.abs(np.diff(work)) > 5e-3)
    one.energies[:] = 3.0 * work  # of forces that are a third, and the other way
    assert work_ratio(one) == pytest.approx(-3.0)
    write_hdf5(tmp_path / "a.h5", one, {})
    with pytest.raises(DataError, match="energies change -3 times"):
        read_frames([tmp_path / "a.h5"])


@pytest.mark.usefixtures("small_pieces")
def test_records_hold_what_was_read(tmp_path: Path) -> None:
    data = labelled(each=4)
    writer = Writer(3.0, tmp_path)
    for first in range(0, len(data), 10):
        writer.append(data.select(np.arange(first, min(first + 10, len(data)))))
    made = writer.finish()
    assert list(tmp_path.iterdir()) == []  # whatever ends the process, nothing is left
    assert checksum(made) == checksum(data)
    order = np.random.default_rng(1).permutation(len(data))[:20]
    equal(made.select(order), data.select(order))
    equal(made.select(np.arange(0)), data.select([]))
    references = np.linspace(-3.0, 4.0, 9) ** 3
    expected = data.energies - np.add.reduceat(references[data.numbers], data.splits[:-1])
    np.testing.assert_array_equal(remainders(made, references), expected)
    chosen = np.sort(order)
    np.testing.assert_array_equal(fit_references(made, 8, chosen=chosen), fit_references(data.select(chosen), 8))


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hdf5(tmp_path / "a.h5", labelled(each=2), {})

    def full(handle: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    data = DataConfig.model_validate({"train": str(tmp_path / "a.h5")})
    with pytest.raises(DataError, match=rf"{tmp_path}: the frames can't be kept .*\(No space left on device\)"):
        load_dataset(data, MODEL, folder=tmp_path)


def test_a_folder_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none: can't be written to \(No such file"):
        Scratch(tmp_path / "none")


def test_the_file_goes_with_its_last_reference(tmp_path: Path) -> None:
    writer = Writer(3.0, tmp_path)
    writer.append(labelled(each=1))
    made = writer.finish()
    handle = made.scratch._file
    del writer, made
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def use(path: Path) -> Dataset:
    """What a training run does to its data: load, references, an epoch of batches."""
    dataset = load_dataset(DataConfig.model_validate({"train": str(path)}), MODEL)
    made = dataset.frames
    references = fit_references(made, 8, chosen=dataset.train)
    store = Store(made, remainders(made, references).astype(np.float32))
    packer = Packer(store, batch_shape(store, 8, 1.1))
    for work in stream(packer, dataset.train, 0, Position()):
        if work.after.epoch > 0:
            return dataset
    raise AssertionError


def peak_of(path: Path) -> int:
    tracemalloc.start()
    try:
        use(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("write", [write_h5, write_packed_h5, write_shuffled_h5])
def test_memory_does_not_grow_with_positions_and_forces(
    write: Callable[[Path, Frames], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the frames: a small part of what their positions, forces and pairs take is added."""
    shrink(monkeypatch, 1 << 10)
    few = labelled(each=100)
    write(tmp_path / "few.h5", few)
    write(tmp_path / "many.h5", Frames.join([few] * 4))
    added = 3 * len(few)
    use(tmp_path / "few.h5")
    growth = (peak_of(tmp_path / "many.h5") - peak_of(tmp_path / "few.h5")) / added
    a_frame = 36 * len(few.numbers) / len(few)
    assert growth < 0.8 * a_frame, f"{growth:.0f} bytes a frame, positions and forces are {a_frame:.0f}"


def test_reading_a_batch_reads_its_frames_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    data = labelled(each=2)
    writer = Writer(3.0)
    writer.append(data)
    made: Records = writer.finish()
    seen: list[tuple[int, int]] = []
    read = Scratch.read

    def counted(self: Scratch, start: int, targets: list[memoryview]) -> None:
        seen.append((start, sum(target.nbytes for target in targets)))
        read(self, start, targets)

    monkeypatch.setattr(records.Scratch, "read", counted)
    ids = np.array([7, 3])
    store = Store(made, made.energies)
    Packer(store, batch_shape(store, 2, 4.0)).pack([ids])
    sizes = 36 * made.atoms_of(ids) + 4 * made.pair_count[ids]
    assert seen == list(zip(made.starts[ids], sizes, strict=True))


def test_what_is_read_whole_is_the_same(tmp_path: Path) -> None:
    data = labelled(each=2)
    write_hdf5(tmp_path / "a.h5", data, {})
    part = read_hdf5(tmp_path / "a.h5")
    equal(part.frames, data)
    assert part.origin.tolist() == list(range(len(data)))
