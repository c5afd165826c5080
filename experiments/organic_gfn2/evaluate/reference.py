"""The teacher's side of the comparison, made once: geometries, frequencies, torsions and labelled frames, by seed.

    python experiments/organic_gfn2/evaluate/reference.py -o experiments/organic_gfn2/reference --processes 2
    python experiments/organic_gfn2/evaluate/reference.py -o experiments/organic_gfn2/reference --processes 2 --others

Needs tblite and rdkit; what it leaves behind needs neither. All of the held-out molecules:
small.h5 (minima), frequencies.json (/cm); drug.h5 (minima), frames_300K.h5 (Langevin dynamics of the teacher itself),
frames_mixed.h5 (300 to 1000 K, displaced atoms, stretched bonds); torsions.h5 (relaxed scans). With --others, only
frames_mixed_others.h5, the same kinds of frames of all drug-like molecules that frames_mixed.h5 leaves out, and
reference_others.json.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import hashlib
import json
import multiprocessing
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_masses
from ase.units import Bohr, Hartree, fs, kB

sys.path.insert(0, str(Path(__file__).parents[1]))

from sampling import embed

from evaluate.common import TeacherCalculator, bonds, frequencies, molecules, relaxed
from jaxff.errors import JaxffError
from jaxff.files import atomic_write
from jaxff.train.frames import Frame, Frames
from jaxff.train.hdf5 import checksum, write_hdf5
from jaxff.train.teachers import make_teacher

TEACHER = "tblite:GFN2-xTB"
SEED = 20261124
MAX_FORCE = 30.0  # eV/Å
EQUILIBRATION, BETWEEN = 60, 30  # steps of 1 fs
MIXED = 36  # molecules of frames_mixed.h5
ANGLES = np.arange(-180, 180, 15)
Teacher = Callable[[Any, Any], tuple[float, np.ndarray]]
Rows = list[tuple[Frame, Any]]  # frames, and what belongs to each in a table beside them


def start(smiles: str, seed: int) -> tuple[np.ndarray, np.ndarray, Any]:
    """Numbers, a conformer's positions after MMFF, and the RDKit molecule."""
    from rdkit.Chem import rdForceFieldHelpers

    molecule, _ = embed(smiles, 1, seed)
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(molecule):
        rdForceFieldHelpers.MMFFOptimizeMolecule(molecule, maxIters=500)
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], np.int32)
    return numbers, molecule.GetConformer().GetPositions(), molecule


def small(name: str, smiles: str, teacher: Teacher) -> tuple[Rows, list[float]]:
    """The minimum, and its wavenumbers; a saddle is left along its steepest mode."""
    numbers, positions, _ = start(smiles, SEED)
    for _ in range(3):
        positions, converged = relaxed(TeacherCalculator(teacher), numbers, positions, 1e-3)
        if not converged:
            raise JaxffError(f"{name}: the teacher's relaxation did not converge")
        hessian = hessian_by_differences(numbers, positions, teacher)
        waves = frequencies(numbers, positions, hessian)
        if waves[0] > 0:
            break
        positions = positions + 0.1 * np.linalg.eigh(hessian)[1][:, 0].reshape(-1, 3)
    return [(_label(name, numbers, positions, teacher), 0.0)], waves.tolist()


def hessian_by_differences(numbers: Any, positions: Any, teacher: Teacher, h: float = 0.005) -> np.ndarray:
    """Central differences of the forces, eV/Å²."""
    rows = []
    for i in range(positions.size):
        shift = np.zeros(positions.size)
        shift[i] = h
        shift = shift.reshape(-1, 3)
        rows.append((teacher(numbers, positions - shift)[1] - teacher(numbers, positions + shift)[1]).ravel() / (2 * h))
    matrix = np.array(rows)
    return (matrix + matrix.T) / 2


