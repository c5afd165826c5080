"""Both architectures: the chain of rules against autodiff, invariances, and every awkward structure."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from scipy.spatial.transform import Rotation

from jaxff import models, ops
from jaxff.models import painn, student
from jaxff.models.parameters import dense_layers
from jaxff.ops import accumulate_forces
from jaxff.potential import Potential
from jaxff.system import Pairs
from tests.structures import CONFIGS, LAYOUTS, PAINN, STUDENT, pairs_in_layout, random_params, random_structure
from tests.vjp import assert_close

pytestmark = pytest.mark.usefixtures("compile_quickly")
NAMES = list(CONFIGS)


def padded_case(name: str, layout: str = "slots", padding: int = 2) -> tuple[Any, ...]:
    """(params, config, numbers, vectors, pairs) of a random structure with padding."""
    config = CONFIGS[name]
    numbers, positions = random_structure(7)
    vectors, pairs = pairs_in_layout(positions, config.cutoff, layout, padding)
    return random_params(config), config, np.pad(numbers, (0, padding)), jnp.asarray(vectors), pairs


def total(function: Any, params: Any, config: Any, numbers: Any, vectors: Any, pairs: Pairs) -> Any:
    """Energies with unequal weights: a general cotangent."""
    energies = function(params, config, numbers, vectors, pairs)
    return jnp.sum(energies * jnp.linspace(1.0, 2.0, len(numbers)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
class TestAgainstAutodiff:
    def test_positions_and_parameters(self, name: str, layout: str) -> None:
        """The gradient by R and by every parameter, through rules and through autodiff of plain functions."""
        config = CONFIGS[name]
        numbers, positions = random_structure(7)
        _, pairs = pairs_in_layout(positions, config.cutoff, layout, padding=2)
        numbers, params = np.pad(numbers, (0, 2)), random_params(config)
        padded = jnp.pad(jnp.asarray(positions), ((0, 2), (0, 0)))

        def gradient(function: Any) -> Any:
            def energy(params: Any, r: Any) -> Any:
                vectors = r[pairs.senders] - r[pairs.receivers]
                return total(function, params, config, numbers, vectors, pairs)

            return jax.jit(jax.value_and_grad(energy, (0, 1)))(params, padded)

        assert_close(gradient(models.atomic_energies), gradient(models.reference_atomic_energies), 1e-12)

    def test_explicit_chain(self, name: str, layout: str) -> None:
        """The one function without jax.grad, the custom_vjp energy and autodiff give the same."""
        params, config, numbers, vectors, pairs = padded_case(name, layout)

        def by_grad(function: Any) -> Any:
            gradient = jax.grad(lambda r: function(params, config, numbers, r, pairs).sum())(vectors)
            return accumulate_forces(gradient, pairs)

        @jax.jit
        def every_way() -> Any:
            energies, gradients = models.energies_and_vector_gradients(params, config, numbers, vectors, pairs)
            plain = models.reference_atomic_energies(params, config, numbers, vectors, pairs)
            forces = accumulate_forces(gradients, pairs)
            return energies, plain, forces, by_grad(models.atomic_energies), by_grad(models.reference_atomic_energies)

        energies, plain, forces, by_rules, by_autodiff = every_way()
        assert_close(energies, plain, 1e-13)
        assert_close(forces, by_rules, 1e-13)
        assert_close(forces, by_autodiff, 1e-12)
        assert np.all(forces[7:] == 0)
        assert np.all(energies[7:] == 0)
        assert np.abs(forces.sum(axis=0)).max() < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_second_order(name: str) -> None:
    """Reverse over reverse, against autodiff of the plain functions and against differences."""
    config = CONFIGS[name].model_copy(update={"hidden_dim": 4})
    params = random_params(config)
    numbers, positions = random_structure(4)
    _, pairs = pairs_in_layout(positions, config.cutoff, "slots")
    positions = jnp.asarray(positions)

    def energy(r: Any, function: Any = models.atomic_energies) -> Any:
        return function(params, config, numbers, r[pairs.senders] - r[pairs.receivers], pairs).sum()

    hessian = jax.jit(jax.jacrev(jax.grad(energy)))(positions).reshape(12, 12)
    expected = jax.jit(jax.hessian(lambda r: energy(r, models.reference_atomic_energies)))(positions)
    assert_close(hessian, expected.reshape(12, 12), 1e-11)
    assert_close(hessian, hessian.T, 1e-11)
    check_grads(jax.jit(energy), (positions,), order=2, modes=["rev"], atol=1e-5, rtol=1e-5, eps=1e-4)


def test_force_loss_trains() -> None:
    """The gradient of a force loss by the parameters: rules differentiated once more, against autodiff."""
    params, config, numbers, vectors, pairs = padded_case("painn")

    def loss(params: Any, function: Any) -> Any:
        g = jax.grad(lambda r: function(params, config, numbers, r, pairs).sum())(vectors)
        return jnp.sum(accumulate_forces(g, pairs) ** 2)

    rules = jax.jit(jax.grad(lambda p: loss(p, models.atomic_energies)))(params)
    assert_close(rules, jax.jit(jax.grad(lambda p: loss(p, models.reference_atomic_energies)))(params), 1e-11)


RULES = {
    "student": ["distance_bwd", "edge_features_bwd", "mlp_bwd", "message_bwd", "update_bwd", "readout_bwd"],
    "painn": [
        "distance_bwd",
        "bessel_edge_features_bwd",
        "mlp_bwd",
        "gated_message_bwd",
        "equivariant_update_bwd",
        "readout_bwd",
    ],
}


@pytest.mark.parametrize(("name", "rule"), [(n, r) for n, rules in RULES.items() for r in rules])
def test_a_broken_rule_changes_the_forces(name: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No autodiff of the primal takes place: what the rules say is what comes out, in both ways to forces."""
    module = {"student": student, "painn": painn}[name]
    case = padded_case(name)

    def both() -> tuple[Any, Any]:
        by_grad = jax.grad(lambda r: models.atomic_energies(*case[:3], r, case[4]).sum())
        return jax.jit(lambda r: (by_grad(r), models.energies_and_vector_gradients(*case[:3], r, case[4])[1]))(case[3])

    right = both()
    assert_close(right[0], right[1], 1e-13)
    original = getattr(module, rule)
    monkeypatch.setattr(module, rule, lambda *a: jax.tree.map(lambda x: 1.01 * x, original(*a)))
    wrong = both()
    for before, after in zip(right, wrong, strict=True):
        assert jnp.abs(after - before).max() > 1e-4 * jnp.abs(before).max()


