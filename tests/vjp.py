"""check_vjp: a hand-written rule against autodiff of its reference, against differences, and in second order."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads


def weighted(function: Callable[..., Any], weights: Any) -> Callable[..., Any]:
    """A scalar function: the sum of all outputs times fixed weights."""

    def scalar(*args: Any) -> Any:
        products = jax.tree.map(lambda y, w: jnp.sum(y * w), function(*args), weights)
        return sum(jax.tree.leaves(products))

    return scalar


def random_like(tree: Any, seed: int = 0) -> Any:
    """Standard normal numbers in the shape of a tree."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), tree)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Equal trees within `tolerance` of each leaf's largest entry, or of 1."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = max(1.0, float(jnp.max(jnp.abs(e), initial=0.0)))
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * scale)


def check_vjp(op: Callable[..., Any], reference: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """`op` has its reference's value; its rule has the reference's gradient to 1e-12, differences to 1e-7, order 2.

    All leaves of `args` are float64 arrays and are differentiated.
    """
    value, expected_value = jax.jit(op)(*args), jax.jit(reference)(*args)
    assert_close(value, expected_value, 1e-14)
    weights, directions = random_like(value, seed=1), random_like(args, seed=2)
    by_rule, by_autodiff = weighted(op, weights), weighted(reference, weights)
    every = tuple(range(len(args)))

    def orders(function: Callable[..., Any]) -> tuple[Any, Any]:
        first = jax.grad(function, every)
        return first(*args), jax.grad(weighted(first, directions), every)(*args)

    first, second = jax.jit(lambda: orders(by_rule))()
    expected_first, expected_second = jax.jit(lambda: orders(by_autodiff))()
    assert_close(first, expected_first, 1e-12)
    assert_close(second, expected_second, 1e-10)
    check_grads(jax.jit(by_rule), args, order=1, modes=["rev"], atol=1e-7, rtol=1e-7, eps=1e-5)