def drug(name: str, smiles: str, teacher: Teacher, mixed: bool) -> tuple[Rows, Rows, Rows]:
    """The minimum; frames at 300 K; and, if `mixed`, frames of all kinds with their kind."""
    rng = np.random.default_rng([SEED, *name.encode()])
    numbers, positions, _ = start(smiles, SEED)
    positions, _ = relaxed(TeacherCalculator(_Warm(numbers)), numbers, positions, 0.02, 100)
    minimum = _label(name, numbers, positions, teacher)
    frames: Rows = []
    trajectory = _langevin(numbers, positions, rng)
    next(trajectory)
    for step in (EQUILIBRATION, BETWEEN, BETWEEN):
        frames.append((_label(name, numbers, trajectory.send((300.0, step)), teacher), "300 K"))
    others: Rows = []
    if mixed:
        others += frames[:2]
        for temperature in (600.0, 1000.0):
            for step in (BETWEEN, BETWEEN):
                hot = trajectory.send((temperature, step))
                others.append((_label(name, numbers, hot, teacher), f"{temperature:g} K"))
        for spread in (0.05, 0.1, 0.2):
            others.append((_label(name, numbers, positions + rng.normal(0, spread, positions.shape), teacher), "moved"))
        others.append((_label(name, numbers, _stretched(numbers, positions, rng), teacher), "stretched"))
        others = [row for row in others if np.abs(row[0].forces).max() < MAX_FORCE]
    return [(minimum, 0.0)], frames, others


def torsion(name: str, smiles: str, teacher: Teacher) -> Rows:
    """A scan of the rotatable bond nearest the middle, all else relaxed by the teacher; and the angle of each frame."""
    numbers, positions, molecule = start(smiles, SEED)
    positions, _ = relaxed(TeacherCalculator(teacher), numbers, positions, 0.02)
    atoms, moving = rotatable_bond(molecule)
    rows: Rows = []
    for angle in ANGLES:
        scan = Atoms(numbers=numbers, positions=positions)
        scan.set_dihedral(*atoms, angle, indices=moving)
        positions = _relaxed_at(scan, atoms, angle, teacher)
        rows.append((_label(name, numbers, positions, teacher), float(angle)))
    return rows


def rotatable_bond(molecule: Any) -> tuple[list[int], list[int]]:
    """Four atoms of a dihedral, and the atoms that turn with the last: single, no ring, no amide, evenly cut."""
    from rdkit import Chem

    pattern = Chem.MolFromSmarts("[!$([D1]);!#1]-&!@[!$([D1]);!#1]")
    amide = {frozenset(m) for m in molecule.GetSubstructMatches(Chem.MolFromSmarts("C(=O)-[N,O]")) for m in (m[::2],)}
    best: tuple[int, list[int], list[int]] | None = None
    for j, k in molecule.GetSubstructMatches(pattern):
        heavy = [
            [n.GetIdx() for n in molecule.GetAtomWithIdx(a).GetNeighbors() if n.GetAtomicNum() > 1] for a in (j, k)
        ]
        first, last = ([n for n in row if n not in (j, k)] for row in heavy)
        if frozenset((j, k)) in amide or not first or not last:
            continue
        cut = Chem.RWMol(molecule)
        cut.RemoveBond(j, k)
        side = next(list(part) for part in Chem.GetMolFrags(cut) if k in part)
        balance = min(len(side), molecule.GetNumAtoms() - len(side))
        if best is None or balance > best[0]:
            best = balance, [first[0], j, k, last[0]], side
    if best is None:
        raise JaxffError(f"{Chem.MolToSmiles(molecule)}: expected a rotatable bond, found none")
    return best[1], best[2]


def _relaxed_at(scan: Atoms, dihedral: list[int], angle: float, teacher: Teacher) -> np.ndarray:
    """The minimum at a fixed dihedral: a stiff spring while it relaxes, so that no constraint solver can fail."""
    spring = _Spring(teacher, dihedral, float(angle))
    return relaxed(TeacherCalculator(spring), scan.numbers, scan.positions, 0.02, 80)[0]


class _Spring:
    """The teacher with k/2 (φ - φ0)² of a dihedral added."""

    def __init__(self, teacher: Teacher, dihedral: list[int], angle: float, k: float = 50.0) -> None:
        self.teacher, self.dihedral, self.angle, self.k = teacher, dihedral, np.radians(angle), k

    def __call__(self, numbers: Any, positions: Any) -> tuple[float, np.ndarray]:
        energy, forces = self.teacher(numbers, positions)
        atoms = Atoms(numbers=numbers, positions=positions)
        difference = np.radians(atoms.get_dihedral(*self.dihedral)) - self.angle
        difference -= 2 * np.pi * np.round(difference / (2 * np.pi))
        gradient = dihedral_gradient(positions[self.dihedral])
        forces = np.array(forces)
        forces[self.dihedral] -= self.k * difference * gradient
        return energy + self.k * difference**2 / 2, forces


