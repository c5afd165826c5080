"""Geometries of one molecule (or cluster) that dynamics and chemistry visit, cheap to make, and their GFN2-xTB labels.

Everything follows from (seed, index of the molecule). Thermal frames come from the MMFF94 force field (RDKit): Langevin
dynamics at 300 to 1000 K, and normal modes drawn around the minimum of GFN2-xTB, which a few Newton steps with MMFF's
Hessian reach; these steps are kept, too. Torsions are turned at random, bonds stretched and compressed, small molecules
set beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from ase.data import atomic_masses, covalent_radii, vdw_radii
from ase.units import fs, kB
from rdkit import Chem, RDLogger
from rdkit.Chem import rdDistGeom, rdForceFieldHelpers, rdMolTransforms
from scipy.spatial.transform import Rotation

from jaxff.errors import LabelError, StructureError

KCAL = 0.0433641153  # eV
MAX_FORCE = 30.0  # eV/Å, largest component that is kept
SMALLEST_CONTACT = 0.55  # of the sum of covalent radii
Teacher = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]

RDLogger.DisableLog("rdApp.*")


class Label(NamedTuple):
    """One labelled geometry: Å, eV, eV/Å."""

    positions: np.ndarray
    energy: float
    forces: np.ndarray


class Mechanics:
    """MMFF94 (UFF where it has no parameters) of one molecule."""

    def __init__(self, molecule: Chem.Mol) -> None:
        self.field = None
        properties = rdForceFieldHelpers.MMFFGetMoleculeProperties(molecule)
        if properties is not None:
            self.field = rdForceFieldHelpers.MMFFGetMoleculeForceField(
                molecule, properties, ignoreInterfragInteractions=False
            )
        elif rdForceFieldHelpers.UFFHasAllMoleculeParams(molecule):
            self.field = rdForceFieldHelpers.UFFGetMoleculeForceField(molecule, ignoreInterfragInteractions=False)
        if self.field is None:
            raise ValueError("no force field")
        self.conformer = molecule.GetConformer()
        self.numbers = np.array([a.GetAtomicNum() for a in molecule.GetAtoms()])
        self.masses = np.maximum(atomic_masses[self.numbers], 3.0)[
            :, None
        ]  # heavy hydrogens: same ensemble, longer steps

    def gradient(self, r: np.ndarray) -> np.ndarray:
        """dE/dR, eV/Å. RDKit keeps distances from one call to the next: Initialize drops them."""
        self.conformer.SetPositions(np.ascontiguousarray(r))
        self.field.Initialize()
        return np.array(self.field.CalcGrad()).reshape(-1, 3) * KCAL

    def minimize(self, r: np.ndarray, steps: int) -> np.ndarray:
        """Positions after at most `steps` of RDKit's minimiser."""
        self.conformer.SetPositions(np.ascontiguousarray(r))
        self.field.Initialize()
        self.field.Minimize(maxIts=steps)
        return self.conformer.GetPositions()

    def hessian(self, r: np.ndarray, h: float = 1e-3) -> np.ndarray:
        """Second derivatives by central differences, eV/Å²."""
        flat = r.ravel()
        rows = []
        for i in range(flat.size):
            plus, minus = flat.copy(), flat.copy()
            plus[i] += h
            minus[i] -= h
            rows.append((self.gradient(plus.reshape(-1, 3)) - self.gradient(minus.reshape(-1, 3))).ravel() / (2 * h))
        matrix = np.array(rows)
        return (matrix + matrix.T) / 2

    def langevin(self, r: np.ndarray, temperature: float, steps: int, rng: np.random.Generator) -> np.ndarray:
        """Positions after `steps` of 1.5 fs of BAOAB dynamics with a friction of 0.02/fs."""
        dt, friction = 1.5 * fs, 0.02 / fs
        keep = np.exp(-friction * dt)
        spread = np.sqrt(kB * temperature / self.masses)
        v = rng.normal(size=r.shape) * spread
        gradient = self.gradient(r)
        for _ in range(steps):
            v = v - 0.5 * dt * gradient / self.masses
            r = r + 0.5 * dt * v
            v = keep * v + np.sqrt(1 - keep**2) * rng.normal(size=r.shape) * spread
            r = r + 0.5 * dt * v
            gradient = np.clip(self.gradient(r), -100, 100)
            v = v - 0.5 * dt * gradient / self.masses
        return r


