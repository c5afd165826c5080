import numpy as np
import pytest
from ase.build import molecule

from jaxff.md.relax import relax
from tests.md.conftest import MakePotential


@pytest.mark.parametrize("name", ["CH3CH2OH", "H2O"])
def test_relaxing_goes_downhill_to_small_forces(painn: MakePotential, name: str) -> None:
    atoms = molecule(name)
    before = atoms.positions.copy()
    potential = painn("float64")
    relaxed, report = relax(potential, atoms, fmax=0.02, max_steps=400)
    energy, forces = potential.energy_and_forces(relaxed.numbers, relaxed.positions)
    assert report.converged
    assert report.fmax <= 0.02
    assert report.fmax == pytest.approx(np.linalg.norm(forces, axis=1).max(), rel=1e-6)
    assert energy == pytest.approx(report.energy_after, abs=1e-9)
    assert report.energy_after < report.energy_before
    assert relaxed.calc is None
    np.testing.assert_array_equal(atoms.positions, before)


def test_not_converging_is_reported(painn: MakePotential) -> None:
    _, report = relax(painn("float32"), molecule("CH3CH2OH"), fmax=1e-9, max_steps=2)
    assert not report.converged
    assert report.steps == 2
