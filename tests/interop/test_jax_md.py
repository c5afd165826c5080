"""The jax-md energy functions in open space: equal to the Potential, usable by jax-md as they are."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_md import minimize, partition, quantity, simulate, space

from jaxff.errors import ConfigError, JaxffError, StructureError
from jaxff.interop import jax_md as adapter
from jaxff.potential import Potential

from .conftest import BOX, CUTOFF, PAIRED, random_atoms, random_potential, with_list

pytestmark = [
    pytest.mark.usefixtures("lenient_promotion"),
    # jax-md's lists mix int32 and int64 under x64
    pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning"),
]
FORMATS = [partition.Dense, partition.Sparse, partition.OrderedSparse]


@pytest.mark.parametrize("fmt", FORMATS)
def test_open_lists_equal_all_pairs_and_potential(potential, fmt):
    numbers, positions = random_atoms(14, 6.0)
    displacement, _ = space.free()
    energy, forces = potential.energy_and_forces(numbers, positions)
    all_pairs = adapter.energy(potential, numbers, displacement)
    listed, _ = with_list(potential, numbers, positions, displacement, 100.0, format=fmt)
    for energy_fn in (all_pairs, listed):
        value, gradient = jax.jit(jax.value_and_grad(energy_fn))(jnp.asarray(positions))
        assert value == pytest.approx(energy, rel=0, abs=1e-12 * max(1.0, abs(energy)))
        np.testing.assert_allclose(-gradient, forces, rtol=0, atol=1e-11)


@PAIRED
def test_per_particle_energies_are_the_atoms(potential, fmt):
    numbers, positions = random_atoms(9, 5.0)
    displacement, _ = space.free()
    expected = potential.atomic_energies(numbers, positions)
    all_pairs = adapter.energy(potential, numbers, displacement, per_particle=True)
    listed, _ = with_list(potential, numbers, positions, displacement, 100.0, format=fmt, per_particle=True)
    for energy_fn in (all_pairs, listed):
        np.testing.assert_allclose(energy_fn(jnp.asarray(positions)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_edge_at_the_cutoff_is_listed(fmt):
    potential = random_potential("student")
    numbers, positions = [1, 8], np.array([[0.0, 0.0, 0.0], [CUTOFF, 0.0, 0.0]])
    listed, _ = with_list(potential, numbers, positions, space.free()[0], 100.0, format=fmt, dr_threshold=0.0)
    assert float(listed(jnp.asarray(positions))) == pytest.approx(potential.energy(numbers, positions), abs=1e-12)
    beyond = positions * (1 + 1e-12)
    assert abs(potential.energy(numbers, beyond) - potential.energy(numbers, positions)) > 1e-6


@PAIRED
@pytest.mark.parametrize("n", [1, 2])
def test_lonely_atoms_and_free_slots_give_no_nan(potential, fmt, n):
    numbers, positions = [6, 8][:n], np.array([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]])[:n]
    listed, _ = with_list(potential, numbers, positions, space.free()[0], 100.0, format=fmt, capacity_multiplier=3.0)
    R = jnp.asarray(positions)
    assert float(listed(R)) == pytest.approx(potential.energy(numbers, positions), abs=1e-12)
    assert not np.any(jax.grad(listed)(R))
    assert not np.any(jax.jit(jax.jacrev(jax.grad(listed)))(R))


@PAIRED
def test_second_derivatives_equal_the_hessian(potential, fmt):
    numbers, positions = random_atoms(5, 3.0)
    R = jnp.asarray(positions)
    expected = potential.hessian(numbers, positions)
    listed, _ = with_list(potential, numbers, positions, space.free()[0], 100.0, format=fmt, capacity_multiplier=2.0)
    for energy_fn in (adapter.energy(potential, numbers, space.free()[0]), listed):
        hessian = jax.jit(jax.jacrev(jax.grad(energy_fn)))(R).reshape(15, 15)
        np.testing.assert_allclose(hessian, expected, rtol=0, atol=1e-9 * max(1.0, np.abs(expected).max()))


def test_quantity_force_is_the_potential_s(potential):
    numbers, positions = random_atoms(8, 5.0)
    force_fn = jax.jit(quantity.force(adapter.energy(potential, numbers, space.free()[0])))
    _, forces = potential.energy_and_forces(numbers, positions)
    np.testing.assert_allclose(force_fn(jnp.asarray(positions)), forces, rtol=0, atol=1e-11)


def test_nve_with_a_list_conserves_energy():
    potential = random_potential("painn")
    numbers, positions = random_atoms(20, BOX, closest=1.2)
    displacement, shift = space.periodic(BOX)
    neighbor_fn, energy_fn = adapter.energy_neighbor_list(displacement, BOX, potential, numbers)
    init, apply = simulate.nve(energy_fn, shift, 0.02)
    neighbor = neighbor_fn.allocate(jnp.asarray(positions))
    state = init(jax.random.key(0), jnp.asarray(positions), 0.03, mass=10.0, neighbor=neighbor)

    def total(state, neighbor):
        kinetic = quantity.kinetic_energy(momentum=state.momentum, mass=state.mass)
        return float(energy_fn(state.position, neighbor=neighbor) + kinetic)

    @jax.jit
    def step(state, neighbor):
        neighbor = neighbor.update(state.position)
        return apply(state, neighbor=neighbor), neighbor

    start = total(state, neighbor)
    for _ in range(50):
        state, neighbor = step(state, neighbor)
    neighbor = neighbor.update(state.position)
    assert not neighbor.did_buffer_overflow
    assert np.abs(state.position - positions).max() > 0.01
    assert total(state, neighbor) == pytest.approx(start, abs=1e-4)


def test_fire_descent_lowers_the_energy(potential):
    numbers, positions = random_atoms(8, 5.0, closest=1.0)
    displacement, shift = space.free()
    energy_fn = jax.jit(adapter.energy(potential, numbers, displacement))
    init, apply = minimize.fire_descent(energy_fn, shift, dt_start=0.01, dt_max=0.05)
    state = init(jnp.asarray(positions))
    before = float(energy_fn(state.position))
    step = jax.jit(apply)
    for _ in range(30):
        state = step(state)
    assert float(energy_fn(state.position)) < before


def test_an_overflowing_list_says_so(potential):
    numbers, positions = random_atoms(12, 11.0, closest=1.5)
    neighbor_fn, _ = adapter.energy_neighbor_list(
        space.free()[0], 100.0, potential, numbers, dr_threshold=0.0, capacity_multiplier=1.0
    )
    neighbor = neighbor_fn.allocate(jnp.asarray(positions))
    assert not neighbor.did_buffer_overflow
    assert neighbor.update(jnp.asarray(0.3 * positions)).did_buffer_overflow


def test_bad_input_is_refused(potential):
    displacement, _ = space.free()
    for numbers in ([1, 99], [0, 1], []):
        with pytest.raises(StructureError):
            adapter.energy(potential, numbers, displacement)
    energy_fn = adapter.energy(potential, [1, 8], displacement)
    with pytest.raises(StructureError, match=r"\[2, 3\]"):
        energy_fn(jnp.zeros((3, 3)))
    with pytest.raises(TypeError, match="capacity_multiplyer"):
        adapter.energy_neighbor_list(displacement, 10.0, potential, [1, 8], capacity_multiplyer=2.0)


def test_float64_without_x64_is_refused(potential):
    displacement, _ = space.free()
    energy_fn = adapter.energy(potential, [1, 8], displacement)
    with jax.enable_x64(False):
        with pytest.raises(ConfigError, match="jax_enable_x64"):
            adapter.energy(potential, [1, 8], displacement)
        with pytest.raises(JaxffError, match="jax_enable_x64"):
            energy_fn(jnp.zeros((2, 3)))


def test_float32_needs_no_x64():
    potential = random_potential("painn", "float32")
    numbers, positions = random_atoms(8, 5.0)
    energy, forces = potential.energy_and_forces(numbers, positions)
    with jax.enable_x64(False):
        listed, _ = with_list(potential, numbers, positions, space.free()[0], 100.0)
        value, gradient = jax.value_and_grad(listed)(jnp.asarray(positions))
    assert value.dtype == gradient.dtype == np.float32
    assert float(value) == pytest.approx(energy, rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(-gradient, forces, rtol=0, atol=1e-4)


def test_own_code_promotes_nothing(potential: Potential):
    numbers, positions = random_atoms(6, 5.0)
    with jax.numpy_dtype_promotion("strict"):
        energy_fn = jax.jit(adapter.energy(potential, numbers, space.free()[0]))
        assert np.isfinite(energy_fn(jnp.asarray(positions)))
        assert np.isfinite(energy_fn(jnp.asarray(positions, dtype=jnp.float32)))


def test_jax_grad_goes_through_the_hand_written_rules():
    """Forward mode exists for plain JAX only: it is refused, so a rule stands in between."""
    numbers, positions = random_atoms(4, 3.0)
    energy_fn = adapter.energy(random_potential("painn"), numbers, space.free()[0])
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(energy_fn, (jnp.asarray(positions),), (jnp.ones((4, 3)),))


def test_plain_differences_are_recognised():
    """Only they let a kernel take positions in place of pair vectors."""
    assert adapter._is_difference(space.free()[0])
    assert adapter._is_difference(lambda a, b: a - b)
    for displacement in (space.periodic(9.0)[0], lambda a, b: b - a, lambda a, b: 2 * (a - b), lambda a, b, box: a - b):
        assert not adapter._is_difference(displacement)


def test_what_takes_long_is_imported_when_asked_for():
    """In a process of its own: here jax-md may be there already. Under strict promotion, which fails within jax-md."""
    code = """
import sys
from jaxff.interop import jax_md
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
later = ("flax.nnx", "scipy.interpolate._fitpack_py")
print(*(name in sys.modules for name in later))
from jax_md import interpolate
print(interpolate.spline.__module__, *(name in sys.modules for name in later))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["False", "False", "jax_md.interpolate", "False", "True"], result.stderr
