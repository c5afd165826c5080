"""Reading: the same frames from every kind of file, units, what is refused, what is dropped, how molecules split."""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ase.io
import h5py
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect

from jaxff.config import PainnConfig
from jaxff.errors import ConfigError, DataError
from jaxff.train.checks import closest_distances, work_ratio
from jaxff.train.config import DataConfig
from jaxff.train.data import Units, read_frames, split_by_molecule, write_hdf5
from jaxff.train.dataset import load_dataset
from jaxff.train.frames import Frame, Frames
from jaxff.train.hdf5 import checksum, read_metadata

NAMES = ("H2O", "CH4", "C6H6", "CH3CH2OH", "CO2")


def labelled(name: str, seed: int = 0, size: float = 0.03) -> Frame:
    """A distorted molecule with labels of a harmonic force field: forces that belong to the energy, no net force."""
    atoms = molecule(name)
    step = np.random.default_rng(seed).normal(0.0, size, atoms.positions.shape)
    step -= step.mean(axis=0)
    energy = -10.0 * len(atoms) + 10.0 * float(np.sum(step**2))
    return Frame(atoms.numbers, atoms.positions + step, energy, -20.0 * step, name)


@pytest.fixture
def frames() -> Frames:
    return Frames.of([labelled(name, seed) for seed in range(4) for name in NAMES])


def as_atoms(frame: Frame, **info: object) -> Atoms:
    atoms = Atoms(numbers=frame.numbers, positions=frame.positions, info=info)
    atoms.calc = SinglePointCalculator(atoms, energy=frame.energy, forces=frame.forces)
    return atoms


def equal(a: Frames, b: Frames, rtol: float = 0.0, atol: float = 0.0) -> None:
    np.testing.assert_array_equal(a.numbers, b.numbers)
    np.testing.assert_array_equal(a.splits, b.splits)
    np.testing.assert_array_equal(a.molecules, b.molecules)
    for name in ("positions", "energies", "forces"):
        np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=rtol, atol=atol)


def changed(frame: Frame, **values: object) -> Frame:
    return frame._replace(**values)  # type: ignore[arg-type]


# ---- frames ----


def test_frames_select_join_and_index(frames: Frames) -> None:
    order = [7, 0, 7, 19]
    chosen = frames.select(order)
    for k, b in enumerate(order):
        for mine, theirs in zip(chosen[k], frames[b], strict=True):
            np.testing.assert_array_equal(mine, theirs)
    joined = Frames.join([frames.select([0]), Frames.join([]), frames.select(np.arange(1, len(frames)))])
    equal(joined, frames)
    mask = np.arange(len(frames)) % 2 == 1
    equal(frames.select(mask), frames.select(np.flatnonzero(mask)))
    assert frames[-1].molecule == "CO2"
    assert frames.num_atoms.tolist()[:3] == [3, 5, 12]
    with pytest.raises(IndexError):
        frames[20]
    assert len(frames.select([])) == 0


def test_frames_refuse_lengths_that_disagree(frames: Frames) -> None:
    with pytest.raises(DataError, match=r"expected energies of shape \[20\].*received \[19\]"):
        replace(frames, energies=frames.energies[1:])
    with pytest.raises(DataError, match="splits that start at 0"):
        replace(frames, splits=frames.splits[::-1])


# ---- the same frames from every kind of file ----


def write_xyz(path: Path, frames: Frames) -> None:
    ase.io.write(path, [as_atoms(frame, molecule=frame.molecule) for frame in frames], format="extxyz")


def write_ref_xyz(path: Path, frames: Frames) -> None:
    images = []
    for frame in frames:
        atoms = Atoms(numbers=frame.numbers, positions=frame.positions)
        atoms.info |= {"REF_energy": frame.energy, "smiles": frame.molecule}
        atoms.arrays["REF_forces"] = np.asarray(frame.forces, dtype=np.float64)
        images.append(atoms)
    ase.io.write(path, images, format="extxyz")


def write_db(path: Path, frames: Frames) -> None:
    with connect(path) as db:
        for frame in frames:
            db.write(as_atoms(frame), name=f"{frame.molecule}_")


def write_db_data(path: Path, frames: Frames) -> None:
    with connect(path) as db:
        for frame in frames:
            bare = Atoms(numbers=frame.numbers, positions=frame.positions)
            db.write(bare, data={"energy": frame.energy, "forces": frame.forces, "molecule": frame.molecule})


def write_h5(path: Path, frames: Frames) -> None:
    write_hdf5(path, frames, {"teacher": "none"})


