"""The student's atoms between two messages: s and v are sent as they are (jaxff.ops.update has the equations)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxff.config import StudentConfig
from jaxff.kernels.atoms import AXES, Named, Rows, Weights, inner, rows_of, silu, silu_slope, total
from jaxff.kernels.message import Sources
from jaxff.models.parameters import Params

KEPT = {"heard": 3, "z": 1, "g": 2}
MADE = {"s": 1, "v": 3} | KEPT  # rows of each name that `between` makes
JOINED = ("v",)


def prepare(tree: Params, config: StudentConfig) -> Params:
    """The tree with the updates' weights by the names of the equations, and their transposes.

    Of the last interaction's o only the first F columns are kept: no energy depends on the others.
    """
    result = dict(tree)
    for i in range(config.num_interactions):
        layer = tree[f"interaction_{i}"]
        old = layer["update"]
        (a_kernel, a), (b_kernel, b) = ((old[k]["kernel"], old[k]["bias"]) for k in ("dense_0", "dense_1"))
        if i == config.num_interactions - 1:
            b_kernel, b = (x[..., : config.hidden_dim] for x in (b_kernel, b))
        named = {"A": a_kernel, "a": a[None], "At": a_kernel.T, "B": b_kernel, "b": b[None], "Bt": b_kernel.T}
        result[f"interaction_{i}"] = layer | {"update": named | {"M": old["mixing_matrix"]}}
    return result


def first_sources(tree: Params, numbers: Array) -> Sources:
    """What atoms send before they heard of each other."""
    return Sources(tree["embedding"]["table"][numbers], None, None)


def sources(made: dict[str, Any]) -> Sources:
    """What atoms send of what `between` made."""
    (s,) = made["s"]
    return Sources(s, None, made["v"])


def weights(tree: Params, i: int, last: bool) -> Weights:
    """Update i."""
    return tree[f"interaction_{i}"]["update"]


def between(on: Any, config: StudentConfig, w: Weights, s: Array, v: Rows) -> Named:
    """z = [s, n] A + a with n = |v|,  (o, g1, g2) = silu(z) B + b,  s' = s + o,  v' = v g1 + (M v) g2."""
    z, (o, *g) = _gates(on, w, s, v, 3)
    mixed = _mix(on, w["M"], v)
    v_new = [x * g[0] + y * g[1] for x, y in zip(v, mixed, strict=True)]
    return {"s": [s + o], "v": v_new, "heard": v, "z": [z], "g": g}


def between_bwd(
    on: Any, config: StudentConfig, w: Weights, kept: Any, bars: Rows, s_bar: Any, v_bar: Any
) -> tuple[Array, Rows]:
    """s̄ and v̄ after message i of those after message i + 1 and of the cotangents of what it was sent."""
    v, (z,), g = ([on.own(row) for row in kept[name]] for name in KEPT)
    a_bar, *y_bar = bars
    s_bar, v_bar = on.own(s_bar) + a_bar, [x + y for x, y in zip(rows_of(on, v_bar), y_bar, strict=True)]
    above = [s_bar, inner(v_bar, v), inner(v_bar, _mix(on, w["M"], v))]
    s_more, v_more = _hidden_bwd(on, w, above, z, v)
    mixed = _mix(on, w["M"], [x * g[1] for x in v_bar], transposed=True)
    return s_bar + s_more, [a * g[0] + b + c for a, b, c in zip(v_bar, mixed, v_more, strict=True)]


def last(
    on: Any, config: StudentConfig, w: Weights, read: Callable[[Array], tuple[Array, Array]], s: Array, v: Rows
) -> tuple[Array, Array, Rows]:
    """Energies of s' = s + o, and their gradients by s and v after the last message."""
    z, (o,) = _gates(on, w, s, v, 1)
    energies, s_bar = read(s + o)
    s_more, v_bar = _hidden_bwd(on, w, [s_bar], z, v)
    return energies, s_bar + s_more, v_bar


def _gates(on: Any, w: Params, s: Array, v: Rows, parts: int) -> tuple[Array, Rows]:
    z = on.total([s, jnp.sqrt(inner(v, v))], w["A"]) + on.bias(w["a"])
    return z, [x + on.bias(w["b"], k) for k, x in enumerate(on.spread(silu(z), w["B"], parts))]


def _hidden_bwd(on: Any, w: Params, above: Rows, z: Array, v: Rows) -> tuple[Array, Rows]:
    """What s̄ and v̄ gain: [s̄₊, n̄] = silu'(z) (above Bᵀ) Aᵀ, and n̄ v/n, 0 where n = 0."""
    z_bar = on.total(above, w["Bt"]) * silu_slope(z)
    s_more, n_bar = on.spread(z_bar, w["At"], 2)
    n = jnp.sqrt(inner(v, v))
    factor = jnp.where(n > 0, n_bar / jnp.where(n > 0, n, 1.0), 0.0)
    return s_more, [factor * x for x in v]


def _mix(on: Any, matrix: Any, v: Rows, transposed: bool = False) -> Rows:
    """M v, or Mᵀ v, of the three components."""
    m = [[on.entry(matrix, k, c) if transposed else on.entry(matrix, c, k) for k in AXES] for c in AXES]
    return [total([m[c][k] * v[k] for k in AXES]) for c in AXES]