def dihedral_gradient(r: np.ndarray) -> np.ndarray:
    """dφ/dr of four atoms, [4, 3] rad/Å (Blondel, Karplus 1996)."""
    f, g, h = r[0] - r[1], r[1] - r[2], r[3] - r[2]
    a, b, size = np.cross(f, g), np.cross(h, g), np.linalg.norm(g)
    outer, inner = -size / (a @ a) * a, size / (b @ b) * b
    middle = (f @ g) / (a @ a * size) * a - (h @ g) / (b @ b * size) * b
    return np.array([outer, middle - outer, -middle - inner, inner])


class _Warm:
    """GFN2-xTB that starts from the last density: faster along a trajectory; its labels are not kept."""

    def __init__(self, numbers: Any) -> None:
        from tblite.interface import Calculator

        self.make = lambda r: Calculator("GFN2-xTB", numbers, r / Bohr)
        self.calculator: Any = None
        self.result: Any = None

    def __call__(self, numbers: Any, positions: Any) -> tuple[float, np.ndarray]:
        if self.calculator is None:
            self.calculator = self.make(positions)
            self.calculator.set("verbosity", 0)
            self.calculator.set("accuracy", 5.0)
        self.calculator.update(positions / Bohr)
        self.result = self.calculator.singlepoint(self.result)
        return self.result.get("energy") * Hartree, -self.result.get("gradient") * Hartree / Bohr


def _langevin(numbers: Any, positions: Any, rng: np.random.Generator) -> Iterator[Any]:
    """Send (temperature K, steps of 1 fs) and get positions: BAOAB with a friction of 0.02/fs.

    It starts at a minimum with twice the kinetic energy, half of which the bonds take up within a few steps.
    """
    teacher, masses, dt = _Warm(numbers), atomic_masses[numbers][:, None], 1.0 * fs
    keep = np.exp(-0.02)
    forces = teacher(numbers, positions)[1]
    velocities: Any = None
    while True:
        temperature, steps = yield positions
        spread = np.sqrt(kB * temperature / masses)
        if velocities is None:
            velocities = rng.normal(size=positions.shape) * spread * np.sqrt(2)
        for _ in range(steps):
            velocities = velocities + 0.5 * dt * forces / masses
            positions = positions + 0.5 * dt * velocities
            velocities = keep * velocities + np.sqrt(1 - keep**2) * rng.normal(size=positions.shape) * spread
            positions = positions + 0.5 * dt * velocities
            forces = teacher(numbers, positions)[1]
            velocities = velocities + 0.5 * dt * forces / masses


def _stretched(numbers: Any, positions: Any, rng: np.random.Generator) -> np.ndarray:
    """An end atom pulled out or pushed in along its bond, to 0.8 to 1.5 of its length."""
    pairs = bonds(numbers, positions)
    counts = np.bincount(pairs.ravel(), minlength=len(numbers))
    ends = [(i, j) for pair in pairs for i, j in (pair, pair[::-1]) if counts[i] == 1]
    i, j = ends[int(rng.integers(len(ends)))]
    moved = positions.copy()
    moved[i] = positions[j] + (positions[i] - positions[j]) * rng.uniform(0.8, 1.5)
    return moved


def _label(name: str, numbers: Any, positions: np.ndarray, teacher: Teacher) -> Frame:
    energy, forces = teacher(numbers, positions)
    return Frame(numbers, np.array(positions), energy, forces, name)


def _task(job: tuple[str, str, str, bool]) -> tuple[str, str, Any]:
    kind, name, smiles, mixed = job
    teacher = make_teacher(TEACHER)
    try:
        if kind == "small":
            return kind, name, small(name, smiles, teacher)
        if kind == "drug":
            return kind, name, drug(name, smiles, teacher, mixed)
        return kind, name, torsion(name, smiles, teacher)
    except (JaxffError, ValueError, RuntimeError) as error:
        return kind, name, error


