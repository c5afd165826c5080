"""Each op's rule against its reference, on random arguments and at the edges of its domain."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import ops
from jaxff.ops import radial, repulsion
from jaxff.ops.distance import distance_reference
from jaxff.ops.message import gated_message_reference, message_reference
from jaxff.ops.mlp import mlp_reference
from jaxff.ops.readout import readout_reference
from jaxff.ops.update import equivariant_update_reference, update_reference
from jaxff.system import Pairs
from tests.structures import LAYOUTS, pairs_in_layout, random_structure
from tests.vjp import assert_close, check_vjp, random_like

pytestmark = pytest.mark.usefixtures("compile_quickly")
F, K = 4, 5
CUTOFF = 3.0


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def layers(*sizes: int) -> tuple[ops.Dense, ...]:
    return tuple(ops.Dense(normal(a, b, seed=i), normal(b, seed=i + 9)) for i, (a, b) in enumerate(pairwise(sizes)))


def distances() -> Any:
    return jnp.asarray(np.random.default_rng(0).uniform(0.3, 3.5, 12))


CASES = {
    "distance": (ops.distance, distance_reference, (normal(7, 3),)),
    "distance_eps": (
        partial(ops.distance, epsilon=0.1),
        partial(distance_reference, epsilon=0.1),
        (normal(7, 3),),
    ),
    "gaussian_basis": (
        ops.gaussian_basis,
        radial.gaussian_basis_reference,
        (distances(), jnp.linspace(0.0, CUTOFF, K), jnp.full(K, 0.7)),
    ),
    "bessel_basis": (
        lambda d: ops.bessel_basis(d, K, CUTOFF),
        lambda d: radial.bessel_basis_reference(d, K, CUTOFF),
        (distances(),),
    ),
    "cosine_cutoff": (
        lambda d: ops.cosine_cutoff(d, CUTOFF),
        lambda d: radial.cosine_cutoff_reference(d, CUTOFF),
        (distances(),),
    ),
    "edge_features": (
        lambda *a: ops.edge_features(*a, CUTOFF),
        lambda *a: radial.edge_features_reference(*a, CUTOFF),
        (distances(), jnp.linspace(0.0, CUTOFF, K), jnp.full(K, 0.7)),
    ),
    "bessel_edge_features": (
        lambda d: ops.bessel_edge_features(d, K, CUTOFF),
        lambda d: radial.bessel_edge_features_reference(d, K, CUTOFF),
        (distances(),),
    ),
    "mlp": (ops.mlp, mlp_reference, (normal(6, 3), layers(3, 5, 4, 2))),
    "mlp_leading_axes": (ops.mlp, mlp_reference, (normal(2, 6, 3), layers(3, 5))),
    "readout": (ops.readout, readout_reference, (normal(6, F), layers(F, 3, 2, 1))),
    "update": (
        ops.update,
        update_reference,
        (normal(6, F), normal(6, 3, F), layers(2 * F, F, 3 * F), normal(3, 3)),
    ),
    "equivariant_update": (
        lambda *a: ops.equivariant_update(*a, 0.1),
        lambda *a: equivariant_update_reference(*a, 0.1),
        (normal(6, F), normal(6, 3, F), layers(2 * F, F, 3 * F), normal(F, F), normal(F, F, seed=1)),
    ),
    "equivariant_update_published_norm": (
        lambda *a: ops.equivariant_update(*a, 0.0),
        lambda *a: equivariant_update_reference(*a, 0.0),
        (normal(6, F), normal(6, 3, F), layers(2 * F, F, 3 * F), normal(F, F), normal(F, F, seed=1)),
    ),
    "zbl": (
        lambda d: ops.zbl(d, jnp.full(12, 6.0), jnp.full(12, 8.0), jnp.full(12, 2.0)),
        lambda d: repulsion.zbl_reference(d, jnp.full(12, 6.0), jnp.full(12, 8.0), jnp.full(12, 2.0)),
        (distances(),),
    ),
}


MESSAGES = {
    "message": (ops.message, message_reference),
    "gated_message": (ops.gated_message, gated_message_reference),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name: str) -> None:
    op, reference, args = CASES[name]
    if name == "zbl":  # its values reach 1e3 eV at 0.3 Å: differences need softer pairs
        args = (jnp.linspace(0.8, 2.2, 12),)
    check_vjp(op, reference, args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op_name", MESSAGES)
def test_message_rule(op_name: str, layout: str) -> None:
    """Filters of random pairs: the general transpose must be exact, so the list makes no promise of symmetry."""
    _, positions = random_structure(6)
    _, pairs = pairs_in_layout(positions, 2.5, layout, padding=2)
    pairs = Pairs(pairs.senders, pairs.receivers, pairs.mask, pairs.num_atoms, pairs.layout, symmetric=False)
    op, reference = MESSAGES[op_name]
    n, e = pairs.num_atoms, len(pairs.mask)
    width = F if op_name == "message" else 3 * F
    args = (normal(n, width), normal(n, 3, F), normal(e, 3 * F), normal(e, 3))
    check_vjp(lambda *a: op(*a, pairs), lambda *a: reference(*a, pairs), args)


@pytest.mark.parametrize("op_name", MESSAGES)
def test_message_transpose_by_gather(op_name: str) -> None:
    """Over a symmetric list, with symmetric filters and odd directions, the gather gives the scatter's cotangents."""
    _, positions = random_structure(9)
    vectors, promised = pairs_in_layout(positions, 2.5, "slots", padding=1)
    general = Pairs(promised.senders, promised.receivers, promised.mask, promised.num_atoms, "slots", symmetric=False)
    assert promised.transposes_by_gather
    assert not general.transposes_by_gather
    d, u = ops.distance(jnp.asarray(vectors))
    filters = jnp.sin(d[:, None] * jnp.arange(1.0, 3 * F + 1))
    width = F if op_name == "message" else 3 * F
    args = (normal(10, width), normal(10, 3, F), filters, u)
    op, _ = MESSAGES[op_name]
    weights = random_like(op(*args, general))

    def cotangents(pairs: Pairs) -> Any:
        return jax.vjp(lambda *a: op(*a, pairs), *args)[1](weights)

    assert_close(cotangents(promised), cotangents(general), 1e-13)