def embed(smiles: str, count: int, seed: int) -> tuple[Chem.Mol, list[np.ndarray]]:
    """The molecule with hydrogens, and ETKDGv3 conformers [N, 3] Å."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    settings: Any = rdDistGeom.ETKDGv3()
    settings.randomSeed = seed
    settings.maxIterations = 20
    ids = list(rdDistGeom.EmbedMultipleConfs(molecule, count, settings))
    if not ids:
        settings.useRandomCoords = True
        ids = list(rdDistGeom.EmbedMultipleConfs(molecule, count, settings))
    if not ids:
        raise ValueError("no conformer")
    return molecule, [molecule.GetConformer(i).GetPositions() for i in ids]


def sample(smiles: str, seed: int, teacher: Teacher) -> Iterator[Label]:
    """Labelled geometries of one molecule; many for a small one, a dozen for a large one."""
    rng = np.random.default_rng([seed, 1])
    heavy = Chem.MolFromSmiles(smiles).GetNumAtoms()
    conformers, each = (3, 14) if heavy <= 3 else (2, 6) if heavy <= 7 else (2, 3) if heavy <= 14 else (1, 4)
    molecule, starts = embed(smiles, conformers, int(rng.integers(2**31)))
    mechanics = Mechanics(molecule)
    check = Checked(mechanics.numbers, teacher)
    for start in starts:
        bottom = mechanics.minimize(start, 60)
        stiffness, modes = _modes(mechanics.hessian(bottom))
        yield from (labels := _descend(bottom, stiffness, modes, check, 4))
        if labels:
            bottom = labels[-1].positions
        for _ in range(each):
            temperature = float(rng.choice([50, 150, 300, 300, 600, 1000]))
            yield from check(_displaced(bottom, stiffness, modes, temperature, rng))
            yield from check(mechanics.langevin(start, float(rng.choice([300, 600, 1000])), 40, rng))
        for _ in range(max(1, each // 3)):
            yield from check(_turned(molecule, mechanics, bottom, rng))
            yield from check(_stretched(molecule, _displaced(bottom, stiffness, modes, 300.0, rng), rng))


def sample_cluster(smiles: list[str], seed: int, teacher: Teacher, frames: int = 8) -> Iterator[Label]:
    """Labelled geometries of molecules side by side: at random contacts, then along dynamics with MMFF."""
    rng = np.random.default_rng([seed, 2])
    parts = [embed(s, 1, int(rng.integers(2**31))) for s in smiles]
    joined = parts[0][0]
    for molecule, _ in parts[1:]:
        joined = Chem.CombineMols(joined, molecule)
    Chem.SanitizeMol(joined)
    singles = [Mechanics(molecule) for molecule, _ in parts]
    warm = [
        m.langevin(m.minimize(starts[0], 60), 300.0, 60, rng) for m, (_, starts) in zip(singles, parts, strict=True)
    ]
    mechanics = Mechanics(joined)
    check = Checked(mechanics.numbers, teacher)
    for _ in range(frames // 2):
        r = _beside(warm, [m.numbers for m in singles], rng)
        yield from check(r)
        yield from check(mechanics.langevin(r, float(rng.choice([200, 300, 500])), 120, rng))


class Checked:
    """Labels a geometry if its contacts, and the label if its forces, are within bounds: none or one label."""

    def __init__(self, numbers: np.ndarray, teacher: Teacher) -> None:
        self.numbers, self.teacher = numbers, teacher
        radii = covalent_radii[numbers]
        self.bounds = SMALLEST_CONTACT * (radii[:, None] + radii[None, :])

    def __call__(self, r: np.ndarray | None) -> list[Label]:
        if r is None or not np.isfinite(r).all():
            return []
        distance = np.linalg.norm(r[:, None] - r[None, :], axis=-1)
        np.fill_diagonal(distance, np.inf)
        if (distance < self.bounds).any():
            return []
        try:
            energy, forces = self.teacher(self.numbers, r)
        except (LabelError, StructureError):
            return []  # the self-consistent field did not converge
        if not np.isfinite(energy) or not np.isfinite(forces).all() or np.abs(forces).max() > MAX_FORCE:
            return []
        return [Label(r, float(energy), forces)]


def _modes(hessian: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Force constants (eV/Å², made positive) and Cartesian modes of a Hessian."""
    values, vectors = np.linalg.eigh(hessian)
    return np.abs(values), vectors


