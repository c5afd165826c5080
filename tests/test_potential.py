"""Potential: checks, padding, dtypes, compilation, and parity with the real student."""

from collections.abc import Callable

import jax
import numpy as np
import pytest

from jaxff import potential as potential_module
from jaxff.errors import ConfigError, StructureError
from jaxff.neighbors import bucket, neighbor_pairs
from jaxff.potential import Potential
from jaxff.system import closest_pair
from jaxff.validate import finite_difference_errors
from tests.structures import CONFIGS, PAINN, STUDENT, random_params, random_structure

pytestmark = pytest.mark.usefixtures("compile_quickly")

WATER = ([8, 1, 1], [[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])


@pytest.fixture(scope="module", params=CONFIGS)
def model(request: pytest.FixtureRequest) -> Potential:
    config = CONFIGS[request.param]
    return Potential(random_params(config), config, dtype="float64")


def test_results(model: Potential) -> None:
    energy, forces = model.energy_and_forces(*WATER)
    assert isinstance(energy, float)
    assert forces.shape == (3, 3)
    assert forces.dtype == np.float64
    assert model.energy(*WATER) == pytest.approx(energy, abs=1e-12)
    assert model.atomic_energies(*WATER).sum() == pytest.approx(energy, abs=1e-12)
    np.testing.assert_array_equal(model.evaluate(*WATER)[1], forces)


@pytest.mark.parametrize("num_atoms", [5, 70])
def test_padding_and_lists_change_nothing(model: Potential, num_atoms: int) -> None:
    """All pairs with padding up to 64 atoms, padded lists above, against one plain edge list."""
    numbers, positions = random_structure(num_atoms)
    senders, receivers = neighbor_pairs(positions, model.config.cutoff)
    plain = potential_module.Pairs(senders, receivers, np.ones(len(senders), bool), num_atoms)
    vectors = positions[senders] - positions[receivers]
    energies, gradients = jax.jit(model.energies_and_vector_gradients)(numbers, vectors, plain)
    actual_energies, forces = model.evaluate(numbers, positions)
    np.testing.assert_allclose(actual_energies, energies, atol=1e-11)
    expected = potential_module.accumulate_forces(gradients, plain)
    np.testing.assert_allclose(forces, expected, atol=1e-11 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("num_atoms", [2, 70])
def test_forces_against_differences(model: Potential, num_atoms: int) -> None:
    numbers, positions = random_structure(num_atoms, seed=3, closest=1.0)
    errors = finite_difference_errors(model, numbers, positions, coordinates=range(min(24, 3 * num_atoms)))
    assert errors.num_coordinates > 0
    assert errors.max_absolute < 1e-7 * max(1, np.abs(model.energy_and_forces(numbers, positions)[1]).max())
    assert "eV/Å" in str(errors)


def test_the_validator_finds_wrong_forces(model: Potential, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers, positions = random_structure(4)
    right = model.energy_and_forces(numbers, positions)
    monkeypatch.setattr(model, "energy_and_forces", lambda *_: (right[0], right[1] + 1e-3))
    errors = finite_difference_errors(model, numbers, positions)
    assert errors.max_absolute == pytest.approx(1e-3, rel=1e-3)


def test_the_validator_skips_pairs_that_cross_the_cutoff() -> None:
    student = Potential(random_params(STUDENT), STUDENT, dtype="float64")
    errors = finite_difference_errors(student, [6, 6], [[0.0, 0, 0], [2.99995, 0, 0]])
    assert errors.num_skipped == 2
    assert errors.max_absolute < 1e-8


def test_hessian(model: Potential) -> None:
    numbers, positions = random_structure(4, closest=1.1)
    hessian = model.hessian(numbers, positions)
    h = 1e-5
    moved = [positions.copy(), positions.copy()]
    moved[0][1, 2] += h
    moved[1][1, 2] -= h
    plus, minus = (model.energy_and_forces(numbers, r)[1].reshape(-1) for r in moved)
    np.testing.assert_allclose(hessian[5], -(plus - minus) / (2 * h), atol=1e-6 * max(1, np.abs(hessian).max()))


def test_float32_close_to_float64() -> None:
    for config in (STUDENT, PAINN):
        single = Potential(random_params(config), config, dtype="float32")
        double = Potential(random_params(config), config, dtype="float64")
        numbers, positions = random_structure(12, closest=1.0)
        forces = single.energy_and_forces(numbers, positions)[1]
        assert forces.dtype == np.float32
        np.testing.assert_allclose(forces, double.energy_and_forces(numbers, positions)[1], atol=1e-4)


def test_float64_needs_no_global_setting() -> None:
    params = jax.tree.map(np.asarray, random_params(PAINN))
    jax.config.update("jax_enable_x64", False)
    try:
        double = Potential(params, PAINN, dtype="float64")
        energy, forces = double.energy_and_forces(*WATER)
    finally:
        jax.config.update("jax_enable_x64", True)
    expected = Potential(params, PAINN, dtype="float64").energy_and_forces(*WATER)
    assert forces.dtype == np.float64
    assert energy == pytest.approx(expected[0], abs=1e-12)


def test_loading_compiles_little(compilations: Callable[[], int]) -> None:
    """No program for each shape of the parameters."""
    config = PAINN.model_copy(update={"hidden_dim": 20})  # shapes of its own
    params = jax.tree.map(np.asarray, random_params(config))
    before = compilations()
    potential = Potential(params, config, filters="table")
    assert potential.filter_error is not None
    assert compilations() <= before + 3


def test_parameters_are_copied() -> None:
    params = jax.tree.map(np.array, random_params(PAINN))
    potential = Potential(params, PAINN, dtype="float64")
    energy = potential.energy(*WATER)
    for x in jax.tree.leaves(params):
        x[...] = 0
    assert potential.energy(*WATER) == energy


def test_no_recompilation_while_a_molecule_moves() -> None:
    config = PAINN.model_copy(update={"hidden_dim": 12})  # a shape of its own, so that the count starts fresh
    potential = Potential(random_params(config), config)
    compiled = potential_module._energies_and_forces._cache_size
    for num_atoms in (9, 70):
        numbers, positions = random_structure(num_atoms, closest=1.0)
        potential.energy_and_forces(numbers, positions)
        before = compiled()
        rng = np.random.default_rng(0)
        for _ in range(5):
            potential.energy_and_forces(numbers, positions + rng.normal(scale=0.1, size=positions.shape))
        assert compiled() == before
    before = compiled()
    for num_atoms in range(9, 29):
        potential.energy_and_forces(*random_structure(num_atoms))
    assert compiled() <= before + 4


def test_buckets_hold_and_waste_little() -> None:
    for n in range(1, 5000):
        assert n <= bucket(n) <= max(4, n + 3) if n <= 32 else n <= bucket(n) <= max(n + 15, 1.13 * n)
    assert len({bucket(n) for n in range(1, 5000)}) < 70


BAD = {
    "no atoms": ([], np.zeros((0, 3)), "at least one atom"),
    "shapes": ([1, 1], [[0.0, 0, 0]], r"received \[2\] and \[1, 3\]"),
    "flat positions": ([1], [0.0, 0, 0], r"\[N, 3\]"),
    "NaN": ([1], [[np.nan, 0, 0]], "finite positions.*atom 0"),
    "infinity": ([1, 1], [[0.0, 0, 0], [0, np.inf, 0]], "finite positions.*atom 1"),
    "no such row": ([1, 21], [[0.0, 0, 0], [1, 0, 0]], "1 to 20, received 21 for atom 1"),
    "dummy atom": ([0], [[0.0, 0, 0]], "received 0"),
    "negative": ([-1], [[0.0, 0, 0]], "received -1"),
    "fractional": ([1.5], [[0.0, 0, 0]], "integer"),
    "words": (["H"], [[0.0, 0, 0]], "integer"),
    "ragged": ([1, 1], [[0.0, 0, 0], [1.0]], "arrays of numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_structures(model: Potential, case: str) -> None:
    numbers, positions, message = BAD[case]
    for method in (model.energy, model.energy_and_forces, model.evaluate, model.atomic_energies, model.hessian):
        with pytest.raises(StructureError, match=message):
            method(numbers, positions)


def test_periodic_structures_are_refused(model: Potential) -> None:
    with pytest.raises(StructureError, match="periodic"):
        model.energy(*WATER, cell=np.eye(3) * 10, pbc=True)
    with pytest.raises(StructureError, match="periodic"):
        model.energy(*WATER, cell=np.eye(3) * 10, pbc=[False, False, True])
    assert model.energy(*WATER, cell=np.eye(3) * 10, pbc=False) == model.energy(*WATER)


def test_elements_that_the_model_was_not_made_for() -> None:
    config = PAINN.model_copy(update={"elements": (1, 6)})
    with pytest.raises(StructureError, match=r"elements H C, received O \(atom 0\)"):
        Potential(random_params(config), config).energy(*WATER)


@pytest.mark.parametrize(("kwargs", "message"), [({"dtype": "float16"}, "float16"), ({"engine": "magic"}, "magic")])
def test_bad_settings(kwargs: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Potential(random_params(PAINN), PAINN, **kwargs)


def test_the_validator_wants_float64() -> None:
    with pytest.raises(ConfigError, match="float64"):
        finite_difference_errors(Potential(random_params(PAINN), PAINN), *WATER)
    with pytest.raises(ConfigError, match="positive step"):
        finite_difference_errors(Potential(random_params(PAINN), PAINN, dtype="float64"), *WATER, step=0.0)


def test_closest_pair() -> None:
    assert closest_pair(np.zeros((1, 3)))[0] == np.inf
    assert closest_pair(np.array([[0.0, 0, 0], [3, 0, 0], [3.5, 0, 0]])) == (0.5, 1, 2)
    assert closest_pair(np.zeros((3, 3)))[0] == 0