@pytest.mark.parametrize(
    ("name", "write", "atol"),
    [
        ("a.xyz", write_xyz, 1e-7),
        ("a.extxyz", write_ref_xyz, 1e-7),
        ("a.db", write_db_data, 0.0),
        ("a.json", write_db_data, 0.0),
        ("a.h5", write_h5, 0.0),
        ("a.hdf5", write_h5, 0.0),
    ],
)
def test_reads_what_was_written(
    frames: Frames, tmp_path: Path, name: str, write: Callable[[Path, Frames], None], atol: float
) -> None:
    write(tmp_path / name, frames)
    read, dropped = read_frames([tmp_path / name])
    assert dropped == []
    equal(read, frames, atol=atol)


def test_database_with_calculator_and_name(frames: Frames, tmp_path: Path) -> None:
    write_db(tmp_path / "a.db", frames)
    read, _ = read_frames([tmp_path / "a.db"])
    equal(read, replace(frames, molecules=np.array([f"{m}_" for m in frames.molecules], object)))


def test_keys_of_ones_own(tmp_path: Path) -> None:
    frame = labelled("H2O")
    atoms = as_atoms(changed(frame, energy=1.0, forces=0.0 * frame.forces))
    atoms.info["mine"] = frame.energy
    atoms.arrays["my_forces"] = frame.forces
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    read, _ = read_frames([tmp_path / "a.xyz"], energy_key="mine", forces_key="my_forces")
    assert read[0].energy == pytest.approx(frame.energy)
    np.testing.assert_allclose(read[0].forces, frame.forces, atol=1e-6)
    with pytest.raises(DataError, match=r"a\.xyz, frame 0: no energy under yours"):
        read_frames([tmp_path / "a.xyz"], energy_key="yours")