def _descend(r: np.ndarray, stiffness: np.ndarray, modes: np.ndarray, check: Checked, steps: int) -> list[Label]:
    """Newton steps of the teacher's forces with a foreign Hessian: near its minimum in four; all of them labelled."""
    labels: list[Label] = []
    soft = np.maximum(stiffness, 2.0)
    for _ in range(steps):
        found = check(r)
        if not found:
            break
        labels += found
        move = (modes @ ((modes.T @ found[0].forces.ravel()) / soft)).reshape(-1, 3)
        r = r + move * min(1.0, 0.15 / max(np.abs(move).max(), 1e-12))
    return labels


def _displaced(
    r: np.ndarray, stiffness: np.ndarray, modes: np.ndarray, temperature: float, rng: np.random.Generator
) -> np.ndarray:
    """A draw from the harmonic ensemble at a temperature; soft modes bounded, rigid motion left out."""
    inner = np.where(stiffness > 0.02, 1.0, 0.0)
    spread = np.sqrt(kB * temperature / np.maximum(stiffness, 0.3))
    return r + (modes @ (rng.normal(size=stiffness.shape) * spread * inner)).reshape(-1, 3)


def _turned(molecule: Chem.Mol, mechanics: Mechanics, r: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """One rotatable bond at a random angle, strain partly taken out."""
    pattern = Chem.MolFromSmarts("[!D1]~[!$(*#*)&!D1]-!@[!$(*#*)&!D1]~[!D1]")
    matches = molecule.GetSubstructMatches(pattern)
    if not matches:
        return None
    copy = Chem.Mol(molecule)
    conformer = copy.GetConformer()
    conformer.SetPositions(np.ascontiguousarray(r))
    atoms = matches[int(rng.integers(len(matches)))]
    rdMolTransforms.SetDihedralDeg(conformer, *atoms, float(rng.uniform(-180, 180)))
    return mechanics.minimize(conformer.GetPositions(), int(rng.integers(5, 30)))


def _stretched(molecule: Chem.Mol, r: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """One bond outside rings at 0.75 to 1.6 times its length, the smaller side moved."""
    bonds = [b for b in molecule.GetBonds() if not b.IsInRing()]
    if not bonds:
        return None
    bond = bonds[int(rng.integers(len(bonds)))]
    i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
    cut = Chem.RWMol(molecule)
    cut.RemoveBond(i, j)
    sides = Chem.GetMolFrags(cut)
    side = next(list(s) for s in sides if j in s)
    direction = r[j] - r[i]
    factor = float(rng.choice([rng.uniform(0.75, 1.0), rng.uniform(1.0, 1.6)]))
    moved = r.copy()
    moved[side] += direction * (factor - 1)
    return moved


def _beside(parts: list[np.ndarray], numbers: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """The parts, turned at random, each brought from afar to a contact at 0.8 to 1.8 of the van der Waals distance."""
    placed = parts[0] - parts[0].mean(axis=0)
    radii = np.nan_to_num(vdw_radii[numbers[0]], nan=1.8)
    for part, z in zip(parts[1:], numbers[1:], strict=True):
        turned = Rotation.random(random_state=int(rng.integers(2**31))).apply(part - part.mean(axis=0))
        direction = rng.normal(size=3)
        direction /= np.linalg.norm(direction)
        factor = min(rng.uniform(0.6, 1.1), rng.uniform(0.6, 1.8))
        near = factor * (radii[:, None] + np.nan_to_num(vdw_radii[z], nan=1.8)[None, :])
        for distance in np.arange(20.0, 0.0, -0.1):
            moved = turned + direction * distance
            if (np.linalg.norm(placed[:, None] - moved[None, :], axis=-1) < near).any():
                break
        placed = np.concatenate([placed, turned + direction * (distance + 0.1)])
        radii = np.concatenate([radii, np.nan_to_num(vdw_radii[z], nan=1.8)])
    return placed
