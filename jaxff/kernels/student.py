"""The student's phases between two messages, which send s and v as they are (jaxff.ops.update has the equations).

    n = |v|,  (o, g1, g2) = silu([s, n] A + a) B + b,  s' = s + o,  v' = v g1 + (M v) g2.

Backward, with s̄' and v̄' of s' and v', cotangents of what was sent included (no v̄' in the last interaction):

    [s̄₊, n̄] = silu'(.) ([s̄', <v̄', v>, <v̄', M v>] Bᵀ) Aᵀ,  s̄ = s̄' + s̄₊,  v̄ = v̄' g1 + Mᵀ (v̄' g2) + n̄ v/n.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxff.config import StudentConfig
from jaxff.kernels.atoms import AXES, Made, Plan, Rows, inner, plus, read_in, read_on, total
from jaxff.kernels.message import Sources
from jaxff.models.parameters import Params
from jaxff.ops.distance import divide_or_zero
from jaxff.ops.mlp import silu_slope

BACK_SUMS = 4  # rows of a transposed message
JOINED = ("v", "v_bar")
PACKED = ()


class Between(NamedTuple):
    """Weights between two messages: of the update, and after the last message of the readout."""

    update: Params
    read: Any


def prepare(tree: Params, config: StudentConfig) -> Params:
    """The tree with the updates' weights by the names of the equations, and their transposes.

    Of the last interaction's B and b only the first F columns are kept: no energy depends on the others.
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


def sources(state: Made) -> Sources:
    """What atoms send of what the phases between two messages made."""
    (s,) = state["s"]
    return Sources(s, None, state["v"])


def weights(tree: Params, i: int, last: bool) -> Between:
    """Update i, and after the last one the readout."""
    return Between(tree[f"interaction_{i}"]["update"], tree["read"] if last else None)


def message_heard(on: Any, config: StudentConfig, w: Between, state: Made, sums: Rows) -> Made:
    """s and v with the message, and z before the SiLU."""
    ds, *dv = sums
    (s,), v = plus([ds], on.rows(state["s"])), dv if "v" not in state else plus(dv, on.rows(state["v"]))
    return {"s": [s], "heard": v, "z": on.inward([s, jnp.sqrt(inner(v, v))], w.update["A"])}


def _gates(on: Any, w: Between, state: Made, parts: int) -> tuple[Rows, Made]:
    """o, and g1, g2 if three parts are wanted; and z, to be kept."""
    z = on.whole(state["z"]) + on.row(w.update["a"])
    gates = [x + on.bias(w.update["b"], k) for k, x in enumerate(on.outward(jax.nn.silu(z), w.update["B"], parts))]
    return gates, {"hidden": [on.own_share(state["z"]) + on.bias(w.update["a"])]}


def update(on: Any, config: StudentConfig, w: Between, state: Made) -> Made:
    """s' and v'."""
    (o, *g), kept = _gates(on, w, state, 3)
    v_new = _gated(on, w, on.rows(state["heard"]), g)
    return {"s": plus(on.rows(state["s"]), [o]), "v": v_new, "g": g} | kept


def sent_vectors(on: Any, w: Between, kept: Made) -> Rows:
    """v' once more, of what is kept."""
    return _gated(on, w, on.rows(kept["heard"]), on.rows(kept["g"]))


def _gated(on: Any, w: Between, v: Rows, g: Rows) -> Rows:
    return [x * g[0] + y * g[1] for x, y in zip(v, _mix(on, w.update["M"], v), strict=True)]


def update_last(on: Any, config: StudentConfig, w: Between, state: Made) -> Made:
    """The readout's first product with the last s'."""
    o, kept = _gates(on, w, state, 1)
    (s,) = plus(on.rows(state["s"]), o)
    return {"first": read_in(on, w.read, s)} | kept


def readout(on: Any, config: StudentConfig, w: Between, state: Made) -> Made:
    """Energies, s̄', and z̄ before the slope of the SiLU."""
    energy, s_bar = read_on(on, w.read, state["first"])
    return {"energy": energy, "s_bar": [s_bar], "z_bar": on.inward([s_bar], w.update["Bt"])}


def hidden_bwd(on: Any, config: StudentConfig, w: Between, state: Made, sums: Rows) -> Made:
    """s̄', v̄' g1 + Mᵀ (v̄' g2), and z̄ before the slope of the SiLU."""
    a_bar, *y_bar = sums
    (s_bar,), v_bar = plus(on.rows(state["s_bar"]), [a_bar]), plus(on.rows(state["v_bar"]), y_bar)
    v, g = on.rows(state["heard"]), on.rows(state["g"])
    above = [s_bar, inner(v_bar, v), inner(v_bar, _mix(on, w.update["M"], v))]
    mixed = _mix(on, w.update["M"], [x * g[1] for x in v_bar], transposed=True)
    direct = [x * g[0] + y for x, y in zip(v_bar, mixed, strict=True)]
    return {"s_bar": [s_bar], "direct": direct, "z_bar": on.inward(above, w.update["Bt"])}


def update_bwd(on: Any, config: StudentConfig, w: Between, state: Made) -> Made:
    """s̄ and v̄."""
    (z,) = on.full_rows(state["hidden"])
    s_more, n_bar = on.outward(on.whole(state["z_bar"]) * silu_slope(z), w.update["At"], 2)
    v = on.rows(state["heard"])
    n = jnp.sqrt(inner(v, v))
    factor = divide_or_zero(n_bar, n)
    v_new = [factor * x for x in v]
    if "direct" in state:
        v_new = plus(v_new, on.rows(state["direct"]))
    return {"s_bar": plus(on.rows(state["s_bar"]), [s_more]), "v_bar": v_new}


LAST = (message_heard, update_last, readout, update_bwd)
PLAN = LEAN = Plan((message_heard, update), {"heard": 3, "hidden": 1, "g": 2}, (hidden_bwd, update_bwd), ())

# what is made takes the memory of what its phase reads for the last time, "sent" of the scalars that were sent
TAKES = {hidden_bwd: {"s_bar": "sent", "direct": "g"}, update_bwd: {"s_bar": "s_bar"}}


def _mix(on: Any, matrix: Any, v: Rows, transposed: bool = False) -> Rows:
    """M v, or Mᵀ v, of the three components."""
    m = [[on.entry(matrix, k, c) if transposed else on.entry(matrix, c, k) for k in AXES] for c in AXES]
    return [total([m[c][k] * v[k] for k in AXES]) for c in AXES]
