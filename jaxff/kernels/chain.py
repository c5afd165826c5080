"""Energies and pair gradients with fused kernels: the chain of jaxff.models once more, for inference.

Filters come from tables (jaxff.tabulate). The list must be symmetric: every transposed sum is then a sum at the
receivers, and the gradient of a pair comes out antisymmetrised, (g_e - g_rev(e)) / 2, which has the same forces.
Work that no energy depends on is left out: v = 0 entering the first interaction, the vectors leaving the last.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels.message import Geometry, Sources, message, message_transpose
from jaxff.models.painn import pair_repulsion, pair_repulsion_bwd
from jaxff.models.parameters import Params, dense_layers
from jaxff.models.student import EPSILON
from jaxff.ops.distance import distance_bwd, distance_fwd, divide_or_zero
from jaxff.ops.mlp import Layers, mlp_bwd, mlp_fwd
from jaxff.ops.readout import readout_bwd, readout_fwd
from jaxff.ops.update import equivariant_update_bwd, equivariant_update_fwd, safe_norm, update_bwd, update_fwd
from jaxff.system import Pairs

Config = StudentConfig | PainnConfig


def prepare(tree: Params, config: Config) -> Params:
    """A tabulated tree with each table in the kernels' order (a, b, y), and without its dead third at first."""
    result = dict(tree)
    for i in range(config.num_interactions):
        layer = dict(tree[f"interaction_{i}"])
        scalar, second, third = jnp.split(jnp.asarray(layer.pop("filter")["coefficients"]), 3, axis=2)
        along, vector = (third, second) if config.architecture == "student" else (second, third)
        layer["table"] = jnp.concatenate([scalar, along] if i == 0 else [scalar, along, vector], axis=2)
        result[f"interaction_{i}"] = layer
    return result


def forward(
    tree: Params,
    config: Config,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
    **launch: Any,
) -> tuple[Float[Array, "N"], Any]:
    """Atomic energies with what `backward` needs. launch: arguments of the kernels."""
    model = _MODELS[config.architecture]
    (d, u), distance_residuals = distance_fwd(vectors, model.epsilon)
    geometry = _geometry(d, u, pairs, tree["interaction_0"]["table"].shape[0], config.cutoff)
    s = tree["embedding"]["table"][numbers]
    n, f = s.shape
    v = None
    interactions = []
    for i in range(config.num_interactions):
        layer = tree[f"interaction_{i}"]
        sources, source_residuals = model.sources(layer, s, v)
        ds, dv = message(sources, layer["table"], geometry, **launch)
        v = dv.reshape(n, 3, f) if v is None else v + dv.reshape(n, 3, f)
        last = i == config.num_interactions - 1
        (s, v), update_residuals = model.update(layer, config, s + ds, v, last)
        interactions.append((sources, source_residuals, layer["table"], update_residuals))
    energies, readout_residuals = readout_fwd(s, dense_layers(tree["readout"]))
    if "reference" in tree:
        energies = energies + tree["reference"]["energies"][numbers]
    repulsion = None
    if getattr(config, "repulsion", "none") == "zbl":
        more, repulsion = pair_repulsion(d, numbers, pairs)
        energies = energies + more
    residuals = (distance_residuals, geometry, interactions, readout_residuals, repulsion, numbers, pairs)
    return jnp.where(numbers > 0, energies, 0), residuals


def backward(config: Config, residuals: Any, e_bar: Float[Array, "N"], **launch: Any) -> Float[Array, "E 3"]:
    """Antisymmetrised gradients of Σ ē_i E_i by the pair vectors."""
    model = _MODELS[config.architecture]
    distance_residuals, geometry, interactions, readout_residuals, repulsion, numbers, pairs = residuals
    e_bar = jnp.where(numbers > 0, e_bar, 0)
    s_bar, _ = readout_bwd(readout_residuals, e_bar)
    n, f = s_bar.shape
    v_bar = jnp.zeros((n, 3, f), s_bar.dtype)
    pair_bar = jnp.zeros((4, pairs.mask.shape[0]), s_bar.dtype)
    for i in reversed(range(config.num_interactions)):
        sources, source_residuals, table, update_residuals = interactions[i]
        s_bar, v_bar = model.update_bwd(config, update_residuals, s_bar, v_bar, i == config.num_interactions - 1)
        bars, more = message_transpose(sources, (s_bar, v_bar.reshape(n, 3 * f)), table, geometry, **launch)
        pair_bar = pair_bar + more
        if i:
            s_bar, v_bar = model.sources_bwd(source_residuals, bars, s_bar, v_bar)
    intervals = interactions[0][2].shape[0]
    pair_bar = jnp.where(pairs.mask, pair_bar, 0)
    d_bar = pair_bar[0] * (intervals / config.cutoff)
    if repulsion is not None:
        d_bar = d_bar + pair_repulsion_bwd(repulsion, e_bar, pairs, antisymmetric=True)
    (vectors_bar,) = distance_bwd(model.epsilon, distance_residuals, (d_bar, pair_bar[1:].T))
    return vectors_bar / 2


