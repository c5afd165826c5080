"""The kernels of the student's update and of the readout, interpreted, against the ops that they must equal."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff.kernels import readout, student
from jaxff.kernels.message import Launch
from jaxff.ops.mlp import Dense
from jaxff.ops.readout import readout_bwd, readout_fwd
from jaxff.ops.update import update_bwd, update_fwd


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def update_weights(f: int) -> dict[str, Any]:
    return {
        "dense_0": {"kernel": normal(2 * f, f) / f**0.5, "bias": normal(f)},
        "dense_1": {"kernel": normal(f, 3 * f) / f**0.5, "bias": normal(3 * f)},
        "mixing_matrix": normal(3, 3),
    }


TILED = Launch(16, 4, dense=True, route="interpret")
WHOLE = TILED._replace(dense=False)


@pytest.mark.parametrize("how", [TILED, WHOLE])
@pytest.mark.parametrize("n", [1, 19])
@pytest.mark.parametrize("last", [False, True])
def test_update(last: bool, n: int, how: Launch) -> None:
    """Values and cotangents; an atom without a vector; atoms that fill no block."""
    f = 48
    weights = update_weights(f)
    s, v = normal(n, f), normal(n, 3 * f).at[0].set(0)
    layers = Dense(**weights["dense_0"]), Dense(**weights["dense_1"])
    expected, residuals = update_fwd(s, v.reshape(n, 3, f), layers, weights["mixing_matrix"])
    s_new, v_new, saved = student.update(student.prepare_update(weights, last), s, v, last, how)
    np.testing.assert_allclose(s_new, expected[0], atol=1e-5)
    s_bar, v_bar = normal(n, f, seed=1), normal(n, 3 * f, seed=1) * float(not last)
    if v_new is not None:
        np.testing.assert_allclose(v_new, expected[1].reshape(n, -1), atol=2e-5)
    bars = update_bwd(residuals, (s_bar, v_bar.reshape(n, 3, f)))
    actual = student.update_bwd(saved, s_bar, None if last else v_bar, how)
    np.testing.assert_allclose(actual[0], bars[0], atol=2e-5)
    np.testing.assert_allclose(actual[1], bars[1].reshape(n, -1), atol=2e-5)


@pytest.mark.parametrize("sizes", [(32, 16, 1), (64, 32, 16, 1)])
def test_readout(sizes: tuple[int, ...]) -> None:
    layers = tuple(Dense(normal(a, b) / a**0.5, normal(b)) for a, b in pairwise(sizes))
    s = normal(19, sizes[0])
    expected, residuals = readout_fwd(s, layers)
    energies, slopes = readout.readout(s, layers, TILED)
    np.testing.assert_allclose(energies, expected, atol=1e-5)
    np.testing.assert_allclose(slopes, readout_bwd(residuals, jnp.ones(19, jnp.float32))[0], atol=1e-5)
    assert readout.fits(layers)
    assert not readout.fits((*layers[:-1], Dense(normal(8, 8), normal(8)), layers[-1]))


def test_kernels_lower_for_cuda() -> None:
    f = 64
    weights, weights_last = (student.prepare_update(update_weights(f), last) for last in (False, True))
    layers = Dense(normal(f, 32), normal(32)), Dense(normal(32, 1), normal(1))

    how = Launch(16, 4, dense=True, route="triton")

    def all_of_them(s: Any, v: Any) -> Any:
        s_new, v_new, saved = student.update(weights, s, v, False, how)
        _, _, saved_last = student.update(weights_last, s, v, True, how)
        both = student.update_bwd(saved, s_new, v_new, how), student.update_bwd(saved_last, s_new, None, how)
        return both, readout.readout(s, layers, how)

    text = jax.jit(all_of_them).trace(normal(19, f), normal(19, 3 * f)).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call") >= 7


def test_vmap_runs_on_whole_arrays() -> None:
    """A batch of molecules gives what each of them gives."""
    f, n = 32, 5
    weights = student.prepare_update(update_weights(f), False)
    layers = Dense(normal(f, 16), normal(16)), Dense(normal(16, 1), normal(1))

    def energy_and_slopes(s: Any, v: Any) -> Any:
        s, v_new, saved = student.update(weights, s, v, False, TILED)
        energies, slopes = readout.readout(s, layers, TILED)
        return energies, student.update_bwd(saved, slopes, v_new, TILED)

    s, v = normal(2, n, f), normal(2, n, 3 * f)
    batch = jax.jit(jax.vmap(energy_and_slopes))(s, v)
    for i in range(2):
        for a, e in zip(jax.tree.leaves(batch), jax.tree.leaves(energy_and_slopes(s[i], v[i])), strict=True):
            np.testing.assert_allclose(a[i], e, atol=1e-4)
