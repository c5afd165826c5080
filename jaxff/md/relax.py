"""Energy minimisation before a simulation, by ASE's optimiser through the potential."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ase import Atoms

from jaxff.errors import SimulationError
from jaxff.potential import Potential

DENSE = 200  # atoms


@dataclass(frozen=True)
class Relaxation:
    """What the optimiser reached. eV, eV/Å, Å."""

    converged: bool
    steps: int
    fmax: float
    energy_before: float
    energy_after: float
    largest_move: float


def relax(potential: Potential, atoms: Atoms, fmax: float = 0.01, max_steps: int = 500) -> tuple[Atoms, Relaxation]:
    """A relaxed copy of `atoms` and how it went; not converging is reported, not raised.

    fmax: largest force left, eV/Å. Raises SimulationError if the energy stops being finite.
    """
    from ase.optimize import BFGS, FIRE

    from jaxff.interop.ase import JaxffCalculator

    moved = atoms.copy()
    moved.calc = JaxffCalculator(potential)
    before = moved.get_potential_energy()
    # BFGS keeps going downhill where the surface is concave; its dense Hessian is for molecules
    optimizer = (BFGS if len(atoms) <= DENSE else FIRE)(moved, logfile=None)  # type: ignore[arg-type]
    converged = optimizer.run(fmax=fmax, steps=max_steps)
    after, forces = moved.get_potential_energy(), moved.get_forces()
    if not (np.isfinite(after) and np.isfinite(forces).all()):
        raise SimulationError("relaxing the structure led to an energy that isn't finite: check the structure")
    moved.calc = None
    return moved, Relaxation(
        converged=bool(converged),
        steps=int(optimizer.get_number_of_steps()),
        fmax=float(np.linalg.norm(forces, axis=1).max()),
        energy_before=float(before),
        energy_after=float(after),
        largest_move=float(np.linalg.norm(moved.positions - atoms.positions, axis=1).max()),
    )
