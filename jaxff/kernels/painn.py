"""PaiNN's atoms between two messages: update, next gate, readout, and their gradients (jaxff.ops.update, equations).

The same equations run in two ways. For few atoms an atom has one program for all that happens between two steps in
which atoms hear of each other: message, update and next gate; message, last update, readout and their gradient;
transposed message, gate and update backward. Three kernels forward, three backward, and no tensor cores: a program
streams the weights and sums in IEEE float32. For many atoms the same code takes arrays of all of them through XLA's
products, between the message kernels.

The first gate acts on embeddings alone, so `prepare` tabulates it by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig
from jaxff.kernels.dense import dot, silu, silu_slope
from jaxff.kernels.message import (
    Geometry,
    Launch,
    Sizes,
    Sources,
    message,
    message_sums,
    message_transpose,
    transpose_sums,
)
from jaxff.kernels.readout import readout
from jaxff.models.parameters import Params, dense_layers
from jaxff.ops.mlp import Layers, mlp_fwd

AXES = range(3)
SLOTS, WARPS = 8, 8  # pairs that a program takes at once, and its warps
WIDEST = 128  # channels of a program: a matrix of as many rows and columns is in its registers

Rows = list[Array]
Named = dict[str, Rows]


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


def in_one_program(tree: Params, config: PainnConfig) -> bool:
    """Whether an atom's matrices fit a program: channels are a power of 2, not too many."""
    f = config.hidden_dim
    sizes = [f, *(kernel.shape[1] for kernel, _ in dense_layers(tree["readout"]))]
    return max(sizes) <= WIDEST and all(size & (size - 1) == 0 for size in sizes)


def forward(
    tree: Params, config: PainnConfig, numbers: Int[Array, "N"], geometry: Geometry, launch: Launch
) -> tuple[Float[Array, "N"], Any]:
    """Atomic energies without reference energies, and what `backward` needs (no weights)."""
    f, last = config.hidden_dim, config.num_interactions - 1
    fused = launch.dense and in_one_program(tree, config)
    middle, final = (_middle, _final) if fused else (_middle_whole, _final_whole)
    sources, s, v = _first_sources(tree, numbers, f), tree["embedding"]["table"][numbers], None
    saved = []
    for i in range(last):
        layer = tree[f"interaction_{i}"]
        gate = tree[f"interaction_{i + 1}"]["gate"]
        out = middle(config, sources, s, v, layer["table"], geometry, layer["update"], gate, launch)
        s, v, sources = out.pop("s"), out.pop("v"), Sources(out.pop("xs"), out.pop("xu"), out.pop("y"))
        saved.append((sources, v, out))
    layer, layers = tree[f"interaction_{last}"], dense_layers(tree["readout"])
    energies, s_bar, v_bar = final(config, sources, s, v, layer["table"], geometry, layer["update"], layers, launch)
    return energies, (saved, s_bar, v_bar)


def backward(
    tree: Params,
    config: PainnConfig,
    residuals: Any,
    numbers: Int[Array, "N"],
    geometry: Geometry,
    e_bar: Float[Array, "N"],
    launch: Launch,
) -> list[Float[Array, "4 E"]]:
    """Cotangents of distances (per interval) and directions, one of each interaction."""
    saved, s_bar, v_bar = residuals
    s_bar, v_bar = e_bar[:, None] * s_bar, e_bar[:, None] * v_bar
    fused = launch.dense and in_one_program(tree, config)
    middle = _middle_bwd if fused else _middle_bwd_whole
    pair_bars = []
    for i in reversed(range(1, config.num_interactions)):
        sources, v, kept = saved[i - 1]
        layer, update = tree[f"interaction_{i}"], tree[f"interaction_{i - 1}"]["update"]
        s_bar, v_bar, pair_bar = middle(
            config, sources, v, kept, (s_bar, v_bar), layer["table"], geometry, update, layer["gate"], launch
        )
        pair_bars.append(pair_bar)
    sources, table = _first_sources(tree, numbers, config.hidden_dim), tree["interaction_0"]["table"]
    return [*pair_bars, message_transpose(sources, (s_bar, v_bar), table, geometry, launch)[1]]


