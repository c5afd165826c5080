import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.units import kB

from jaxff.md.velocities import degrees_of_freedom, draw_momenta, kinetic_energy, temperature

MOLECULES = ["CH3CH2OH", "CO2", "N2", "C2H2", "H2O", "CH4"]


@pytest.mark.parametrize("name", MOLECULES)
@pytest.mark.parametrize("angle", [0.0, 37.0])
def test_no_net_momentum_and_no_net_rotation(name: str, angle: float) -> None:
    atoms = molecule(name)
    atoms.rotate(angle, (1, 2, 3))
    atoms.translate((30.0, -20.0, 5.0))
    p = draw_momenta(atoms, 300.0, seed=1)
    arms = atoms.positions - atoms.get_center_of_mass()
    assert np.abs(p).max() > 0.01
    assert np.abs(p.sum(axis=0)).max() < 1e-13
    assert np.abs(np.cross(arms, p).sum(axis=0)).max() < 1e-12


@pytest.mark.parametrize(
    ("atoms", "dof"),
    [
        (Atoms("H"), 0),
        (molecule("N2"), 1),
        (molecule("CO2"), 4),
        (molecule("H2O"), 3),
        (molecule("CH3CH2OH"), 21),
        (Atoms("Cu2", positions=[[0, 0, 0], [1, 1, 1]], cell=[3, 3, 3], pbc=True), 3),
    ],
)
def test_degrees_of_freedom(atoms: Atoms, dof: int) -> None:
    assert degrees_of_freedom(atoms) == dof


@pytest.mark.parametrize("name", MOLECULES)
@pytest.mark.parametrize("remove_rotation", [True, False])
def test_mean_temperature_is_that_asked_for(name: str, remove_rotation: bool) -> None:
    atoms = molecule(name)
    atoms.rotate(20.0, (3, 1, 2))
    dof = degrees_of_freedom(atoms, remove_rotation)
    drawn = np.stack([draw_momenta(atoms, 300.0, seed, remove_rotation) for seed in range(400)])
    kelvin = temperature(kinetic_energy(drawn, atoms.get_masses()), dof)
    # var(T)/T² = 2/dof for a chi-squared with dof degrees of freedom
    assert abs(kelvin.mean() - 300.0) < 4.0 * 300.0 * np.sqrt(2.0 / dof / 400)
    assert kelvin.std() == pytest.approx(300.0 * np.sqrt(2.0 / dof), rel=0.3)


def test_the_seed_decides() -> None:
    atoms = molecule("CH3CH2OH")
    np.testing.assert_array_equal(draw_momenta(atoms, 300.0, 5), draw_momenta(atoms, 300.0, 5))
    assert np.abs(draw_momenta(atoms, 300.0, 5) - draw_momenta(atoms, 300.0, 6)).max() > 0.1


def test_an_atom_stands_still_and_zero_kelvin_is_rest() -> None:
    np.testing.assert_array_equal(draw_momenta(Atoms("Ar"), 300.0, 0), np.zeros((1, 3)))
    np.testing.assert_array_equal(draw_momenta(molecule("H2O"), 0.0, 0), np.zeros((3, 3)))
    assert temperature(0.0, 0) == 0.0


def test_units_agree_with_ase() -> None:
    atoms = molecule("CH3CH2OH")
    momenta = draw_momenta(atoms, 300.0, 2)
    atoms.set_momenta(momenta)
    kinetic = kinetic_energy(momenta, atoms.get_masses())
    assert kinetic == pytest.approx(atoms.get_kinetic_energy(), rel=1e-13)
    assert temperature(kinetic, 21) == pytest.approx(2 * kinetic / 21 / kB, rel=1e-13)
