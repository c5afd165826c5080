"""The ASE calculator: the Potential's numbers, ASE's conventions, and the refusals."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.optimize import BFGS

from jaxff.errors import JaxffError, StructureError
from jaxff.interop.ase import JaxffCalculator
from jaxff.potential import Potential

from .conftest import random_potential


def attached(potential: Potential, name: str = "CH3CH2OH") -> Atoms:
    atoms = molecule(name)
    atoms.calc = JaxffCalculator(potential)
    return atoms


def test_all_properties_are_the_potential_s(potential):
    atoms = attached(potential)
    energy, forces = potential.energy_and_forces(atoms.numbers, atoms.positions)
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    energies = atoms.get_potential_energies()
    np.testing.assert_allclose(energies, potential.atomic_energies(atoms.numbers, atoms.positions), atol=1e-12)
    assert energies.sum() == pytest.approx(energy, abs=1e-12)
    np.testing.assert_allclose(atoms.get_forces(), forces, rtol=0, atol=1e-12)
    assert atoms.get_forces().dtype == np.float64


def test_one_evaluation_serves_all_properties(potential, monkeypatch):
    atoms = attached(potential)
    calls = []
    evaluate = potential.evaluate
    monkeypatch.setattr(atoms.calc.potential, "evaluate", lambda *a, **k: calls.append(1) or evaluate(*a, **k))
    atoms.get_potential_energy()
    atoms.get_forces()
    atoms.get_potential_energies()
    atoms.set_initial_charges([0.1] * len(atoms))
    atoms.get_potential_energy()
    assert len(calls) == 1
    atoms.rattle(0.01)
    atoms.get_forces()
    assert len(calls) == 2


def test_moving_atoms_does_not_recompile(potential, compilations):
    atoms = attached(potential)
    atoms.get_forces()
    before = compilations()
    for seed in range(5):
        atoms.rattle(0.05, seed=seed)
        atoms.get_forces()
    assert compilations() == before


def test_many_sizes_compile_a_few_times(compilations):
    potential = random_potential("painn", "float32")
    sizes = range(2, 21)
    rng = np.random.default_rng(0)
    before = compilations()
    for n in sizes:
        atoms = Atoms(numbers=[6] * n, positions=rng.uniform(0, 6, (n, 3)))
        atoms.calc = JaxffCalculator(potential)
        atoms.get_forces()
    assert 1 <= compilations() - before <= len(sizes) // 3


def test_float32_is_close(potential):
    exact = attached(potential).get_forces()
    rounded = attached(Potential(potential.params, potential.config, dtype="float32")).get_forces()
    np.testing.assert_allclose(rounded, exact, rtol=0, atol=1e-4)


def test_bfgs_runs_and_lowers_the_energy(potential):
    atoms = attached(potential, "H2O")
    before = atoms.get_potential_energy()
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=10)
    assert atoms.get_potential_energy() < before


def test_stress_is_not_implemented(potential):
    with pytest.raises(PropertyNotImplementedError):
        attached(potential).get_stress()


def test_a_cell_without_periodicity_is_open(potential):
    atoms = attached(potential)
    open_energy = atoms.get_potential_energy()
    atoms.center(vacuum=5.0)
    assert atoms.get_potential_energy() == pytest.approx(open_energy, abs=1e-12)


@pytest.mark.parametrize(
    "atoms",
    [
        bulk("NaCl", "rocksalt", a=5.64),
        Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]], cell=[9, 9, 9], pbc=[True, False, False]),
        Atoms(),
        Atoms("H2", positions=[[0, 0, 0], [0, 0, np.nan]]),
        Atoms("Xe", positions=[[0, 0, 0]]),
        Atoms("X", positions=[[0, 0, 0]]),
    ],
    ids=["crystal", "chain", "empty", "nan", "no embedding row", "ghost"],
)
def test_bad_structures_are_refused(potential, atoms):
    atoms.calc = JaxffCalculator(potential)
    for _ in range(2):  # a failure leaves nothing behind
        with pytest.raises(StructureError):
            atoms.get_potential_energy()


def test_the_dtype_of_a_potential_is_kept_and_a_contradiction_refused():
    potential = random_potential("painn", "float64")
    assert JaxffCalculator(potential).potential is potential
    assert JaxffCalculator(potential, dtype="float64").potential is potential
    with pytest.raises(JaxffError):
        JaxffCalculator(potential, dtype="float32")
