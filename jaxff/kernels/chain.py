"""Energies and pair gradients with fused kernels: the chain of jaxff.models once more, for inference.

Filters come from tables (jaxff.tabulate). The list must be symmetric: every transposed sum is then a sum at the
receivers, and the gradient of a pair comes out antisymmetrised, (g_e - g_rev(e)) / 2, which has the same forces.
Work that no energy depends on is left out: v = 0 entering the first interaction, the vectors leaving the last.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels import student
from jaxff.kernels.message import Geometry, Launch, Sources, message, message_transpose
from jaxff.kernels.readout import readout
from jaxff.models.painn import pair_repulsion, pair_repulsion_bwd
from jaxff.models.parameters import Params, dense_layers
from jaxff.models.student import EPSILON
from jaxff.ops.distance import distance_bwd, distance_fwd
from jaxff.ops.mlp import mlp_bwd, mlp_fwd
from jaxff.ops.update import equivariant_update_bwd, equivariant_update_fwd
from jaxff.system import Pairs

Config = StudentConfig | PainnConfig


def prepare(tree: Params, config: Config) -> Params:
    """A tabulated tree with each table in the kernels' order (a, b, y), and without its dead third at first."""
    result = dict(tree)
    for i in range(config.num_interactions):
        layer = dict(tree[f"interaction_{i}"])
        scalar, second, third = jnp.split(jnp.asarray(layer.pop("filter")["coefficients"]), 3, axis=2)
        along, vector = (third, second) if config.architecture == "student" else (second, third)
        layer["update"] = _MODELS[config.architecture].prepare_update(layer["update"])
        layer["table"] = jnp.concatenate([scalar, along] if i == 0 else [scalar, along, vector], axis=2)
        result[f"interaction_{i}"] = layer
    return result


def forward(
    tree: Params,
    config: Config,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
    launch: Launch,
) -> tuple[Float[Array, "N"], Any]:
    """Atomic energies with what `backward` needs."""
    model = _MODELS[config.architecture]
    (d, u), distance_residuals = distance_fwd(vectors, model.epsilon)
    geometry = _geometry(d, u, pairs, tree["interaction_0"]["table"].shape[0], config.cutoff)
    s, v = tree["embedding"]["table"][numbers], None
    interactions = []
    for i in range(config.num_interactions):
        layer = tree[f"interaction_{i}"]
        sources, source_residuals = model.sources(layer, s, v)
        ds, dv = message(sources, layer["table"], geometry, launch, add=model.sends_itself)
        if not model.sends_itself:
            ds, dv = s + ds, dv if v is None else v + dv
        last = i == config.num_interactions - 1
        s, v, update_residuals = model.update(layer, config, ds, dv, last, launch)
        interactions.append((sources, source_residuals, layer["table"], update_residuals))
    energies, slopes = readout(s, dense_layers(tree["readout"]), launch)
    if "reference" in tree:
        energies = energies + tree["reference"]["energies"][numbers]
    repulsion = None
    if getattr(config, "repulsion", "none") == "zbl":
        more, repulsion = pair_repulsion(d, numbers, pairs)
        energies = energies + more
    residuals = (distance_residuals, geometry, interactions, slopes, repulsion, numbers, pairs)
    return jnp.where(numbers > 0, energies, 0), residuals