def test_rules_are_what_jax_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No op lets autodiff see its primal: a primal without a derivative is differentiated all the same."""
    blind = jax.custom_vjp(lambda d: jnp.floor(ops.cosine_cutoff(d, CUTOFF)))
    blind.defvjp(lambda d: radial.cosine_cutoff_fwd(d, CUTOFF), lambda r, g: radial.cosine_cutoff_bwd(CUTOFF, r, g))
    d = distances()
    slope = jax.vmap(jax.grad(lambda x: ops.cosine_cutoff(x[None], CUTOFF)[0]))(d)
    np.testing.assert_allclose(jax.vjp(blind, d)[1](jnp.ones_like(d))[0], slope, atol=1e-15)


class TestEdgesOfTheDomain:
    """Zero vectors, pairs at and beyond the cutoff, no pair at all: finite values and derivatives."""

    @pytest.mark.parametrize("epsilon", [0.0, 1e-8])
    def test_zero_vector(self, epsilon: float) -> None:
        def energy(r: Any) -> Any:
            d, u = ops.distance(r, epsilon)
            return jnp.sum(d**2) + jnp.sum(u * jnp.asarray([[1.0, 2.0, 3.0]])) * 0 + jnp.sum(d)

        r = jnp.zeros((2, 3))
        assert jnp.all(jnp.isfinite(jax.grad(energy)(r)))
        assert jnp.all(jnp.isfinite(jax.jacrev(jax.grad(energy))(r)))

    def test_gradient_of_the_norm_at_zero_is_zero(self) -> None:
        s, v = normal(2, F), jnp.zeros((2, 3, F))
        weights = layers(2 * F, F, 3 * F)
        grad = jax.grad(lambda v: ops.update(s, v, weights, jnp.eye(3))[0].sum())(v)
        assert jnp.all(grad == 0)

    def test_beyond_the_cutoff(self) -> None:
        d = jnp.asarray([CUTOFF, np.nextafter(CUTOFF, 0.0), CUTOFF + 1, 100.0])
        f, slope = radial.cosine_cutoff_fwd(d, CUTOFF)
        np.testing.assert_allclose(f, 0, atol=1e-15)
        np.testing.assert_allclose(slope, 0, atol=1e-15)

    def test_bessel_at_zero(self) -> None:
        b, slope = radial.bessel_basis_fwd(jnp.zeros(1), K, CUTOFF)
        np.testing.assert_allclose(b[0], np.arange(1, K + 1) * np.pi / CUTOFF)
        assert jnp.all(slope == 0)
        second = jax.grad(lambda d: jnp.sum(jax.grad(lambda x: ops.bessel_basis(x, K, CUTOFF).sum())(d)))(jnp.zeros(1))
        assert jnp.all(jnp.isfinite(second))

    def test_no_pairs(self) -> None:
        pairs = Pairs(jnp.zeros(0, int), jnp.zeros(0, int), jnp.zeros(0, bool), 3)
        ds, dv = ops.message(normal(3, F), normal(3, 3, F), jnp.zeros((0, 3 * F)), jnp.zeros((0, 3)), pairs)
        assert jnp.all(ds == 0)
        assert jnp.all(dv == 0)

    def test_zbl_is_finite_at_zero_and_smooth_at_its_end(self) -> None:
        def energy(d: Any) -> Any:
            return ops.zbl(d, jnp.full(3, 6.0), jnp.full(3, 6.0), jnp.full(3, 1.5))

        d = jnp.asarray([0.0, 1.5 - 1e-7, 1.6])
        value, slope = energy(d), jax.grad(lambda d: energy(d).sum())(d)
        assert jnp.isfinite(value[0])
        assert slope[0] == 0
        np.testing.assert_allclose(value[1:], 0, atol=1e-12)
        np.testing.assert_allclose(slope[1:], 0, atol=1e-9)
        assert energy(jnp.full(3, 0.5))[0] > 50  # eV: a wall


def test_zbl_against_published_numbers() -> None:
    """The universal screening function: φ(0) = 1, and φ(1) as in Ziegler, Biersack, Littmark's coefficients."""
    assert sum(repulsion._AMPLITUDES) == pytest.approx(1.0, abs=1e-4)
    d = jnp.asarray([0.05])
    bare = 14.399645 * 36 / 0.05
    screening = 0.8854 * 0.529177 / (2 * 6**0.23)
    x = 0.05 / screening
    phi = 0.18175 * np.exp(-3.1998 * x) + 0.50986 * np.exp(-0.94229 * x)
    phi += 0.28022 * np.exp(-0.4029 * x) + 0.02817 * np.exp(-0.20162 * x)
    energy = ops.zbl(d, jnp.full(1, 6.0), jnp.full(1, 6.0), jnp.full(1, 1e6))
    np.testing.assert_allclose(energy, bare * phi, rtol=1e-6)


