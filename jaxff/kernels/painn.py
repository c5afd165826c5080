"""PaiNN's phases between two messages: update, next gate, and their gradients (jaxff.ops.update has the equations).

    n = |Vv|,  (a_ss, a_sv, a_vv) = silu([s, n] A + a) B + b,  s' = s + a_ss + a_sv <Uv, Vv>,  v' = v + a_vv Uv;
    (xs, xu, xv) = silu(s' C + c) D + d,  sent: xs, xu and y = xv v'.

Backward, with s̄' and v̄' of s' and v' (no v̄' in the last interaction), h = s̄' a_sv and the cotangents ā, b̄, ȳ of what
was sent, which s̄' and v̄' contain:

    s̄' gains silu'(.) ([ā, b̄, <ȳ, v'>] Dᵀ) Cᵀ,  v̄' gains xv ȳ;
    [s̄₊, n̄] = silu'(.) ([s̄', s̄' <Uv, Vv>, <v̄', Uv>] Bᵀ) Aᵀ,  s̄ = s̄' + s̄₊,
    (Uv)‾ = v̄' a_vv + h Vv,  (Vv)‾ = h Uv + n̄ Vv/(n + ε),  v̄ = v̄' + (Uv)‾ Uᵀ + (Vv)‾ Vᵀ.

The first gate acts on embeddings alone, so `prepare` tabulates it by element.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxff.config import PainnConfig
from jaxff.devices import on_the_cpu
from jaxff.kernels.atoms import Made, Plan, Rows, inner, plus, read_in, read_on
from jaxff.kernels.message import Sources
from jaxff.models.parameters import Params, dense_layers
from jaxff.ops.distance import divide_or_zero
from jaxff.ops.mlp import mlp_fwd, silu_slope

SENT = ("xs", "xu", "y")
BACK_SUMS = 5  # rows of a transposed message
JOINED = ("y", "v_bar", "sent")
PACKED = ("sent",)  # of those, by CUDA kernels, what lies in less memory


class Between(NamedTuple):
    """Weights between two messages: of the update, and of the next gate or, after the last message, the readout."""

    update: Params
    gate: Any
    read: Any


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
            with on_the_cpu():
                sent, _ = jax.jit(mlp_fwd)(tree["embedding"]["table"], gate)
            layer["sent"] = np.asarray(sent)[:, : 2 * config.hidden_dim]
        else:
            (c_kernel, c), (d_kernel, d) = gate
            layer["gate"] = _transposed({"C": c_kernel, "D": d_kernel}) | {"c": c[None], "d": d[None]}
        result[f"interaction_{i}"] = layer
    return result


def first_sources(tree: Params, numbers: Array) -> Sources:
    """What atoms send before they heard of each other."""
    sent = tree["interaction_0"]["sent"][numbers]
    f = sent.shape[1] // 2
    return Sources(sent[:, :f], sent[:, f:], None)


def sources(state: Made) -> Sources:
    """What atoms send of what the phases between two messages made; one array where `beside` made it."""
    if "sent" in state:
        return Sources(state["sent"], None, None)
    (xs,), (xu,) = state["xs"], state["xu"]
    return Sources(xs, xu, state["y"])


def weights(tree: Params, i: int, last: bool) -> Between:
    """Update i, and the next gate or the readout."""
    update = tree[f"interaction_{i}"]["update"]
    return Between(update, None, tree["read"]) if last else Between(update, tree[f"interaction_{i + 1}"]["gate"], None)


def message_heard(on: Any, config: PainnConfig, w: Between, state: Made, sums: Rows) -> Made:
    """s and v with the message."""
    ds, *dv = sums
    return {"s": plus([ds], on.rows(state["s"])), "v": dv if "v" not in state else plus(dv, on.rows(state["v"]))}


def update_hidden(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """Uv, Vv, and z before the update's SiLU."""
    v, epsilon = on.full_rows(state["v"]), config.vector_norm_epsilon
    uv, vv = on.outward_each((v, w.update["U"])), on.outward_each((v, w.update["V"]))
    n = jnp.sqrt(inner(vv, vv) + epsilon**2) - epsilon
    return {"uv": uv, "vv": vv, "z": on.inward([*on.rows(state["s"]), n], w.update["A"])}


def _gates(on: Any, w: Between, state: Made, parts: int) -> tuple[Array, Made]:
    """s'; and to be kept z, and a_sv with, if three parts are wanted, a_vv."""
    z = on.whole(state["z"]) + on.row(w.update["a"])
    a = [gate + on.bias(w.update["b"], k) for k, gate in enumerate(on.outward(jax.nn.silu(z), w.update["B"], parts))]
    (s,), uv, vv = on.rows(state["s"]), on.rows(state["uv"]), on.rows(state["vv"])
    hidden = [on.own_share(state["z"]) + on.bias(w.update["a"])]
    return s + a[0] + a[1] * inner(uv, vv), {"hidden": hidden, "a": a[1:]}