def _first_sources(tree: Params, numbers: Array, f: int) -> Sources:
    sent = tree["interaction_0"]["sent"][numbers]
    return Sources(sent[:, :f], sent[:, f:], None)


def _transposed(weights: Params) -> Params:
    return weights | {name + "t": kernel.T for name, kernel in weights.items()}


# --- the equations, of rows of channels: [F] within a program, [N, F] for all atoms ---


class _Atom(NamedTuple):
    """One atom in a program: rows are [F], matrices are read by F x F blocks."""

    i: Any
    f: int

    def own(self, ref: Any, part: int = 0) -> Array:
        return ref[self.i, part * self.f : (part + 1) * self.f]

    def bias(self, ref: Any, part: int = 0) -> Array:
        return ref[0, part * self.f : (part + 1) * self.f]

    def each(self, xs: Rows, kernel: Any) -> Rows:
        """x K of each x."""
        tile = kernel[...]
        return [_times(x, tile) for x in xs]

    def spread(self, x: Array, kernel: Any, parts: int) -> Rows:
        """x K, by F columns."""
        return [_times(x, kernel[:, k * self.f : (k + 1) * self.f]) for k in range(parts)]

    def total(self, xs: Rows, kernel: Any) -> Array:
        """[x_0, x_1, ...] K."""
        products = [_times(x, kernel[k * self.f : (k + 1) * self.f, :]) for k, x in enumerate(xs)]
        return _sum(products)


class _Atoms(NamedTuple):
    """All atoms: rows are [N, F]."""

    f: int

    def own(self, x: Array, part: int = 0) -> Array:
        return x[:, part * self.f : (part + 1) * self.f]

    def bias(self, x: Array, part: int = 0) -> Array:
        return self.own(x, part)

    def each(self, xs: Rows, kernel: Array) -> Rows:
        return list(dot(jnp.stack(xs), kernel))

    def spread(self, x: Array, kernel: Array, parts: int) -> Rows:
        return jnp.split(dot(x, kernel[:, : parts * self.f]), parts, axis=1)

    def total(self, xs: Rows, kernel: Array) -> Array:
        return dot(jnp.concatenate(xs, axis=1), kernel[: len(xs) * self.f])


def _update(on: Any, w: Params, epsilon: float, s: Array, v: Rows, last: bool) -> tuple[Array, Rows, Named]:
    """n = |Vv|,  (a_ss, a_sv, a_vv) = silu([s, n] A + a) B + b,  s' = s + a_ss + a_sv <Uv, Vv>,  v' = v + a_vv Uv."""
    uv, vv = on.each(v, w["U"]), on.each(v, w["V"])
    n = jnp.sqrt(_dot(vv, vv) + epsilon**2) - epsilon
    z = on.total([s, n], w["A"]) + on.bias(w["a"])
    a = [gate + on.bias(w["b"], k) for k, gate in enumerate(on.spread(silu(z), w["B"], 2 if last else 3))]
    s = s + a[0] + a[1] * _dot(uv, vv)
    saved = {"uv": uv, "vv": vv, "z": [z], "a": a[1:]}
    return s, v if last else [x + a[2] * y for x, y in zip(v, uv, strict=True)], saved


