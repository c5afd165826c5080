"""An ASE Calculator for any jaxff model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from jaxff.errors import ConfigError
from jaxff.loading import load_potential
from jaxff.potential import Potential


class JaxffCalculator(Calculator):
    """Energy (eV), free energy (the same), energies per atom ([N], eV) and forces ([N, 3], eV/Å).

    `path_or_potential` is a checkpoint file (.safetensors, or any PyTorch layout that jaxff converts) or
    a Potential. `dtype` ("float32" or "float64") is that of the evaluation; left out, a file gives float32
    and a Potential keeps its own. Results are handed to ASE in float64.

    One evaluation gives all four. Moving atoms never recompiles; a new size does only when it enters a new
    bucket of the Potential. A periodic, empty, non-finite or unknown structure raises StructureError. The
    stress isn't implemented: ASE raises its PropertyNotImplementedError.
    """

    name = "jaxff"
    implemented_properties = ["energy", "free_energy", "energies", "forces"]  # noqa: RUF012  (as ASE has it)
    # no model here sees charges or magnetic moments
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        path_or_potential: str | Path | Potential,
        dtype: str | None = None,
        engine: str = "auto",
        **kwargs: Any,
    ) -> None:
        self.potential = _potential(path_or_potential, dtype, engine)
        super().__init__(**kwargs)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results`. Called by ASE."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        assert self.atoms is not None
        energies, forces = self.potential.evaluate(
            self.atoms.numbers, self.atoms.positions, self.atoms.cell.array, self.atoms.pbc
        )
        energies = np.asarray(energies, dtype=np.float64)
        total = float(energies.sum(dtype=float))
        self.results = {
            "energy": total,
            "free_energy": total,
            "energies": energies,
            "forces": np.asarray(forces, dtype=np.float64),
        }


def _potential(source: str | Path | Potential, dtype: str | None, engine: str) -> Potential:
    if not isinstance(source, Potential):
        return load_potential(source, dtype or "float32", engine)
    if dtype is not None and dtype != source.dtype:
        raise ConfigError(f"expected dtype {source.dtype}, which this potential has, received {dtype!r}")
    return source