def test_the_explicit_chain_differentiates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("autodiff was called")

    for name in ("grad", "vjp", "value_and_grad", "jvp", "linearize", "jacrev", "jacfwd"):
        monkeypatch.setattr(jax, name, refuse)
    for name in NAMES:
        text = str(jax.make_jaxpr(models.energies_and_vector_gradients, static_argnums=1)(*padded_case(name)))
        assert "custom_vjp" not in text


def test_student_composed_of_public_ops() -> None:
    """The public ops, one custom_vjp each, chained by JAX, give the model's energy and forces."""
    params, config, numbers, vectors, pairs = padded_case("student")

    def energy(r: Any) -> Any:
        d, u = ops.distance(r, student.EPSILON)
        phi = ops.edge_features(d, params["radial"]["centers"], params["radial"]["widths"], config.cutoff)
        s = params["embedding"]["table"][numbers]
        v = jnp.zeros((len(numbers), 3, config.hidden_dim))
        for i in range(config.num_interactions):
            layer = params[f"interaction_{i}"]
            update = {k: x for k, x in layer["update"].items() if k != "mixing_matrix"}
            ds, dv = ops.message(s, v, ops.mlp(phi, dense_layers(layer["filter"])), u, pairs)
            s, v = ops.update(s + ds, v + dv, dense_layers(update), layer["update"]["mixing_matrix"])
        return jnp.sum(jnp.where(numbers > 0, ops.readout(s, dense_layers(params["readout"])), 0))

    expected = jax.jit(models.energies_and_vector_gradients, static_argnums=1)(params, config, numbers, vectors, pairs)
    value, gradient = jax.jit(jax.value_and_grad(energy))(vectors)
    assert_close(value, expected[0].sum(), 1e-13)
    assert_close(accumulate_forces(gradient, pairs), accumulate_forces(expected[1], pairs), 1e-12)


@pytest.mark.parametrize("config", [STUDENT, PAINN])
def test_flax_modules_own_the_parameters(config: Any) -> None:
    _, _, numbers, vectors, pairs = padded_case(config.architecture)
    module = {"student": models.Student, "painn": models.Painn}[config.architecture](config, jnp.float64)
    variables = module.init(jax.random.key(0), numbers, vectors, pairs)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables["params"])
    assert shapes == models.param_shapes(config, jnp.float64)
    energies = module.apply(variables, numbers, vectors, pairs)
    assert_close(energies, models.atomic_energies(variables["params"], config, numbers, vectors, pairs), 1e-14)