def _update_bwd(
    on: Any, w: Params, epsilon: float, saved: Named, s_bar: Array, v_bar: Rows | None
) -> tuple[Array, Rows]:
    """h = s̄' a_sv,  (Uv)‾ = v̄' a_vv + h Vv,  (Vv)‾ = h Uv + n̄ Vv/(n + ε),  v̄ = v̄' + (Uv)‾ Uᵀ + (Vv)‾ Vᵀ;

    [s̄₊, n̄] = silu'(z) ([s̄', s̄' <Uv, Vv>, <v̄', Uv>] Bᵀ) Aᵀ,  s̄ = s̄' + s̄₊.  v̄' is None in the last interaction.
    """
    uv, vv, (z,), a = saved["uv"], saved["vv"], saved["z"], saved["a"]
    above = [s_bar, s_bar * _dot(uv, vv), *([] if v_bar is None else [_dot(v_bar, uv)])]
    z_bar = on.total(above, w["Bt"]) * silu_slope(z)
    s_more, n_bar = on.spread(z_bar, w["At"], 2)
    h, norm = s_bar * a[0], jnp.sqrt(_dot(vv, vv) + epsilon**2)
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
    z = on.total([s], w["C"]) + on.bias(w["c"])
    xs, xu, xv = (x + on.bias(w["d"], k) for k, x in enumerate(on.spread(silu(z), w["D"], 3)))
    return {"xs": [xs], "xu": [xu], "xv": [xv], "y": [xv * x for x in v], "z_gate": [z]}


def _gate_bwd(on: Any, w: Params, saved: Named, v: Rows, bars: Rows) -> tuple[Array, Rows]:
    """What s̄ and v̄ gain: silu'(z) ([ā, b̄, <ȳ, v>] Dᵀ) Cᵀ and xv ȳ."""
    a_bar, b_bar, *y_bar = bars
    z_bar = on.total([a_bar, b_bar, _dot(y_bar, v)], w["Dt"]) * silu_slope(saved["z_gate"][0])
    return on.total([z_bar], w["Ct"]), [saved["xv"][0] * x for x in y_bar]


def _between(on: Any, epsilon: float, update: Params, gate: Params, s: Array, v: Rows) -> Named:
    s, v, saved = _update(on, update, epsilon, s, v, False)
    return {"s": [s], "v": v} | saved | _gate(on, gate, s, v)


def _between_bwd(
    on: Any, epsilon: float, update: Params, gate: Params, kept: Any, v: Any, bars: Rows, s_bar: Any, v_bar: Any
) -> tuple[Array, Rows]:
    """s̄ and v̄ after message i of those after message i + 1 and of the cotangents of what it was sent."""
    saved = {name: [on.own(kept[name], k) for k in range(parts)] for name, parts in _KEPT.items()}
    s_more, v_more = _gate_bwd(on, gate, saved, [on.own(v, axis) for axis in AXES], bars)
    s_bar, v_bar = on.own(s_bar) + s_more, [on.own(v_bar, axis) + v_more[axis] for axis in AXES]
    return _update_bwd(on, update, epsilon, saved, s_bar, v_bar)


def _last(
    on: Any, epsilon: float, update: Params, read: Callable[[Array], tuple[Array, Array]], s: Array, v: Rows
) -> tuple[Array, Array, Rows]:
    """Energies and their gradients by s and v after the last message."""
    s, _, saved = _update(on, update, epsilon, s, v, True)
    energies, slopes = read(s)
    return energies, *_update_bwd(on, update, epsilon, saved, slopes, None)


_KEPT = {"uv": 3, "vv": 3, "z": 1, "a": 2, "z_gate": 1, "xv": 1}
_MADE = {"s": 1, "v": 3, "xs": 1, "xu": 1, "y": 3} | _KEPT


def _dot(x: Rows, y: Rows) -> Array:
    return _sum([a * b for a, b in zip(x, y, strict=True)])


def _sum(terms: Sequence[Array]) -> Array:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _times(x: Float[Array, "K"], tile: Float[Array, "K C"]) -> Float[Array, "C"]:
    return jnp.sum(x[:, None] * tile, axis=0)


# --- many atoms: arrays through XLA, between message kernels ---


