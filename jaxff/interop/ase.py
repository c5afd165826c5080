"""An ASE Calculator for any jaxff model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from jaxff import pretrained
from jaxff.errors import ConfigError
from jaxff.loading import load_potential
from jaxff.potential import Potential
from jaxff.system import check_neutral_singlet

if TYPE_CHECKING:
    from jaxff.uncertainty import Committee


class JaxffCalculator(Calculator):
    """Energy (eV), free energy (the same), energies per atom ([N], eV) and forces ([N, 3], eV/Å).

    `path_or_potential` is the name of a pretrained model ("organic", the default), a checkpoint file (.safetensors,
    or any PyTorch layout that jaxff converts) or a Potential. `dtype` ("float32" or "float64") is that of the
    evaluation; left out, a file gives float32 and a Potential keeps its own. Results are handed to ASE in float64.

    `uncertainty=True` puts `forces_uncertainty` into `results`: the estimated error of each force vector, [N] eV/Å, of
    a pretrained model by its card; and `large_error_probability`, that any of them is wrong by more than 0.2 eV/Å. A
    jaxff.uncertainty.Committee does the same for models of your own, and then is what evaluates: leave
    `path_or_potential`, `dtype` and `engine` out.

    One evaluation gives all of it. Moving atoms never recompiles; a new size does only when it enters a new
    bucket of the Potential. A periodic, empty, non-finite or unknown structure raises StructureError, and so does a
    charge or a spin (of atoms.info, or initial charges and moments) where the model knows neither. The
    stress isn't implemented: ASE raises its PropertyNotImplementedError.
    """

    name = "jaxff"
    implemented_properties = ["energy", "free_energy", "energies", "forces"]  # noqa: RUF012  (as ASE has it)
    # no model here sees charges or magnetic moments; what must not have them is refused in get_property
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012

    def __init__(
        self,
        path_or_potential: str | Path | Potential | None = None,
        dtype: str | None = None,
        engine: str = "auto",
        uncertainty: bool | Committee = False,
        **kwargs: Any,
    ) -> None:
        self.committee = _committee(path_or_potential, dtype, engine, uncertainty)
        if self.committee is None:
            self.potential = _potential(path_or_potential, dtype, engine)
        else:
            self.potential = self.committee.members[0]
        super().__init__(**kwargs)

    def get_property(self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True) -> Any:
        """ASE's, after a look at what the cache doesn't see: charge and spin."""
        if atoms is not None:
            check_charge_and_spin(self.potential, atoms)
        return super().get_property(name, atoms, allow_calculation)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: list[str] | None = None,
        system_changes: list[str] = all_changes,
    ) -> None:
        """Fill `results`. Called by ASE."""
        super().calculate(atoms, properties or ["energy"], system_changes)
        assert self.atoms is not None
        check_charge_and_spin(self.potential, self.atoms)
        structure = (self.atoms.numbers, self.atoms.positions, self.atoms.cell.array, self.atoms.pbc)
        if self.committee is None:
            energies, forces = self.potential.evaluate(*structure)
        else:
            energies, forces, spread = self.committee.evaluate(*structure)
        energies = np.asarray(energies, dtype=np.float64)
        total = float(energies.sum(dtype=float))
        self.results = {
            "energy": total,
            "free_energy": total,
            "energies": energies,
            "forces": np.asarray(forces, dtype=np.float64),
        }
        if self.committee is not None:
            self.results["forces_uncertainty"] = self.committee.calibrated(spread)
            if self.committee.logistic is not None:
                self.results["large_error_probability"] = self.committee.large_error_probability(spread)


def check_atoms(potential: Potential, atoms: Atoms) -> None:
    """StructureError for atoms that the potential can't or must not evaluate, charge and spin included."""
    potential.check(atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc)
    check_charge_and_spin(potential, atoms)


def check_charge_and_spin(potential: Potential, atoms: Atoms) -> None:
    """StructureError for a charge or a spin that `atoms` says it has, where the potential knows neither."""
    if potential.closed_shell:
        check_neutral_singlet(atoms.info, atoms.get_initial_charges(), atoms.get_initial_magnetic_moments())


def _potential(source: str | Path | Potential | None, dtype: str | None, engine: str) -> Potential:
    if not isinstance(source, Potential):
        return load_potential(pretrained.DEFAULT if source is None else source, dtype or "float32", engine)
    if dtype is not None and dtype != source.dtype:
        raise ConfigError(f"expected dtype {source.dtype}, which this potential has, received {dtype!r}")
    return source


def _committee(
    source: str | Path | Potential | None, dtype: str | None, engine: str, uncertainty: bool | Committee
) -> Committee | None:
    if uncertainty is False:
        return None
    from jaxff.uncertainty import pretrained_committee

    if uncertainty is not True:
        if source is not None and source is not uncertainty.members[0]:
            raise ConfigError("expected a committee or a model, received both: the committee's first member evaluates")
        return uncertainty
    name = pretrained.DEFAULT if source is None else source
    if isinstance(name, Potential) or not pretrained.is_name(name):
        raise ConfigError(
            "expected a pretrained model for uncertainty=True, received one without a card:"
            " pass a jaxff.uncertainty.Committee of models of your own"
        )
    return pretrained_committee(str(name), dtype or "float32", engine)
