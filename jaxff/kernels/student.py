"""The student between two messages: s and v are sent as they are; update and its gradient in two kernels each.

jaxff.ops.update has the equations.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxff.config import StudentConfig
from jaxff.kernels.dense import Tile, launch, norm, silu, silu_slope
from jaxff.kernels.message import Geometry, Launch, Sources, message, message_transpose
from jaxff.kernels.readout import readout
from jaxff.models.parameters import Params, dense_layers

AXES = range(3)


def prepare(tree: Params, config: StudentConfig) -> Params:
    """The tree with the updates' weights as the kernels read them."""
    result = dict(tree)
    for i in range(config.num_interactions):
        layer, last = tree[f"interaction_{i}"], i == config.num_interactions - 1
        result[f"interaction_{i}"] = layer | {"update": prepare_update(layer["update"], last)}
    return result


def forward(
    tree: Params, config: StudentConfig, numbers: Int[Array, "N"], geometry: Geometry, how: Launch
) -> tuple[Float[Array, "N"], Any]:
    """Atomic energies without reference energies, and what `backward` needs (no weights)."""
    s, v = tree["embedding"]["table"][numbers], None
    interactions = []
    for i in range(config.num_interactions):
        layer = tree[f"interaction_{i}"]
        sources = Sources(s, None, v)
        s, v = message(sources, layer["table"], geometry, how, add=True)
        s, v, (_, *saved) = update(layer["update"], s, v, i == config.num_interactions - 1, how)
        interactions.append((sources if i else None, saved))
    energies, slopes = readout(s, dense_layers(tree["readout"]), how)
    return energies, (interactions, slopes)


def backward(
    tree: Params,
    config: StudentConfig,
    residuals: Any,
    numbers: Int[Array, "N"],
    geometry: Geometry,
    e_bar: Float[Array, "N"],
    how: Launch,
) -> list[Float[Array, "4 E"]]:
    """Cotangents of distances (per interval) and directions, one of each interaction."""
    interactions, slopes = residuals
    s_bar, v_bar = e_bar[:, None] * slopes, None
    pair_bars = []
    for i in reversed(range(config.num_interactions)):
        sources, saved = interactions[i]
        layer = tree[f"interaction_{i}"]
        if sources is None:
            sources = Sources(tree["embedding"]["table"][numbers], None, None)
        above = update_bwd((layer["update"], *saved), s_bar, v_bar, how)
        (s_bar, _, v_bar), pair_bar = message_transpose(sources, above, layer["table"], geometry, how, add=True)
        pair_bars.append(pair_bar)
    return pair_bars


def prepare_update(update: Params, last: bool) -> Params:
    """Kernels, their transposes and biases, by the names of the equations: z = [s, n] A + a, o = silu(z) B + b.

    Of the last interaction's o only the first F columns are kept: no energy depends on the others.
    """
    (a_kernel, a), (b_kernel, b) = ((update[k]["kernel"], update[k]["bias"]) for k in ("dense_0", "dense_1"))
    if last:
        f = a_kernel.shape[1]
        b_kernel, b = b_kernel[:, :f], b[:f]
    named = {"A": a_kernel, "a": a[None], "At": a_kernel.T, "B": b_kernel, "b": b[None], "Bt": b_kernel.T}
    return named | {"M": update["mixing_matrix"]}


