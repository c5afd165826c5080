"""PaiNN's atoms between two messages: update, next gate, and their gradients (jaxff.ops.update has the equations).

The first gate acts on embeddings alone, so `prepare` tabulates it by element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from jaxff.config import PainnConfig
from jaxff.kernels.atoms import Named, Rows, Weights, inner, rows_of, silu, silu_slope
from jaxff.kernels.message import Sources
from jaxff.models.parameters import Params, dense_layers
from jaxff.ops.mlp import mlp_fwd

KEPT = {"v": 3, "uv": 3, "vv": 3, "z": 1, "a": 2, "z_gate": 1, "xv": 1}
MADE = {"s": 1, "xs": 1, "xu": 1, "y": 3} | KEPT  # rows of each name that `between` makes
JOINED = ("y",)


def prepare(tree: Params, config: PainnConfig) -> Params:
    """Weights by the names of the equations, with their transposes; the first gate of every element."""
    result = dict(tree)
    for i in range(config.num_interactions):
        layer = dict(tree[f"interaction_{i}"])
        gate, old = dense_layers(layer.pop("gate")), layer["update"]
        (a_kernel, a), (b_kernel, b) = ((old[k]["kernel"], old[k]["bias"]) for k in ("dense_0", "dense_1"))
        if i == config.num_interactions - 1:  # no energy depends on the last a_vv
            b_kernel, b = (x[..., : 2 * config.hidden_dim] for x in (b_kernel, b))
        layer["update"] = _transposed({"U": old["kernel_u"], "V": old["kernel_v"], "A": a_kernel, "B": b_kernel}) | {
            "a": a[None],
            "b": b[None],
        }
        if i == 0:
            layer["sent"] = mlp_fwd(tree["embedding"]["table"], gate)[0][:, : 2 * config.hidden_dim]
        else:
            (c_kernel, c), (d_kernel, d) = gate
            layer["gate"] = _transposed({"C": c_kernel, "D": d_kernel}) | {"c": c[None], "d": d[None]}
        result[f"interaction_{i}"] = layer
    return result


def first_sources(tree: Params, numbers: Array) -> Sources:
    """What atoms send before they heard of each other."""
    sent = tree["interaction_0"]["sent"][numbers]
    a, b = jnp.split(sent, 2, axis=1)
    return Sources(a, b, None)


def sources(made: dict[str, Any]) -> Sources:
    """What atoms send of what `between` made."""
    (xs,), (xu,) = made["xs"], made["xu"]
    return Sources(xs, xu, made["y"])


def weights(tree: Params, i: int, last: bool) -> Weights:
    """Update i and, unless it is the last, the next gate."""
    update = tree[f"interaction_{i}"]["update"]
    return update if last else (update, tree[f"interaction_{i + 1}"]["gate"])


def between(on: Any, config: PainnConfig, w: Weights, s: Array, v: Rows) -> Named:
    """Update and next gate of s and v that heard the message."""
    update, gate = w
    s, v, saved = _update(on, update, config.vector_norm_epsilon, s, v, False)
    return {"s": [s], "v": v} | saved | _gate(on, gate, s, v)


def between_bwd(
    on: Any, config: PainnConfig, w: Weights, kept: Any, bars: Rows, s_bar: Any, v_bar: Any
) -> tuple[Array, Rows]:
    """s̄ and v̄ after message i of those after message i + 1 and of the cotangents of what it was sent."""
    update, gate = w
    saved = {name: [on.own(row) for row in kept[name]] for name in KEPT}
    s_more, v_more = _gate_bwd(on, gate, saved, saved["v"], bars)
    above = on.own(s_bar) + s_more, [x + more for x, more in zip(rows_of(on, v_bar), v_more, strict=True)]
    return _update_bwd(on, update, config.vector_norm_epsilon, saved, *above)


def last(
    on: Any, config: PainnConfig, w: Weights, read: Callable[[Array], tuple[Array, Array]], s: Array, v: Rows
) -> tuple[Array, Array, Rows]:
    """Energies and their gradients by s and v after the last message."""
    s, _, saved = _update(on, w, config.vector_norm_epsilon, s, v, True)
    energies, slopes = read(s)
    return energies, *_update_bwd(on, w, config.vector_norm_epsilon, saved, slopes, None)


def _transposed(weights: Params) -> Params:
    return weights | {name + "t": kernel.T for name, kernel in weights.items()}


def _update(on: Any, w: Params, epsilon: float, s: Array, v: Rows, last: bool) -> tuple[Array, Rows, Named]:
    """n = |Vv|,  (a_ss, a_sv, a_vv) = silu([s, n] A + a) B + b,  s' = s + a_ss + a_sv <Uv, Vv>,  v' = v + a_vv Uv."""
    uv, vv = on.each(v, w["U"]), on.each(v, w["V"])
    n = jnp.sqrt(inner(vv, vv) + epsilon**2) - epsilon
    z = on.total([s, n], w["A"]) + on.bias(w["a"])
    a = [gate + on.bias(w["b"], k) for k, gate in enumerate(on.spread(silu(z), w["B"], 2 if last else 3))]
    s = s + a[0] + a[1] * inner(uv, vv)
    saved = {"uv": uv, "vv": vv, "z": [z], "a": a[1:]}
    return s, v if last else [x + a[2] * y for x, y in zip(v, uv, strict=True)], saved


def _update_bwd(
    on: Any, w: Params, epsilon: float, saved: Named, s_bar: Array, v_bar: Rows | None
) -> tuple[Array, Rows]:
    """h = s̄' a_sv,  (Uv)‾ = v̄' a_vv + h Vv,  (Vv)‾ = h Uv + n̄ Vv/(n + ε),  v̄ = v̄' + (Uv)‾ Uᵀ + (Vv)‾ Vᵀ;

    [s̄₊, n̄] = silu'(z) ([s̄', s̄' <Uv, Vv>, <v̄', Uv>] Bᵀ) Aᵀ,  s̄ = s̄' + s̄₊.  v̄' is None in the last interaction.
    """
    uv, vv, (z,), a = saved["uv"], saved["vv"], saved["z"], saved["a"]
    above = [s_bar, s_bar * inner(uv, vv), *([] if v_bar is None else [inner(v_bar, uv)])]
    z_bar = on.total(above, w["Bt"]) * silu_slope(z)
    s_more, n_bar = on.spread(z_bar, w["At"], 2)
    h, norm = s_bar * a[0], jnp.sqrt(inner(vv, vv) + epsilon**2)
    factor = jnp.where(norm > 0, n_bar / jnp.where(norm > 0, norm, 1.0), 0.0)
    uv_bar, vv_bar = [h * x for x in vv], [h * x + factor * y for x, y in zip(uv, vv, strict=True)]
    if v_bar is not None:
        uv_bar = [x + a[1] * y for x, y in zip(uv_bar, v_bar, strict=True)]
    v_in = [x + y for x, y in zip(on.each(uv_bar, w["Ut"]), on.each(vv_bar, w["Vt"]), strict=True)]
    if v_bar is not None:
        v_in = [x + y for x, y in zip(v_in, v_bar, strict=True)]
    return s_bar + s_more, v_in


def _gate(on: Any, w: Params, s: Array, v: Rows) -> Named:
    """(xs, xu, xv) = silu(s C + c) D + d, and y = xv v."""
    z = on.product(s, w["C"]) + on.bias(w["c"])
    xs, xu, xv = (x + on.bias(w["d"], k) for k, x in enumerate(on.spread(silu(z), w["D"], 3)))
    return {"xs": [xs], "xu": [xu], "xv": [xv], "y": [xv * x for x in v], "z_gate": [z]}


def _gate_bwd(on: Any, w: Params, saved: Named, v: Rows, bars: Rows) -> tuple[Array, Rows]:
    """What s̄ and v̄ gain: silu'(z) ([ā, b̄, <ȳ, v>] Dᵀ) Cᵀ and xv ȳ."""
    a_bar, b_bar, *y_bar = bars
    z_bar = on.total([a_bar, b_bar, inner(y_bar, v)], w["Dt"]) * silu_slope(saved["z_gate"][0])
    return on.product(z_bar, w["Ct"]), [saved["xv"][0] * x for x in y_bar]