def jobs(limit: int | None, others: bool = False) -> list[tuple[str, str, str, bool]]:
    """(set, name, SMILES, whether it is among the mixed frames) of all held-out molecules, the long ones first.

    others: those drug-like molecules alone that aren't among them, as if they were.
    """
    made: list[tuple[str, str, str, bool]] = []
    for kind in ("drug", "torsion", "small"):
        chosen = list(molecules(kind).items())
        if limit is not None:
            chosen = sorted(chosen, key=lambda item: len(item[1]))[:limit]
        made += [(kind, name, smiles, i % max(1, len(chosen) // MIXED) == 0) for i, (name, smiles) in enumerate(chosen)]
    if others:
        return [(kind, name, smiles, True) for kind, name, smiles, mixed in made if kind == "drug" and not mixed]
    return made


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="the reference folder")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--limit", type=int, help="so many molecules of each set, the shortest: for tests")
    parser.add_argument("--others", action="store_true", help="only frames_mixed_others.h5, beside what is there")
    make(**vars(parser.parse_args()))


def make(output: Path, processes: int = 1, limit: int | None = None, others: bool = False) -> None:
    """Fills the folder `output`; with `others`, frames_mixed_others.h5 alone."""
    output.mkdir(parents=True, exist_ok=True)
    begin, failed = time.monotonic(), {}
    todo = jobs(limit, others)
    # of a run that was ended early: our own file, goes at the end
    journal = output / ("journal_others.pickle" if others else "journal.pickle")
    results = _read_journal(journal)
    missing = [job for job in todo if job[:2] not in results]
    with multiprocessing.get_context("spawn").Pool(processes) as pool, journal.open("ab") as file:
        for done, (kind, name, result) in enumerate(pool.imap_unordered(_task, missing), 1):
            print(f"{done}/{len(missing)} {time.monotonic() - begin:.0f} s {kind} {name}", flush=True)
            if isinstance(result, Exception):
                failed[f"{kind} {name}"] = str(result)
                print(f"  left out: {result}", flush=True)
            else:
                results[kind, name] = result
                pickle.dump(((kind, name), result), file)
                file.flush()
    found = {kind: [results[kind, name] for k, name, *_ in todo if k == kind and (kind, name) in results]
             for kind in ("small", "drug", "torsion")}  # fmt: skip
    mixed = [row for _, _, rows in found["drug"] for row in rows]
    files: dict[str, Rows] = {"frames_mixed_others": mixed}
    if not others:
        files = {
            "small": [row for rows, _ in found["small"] for row in rows],
            "drug": [row for rows, _, _ in found["drug"] for row in rows],
            "frames_300K": [row for _, rows, _ in found["drug"] for row in rows],
            "frames_mixed": mixed,
            "torsions": [row for rows in found["torsion"] for row in rows],
        }
    versions = make_teacher(TEACHER).versions
    checksums = {}
    for name, rows in files.items():
        frames = Frames.of([frame for frame, _ in rows])
        write_hdf5(output / f"{name}.h5", frames, {"teacher": TEACHER, "seed": SEED, "versions": versions},
                   {"about": [about for _, about in rows]})  # fmt: skip
        checksums[name] = checksum(frames)
    if not others:
        waves = {name: results[kind, name][1] for kind, name, *_ in todo if kind == "small" and (kind, name) in results}
        _write_json(output / "frequencies.json", waves)
    summary = {"teacher": TEACHER, "seed": SEED, "versions": versions, "limit": limit, "left_out": failed,
               "frames": {name: len(rows) for name, rows in files.items()}, "checksums": checksums,
               "sha256": hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()}  # fmt: skip
    _write_json(output / ("reference_others.json" if others else "reference.json"), summary)
    journal.unlink()


def _read_journal(path: Path) -> dict[tuple[str, str], Any]:
    found = {}
    if path.exists():
        with path.open("rb") as file:
            try:
                while True:
                    key, result = pickle.load(file)
                    found[key] = result
            except (EOFError, pickle.UnpicklingError):  # the last one was cut short
                pass
    return found


def _write_json(path: Path, data: Any) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
