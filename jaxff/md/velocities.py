"""Starting momenta: Maxwell-Boltzmann, without net momentum and, for molecules, without net rotation."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from jaxtyping import Float

from jaxff.units import kB

# principal moments below this fraction of the largest count as zero: the molecule is linear
LINEAR = 1e-6


def degrees_of_freedom(atoms: Atoms, remove_rotation: bool = True) -> int:
    """Degrees of freedom that carry temperature.

    3N - 6 for a molecule, 3N - 5 for a linear one, 3N - 3 for a periodic system or where rotation was kept,
    0 for an atom.
    """
    n = len(atoms)
    if n == 1:
        return 0
    if atoms.pbc.any() or not remove_rotation:
        return 3 * n - 3
    return 3 * n - 3 - _rotations(_inertia(atoms.positions, atoms.get_masses()))


def draw_momenta(
    atoms: Atoms, temperature_K: float, seed: int, remove_rotation: bool = True
) -> Float[np.ndarray, "N 3"]:
    """Momenta in amu Å / ASE time from exp(-p²/2m kB T), projected on no net momentum (and no net rotation).

    The projection is orthogonal in p/√m, so what is left is still Maxwell-Boltzmann at T over
    `degrees_of_freedom`; nothing is rescaled. The same seed gives the same momenta.
    """
    from ase.md.velocitydistribution import thermalize_momenta

    copy = Atoms(numbers=atoms.numbers, positions=atoms.positions, masses=atoms.get_masses())
    thermalize_momenta(copy, temperature_K, rng=np.random.default_rng(seed))
    masses = copy.get_masses()[:, None]
    momenta = copy.get_momenta()
    momenta = momenta - masses * momenta.sum(axis=0) / masses.sum()
    if remove_rotation and not atoms.pbc.any():
        momenta = _without_rotation(momenta, copy.positions, masses)
        momenta = momenta - masses * momenta.sum(axis=0) / masses.sum()
    return momenta


def kinetic_energy(momenta: Float[np.ndarray, "*T N 3"], masses: Float[np.ndarray, " N"]) -> Float[np.ndarray, "*T"]:
    """Sum of p²/2m in eV, in float64."""
    p = np.asarray(momenta, dtype=np.float64)
    return (p**2 / (2.0 * masses[:, None])).sum(axis=(-2, -1))


def temperature(kinetic: Float[np.ndarray, "*T"] | float, dof: int) -> Float[np.ndarray, "*T"]:
    """2 K / (dof kB) in K; 0 where there is no degree of freedom."""
    return np.asarray(kinetic) * (2.0 / (dof * kB) if dof else 0.0)


def _without_rotation(
    momenta: Float[np.ndarray, "N 3"], positions: Float[np.ndarray, "N 3"], masses: Float[np.ndarray, "N 1"]
) -> Float[np.ndarray, "N 3"]:
    # p - m ω × (r - centre), with I ω = L; the pseudo-inverse leaves the axis of a linear molecule alone
    arms = positions - (masses * positions).sum(axis=0) / masses.sum()
    angular = np.cross(arms, momenta).sum(axis=0)
    omega = np.linalg.pinv(_inertia(positions, masses[:, 0]), rcond=LINEAR, hermitian=True) @ angular
    return momenta - masses * np.cross(omega, arms)


def _inertia(positions: Float[np.ndarray, "N 3"], masses: Float[np.ndarray, " N"]) -> Float[np.ndarray, "3 3"]:
    arms = positions - masses @ positions / masses.sum()
    return (masses * (arms**2).sum(axis=1)).sum() * np.eye(3) - (masses * arms.T) @ arms


def _rotations(inertia: Float[np.ndarray, "3 3"]) -> int:
    moments = np.linalg.eigvalsh(inertia)
    return int((moments > LINEAR * moments[-1]).sum())
