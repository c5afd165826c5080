"""The jax-md energy functions in periodic boxes, and the boxes that are too small for the minimum image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_md import quantity, space

from jaxff.errors import StructureError
from jaxff.interop import jax_md as adapter

from .conftest import BOX, CUTOFF, PAIRED, random_atoms, random_potential, with_list

pytestmark = [
    pytest.mark.usefixtures("lenient_promotion"),
    # jax-md's lists mix int32 and int64 under x64
    pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning"),
]


def periodic_spaces(box: float):
    """(name, displacement, box, whether positions are fractional) of one cubic box."""
    yield "scalar", space.periodic(box)[0], box, False
    yield "vector", space.periodic(jnp.full(3, box))[0], jnp.full(3, box), False
    matrix = box * jnp.eye(3)
    yield "matrix", space.periodic_general(matrix, fractional_coordinates=False)[0], matrix, False
    yield "fractional", space.periodic_general(matrix)[0], matrix, True


@PAIRED
def test_a_supercell_has_eight_times_the_energy(potential, fmt):
    numbers, positions = random_atoms(10, BOX)
    unit_cell = jax.jit(adapter.energy(potential, numbers, space.periodic(BOX)[0]))
    small = float(unit_cell(jnp.asarray(positions)))
    corners = BOX * np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), axis=-1).reshape(-1, 1, 3)
    many, R = np.tile(numbers, 8), (positions[None] + corners).reshape(-1, 3)
    for name, displacement, box, fractional in periodic_spaces(2 * BOX):
        options = {"fractional_coordinates": fractional, "format": fmt}
        R_space = R / (2 * BOX) if fractional else R
        listed, _ = with_list(potential, many, R_space, displacement, box, **options)
        large = float(listed(jnp.asarray(R_space)))
        assert large == pytest.approx(8 * small, rel=1e-11), name


def test_a_periodic_box_equals_a_cluster_of_its_images(potential):
    numbers, positions = random_atoms(8, BOX, seed=3)
    periodic = jax.jit(adapter.energy(potential, numbers, space.periodic(BOX)[0], per_particle=True))
    shifts = BOX * np.stack(np.meshgrid([0, -1, 1], [0, -1, 1], [0, -1, 1]), axis=-1).reshape(-1, 1, 3)
    shifts = shifts[np.argsort(np.abs(shifts).sum(axis=(1, 2)), kind="stable")]
    cluster = (positions[None] + shifts).reshape(-1, 3)
    expected = potential.atomic_energies(np.tile(numbers, 27), cluster)[:8]
    np.testing.assert_allclose(periodic(jnp.asarray(positions)), expected, rtol=0, atol=1e-11)


@PAIRED
def test_lattice_translations_change_nothing(potential, fmt):
    numbers, positions = random_atoms(10, BOX)
    displacement, _ = space.periodic(BOX)
    listed, _ = with_list(potential, numbers, positions, displacement, BOX, format=fmt)
    moved = positions.copy()
    moved[3] += [BOX, -BOX, 2 * BOX]
    relisted, _ = with_list(potential, numbers, moved, displacement, BOX, format=fmt)
    R, R_moved = jnp.asarray(positions), jnp.asarray(moved)
    assert float(relisted(R_moved)) == pytest.approx(float(listed(R)), abs=1e-11)
    np.testing.assert_allclose(jax.grad(relisted)(R_moved), jax.grad(listed)(R), rtol=0, atol=1e-10)


@PAIRED
def test_periodic_forces_against_differences(potential, fmt):
    numbers, positions = random_atoms(10, BOX, seed=5)
    displacement, _ = space.periodic(BOX)
    listed, _ = with_list(potential, numbers, positions, displacement, BOX, format=fmt)
    gradient = jax.grad(listed)(jnp.asarray(positions))
    np.testing.assert_allclose(np.sum(gradient, axis=0), 0.0, atol=1e-11)
    h = 1e-5
    for atom, axis in ((0, 0), (4, 1), (9, 2)):
        ahead, behind = positions.copy(), positions.copy()
        ahead[atom, axis] += h
        behind[atom, axis] -= h
        slope = (listed(jnp.asarray(ahead)) - listed(jnp.asarray(behind))) / (2 * h)
        assert float(slope) == pytest.approx(float(gradient[atom, axis]), abs=1e-7)


def test_both_directions_of_a_pair_are_exact_opposites():
    """Without it, rounding lets one edge of a pair pass the cutoff and not the other."""
    _, positions = random_atoms(30, BOX)
    pairs = adapter._all_pairs(30)
    vectors = adapter._pair_vectors(space.periodic(BOX)[0], jnp.asarray(positions), pairs).reshape(30, 30, 3)
    np.testing.assert_array_equal(vectors, -np.swapaxes(vectors, 0, 1))
    np.testing.assert_array_equal(
        adapter._pair_vectors(space.free()[0], jnp.asarray(positions), pairs),
        (positions[None] - positions[:, None]).reshape(-1, 3),
    )


def test_stress_is_the_strain_derivative_and_pressure_its_trace(potential):
    numbers, positions = random_atoms(10, BOX)
    R, box = jnp.asarray(positions), BOX * jnp.eye(3)
    displacement, _ = space.periodic_general(box, fractional_coordinates=False)
    energy_fn, _ = with_list(potential, numbers, positions, displacement, box)
    stress = quantity.stress(energy_fn, R, box)
    h = 1e-5
    for i, j in ((0, 0), (0, 1), (2, 2)):
        strain = np.zeros((3, 3))
        strain[i, j] = h
        ahead, behind = (float(energy_fn(R, perturbation=jnp.eye(3) + s * strain)) for s in (1, -1))
        assert float(stress[i, j]) == pytest.approx(-(ahead - behind) / (2 * h) / BOX**3, abs=1e-9)
    assert float(quantity.pressure(energy_fn, R, box)) == pytest.approx(float(jnp.trace(stress)) / 3, abs=1e-12)


@pytest.mark.parametrize("side", [5.9, (20.0, 20.0, 5.9)])
def test_a_box_below_twice_the_cutoff_is_refused(potential, side):
    box = jnp.asarray(side)
    matrix = jnp.diag(jnp.broadcast_to(box, 3))
    for displacement in (
        space.periodic(box)[0],
        space.periodic_general(matrix)[0],
        space.periodic_general(matrix, fractional_coordinates=False)[0],
    ):
        with pytest.raises(StructureError, match="at least 6 Å"):
            adapter.energy(potential, [1, 1], displacement)
        with pytest.raises(StructureError, match="at least 6 Å"):
            adapter.energy_neighbor_list(displacement, box, potential, [1, 1])


def test_a_skew_box_is_measured_along_its_normals(potential):
    box = np.array([[8.0, 6.0, 0.0], [0.0, 8.0, 6.0], [0.0, 0.0, 8.0]])
    assert np.linalg.norm(box, axis=0).min() > 2 * CUTOFF
    height = 1.0 / np.linalg.norm(np.linalg.inv(box), axis=1).max()
    assert height < 2 * CUTOFF
    for fractional in (True, False):
        with pytest.raises(StructureError, match="face normal"):
            adapter.energy(potential, [1, 1], space.periodic_general(jnp.asarray(box), fractional)[0])
        larger = jnp.asarray(box * 2.01 * CUTOFF / height)
        adapter.energy(potential, [1, 1], space.periodic_general(larger, fractional)[0])


def test_a_traced_box_that_shrinks_too_far_gives_nan():
    potential = random_potential("painn")
    numbers, positions = random_atoms(6, BOX)
    energy_fn = adapter.energy(potential, numbers, space.periodic_general(BOX * jnp.eye(3))[0])
    in_box = jax.jit(lambda side: energy_fn(jnp.asarray(positions) / BOX, box=side * jnp.eye(3)))
    assert np.isfinite(in_box(BOX))
    assert np.isfinite(jax.grad(in_box)(BOX))
    assert np.isnan(in_box(5.9))
    built_inside = jax.jit(lambda side: adapter.energy(potential, numbers, space.periodic(side)[0])(positions))
    assert np.isfinite(built_inside(BOX))
    assert np.isnan(built_inside(5.9))