def test_folders_globs_and_files_found_twice(frames: Frames, tmp_path: Path) -> None:
    write_h5(tmp_path / "b.h5", frames.select([0, 1]))
    (tmp_path / "sub").mkdir()
    write_xyz(tmp_path / "sub" / "a.xyz", frames.select([2]))
    (tmp_path / "notes.txt").write_text("no structures")
    (tmp_path / "summary.json").write_text("{}")
    seen: list[tuple[str, int]] = []
    read, _ = read_frames(
        [tmp_path, str(tmp_path / "*.h5")], progress=lambda path, n: seen.append((Path(path).name, n))
    )
    assert seen == [("b.h5", 2), ("a.xyz", 1)]
    assert len(read) == 3
    read, _ = read_frames([str(tmp_path / "**" / "*.xyz")])
    assert len(read) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: [p / "none.h5"], "none.h5: no such file"),
        (lambda p: [p / "*.h5"], "no such file"),
        (lambda p: [p], "no such file, and no files where it is a folder"),
        (lambda p: [], "expected at least one file"),
    ],
)
def test_nothing_found_is_refused(tmp_path: Path, make: Callable[[Path], list[Path]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_frames(make(tmp_path))


@pytest.mark.parametrize("name", ["a.h5", "a.db", "a.json", "a.xyz", "a.txt"])
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00not a structure\n\xff")
    with pytest.raises(DataError, match=re.escape(name)):
        read_frames([tmp_path / name])


# ---- HDF5 of the distillation project ----


def test_hdf5_without_molecules_has_hill_formulas(frames: Frames, tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", frames)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["structures/molecules"]
    read, _ = read_frames([tmp_path / "a.h5"])
    formulas = {"H2O": "H2O", "CH4": "CH4", "C6H6": "C6H6", "CH3CH2OH": "C2H6O", "CO2": "CO2"}
    assert read.molecules.tolist() == [formulas[m] for m in frames.molecules]


def test_hdf5_molecules_of_fixed_length(frames: Frames, tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", frames)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["structures/molecules"]
        file["structures/molecules"] = frames.molecules.astype("S")
    equal(read_frames([tmp_path / "a.h5"])[0], frames)


def test_hdf5_labels_find_their_structures(frames: Frames, tmp_path: Path) -> None:
    """Labels in another order, some structures with none."""
    write_h5(tmp_path / "a.h5", frames)
    order = np.array([5, 3, 0, 11])
    chosen = frames.select(order)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        for key in ("energy", "forces", "forces_splits", "structure_indices"):
            del file[f"labels/{key}"]
        file["labels/energy"] = chosen.energies
        file["labels/forces"] = chosen.forces
        file["labels/forces_splits"] = chosen.splits
        file["labels/structure_indices"] = order
    read, _ = read_frames([tmp_path / "a.h5"])
    equal(read, chosen)


def test_hdf5_frames_that_cannot_be(frames: Frames, tmp_path: Path) -> None:
    """Counts of forces and atoms that disagree; a periodic frame: the others are whole."""
    write_h5(tmp_path / "a.h5", frames)
    splits = frames.splits.copy()
    splits[2] -= 1  # frame 1 loses a force, frame 2 gains one
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["labels/forces_splits"][...] = splits
        file["structures/pbc"][4] = (True, False, False)
    with pytest.raises(DataError, match=r"3 of 20 frames.*a\.h5, frame 1: forces of 4 atoms, and 5 atoms"):
        read_frames([tmp_path / "a.h5"])
    read, dropped = read_frames([tmp_path / "a.h5"], on_bad="drop")
    assert [int(re.search(r"frame (\d+)", line).group(1)) for line in dropped] == [1, 2, 4]  # type: ignore[union-attr]
    assert "periodic" in dropped[2]
    equal(read, frames.select([0, 3, *range(5, 20)]))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("labels/energy", None, "labels/energy is missing"),
        (
            "structures/positions",
            np.zeros((3, 2)),
            r"structures/positions: expected shape \[128, 3\], received \[3, 2\]",
        ),
        ("labels/forces_splits", np.zeros(21, np.int64), "expected splits that rise from 0 to 128"),
        ("labels/structure_indices", np.full(20, 20), "expected indices of 20 structures, received 20"),
        ("labels/energy", np.full(20, b"x"), "expected a dtype"),
        ("structures/atomic_numbers", np.zeros((), np.int64), "expected shape"),
    ],
)
def test_hdf5_of_another_layout(frames: Frames, tmp_path: Path, key: str, value: object, message: str) -> None:
    write_h5(tmp_path / "a.h5", frames)
    assert frames.splits[-1] == 128
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file[key]
        if value is not None:
            file[key] = value
    with pytest.raises(DataError, match=rf"a\.h5: .*{message}"):
        read_frames([tmp_path / "a.h5"])


def test_hdf5_metadata_and_checksum(frames: Frames, tmp_path: Path) -> None:
    write_hdf5(tmp_path / "a.h5", frames, {"teacher": "x", "seed": 3, "versions": {"a": "1"}}, {"reasons": ["é", "b"]})
    attributes, tables = read_metadata(tmp_path / "a.h5")
    assert (attributes["teacher"], attributes["seed"], attributes["versions"]) == ("x", 3, '{"a": "1"}')
    assert tables["reasons"].tolist() == ["é", "b"]
    read, _ = read_frames([tmp_path / "a.h5"])
    assert attributes["sha256"] == checksum(read)
    assert checksum(read) != checksum(replace(read, energies=read.energies + 1e-9))
    with h5py.File(tmp_path / "a.h5") as file:  # as the distillation project reads it
        assert file["structures/cells"].shape == (20, 3, 3)
        assert file["labels/stress_mask"].shape == (20,)
        assert not file["labels/stress_mask"][()].any()
        assert file["labels/forces"].dtype == np.float32


# ---- units ----


@pytest.mark.parametrize("energy", ["eV", "meV", "kcal/mol", "kJ/mol", "Hartree"])
@pytest.mark.parametrize("length", ["Å", "Bohr", "nm"])
def test_units(frames: Frames, tmp_path: Path, energy: str, length: str) -> None:
    e = {
        "eV": 1.0,
        "meV": 1e-3,
        "kcal/mol": units.kcal / units.mol,
        "kJ/mol": units.kJ / units.mol,
        "Hartree": units.Ha,
    }
    a = {"Å": 1.0, "Bohr": units.Bohr, "nm": 10.0}
    theirs = replace(
        frames,
        energies=frames.energies / e[energy],
        positions=frames.positions / a[length],
        forces=frames.forces * a[length] / e[energy],
    )
    write_h5(tmp_path / "a.h5", theirs)
    read, _ = read_frames([tmp_path / "a.h5"], units=Units(energy=energy, length=length))  # type: ignore[arg-type]
    equal(read, frames, rtol=1e-6, atol=1e-6)


def test_units_that_are_none() -> None:
    from jaxff.config import parse_settings

    with pytest.raises(ConfigError, match="energy"):
        parse_settings(Units, {"energy": "parsec"}, "data")


@pytest.mark.parametrize("factor", [1 / units.Bohr, units.Bohr, 0.1, 10.0])
@pytest.mark.parametrize("on_bad", ["refuse", "drop"])
def test_wrong_unit_of_length_is_seen(frames: Frames, tmp_path: Path, factor: float, on_bad: str) -> None:
    write_h5(tmp_path / "a.h5", replace(frames, positions=frames.positions * factor))
    with pytest.raises(DataError, match=r"a\.h5: the declared unit of length looks wrong"):
        read_frames([tmp_path / "a.h5"], on_bad=on_bad)  # type: ignore[arg-type]


def test_wrong_unit_of_forces_is_seen(frames: Frames, tmp_path: Path) -> None:
    factor = units.mol / units.kcal
    kcal = replace(frames, energies=frames.energies * factor, forces=frames.forces * factor)
    write_h5(tmp_path / "a.h5", kcal)
    with pytest.raises(DataError, match=r"units of energy and length look wrong.*eV/Å"):
        read_frames([tmp_path / "a.h5"])
    read, _ = read_frames([tmp_path / "a.h5"], units=Units(energy="kcal/mol"))
    equal(read, frames, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("factor", "said"), [(-1.0, "-1"), (0.05, "20"), (5.0, "0.2")])
def test_forces_that_do_not_belong_to_the_energies_are_seen(tmp_path: Path, factor: float, said: str) -> None:
    """Gradients, forces in other units: the energy's change along a trajectory tells."""
    path = Frames.of([labelled("C6H6", 1, size) for size in np.linspace(0.02, 0.05, 16)])
    assert work_ratio(path) == pytest.approx(1.0, abs=0.02)
    write_h5(tmp_path / "a.h5", path)
    read_frames([tmp_path / "a.h5"])
    write_h5(tmp_path / "b.h5", replace(path, forces=path.forces * np.float32(factor)))
    with pytest.raises(DataError, match=f"energies and forces disagree.*energies change {said} times"):
        read_frames([tmp_path / "b.h5"])


def test_real_molecular_dynamics_is_plausible(tmp_path: Path) -> None:
    """EMT's forces belong to its energies."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = EMT()
    start = atoms.positions.copy()
    step = np.random.default_rng(0).normal(0.0, 0.05, start.shape)
    images = []
    for t in np.linspace(0.0, 1.0, 30):
        atoms.positions = start + np.sin(6.0 * t) * step
        frame = Frame(atoms.numbers, atoms.positions.copy(), atoms.get_potential_energy(), atoms.get_forces(), "e")
        images.append(frame)
    assert work_ratio(Frames.of(images)) == pytest.approx(1.0, abs=0.1)


# ---- bad frames ----


def edit(frame: Frame, name: str, index: object, value: float) -> Frame:
    array = np.array(getattr(frame, name))
    array[index] = value
    return changed(frame, **{name: array})


BAD = {
    "energy nan": lambda f: changed(f, energy=np.nan),
    "infinity in its forces": lambda f: edit(f, "forces", (0, 0), np.inf),
    "infinity in its positions": lambda f: edit(f, "positions", (0, 0), np.nan),
    "a force component of 150 eV/Å, expected at most 100": lambda f: edit(
        edit(f, "forces", (0, 0), 150.0), "forces", (1, 0), -150.0
    ),
    "forces that add up to 3": lambda f: changed(f, forces=f.forces + np.float32(1 / np.sqrt(3.0))),
    "two atoms 0.1 Å apart": lambda f: edit(f, "positions", 1, f.positions[0] + [0.1, 0.0, 0.0]),
    "a position beyond 1e+06 Å": lambda f: edit(f, "positions", 0, 1e7),
    "an atomic number outside": lambda f: edit(f, "numbers", 0, 119),
    "outside 1..118": lambda f: edit(f, "numbers", 0, 0),
    "no atoms": lambda f: Frame(f.numbers[:0], f.positions[:0], 0.0, f.forces[:0], "none"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_frames_are_named_and_refused_or_dropped(frames: Frames, tmp_path: Path, what: str) -> None:
    good = list(frames)
    write_h5(tmp_path / "a.h5", Frames.of([*good[:10], BAD[what](good[10]), *good[11:]]))
    with pytest.raises(DataError, match=rf"1 of 20 frames can't be used: .*a\.h5, frame 10: .*{re.escape(what)}"):
        read_frames([tmp_path / "a.h5"])
    read, dropped = read_frames([tmp_path / "a.h5"], on_bad="drop")
    assert len(dropped) == 1
    assert what in dropped[0]
    equal(read, frames.select([b for b in range(20) if b != 10]))


def test_bad_frames_of_xyz_keep_their_numbers(frames: Frames, tmp_path: Path) -> None:
    images = [as_atoms(frame, molecule=frame.molecule) for frame in frames]
    del images[3].calc.results["forces"]
    images[5].pbc = True
    images[5].cell = np.eye(3) * 20.0
    images[7].positions[0] = images[7].positions[1]
    ase.io.write(tmp_path / "a.xyz", images, format="extxyz")
    read, dropped = read_frames([tmp_path / "a.xyz"], on_bad="drop")
    assert [line.split(": ")[0].rpartition(" ")[2] for line in dropped] == ["3", "5", "7"]
    assert len(read) == 17


def test_odd_electrons_are_bad_where_the_model_is_closed_shell(frames: Frames, tmp_path: Path) -> None:
    good = list(frames)
    methyl = Frame(*(x[:-1] for x in good[1][:2]), 0.0, 0.0 * good[1].forces[:-1], "CH3")
    write_h5(tmp_path / "a.h5", Frames.of([methyl, *good]))
    assert len(read_frames([tmp_path / "a.h5"])[0]) == 21
    with pytest.raises(DataError, match=r"1 of 21 frames can't be used: .*a\.h5, frame 0: 9 electrons, an odd number"):
        read_frames([tmp_path / "a.h5"], closed_shell=True)
    data = DataConfig.model_validate({"train": str(tmp_path / "a.h5"), "on_bad": "drop", "fractions": (0.5, 0.5, 0)})
    for closed_shell, count in ((True, 20), (False, 21)):
        notes: list[str] = []
        dataset = load_dataset(data, PainnConfig.model_validate({"closed_shell": closed_shell}), notes.append)
        assert len(dataset.frames) == count
        assert len(notes) == (closed_shell is True)


def test_many_bad_frames_are_counted(frames: Frames, tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", replace(frames, energies=np.full(20, np.nan)))
    with pytest.raises(DataError, match=r"20 of 20 frames can't be used: .*; \.\.\."):
        read_frames([tmp_path / "a.h5"], on_bad="drop")  # nothing is left


def test_max_force_is_a_setting(frames: Frames, tmp_path: Path) -> None:
    write_h5(tmp_path / "a.h5", frames)
    largest = float(np.abs(frames.forces).max())
    read_frames([tmp_path / "a.h5"], max_force=1.01 * largest)
    with pytest.raises(DataError, match="1 of 20 frames"):
        read_frames([tmp_path / "a.h5"], max_force=0.999 * largest)


@pytest.mark.parametrize("copies", [1, 60])
def test_closest_distances(copies: int) -> None:
    """Against all pairs; few atoms (products of matrices), and more than 512 (a tree)."""
    rng = np.random.default_rng(0)
    n = 9 * copies
    r = rng.uniform(-5.0, 5.0, (4, n, 3)) * copies ** (1 / 3)
    numbers = rng.choice([1, 6, 17], (4, n))
    frames = Frames.of([Frame(z, x, 0.0, 0.0 * x, "") for z, x in zip(numbers, r, strict=True)])
    distances, scaled = closest_distances(frames)
    from ase.data import covalent_radii

    for b in range(4):
        d = np.linalg.norm(r[b][:, None] - r[b][None], axis=-1) + 1e9 * np.eye(n)
        i, j = np.unravel_index(d.argmin(), d.shape)
        assert distances[b] == pytest.approx(d.min(), rel=1e-12)
        assert scaled[b] == pytest.approx(d.min() / covalent_radii[numbers[b][[i, j]]].sum(), rel=1e-12)


def test_single_atoms_are_frames(tmp_path: Path) -> None:
    atom = Frame(np.array([8]), np.zeros((1, 3)), -1.0, np.zeros((1, 3)), "O")
    write_h5(tmp_path / "a.h5", Frames.of([atom, labelled("H2O")]))
    read, _ = read_frames([tmp_path / "a.h5"])
    assert read.num_atoms.tolist() == [1, 3]


# ---- splits ----


def of_molecules(names: list[str]) -> Frames:
    return Frames.of([changed(labelled("H2O"), molecule=name) for name in names])


def test_a_molecule_is_on_one_side_and_stays_there() -> None:
    names = [f"m{k % 400}" for k in range(1200)]
    frames = of_molecules(names)
    parts = split_by_molecule(frames, (0.8, 0.1, 0.1), seed=1)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(1200))
    sides = [set(frames.molecules[part]) for part in parts]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 400
    assert [len(side) / 400 for side in sides] == pytest.approx([0.8, 0.1, 0.1], abs=0.05)
    more = of_molecules([f"new{k}" for k in range(50)] + names[::-1])
    again = [set(more.molecules[part]) for part in split_by_molecule(more, (0.8, 0.1, 0.1), seed=1)]
    assert all(old <= new for old, new in zip(sides, again, strict=True))
    other = [set(frames.molecules[part]) for part in split_by_molecule(frames, (0.8, 0.1, 0.1), seed=2)]
    assert other != sides


def test_splits_are_the_same_everywhere() -> None:
    """Pinned: another machine, another day, another version."""
    frames = of_molecules([f"m{k}" for k in range(12)])
    parts = split_by_molecule(frames, (0.5, 0.25, 0.25))
    assert [part.tolist() for part in parts] == [[2, 3, 5, 7, 8, 9, 11], [1, 6], [0, 4, 10]]


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5)])
def test_fractions_that_do_not_add_up(frames: Frames, fractions: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match="fractions"):
        split_by_molecule(frames, fractions)


def test_everything_may_be_training(frames: Frames) -> None:
    train, valid, test = split_by_molecule(frames, (1.0, 0.0, 0.0))
    assert (len(train), len(valid), len(test)) == (20, 0, 0)


@pytest.mark.parametrize(("old", "new"), [("energy=", "energy=none-"), ("forces", "energies")])
def test_labels_that_are_no_numbers(frames: Frames, tmp_path: Path, old: str, new: str) -> None:
    write_xyz(tmp_path / "a.xyz", frames)
    text = (tmp_path / "a.xyz").read_text()
    assert old in text
    (tmp_path / "a.xyz").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=r"1 of \d+ frames .*a\.xyz, frame 0: (expected numbers|no forces)"):
        read_frames([tmp_path / "a.xyz"])


def test_a_full_disk_is_an_error_before_h5py_writes(
    frames: Frames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def full(handle: int, start: int, size: int) -> None:
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    write_hdf5(tmp_path / "a.h5", frames, {})
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match=r"No space left.*b\.h5"):
        write_hdf5(tmp_path / "b.h5", frames, {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    assert asked[0] >= (tmp_path / "a.h5").stat().st_size


def test_a_test_set_of_its_own_leaves_its_fraction_to_training(frames: Frames, tmp_path: Path) -> None:
    named = [f"{b % 20}" for b in range(200)]
    write_h5(tmp_path / "a.h5", Frames.of([changed(frames[b % 20], molecule=named[b]) for b in range(200)]))
    write_h5(tmp_path / "b.h5", frames)
    data = {"train": str(tmp_path / "a.h5"), "test": str(tmp_path / "b.h5"), "fractions": (0.4, 0.3, 0.3)}
    dataset = load_dataset(DataConfig.model_validate(data), PainnConfig.model_validate({}))
    assert sorted([*dataset.train, *dataset.valid]) == list(range(200))
    assert list(dataset.test) == list(range(200, 220))


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ({"valid": "b.h5"}, "1 of 1 molecules of data.valid are in data.train, too (CO2)"),
        ({"test": "b.h5"}, "1 of 1 molecules of data.test are in data.valid, too (CO2)"),
        ({"valid": "c.h5", "test": "c.h5"}, "2 of 2 molecules of data.test are in data.valid, too (x, y)"),
    ],
)
def test_a_molecule_on_two_sides_is_refused(frames: Frames, tmp_path: Path, named: dict[str, str], said: str) -> None:
    write_h5(tmp_path / "a.h5", frames)
    write_h5(tmp_path / "b.h5", frames.select([4]))
    write_h5(tmp_path / "c.h5", Frames.of([changed(frames[0], molecule=name) for name in "xy"]))
    paths = {part: str(tmp_path / name) for part, name in {"train": "a.h5", **named}.items()}
    data = {**paths, "fractions": (0.4, 0.6, 0.0), "split_seed": 3}
    with pytest.raises(DataError, match=rf"{re.escape(said)}: .*data\.allow_overlap: true"):
        load_dataset(DataConfig.model_validate(data), PainnConfig.model_validate({}))
    notes: list[str] = []
    data["allow_overlap"] = True
    load_dataset(DataConfig.model_validate(data), PainnConfig.model_validate({}), notes.append)
    assert any(line.startswith(said) for line in notes)