def update(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """s', v', and z before the gate's SiLU."""
    s, kept = _gates(on, w, state, 3)
    v = [x + kept["a"][1] * y for x, y in zip(on.rows(state["v"]), on.rows(state["uv"]), strict=True)]
    return {"s": [s], "v": v, "z_gate": on.inward([s], w.gate["C"])} | kept


def gate(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """What is sent: xs, xu, y = xv v'."""
    z = on.whole(state["z_gate"]) + on.row(w.gate["c"])
    xs, xu, xv = (x + on.bias(w.gate["d"], k) for k, x in enumerate(on.outward(jax.nn.silu(z), w.gate["D"], 3)))
    hidden = [on.own_share(state["z_gate"]) + on.bias(w.gate["c"])]
    y = [xv * x for x in on.rows(state["v"])]
    return {"xs": [xs], "xu": [xu], "xv": [xv], "y": y, "hidden_gate": hidden}


def beside(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """What is sent, side by side."""
    return {"sent": [row for name in SENT for row in on.rows(state[name])]}


def sent_vectors(on: Any, w: Between, kept: Made) -> Rows:
    """y once more, of what is kept."""
    (xv,) = on.rows(kept["xv"])
    return [xv * x for x in on.rows(kept["v"])]


def update_last(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """The last s', and the readout's first product."""
    s, kept = _gates(on, w, state, 2)
    return {"first": read_in(on, w.read, s)} | kept


def readout(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """Energies, s̄', and z̄ before the slope of the update's SiLU."""
    energy, s_bar = read_on(on, w.read, state["first"])
    along = inner(on.rows(state["uv"]), on.rows(state["vv"]))
    return {"energy": energy, "s_bar": [s_bar], "z_bar": on.inward([s_bar, s_bar * along], w.update["Bt"])}


def gate_bwd(on: Any, config: PainnConfig, w: Between, state: Made, sums: Rows) -> Made:
    """v̄', and z̄ before the slope of the gate's SiLU."""
    a_bar, b_bar, *y_bar = sums
    (xv,), v = on.rows(state["xv"]), on.rows(state["v"])
    z_bar = on.inward([a_bar, b_bar, inner(y_bar, v)], w.gate["Dt"])
    return {"v_bar": [x + xv * y for x, y in zip(on.rows(state["v_bar"]), y_bar, strict=True)], "z_gate_bar": z_bar}


def update_hidden_bwd(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """s̄', and z̄ before the slope of the update's SiLU."""
    (z,) = on.full_rows(state["hidden_gate"])
    (more,) = on.outward(on.whole(state["z_gate_bar"]) * silu_slope(z), w.gate["Ct"], 1)
    (s_bar,) = plus(on.rows(state["s_bar"]), [more])
    uv, vv, v_bar = (on.rows(state[name]) for name in ("uv", "vv", "v_bar"))
    above = [s_bar, s_bar * inner(uv, vv), inner(v_bar, uv)]
    return {"s_bar": [s_bar], "z_bar": on.inward(above, w.update["Bt"])}


def update_bwd(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """s̄, (Uv)‾ and (Vv)‾."""
    (z,) = on.full_rows(state["hidden"])
    s_more, n_bar = on.outward(on.whole(state["z_bar"]) * silu_slope(z), w.update["At"], 2)
    (s_bar,), uv, vv = on.rows(state["s_bar"]), on.rows(state["uv"]), on.rows(state["vv"])
    a = on.rows(state["a"])
    h, norm = s_bar * a[0], jnp.sqrt(inner(vv, vv) + config.vector_norm_epsilon**2)
    factor = divide_or_zero(n_bar, norm)
    uv_bar, vv_bar = [h * x for x in vv], [h * x + factor * y for x, y in zip(uv, vv, strict=True)]
    if len(a) == 2:
        uv_bar = [x + a[1] * y for x, y in zip(uv_bar, on.rows(state["v_bar"]), strict=True)]
    return {"s_bar": [s_bar + s_more], "uv_bar": uv_bar, "vv_bar": vv_bar}


def vectors_bwd(on: Any, config: PainnConfig, w: Between, state: Made) -> Made:
    """v̄."""
    uv_bar, vv_bar = on.full_rows(state["uv_bar"]), on.full_rows(state["vv_bar"])
    v_bar = on.outward_each((uv_bar, w.update["Ut"]), (vv_bar, w.update["Vt"]))
    return {"v_bar": v_bar if "v_bar" not in state else plus(v_bar, on.rows(state["v_bar"]))}


def message_heard_and_kept(on: Any, config: PainnConfig, w: Between, state: Made, sums: Rows) -> Made:
    """`message_heard`, and v once more under a name of its own."""
    made = message_heard(on, config, w, state, sums)
    return made | {"heard": made["v"]}


def remake_and_gate_bwd(on: Any, config: PainnConfig, w: Between, state: Made, sums: Rows) -> Made:
    """`gate_bwd` after Uv, Vv and v' from what was heard."""
    v, a = on.full_rows(state["heard"]), on.rows(state["a"])
    uv, vv = on.outward_each((v, w.update["U"])), on.outward_each((v, w.update["V"]))
    v_new = [x + a[1] * y for x, y in zip(v, uv, strict=True)]
    made = {"uv": uv, "vv": vv, "v": v_new}
    return made | gate_bwd(on, config, w, state | made, sums)


LAST = (message_heard, update_hidden, update_last, readout, update_bwd, vectors_bwd)
PLAN = Plan(
    (message_heard, update_hidden, update, gate),
    {"v": 3, "uv": 3, "vv": 3, "hidden": 1, "a": 2, "hidden_gate": 1, "xv": 1},
    (gate_bwd, update_hidden_bwd, update_bwd, vectors_bwd),
    SENT,
)
# two products more, and six rows less pass through memory
LEAN = Plan(
    (message_heard_and_kept, update_hidden, update, gate, beside),
    {"heard": 3, "hidden": 1, "a": 2, "hidden_gate": 1, "xv": 1},
    (remake_and_gate_bwd, update_hidden_bwd, update_bwd, vectors_bwd),
    ("sent",),
)

# what is made takes the memory of what its phase reads for the last time, where programs run it
TAKES = {
    update_hidden_bwd: {"s_bar": "s_bar"},
    update_bwd: {"s_bar": "s_bar", "uv_bar": "uv", "vv_bar": "vv"},
    vectors_bwd: {"v_bar": "v_bar"},
}


def _transposed(weights: Params) -> Params:
    return weights | {name + "t": kernel.T for name, kernel in weights.items()}
