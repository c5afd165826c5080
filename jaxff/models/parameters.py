"""Parameter trees: their shapes and initial values, declared once for each architecture, owned by a Flax module."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxff.ops.mlp import Dense, Layers

Params = dict[str, Any]


class Leaf(NamedTuple):
    """One parameter: its shape, and its initial value from (key, shape, dtype)."""

    shape: tuple[int, ...]
    init: Callable[..., Array]


def dense_leaves(*sizes: int) -> dict[str, dict[str, Leaf]]:
    """The tree {dense_0: {kernel, bias}, ...} of dense layers of these sizes."""
    return {
        f"dense_{i}": {
            "kernel": Leaf((n_in, n_out), nn.initializers.xavier_uniform()),
            "bias": Leaf((n_out,), nn.initializers.zeros),
        }
        for i, (n_in, n_out) in enumerate(pairwise(sizes))
    }


def constant(value: Any) -> Callable[..., Array]:
    """An initialiser that ignores the key."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.broadcast_to(jnp.asarray(value, dtype), shape)

    return init


def dense_layers(tree: Params) -> Layers:
    """Dense tuples of a tree {dense_0: {kernel, bias}, ...}."""
    return tuple(Dense(**tree[f"dense_{i}"]) for i in range(len(tree)))


def dense_tree(layers: Layers) -> Params:
    """The tree of Dense tuples: the inverse of `dense_layers`."""
    return {f"dense_{i}": layer._asdict() for i, layer in enumerate(layers)}


def declare(module: nn.Module, leaves: Any, dtype: Any) -> Params:
    """The tree of parameters, owned by `module`; to be called within its compact method."""
    return {
        name: module.param(name, leaf.init, leaf.shape, dtype)
        if isinstance(leaf, Leaf)
        else ParameterTree(leaf, dtype, name=name)()
        for name, leaf in leaves.items()
    }


class ParameterTree(nn.Module):
    """A Flax module that owns a tree of parameters and returns it."""

    leaves: Any
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Params:
        return declare(self, self.leaves, self.dtype)


def shapes_of(leaves: Any, dtype: Any) -> Params:
    """The tree of jax.ShapeDtypeStruct that belongs to a tree of leaves."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), leaves, is_leaf=lambda x: isinstance(x, Leaf)
    )