def _heard(
    sources: Sources, s: Array, v: Array | None, table: Array, geometry: Geometry, launch: Launch, f: int
) -> tuple[_Atoms, Array, Rows]:
    ds, dv = message(sources, table, geometry, launch)
    on, v = _Atoms(f), dv if v is None else v + dv
    return on, s + ds, [on.own(v, axis) for axis in AXES]


def _middle_whole(
    config: PainnConfig,
    sources: Sources,
    s: Array,
    v: Array | None,
    table: Array,
    geometry: Geometry,
    update: Params,
    gate: Params,
    launch: Launch,
) -> dict[str, Array]:
    on, s, rows = _heard(sources, s, v, table, geometry, launch, config.hidden_dim)
    out = _between(on, config.vector_norm_epsilon, update, gate, s, rows)
    return {name: jnp.concatenate(parts, axis=1) for name, parts in out.items()}


def _final_whole(
    config: PainnConfig,
    sources: Sources,
    s: Array,
    v: Array | None,
    table: Array,
    geometry: Geometry,
    update: Params,
    layers: Layers,
    launch: Launch,
) -> tuple[Array, Array, Array]:
    on, s, rows = _heard(sources, s, v, table, geometry, launch, config.hidden_dim)
    read = lambda s: readout(s, layers, launch)  # noqa: E731
    energies, s_bar, v_bar = _last(on, config.vector_norm_epsilon, update, read, s, rows)
    return energies, s_bar, jnp.concatenate(v_bar, axis=1)


def _middle_bwd_whole(
    config: PainnConfig,
    sources: Sources,
    v: Array,
    kept: dict[str, Array],
    above: tuple[Array, Array],
    table: Array,
    geometry: Geometry,
    update: Params,
    gate: Params,
    launch: Launch,
) -> tuple[Array, Array, Array]:
    bars, pair_bar = message_transpose(sources, above, table, geometry, launch)
    on = _Atoms(config.hidden_dim)
    assert bars.b is not None
    assert bars.y is not None
    rows = [bars.a, bars.b, *(on.own(bars.y, axis) for axis in AXES)]
    s_bar, v_bar = _between_bwd(on, config.vector_norm_epsilon, update, gate, kept, v, rows, *above)
    return s_bar, jnp.concatenate(v_bar, axis=1), pair_bar


# --- few atoms: one program for each ---


def _run(
    kernel: Any, config: PainnConfig, geometry: Geometry, n: int, launch: Launch, name: str, out: Any, *inputs: Any
) -> Any:
    """Run kernel(sizes, epsilon, geometry, *inputs, *outputs) for each atom; inputs and outputs are trees of refs."""
    f = config.hidden_dim
    sizes = Sizes(geometry, n, f, Launch(f, SLOTS, True, launch.route), False)
    return pl.pallas_call(
        partial(kernel, sizes, config.vector_norm_epsilon),
        out_shape=out,
        grid=(n,),
        interpret=launch.interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=name,
    )(geometry, *inputs)


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _middle(
    config: PainnConfig,
    sources: Sources,
    s: Array,
    v: Array | None,
    table: Array,
    geometry: Geometry,
    update: Params,
    gate: Params,
    launch: Launch,
) -> dict[str, Array]:
    n, f = s.shape
    out = {name: _shape(n, parts * f) for name, parts in _MADE.items()}
    inputs = (table, sources, s, v, update, gate)
    return _run(_middle_kernel, config, geometry, n, launch, "message_update_gate", out, *inputs)


def _final(
    config: PainnConfig,
    sources: Sources,
    s: Array,
    v: Array | None,
    table: Array,
    geometry: Geometry,
    update: Params,
    layers: Layers,
    launch: Launch,
) -> tuple[Array, Array, Array]:
    n, f = s.shape
    hidden = [(kernel, kernel.T, bias[None]) for kernel, bias in layers[:-1]]
    final, offset = layers[-1]
    inputs = (table, sources, s, v, update, hidden, final.T)
    out = (_shape(n), _shape(n, f), _shape(n, 3 * f))
    energies, s_bar, v_bar = _run(_final_kernel, config, geometry, n, launch, "message_update_readout", out, *inputs)
    return energies + offset[0], s_bar, v_bar