def backward(config: Config, residuals: Any, e_bar: Float[Array, "N"], launch: Launch) -> Float[Array, "E 3"]:
    """Antisymmetrised gradients of Σ ē_i E_i by the pair vectors."""
    model = _MODELS[config.architecture]
    distance_residuals, geometry, interactions, slopes, repulsion, numbers, pairs = residuals
    e_bar = jnp.where(numbers > 0, e_bar, 0)
    s_bar, v_bar = e_bar[:, None] * slopes, None
    pair_bars = []
    for i in reversed(range(config.num_interactions)):
        sources, source_residuals, table, update_residuals = interactions[i]
        s_bar, v_bar = model.update_bwd(config, update_residuals, s_bar, v_bar, launch)
        bars, pair_bar = message_transpose(sources, (s_bar, v_bar), table, geometry, launch, add=model.sends_itself)
        pair_bars.append(pair_bar)
        if i:
            s_bar, v_bar = model.sources_bwd(source_residuals, bars, s_bar, v_bar)
    intervals = interactions[0][2].shape[0]
    pair_bar = jnp.where(pairs.mask, functools.reduce(operator.add, pair_bars), 0)
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
    """What the atoms do by themselves in the student: s and v are sent as they are."""

    epsilon = EPSILON
    sends_itself = True
    prepare_update = staticmethod(student.prepare_update)

    @staticmethod
    def sources(layer: Params, s: Array, v: Array | None) -> tuple[Sources, None]:
        return Sources(s, None, v), None

    @staticmethod
    def sources_bwd(residuals: None, bars: Sources, s_bar: Array, v_bar: Array) -> tuple[Array, Array | None]:
        return bars.a, bars.y

    @staticmethod
    def update(
        layer: Params, config: Config, s: Array, v: Array, last: bool, launch: Launch
    ) -> tuple[Array, Array | None, Any]:
        return student.update(layer["update"], s, v, last, launch)

    @staticmethod
    def update_bwd(
        config: Config, residuals: Any, s_bar: Array, v_bar: Array | None, launch: Launch
    ) -> tuple[Array, Array]:
        return student.update_bwd(residuals, s_bar, v_bar, launch)


class _Painn:
    """What the atoms do by themselves in PaiNN: φ(s) gates what is sent. Products run through XLA."""

    epsilon = 0.0
    sends_itself = False

    @staticmethod
    def prepare_update(update: Params) -> Params:
        return update

    @staticmethod
    def sources(layer: Params, s: Array, v: Array | None) -> tuple[Sources, Any]:
        x, residuals = mlp_fwd(s, dense_layers(layer["gate"]))
        xs, xu, xv = jnp.split(x, 3, axis=1)
        y = None if v is None else (_axes(v) * xv[:, None, :]).reshape(v.shape)
        return Sources(xs, xu, y), (residuals, xv, v)

    @staticmethod
    def sources_bwd(residuals: Any, bars: Sources, s_bar: Array, v_bar: Array) -> tuple[Array, Array]:
        mlp_residuals, xv, v = residuals
        assert bars.b is not None
        assert bars.y is not None
        y_bar = _axes(bars.y)
        x_bar = jnp.concatenate([bars.a, bars.b, jnp.sum(y_bar * _axes(v), axis=1)], axis=1)
        return s_bar + mlp_bwd(mlp_residuals, x_bar)[0], v_bar + (xv[:, None, :] * y_bar).reshape(v_bar.shape)

    @staticmethod
    def update(layer: Params, config: Any, s: Array, v: Array, last: bool, interpret: bool) -> tuple[Array, Array, Any]:
        weights = dict(layer["update"])
        kernels = weights.pop("kernel_u"), weights.pop("kernel_v")
        out, residuals = equivariant_update_fwd(
            s, _axes(v), dense_layers(weights), *kernels, config.vector_norm_epsilon
        )
        return out[0], out[1].reshape(v.shape), residuals

    @staticmethod
    def update_bwd(
        config: Any, residuals: Any, s_bar: Array, v_bar: Array | None, launch: Launch
    ) -> tuple[Array, Array]:
        bars = s_bar, jnp.zeros((len(s_bar), 3, s_bar.shape[1]), s_bar.dtype) if v_bar is None else _axes(v_bar)
        s_in, v_in, *_ = equivariant_update_bwd(config.vector_norm_epsilon, residuals, bars)
        return s_in, v_in.reshape(len(s_in), -1)


_MODELS: dict[str, Any] = {"student": _Student, "painn": _Painn}


def _axes(v: Float[Array, "N 3F"]) -> Float[Array, "N 3 F"]:
    return v.reshape(len(v), 3, -1)
