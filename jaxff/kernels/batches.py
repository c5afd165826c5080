"""A batch of systems as one larger system, and back: what vmap means to kernels that take one system."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxff.kernels.message import Geometry
from jaxff.system import Pairs

MOST_CONSTANTS, MOST_COPIES = 2**16, 64  # numbers that become part of a program, and copies of an array


def joined(size: int, batched: Any, args: Any) -> Any:
    """Arguments of `size` systems (batched: which of them have the axis of the batch) as those of one.

    Arrays have rows of atoms or pairs, `Pairs` get the layout "slots"; a `Geometry` (without senders) has pairs last.
    """
    return jax.tree.map(_join, full(size, batched, args), is_leaf=_is_special)


def full(size: int, batched: Any, args: Any) -> Any:
    """Arguments of which all have the axis of the batch."""
    leaves, tree = jax.tree.flatten(args)
    each = [x if b else _repeated(size, x) for x, b in zip(leaves, jax.tree.leaves(batched), strict=True)]
    return jax.tree.unflatten(tree, each)


def parted(size: int, results: Any) -> Any:
    """The other way, for results; where results hold a `Geometry`, it is parted as `joined` joins it."""
    return jax.tree.map(lambda x: _part(size, x), results, is_leaf=_is_special)


def _repeated(size: int, x: Array) -> Array:
    """x for each system. Few copies side by side, as XLA folds constants of them, but not of a broadcast."""
    if size <= MOST_COPIES and size * jnp.size(x) <= MOST_CONSTANTS:
        return jnp.stack([x] * size)
    return jnp.broadcast_to(x, (size, *jnp.shape(x)))


def _is_special(x: Any) -> bool:
    return isinstance(x, Pairs | Geometry)


def _join(x: Any) -> Any:
    if isinstance(x, Pairs):
        size = x.mask.shape[0]
        offsets = x.num_atoms * np.arange(size, dtype=np.int32)[:, None]
        if (
            x.mask.size <= MOST_CONSTANTS
        ):  # as many numbers as pairs: XLA folds sums of constants, but not of broadcasts
            offsets = np.repeat(offsets, x.mask.shape[1], axis=1)
        senders, receivers = ((jnp.asarray(y, jnp.int32) + offsets).reshape(-1) for y in (x.senders, x.receivers))
        return Pairs(senders, receivers, x.mask.reshape(-1), size * x.num_atoms, "slots", x.symmetric)
    if isinstance(x, Geometry):
        return Geometry(None, jnp.moveaxis(x.places, 0, 1).reshape(x.places.shape[1], -1))
    return _rows(x)


def _part(size: int, x: Any) -> Any:
    if isinstance(x, Geometry):
        places = jnp.moveaxis(x.places.reshape(x.places.shape[0], size, -1), 1, 0)
        return Geometry(None, places)
    return x.reshape(size, -1, *x.shape[1:])


def _rows(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])
