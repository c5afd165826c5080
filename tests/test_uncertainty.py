"""Committees: the spread against its definition, zero where members agree, and what ASE gets of it."""

from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase.build import molecule

from jaxff.errors import ConfigError, StructureError
from jaxff.interop.ase import JaxffCalculator
from jaxff.potential import Potential
from jaxff.uncertainty import Committee, calibrate
from tests.structures import CONFIGS, random_params, random_structure


def potential(seed: int) -> Potential:
    return Potential(random_params(CONFIGS["painn"], seed), CONFIGS["painn"], dtype="float64")


@pytest.fixture(scope="module")
def members() -> list[Potential]:
    return [potential(seed) for seed in range(3)]


def test_the_spread_is_that_about_the_first(members: list[Potential]) -> None:
    numbers, positions = random_structure(7)
    committee = Committee(members, scale=0.5)
    found = committee.evaluate(numbers, positions)
    forces = [member.energy_and_forces(numbers, positions)[1] for member in members]
    expected = [
        np.sqrt(np.mean([np.linalg.norm(other[i] - forces[0][i]) ** 2 for other in forces[1:]])) for i in range(7)
    ]
    np.testing.assert_allclose(found.spread, expected, rtol=1e-12)
    np.testing.assert_array_equal(found.forces, forces[0])
    assert found.energies.sum() == pytest.approx(members[0].energy(numbers, positions), abs=1e-12)
    np.testing.assert_allclose(committee.force_error(numbers, positions), 0.5 * np.array(expected), rtol=1e-12)


def test_members_that_agree_have_no_spread(members: list[Potential]) -> None:
    assert Committee([members[0], members[0]]).force_error(*random_structure(4)).max() == 0


def test_the_probability_of_a_large_error_is_that_of_any_atom(members: list[Potential]) -> None:
    spread = np.array([0.01, 0.1, 0.4])
    committee = Committee(members, logistic=(1.5, 2.0))
    of_atoms = 1 / (1 + np.exp(-1.5 - 2.0 * np.log(spread + 1e-3)))
    assert committee.large_error_probability(spread) == pytest.approx(1 - np.prod(1 - of_atoms), rel=1e-12)
    assert committee.large_error_probability(np.full(5, 1e-9)) < 1e-4
    with pytest.raises(ConfigError, match="logistic"):
        Committee(members).large_error_probability(spread)


def test_calibration_finds_the_curve_that_made_the_errors() -> None:
    rng = np.random.default_rng(0)
    spread = rng.lognormal(-2, 1, 20000)
    probability = 1 / (1 + np.exp(-2.0 - 1.7 * np.log(spread + 1e-3)))
    errors = np.where(rng.random(20000) < probability, 0.3, 0.1)
    scale, (intercept, slope) = calibrate(spread, errors)
    assert scale == pytest.approx(errors.mean() / spread.mean(), rel=1e-12)
    assert (intercept, slope) == pytest.approx((2.0, 1.7), abs=0.1)
    with pytest.raises(ConfigError, match="both sides"):
        calibrate(spread, np.full(20000, 0.1))


def test_bad_committees(members: list[Potential]) -> None:
    with pytest.raises(ConfigError, match="at least two potentials, received 1"):
        Committee(members[:1])
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive scale"):
            Committee(members, scale=scale)
    with pytest.raises(StructureError, match="finite"):
        Committee(members).force_error([1], [[np.nan, 0, 0]])


def test_ase_gets_it_with_the_forces(members: list[Potential], tmp_path: Path) -> None:
    atoms = molecule("CH3CH2OH")
    committee = Committee(members[:2], scale=3.0)
    atoms.calc = JaxffCalculator(uncertainty=committee)
    np.testing.assert_array_equal(atoms.get_forces(), members[0].energy_and_forces(atoms.numbers, atoms.positions)[1])
    expected = committee.force_error(atoms.numbers, atoms.positions)
    np.testing.assert_allclose(atoms.calc.results["forces_uncertainty"], expected, rtol=1e-12)
    atoms.rattle(0.1)
    atoms.get_potential_energy()
    assert np.abs(atoms.calc.results["forces_uncertainty"] - expected).max() > 1e-6
    ase.io.write(tmp_path / "x.xyz", atoms, format="extxyz")  # ASE doesn't stumble over a result that it doesn't know
    ase.io.write(tmp_path / "x.traj", atoms)


def test_a_model_without_a_card_has_no_uncertainty(members: list[Potential]) -> None:
    with pytest.raises(ConfigError, match="pretrained model"):
        JaxffCalculator(members[0], uncertainty=True)
    with pytest.raises(ConfigError, match="received both"):
        JaxffCalculator(members[1], uncertainty=Committee(members))
    assert "forces_uncertainty" not in JaxffCalculator(members[0]).results
