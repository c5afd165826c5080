"""A teacher for the tests: Morse bonds between all atoms plus energies of the elements; and frames labelled by it."""

from collections.abc import Sequence

import numpy as np
from ase.build import molecule

from jaxff.train.frames import Frame, Frames
from jaxff.units import covalent_radii

MOLECULES = (
    "H2O CH4 NH3 CH3OH C2H6 C2H4 HCN H2CO CO2 N2H4 H2O2 CH3CHO HCOOH C2H2 H3CNH2 H2CCO CH3CN CH3OCH3".split()  # noqa: SIM905
)
ELEMENTS = {1: -13.6, 6: -1027.6, 7: -1484.1, 8: -2041.3}  # eV


def morse(numbers: np.ndarray, positions: np.ndarray) -> tuple[float, np.ndarray]:
    """Energy (eV) and forces (eV/Å): Σ D ((1 - exp(-a (d - d0)))² - 1) over pairs, and the elements' energies."""
    r = positions[None] - positions[:, None]  # [i, j] = R_j - R_i
    d = np.linalg.norm(r, axis=-1) + np.eye(len(numbers))
    x = np.exp(-1.6 * (d - covalent_radii[numbers][:, None] - covalent_radii[numbers][None]))
    off = 1 - np.eye(len(numbers))
    slope = 2 * 3.0 * (1 - x) * 1.6 * x * off
    energy = 0.5 * np.sum(3.0 * ((1 - x) ** 2 - 1) * off) + sum(ELEMENTS[int(z)] for z in numbers)
    return float(energy), np.sum((slope / d)[:, :, None] * r, axis=1)


def labelled(names: Sequence[str] = MOLECULES, each: int = 8, noise: float = 0.06, seed: int = 0) -> Frames:
    """`each` shaken frames of each of ASE's molecules."""
    rng = np.random.default_rng(seed)
    frames = []
    for name in names:
        atoms = molecule(name)
        for _ in range(each):
            positions = atoms.positions + rng.normal(0, noise, atoms.positions.shape)
            frames.append(Frame(atoms.numbers, positions, *morse(atoms.numbers, positions), name))
    return Frames.of(frames)