class TestGradientsWithRespectToPositions:
    """[E, 3, K] and [E, 3] of the public functions, against reverse mode of the references."""

    vectors = normal(6, 3, seed=4)
    centers, widths = jnp.linspace(0.0, CUTOFF, K), jnp.linspace(0.4, 0.8, K)

    def jacobian(self, function: Any) -> Any:
        return jax.vmap(jax.jacrev(lambda r: function(distance_reference(r[None])[0])[0]))(self.vectors)

    def test_gaussian_basis(self) -> None:
        expected = self.jacobian(lambda d: radial.gaussian_basis_reference(d, self.centers, self.widths))
        actual = ops.gaussian_basis_gradient(self.vectors, self.centers, self.widths)
        assert actual.shape == (6, 3, K)
        assert_close(actual, jnp.swapaxes(expected, 1, 2), 1e-13)

    def test_cosine_cutoff(self) -> None:
        expected = self.jacobian(lambda d: radial.cosine_cutoff_reference(d, CUTOFF))
        actual = ops.cosine_cutoff_gradient(self.vectors, CUTOFF)
        assert actual.shape == (6, 3)
        assert_close(actual, expected, 1e-13)

    def test_edge_features(self) -> None:
        expected = self.jacobian(lambda d: radial.edge_features_reference(d, self.centers, self.widths, CUTOFF))
        actual = ops.edge_features_gradient(self.vectors, self.centers, self.widths, CUTOFF)
        assert_close(actual, jnp.swapaxes(expected, 1, 2), 1e-13)


def test_accumulate_forces() -> None:
    """F_i = Σ received g - Σ sent g, padding left out; the net force is zero."""
    pairs = Pairs(jnp.asarray([1, 2, 0]), jnp.asarray([0, 0, 0]), jnp.asarray([True, True, False]), 3)
    g = jnp.asarray([[1.0, 2.0, 3.0], [0.5, 0.0, 0.0], [7.0, 7.0, 7.0]])
    expected = [[1.5, 2.0, 3.0], [-1.0, -2.0, -3.0], [-0.5, 0.0, 0.0]]
    np.testing.assert_allclose(ops.accumulate_forces(g, pairs), expected)
