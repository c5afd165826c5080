"""PaiNN's kernels, interpreted, against the same equations over arrays, and what each size of a system launches."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import kernels, models
from jaxff.kernels import chain, painn
from jaxff.kernels.message import Launch
from jaxff.models.parameters import dense_layers
from jaxff.ops.mlp import mlp_fwd
from jaxff.ops.update import equivariant_update_bwd, equivariant_update_fwd
from jaxff.tabulate import tabulate
from tests.structures import PAINN, pairs_in_layout, random_params, random_structure

ONE = Launch(16, 4, dense=True, route="interpret")
WHOLE = ONE._replace(dense=False)


def prepared(hidden_dim: int, intervals: int = 16) -> tuple[Any, Any]:
    config = PAINN.model_copy(update={"hidden_dim": hidden_dim})
    tree, _ = tabulate(random_params(config), config, intervals)
    return config, kernels.prepare(models.cast(tree, np.dtype("float32")), config)


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
@pytest.mark.parametrize("last", [False, True])
def test_update_against_ops(last: bool, epsilon: float) -> None:
    """Values and cotangents; an atom without a vector."""
    _, tree = prepared(16)
    n, f = 5, 16
    weights = tree.plain["interaction_0"]["update"]
    layers, matrices = dense_layers({k: weights[k] for k in ("dense_0", "dense_1")}), ("kernel_u", "kernel_v")
    s, v = normal(n, f), normal(n, 3, f).at[0].set(0)
    expected, residuals = equivariant_update_fwd(s, v, layers, *(weights[k] for k in matrices), epsilon)
    on, update = painn._Atoms(f), tree.fused["interaction_0"]["update"]
    s_new, v_new, saved = painn._update(on, update, epsilon, s, [v[:, k] for k in range(3)], last)
    np.testing.assert_allclose(s_new, expected[0], atol=1e-5)
    v_bar = normal(n, 3, f, seed=1) * float(not last)
    if not last:
        np.testing.assert_allclose(jnp.stack(v_new, 1), expected[1], atol=1e-5)
    bars = equivariant_update_bwd(epsilon, residuals, (s, v_bar))
    rows = None if last else [v_bar[:, k] for k in range(3)]
    s_bar, v_in = painn._update_bwd(on, update, epsilon, saved, s, rows)
    np.testing.assert_allclose(s_bar, bars[0], atol=2e-5)
    np.testing.assert_allclose(jnp.stack(v_in, 1), bars[1], atol=2e-5)


def test_gate_against_autodiff() -> None:
    _, tree = prepared(16)
    n, f = 5, 16
    gate, s, v = dense_layers(tree.plain["interaction_1"]["gate"]), normal(n, f), normal(n, 3, f)

    def plain(s: Any, v: Any) -> Any:
        xs, xu, xv = jnp.split(mlp_fwd(s, gate)[0], 3, axis=1)
        return xs, xu, *(xv * v[:, k] for k in range(3))

    expected, pullback = jax.vjp(plain, s, v)
    on, weights, rows = painn._Atoms(f), tree.fused["interaction_1"]["gate"], [v[:, k] for k in range(3)]
    out = painn._gate(on, weights, s, rows)
    for a, e in zip([out["xs"][0], out["xu"][0], *out["y"]], expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)
    bars = [normal(n, f, seed=k) for k in range(1, 6)]
    s_bar, v_bar = painn._gate_bwd(on, weights, out, rows, bars)
    expected_s, expected_v = pullback(tuple(bars))
    np.testing.assert_allclose(s_bar, expected_s, atol=1e-5)
    np.testing.assert_allclose(jnp.stack(v_bar, 1), expected_v, atol=1e-5)


def test_one_program_for_an_atom() -> None:
    """All kernels of few atoms against arrays of all atoms: residuals, energies, gradients; an isolated atom."""
    config, tree = prepared(16)
    assert painn.in_one_program(tree.fused, config)
    numbers, positions = random_structure(3)
    positions[0] += 50.0
    vectors, pairs = pairs_in_layout(positions, config.cutoff, "all")

    @jax.jit
    def run(vectors: Any) -> list[Any]:
        results = []
        for launch in (ONE, WHOLE):
            e, kept = chain.forward(tree.fused, config, numbers, vectors, pairs, launch)
            w = 1 + jnp.arange(3, dtype=e.dtype)
            results.append((e, kept, chain.backward(tree.fused, config, kept, numbers, pairs, w, launch)))
        return results

    one, whole = run(jnp.asarray(vectors, jnp.float32))
    assert jax.tree.structure(one) == jax.tree.structure(whole)
    for a, e in zip(jax.tree.leaves(one), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(a, e, atol=3e-5 * max(1, np.abs(e).max()))
    assert np.abs(one[2]).max() > 1e-3


@pytest.mark.parametrize("hidden_dim", [32, 48])
def test_kernels_lower_for_cuda(hidden_dim: int) -> None:
    """A kernel an interaction and direction; a width that is no power of 2 keeps message kernels alone."""
    config, tree = prepared(hidden_dim)
    assert painn.in_one_program(tree.fused, config) == (hidden_dim == 32)
    numbers, positions = random_structure(5)
    vectors, pairs = pairs_in_layout(positions, config.cutoff, "all")

    def both(vectors: Any) -> Any:
        launch = Launch(16, 4, dense=True, route="triton")
        e, kept = chain.forward(tree.fused, config, numbers, vectors, pairs, launch)
        return e, chain.backward(tree.fused, config, kept, numbers, pairs, jnp.ones_like(e), launch)

    traced = jax.jit(both).trace(jnp.asarray(vectors, jnp.float32))
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # JAX 0.12 asks the GPU what it can do
        pytest.skip(f"this JAX lowers for a GPU only where one is: {error}")
    assert text.count("custom_call") >= 2 * config.num_interactions
