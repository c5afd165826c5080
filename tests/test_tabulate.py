"""Tables: the op and its rule, the stated error, and what a table changes in energy and forces."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import load_potential, models
from jaxff.errors import ConfigError
from jaxff.ops.table import interpolate, interpolate_reference
from jaxff.potential import Potential
from jaxff.tabulate import tabulate
from tests.structures import CONFIGS, random_params, random_structure
from tests.vjp import check_vjp

pytestmark = pytest.mark.usefixtures("compile_quickly")
NAMES = list(CONFIGS)


def test_the_op() -> None:
    rng = np.random.default_rng(0)
    d, table = jnp.asarray(rng.uniform(0.05, 2.9, 11)), jnp.asarray(rng.normal(size=(5, 4, 3)))
    check_vjp(lambda *a: interpolate(*a, 3.0), lambda *a: interpolate_reference(*a, 3.0), (d, table))


def test_ends_and_beyond() -> None:
    """Beyond the cutoff the value stays, with slope 0; at the cutoff the slope counts."""
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 4, 1)))
    d = jnp.asarray([0.0, 3.0, 3.5, 1e8])
    values = interpolate(d, table, 3.0)[:, 0]
    np.testing.assert_allclose(values, [table[0, 0, 0]] + [table[4].sum()] * 3)
    slopes = jax.grad(lambda d: interpolate(d, table, 3.0).sum())(d)
    np.testing.assert_allclose(slopes[1], (table[4, 1] + 2 * table[4, 2] + 3 * table[4, 3])[0] * 5 / 3)
    assert np.all(slopes[2:] == 0)


@pytest.mark.parametrize("name", NAMES)
def test_the_stated_error(name: str) -> None:
    """It bounds what is found anywhere, shrinks as T^-4 and T^-3, and is below 1e-6 by default."""
    config = CONFIGS[name]
    params = random_params(config)
    coarse, fine, default = (tabulate(params, config, n)[1] for n in (64, 128, 4096))
    assert 8 < coarse.value / fine.value < 32
    assert 4 < coarse.slope / fine.slope < 16
    assert default.slope < 1e-6 * max(1, default.scale)
    tree, _ = tabulate(params, config, 64)
    d = jnp.linspace(0, config.cutoff, 5001)[:-1]
    exact, table = (models.filters_reference(p, config, d) for p in (params, tree))
    found = max(float(jnp.abs(a - b).max()) for a, b in zip(exact, table, strict=True))
    assert found <= 1.01 * coarse.value
    assert "64 intervals" in str(coarse)


@pytest.mark.parametrize("name", NAMES)
def test_forces_from_tables(name: str) -> None:
    """Close to exact ones, and the gradient of the tabulated energy itself, to second order."""
    config = CONFIGS[name]
    params = random_params(config)
    exact, table = (Potential(params, config, dtype="float64", filters=f) for f in ("exact", "table"))
    assert exact.filter_error is None
    assert table.filter_error is not None
    numbers, positions = random_structure(8, closest=1.0)
    energy, forces = table.energy_and_forces(numbers, positions)
    expected = exact.energy_and_forces(numbers, positions)
    assert energy == pytest.approx(expected[0], abs=1e-8)
    np.testing.assert_allclose(forces, expected[1], atol=1e-6)
    plain = jax.jit(models.reference_atomic_energies, static_argnums=1)
    h, moved = 1e-5, np.eye(24).reshape(24, 8, 3)[3]
    plus, minus = (table.energy_and_forces(numbers, positions + s * h * moved) for s in (1, -1))
    assert (plus[0] - minus[0]) / (2 * h) == pytest.approx(-forces[1, 0], abs=1e-7)
    hessian = table.hessian(numbers, positions)
    np.testing.assert_allclose(hessian[3], -(plus[1] - minus[1]).reshape(-1) / (2 * h), atol=1e-3)
    z, vectors, pairs = table._prepare(*table.check(numbers, positions))
    np.testing.assert_allclose(plain(table._tree, config, z, jnp.asarray(vectors), pairs).sum(), energy, rtol=1e-12)


def test_too_few_intervals() -> None:
    with pytest.raises(ConfigError, match="received 1"):
        tabulate(random_params(CONFIGS["student"]), CONFIGS["student"], 1)


def test_the_published_student(student_dir: Any) -> None:
    """Real weights: the table changes forces by less than 1e-6 eV/Å, in float64 against exact reference numbers."""
    data = np.load(student_dir / "parity_public.npz")
    potential = load_potential(student_dir / "original.pt", dtype="float64", filters="table")
    largest = 0.0
    for i in np.flatnonzero(~data["force_ill_defined"])[::9]:
        part = slice(*data["offset"][i : i + 2])
        forces = potential.energy_and_forces(data["numbers"][part], data["positions"][part])[1]
        largest = max(largest, float(np.abs(forces - data["forces_original_f64"][part]).max()))
    assert largest < 1e-6