def update(
    weights: Params, s: Float[Array, "N F"], v: Float[Array, "N 3F"], last: bool, how: Launch
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"] | None, Any]:
    """s', v' and what `update_bwd` needs; v' is None and not computed in the last interaction."""
    f = s.shape[1]
    run = partial(launch, f=f, how=how)
    (z,) = run(_hidden, (s, v, weights["A"], weights["a"]), (f,), name="update_hidden")
    inputs = (s, v, z, weights["B"], weights["b"], weights["M"])
    if last:
        (s_new,) = run(_last, inputs, (f,), name="update_last")
        return s_new, None, (weights, v, z, None)
    s_new, v_new, gates = run(_gated, inputs, (f, 3 * f, 2 * f), name="update")
    return s_new, v_new, (weights, v, z, gates)


def update_bwd(
    residuals: Any, s_bar: Float[Array, "N F"], v_bar: Float[Array, "N 3F"] | None, how: Launch
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """Cotangents of s and v from those of s' and v' (None in the last interaction)."""
    weights, v, z, gates = residuals
    f = s_bar.shape[1]
    run = partial(launch, f=f, how=how)
    above = (s_bar,) if v_bar is None else (s_bar, v_bar)
    (z_bar,) = run(_hidden_bwd, (z, v, weights["Bt"], weights["M"], *above), (f,), name="update_hidden_bwd")
    more = () if gates is None else (gates, weights["M"])
    s_in, v_in = run(_input_bwd, (z_bar, v, weights["At"], *above, *more), (f, 3 * f), name="update_bwd")
    return s_in, v_in


def _hidden(tile: Tile, s: Any, v: Any, kernel: Any, bias: Any, z: Any) -> None:
    """z = s A_s + n A_n + a."""
    inputs = [lambda k: tile.load(s, k), lambda k: norm([tile.load(v, k + axis * tile.f) for axis in AXES])]
    tile.store(z, tile.total(inputs, kernel) + tile.bias(bias))


def _last(tile: Tile, s: Any, v: Any, z: Any, kernel: Any, bias: Any, mix: Any, s_new: Any) -> None:
    """s' = s + a."""
    tile.store(s_new, tile.own(s) + _gates(tile, z, kernel, bias, 1)[0])


def _gated(
    tile: Tile, s: Any, v: Any, z: Any, kernel: Any, bias: Any, mix: Any, s_new: Any, v_new: Any, gates: Any
) -> None:
    """s' = s + a,  v' = v g1 + (M v) g2."""
    a, g1, g2 = _gates(tile, z, kernel, bias, 3)
    tile.store(s_new, tile.own(s) + a)
    tile.store(gates, g1)
    tile.store(gates, g2, 1)
    old = [tile.own(v, axis) for axis in AXES]
    for axis, mixed in enumerate(_mix(mix, old)):
        tile.store(v_new, old[axis] * g1 + mixed * g2, axis)


def _hidden_bwd(tile: Tile, z: Any, v: Any, kernel: Any, mix: Any, s_bar: Any, *rest: Any) -> None:
    """z̄ = silu'(z) ([s̄', Σ_c v̄'_c v_c, Σ_c v̄'_c (M v)_c] Bᵀ)."""
    *v_bars, z_bar = rest
    inputs: list[Any] = [lambda k: tile.load(s_bar, k)]
    for v_bar in v_bars:

        def along(k: Array, mixed: bool, v_bar: Any = v_bar) -> Array:
            old = [tile.load(v, k + axis * tile.f) for axis in AXES]
            old = _mix(mix, old) if mixed else old
            return _sum([tile.load(v_bar, k + axis * tile.f) * old[axis] for axis in AXES])

        inputs += [partial(along, mixed=False), partial(along, mixed=True)]
    tile.store(z_bar, tile.total(inputs, kernel) * silu_slope(tile.own(z)))


def _input_bwd(tile: Tile, z_bar: Any, v: Any, kernel: Any, s_bar: Any, *rest: Any) -> None:
    """[s̄₊, n̄] = z̄ Aᵀ,  s̄ = s̄' + s̄₊,  v̄ = v̄' g1 + Mᵀ (v̄' g2) + n̄ v/n."""
    *more, s_in, v_in = rest
    s_more, n_bar = tile.spread(lambda k: tile.load(z_bar, k), kernel, 2)
    tile.store(s_in, tile.own(s_bar) + s_more)
    old = [tile.own(v, axis) for axis in AXES]
    n = norm(old)
    factor = jnp.where(n > 0, n_bar / jnp.where(n > 0, n, 1.0), 0.0)
    result = [factor * x for x in old]
    if more:
        v_bar, gates, mix = more
        bars = [tile.own(v_bar, axis) for axis in AXES]
        g1, g2 = tile.own(gates), tile.own(gates, 1)
        mixed = _mix(mix, [x * g2 for x in bars], transposed=True)
        result = [result[axis] + bars[axis] * g1 + mixed[axis] for axis in AXES]
    for axis in AXES:
        tile.store(v_in, result[axis], axis)


def _gates(tile: Tile, z: Any, kernel: Any, bias: Any, parts: int) -> list[Array]:
    products = tile.spread(lambda k: silu(tile.load(z, k)), kernel, parts)
    return [product + tile.bias(bias, part) for part, product in enumerate(products)]


def _mix(matrix: Any, v: list[Array], transposed: bool = False) -> list[Array]:
    def entry(c: int, k: int) -> Any:
        return matrix[k, c] if transposed else matrix[c, k]

    return [_sum([entry(c, k) * v[k] for k in AXES]) for c in AXES]


def _sum(terms: list[Array]) -> Array:
    return terms[0] + terms[1] + terms[2]