class TestInvariance:
    """PaiNN keeps its energy, and turns its forces, under every symmetry of space and of the atoms."""

    config = CONFIGS["painn+zbl"]
    potential = Potential(random_params(config), config, dtype="float64")

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**31), num_atoms=st.integers(1, 20), reflect=st.booleans())
    def test_rotation_reflection_translation(self, seed: int, num_atoms: int, reflect: bool) -> None:
        numbers, positions = random_structure(num_atoms, seed)
        rng = np.random.default_rng(seed)
        matrix = Rotation.random(random_state=rng).as_matrix() * (-1 if reflect else 1)
        energy, forces = self.potential.energy_and_forces(numbers, positions)
        moved_energy, moved_forces = self.potential.energy_and_forces(
            numbers, positions @ matrix.T + rng.uniform(-5, 5, 3)
        )
        scale = max(1, np.abs(forces).max())
        assert moved_energy == pytest.approx(energy, abs=1e-11 * max(1, abs(energy)))
        np.testing.assert_allclose(moved_forces, forces @ matrix.T, atol=1e-10 * scale)

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**31), num_atoms=st.integers(2, 40))
    def test_permutation(self, seed: int, num_atoms: int) -> None:
        numbers, positions = random_structure(num_atoms, seed)
        order = np.random.default_rng(seed).permutation(num_atoms)
        energy, forces = self.potential.energy_and_forces(numbers, positions)
        other_energy, other_forces = self.potential.energy_and_forces(numbers[order], positions[order])
        assert other_energy == pytest.approx(energy, abs=1e-11 * max(1, abs(energy)))
        np.testing.assert_allclose(other_forces, forces[order], atol=1e-10 * max(1, np.abs(forces).max()))

    def test_the_student_breaks_rotation(self) -> None:
        """The defect is reproduced: a general mixing matrix does not commute with rotations."""
        potential = Potential(random_params(STUDENT), STUDENT, dtype="float64")
        numbers, positions = random_structure(8)
        turned = positions @ Rotation.from_euler("xyz", [40, 50, 60], degrees=True).as_matrix().T
        assert abs(potential.energy(numbers, turned) - potential.energy(numbers, positions)) > 1e-4


@pytest.mark.parametrize("name", ["painn", "painn+zbl"])
def test_painn_is_continuous_at_the_cutoff(name: str) -> None:
    """Energy and forces; the student's energy jumps there."""
    config = CONFIGS[name]
    numbers = [6, 8, 1]

    def at(potential: Potential, d: float) -> tuple[float, np.ndarray]:
        return potential.energy_and_forces(numbers, [[0, 0, 0], [d, 0, 0], [0, 1.1, 0]])

    painn_potential = Potential(random_params(config), config, dtype="float64")
    inside, outside = (at(painn_potential, config.cutoff + delta) for delta in (-1e-7, 1e-7))
    assert inside[0] == pytest.approx(outside[0], abs=1e-9)
    np.testing.assert_allclose(inside[1], outside[1], atol=1e-5)
    student_potential = Potential(random_params(STUDENT), STUDENT, dtype="float64")
    assert abs(at(student_potential, 3.0)[0] - at(student_potential, 3.0 + 1e-7)[0]) > 1e-4


AWKWARD = {
    "one atom": [[0.0, 0, 0]],
    "coincident": [[0.0, 0, 0], [0, 0, 0]],
    "coincident and a third": [[0.0, 0, 0], [0, 0, 0], [1, 0, 0]],
    "isolated": [[0.0, 0, 0], [1, 0, 0], [50, 0, 0]],
    "exactly at the cutoff": [[0.0, 0, 0], [3.0, 0, 0]],
    "beyond the cutoff": [[0.0, 0, 0], [3.5, 0, 0]],
    "linear, vectors cancel": [[-1.2, 0, 0], [0.0, 0, 0], [1.2, 0, 0]],
    "tetrahedral": [[0.0, 0, 0], [0.6, 0.6, 0.6], [0.6, -0.6, -0.6], [-0.6, 0.6, -0.6], [-0.6, -0.6, 0.6]],
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_awkward_structures_are_finite(name: str, dtype: str) -> None:
    """Energy, forces and second derivatives; the net force vanishes."""
    config = CONFIGS[name]
    potential = Potential(random_params(config), config, dtype=dtype)
    hessian = jax.jit(jax.jacrev(jax.grad(lambda r, z, mask: padded_energy(potential, r, z, mask))))
    for title, rows in AWKWARD.items():
        positions, numbers = np.array(rows), [6] + [1] * (len(rows) - 1)
        energy, forces = potential.energy_and_forces(numbers, positions)
        assert np.isfinite(energy), title
        assert np.isfinite(forces).all(), title
        largest = max(1.0, np.abs(forces).max())
        assert np.abs(forces.sum(axis=0)).max() <= (1e-5 if dtype == "float32" else 1e-12) * largest, title
        missing = 5 - len(rows)
        padded = jnp.asarray(np.pad(positions, ((0, missing), (0, 0))), dtype)
        real = np.arange(5) < len(rows)
        assert jnp.isfinite(hessian(padded, np.pad(numbers, (0, missing)), np.outer(real, real))).all(), title


def padded_energy(potential: Potential, r: Any, numbers: Any, mask: Any) -> Any:
    """Energy of 5 places, all pairs, `mask` [5, 5] telling which are real."""
    index = np.arange(25)
    mask = (mask & ~np.eye(5, dtype=bool)).reshape(-1)
    pairs = Pairs(index % 5, index // 5, mask, 5, layout="all", symmetric=True)
    vectors = jnp.where(mask[:, None], (r[None] - r[:, None]).reshape(25, 3), 0)
    return potential.atomic_energies_of_vectors(numbers, vectors, pairs).sum()