def _geometry(d: Array, u: Array, pairs: Pairs, intervals: int, cutoff: float) -> Geometry:
    x = jnp.clip(d, 0, cutoff) * (intervals / cutoff)
    interval = jnp.clip(x.astype(jnp.int32), 0, intervals - 1)
    t = x - interval.astype(d.dtype)
    places = jnp.concatenate([t[None], pairs.mask.astype(d.dtype)[None], u.T])
    return Geometry(jnp.asarray(pairs.senders, jnp.int32), interval, places)


class _Student:
    """What the atoms do by themselves in the student: v is sent as it is."""

    epsilon = EPSILON

    @staticmethod
    def sources(layer: Params, s: Array, v: Array | None) -> tuple[Sources, Any]:
        return Sources(s, None, None if v is None else v.reshape(len(s), -1)), None

    @staticmethod
    def sources_bwd(residuals: Any, bars: Sources, s_bar: Array, v_bar: Array) -> tuple[Array, Array]:
        assert bars.y is not None
        return s_bar + bars.a, v_bar + bars.y.reshape(v_bar.shape)

    @staticmethod
    def update(layer: Params, config: Config, s: Array, v: Array, last: bool) -> tuple[tuple[Array, Array], Any]:
        layers = _layers(layer["update"], ("mixing_matrix",))
        if not last:
            return update_fwd(s, v, layers, layer["update"]["mixing_matrix"])
        n = safe_norm(v, axis=1)
        a, residuals = mlp_fwd(jnp.concatenate([s, n], axis=1), _first(layers, s.shape[1]))
        return (s + a, v), (v, n, residuals)

    @staticmethod
    def update_bwd(config: Config, residuals: Any, s_bar: Array, v_bar: Array, last: bool) -> tuple[Array, Array]:
        if not last:
            return update_bwd(residuals, (s_bar, v_bar))[:2]
        v, n, mlp_residuals = residuals
        more, n_bar = jnp.split(mlp_bwd(mlp_residuals, s_bar)[0], 2, axis=1)
        return s_bar + more, divide_or_zero(v, n[:, None, :]) * n_bar[:, None, :]


class _Painn:
    """What the atoms do by themselves in PaiNN: φ(s) gates what is sent."""

    epsilon = 0.0

    @staticmethod
    def sources(layer: Params, s: Array, v: Array | None) -> tuple[Sources, Any]:
        x, residuals = mlp_fwd(s, dense_layers(layer["gate"]))
        xs, xu, xv = jnp.split(x, 3, axis=1)
        y = None if v is None else (xv[:, None, :] * v).reshape(len(s), -1)
        return Sources(xs, xu, y), (residuals, xv, v)

    @staticmethod
    def sources_bwd(residuals: Any, bars: Sources, s_bar: Array, v_bar: Array) -> tuple[Array, Array]:
        mlp_residuals, xv, v = residuals
        assert bars.b is not None
        assert bars.y is not None
        y_bar = bars.y.reshape(v_bar.shape)
        x_bar = jnp.concatenate([bars.a, bars.b, jnp.sum(y_bar * v, axis=1)], axis=1)
        return s_bar + mlp_bwd(mlp_residuals, x_bar)[0], v_bar + xv[:, None, :] * y_bar

    @staticmethod
    def update(layer: Params, config: Any, s: Array, v: Array, last: bool) -> tuple[tuple[Array, Array], Any]:
        weights = layer["update"]
        layers = _layers(weights, ("kernel_u", "kernel_v"))
        return equivariant_update_fwd(
            s, v, layers, weights["kernel_u"], weights["kernel_v"], config.vector_norm_epsilon
        )

    @staticmethod
    def update_bwd(config: Any, residuals: Any, s_bar: Array, v_bar: Array, last: bool) -> tuple[Array, Array]:
        return equivariant_update_bwd(config.vector_norm_epsilon, residuals, (s_bar, v_bar))[:2]


_MODELS: dict[str, Any] = {"student": _Student, "painn": _Painn}


def _layers(weights: Params, others: tuple[str, ...]) -> Layers:
    return dense_layers({name: layer for name, layer in weights.items() if name not in others})


def _first(layers: Layers, columns: int) -> Layers:
    """The layers with the first columns of the last one only."""
    *inner, last = layers
    return (*inner, last._replace(kernel=last.kernel[:, :columns], bias=last.bias[:columns]))