def _middle_bwd(
    config: PainnConfig,
    sources: Sources,
    v: Array,
    kept: dict[str, Array],
    above: tuple[Array, Array],
    table: Array,
    geometry: Geometry,
    update: Params,
    gate: Params,
    launch: Launch,
) -> tuple[Array, Array, Array]:
    n, f = v.shape[0], config.hidden_dim
    out = (_shape(n, f), _shape(n, 3 * f), _shape(1, 4, geometry.senders.shape[0]))
    inputs = (table, sources, v, kept, above, update, gate)
    s_bar, v_bar, pair_bars = _run(
        _middle_bwd_kernel, config, geometry, n, launch, "message_gate_update_bwd", out, *inputs
    )
    return s_bar, v_bar, pair_bars[0]


def _hears(sizes: Sizes, geometry: Geometry, table: Any, sources: Sources, s: Any, v: Any) -> tuple[_Atom, Array, Rows]:
    on = _Atom(pl.program_id(0), sizes.f)
    ds, *dv = message_sums(geometry, table, sources, sizes, on.i, _all_channels(sizes))
    return on, on.own(s) + ds, dv if v is None else [on.own(v, axis) + dv[axis] for axis in AXES]


def _middle_kernel(
    sizes: Sizes,
    epsilon: float,
    geometry: Geometry,
    table: Any,
    sources: Sources,
    s: Any,
    v: Any,
    update: Params,
    gate: Params,
    out: Any,
) -> None:
    on, s, v = _hears(sizes, geometry, table, sources, s, v)
    for name, parts in _between(on, epsilon, update, gate, s, v).items():
        _store(on, out[name], parts)


def _final_kernel(
    sizes: Sizes,
    epsilon: float,
    geometry: Geometry,
    table: Any,
    sources: Sources,
    s: Any,
    v: Any,
    update: Params,
    hidden: Any,
    final: Any,
    *out: Any,
) -> None:
    on, s, v = _hears(sizes, geometry, table, sources, s, v)

    def read(x: Array) -> tuple[Array, Array]:
        pre = []
        for kernel, _, bias in hidden:
            pre.append(_times(x, kernel[...]) + bias[0, :])
            x = silu(pre[-1])
        x_bar = final[0, :]
        energy = jnp.sum(x * x_bar)
        for (_, transposed, _), z in zip(reversed(hidden), reversed(pre), strict=True):
            x_bar = _times(x_bar * silu_slope(z), transposed[...])
        return energy, x_bar

    energy, s_bar, v_bar = _last(on, epsilon, update, read, s, v)
    out[0][on.i] = energy
    _store(on, out[1], [s_bar])
    _store(on, out[2], v_bar)


def _middle_bwd_kernel(
    sizes: Sizes,
    epsilon: float,
    geometry: Geometry,
    table: Any,
    sources: Sources,
    v: Any,
    kept: Any,
    above: tuple[Any, Any],
    update: Params,
    gate: Params,
    *out: Any,
) -> None:
    on, channels = _Atom(pl.program_id(0), sizes.f), _all_channels(sizes)
    bars = transpose_sums(geometry, table, sources, *above, out[2], sizes, on.i, 0, channels)
    s_bar, v_bar = _between_bwd(on, epsilon, update, gate, kept, v, bars, *above)
    _store(on, out[0], [s_bar])
    _store(on, out[1], v_bar)


def _all_channels(sizes: Sizes) -> Int[Array, "F"]:
    return jnp.arange(sizes.f, dtype=jnp.int32)


def _store(on: _Atom, ref: Any, parts: Rows) -> None:
    for k, part in enumerate(parts):
        ref[on.i, k * on.f : (k + 1) * on.f] = part
