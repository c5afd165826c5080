"""MLFF-Distiller's StudentForceField, to the letter: PaiNN-like, distilled from Orb-v2 (atfrank/MLFF-Distiller).

Its defects are part of it. The mixing matrix acts on Cartesian axes, so the energy depends on the orientation; the
filters' biases act beyond the cutoff function, so the energy jumps when a pair crosses the cutoff; |v| has a cone.
"""

from __future__ import annotations

import functools
import operator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxff.config import StudentConfig
from jaxff.models import tables
from jaxff.models.parameters import Leaf, Params, constant, declare, dense_layers, dense_leaves, dense_tree
from jaxff.models.tables import Filters
from jaxff.ops.distance import distance_bwd, distance_fwd, distance_reference
from jaxff.ops.message import message_bwd, message_fwd, message_reference
from jaxff.ops.mlp import Layers, mlp_bwd, mlp_fwd, mlp_reference
from jaxff.ops.radial import edge_features_bwd, edge_features_fwd, edge_features_reference
from jaxff.ops.readout import readout_bwd, readout_fwd, readout_reference
from jaxff.ops.update import update_bwd, update_fwd, update_reference
from jaxff.system import Pairs

EPSILON = 1e-8  # Å, in u = r / (d + ε)


def leaves(config: StudentConfig) -> dict[str, Any]:
    """Shapes and initial values of all parameters."""
    f, k = config.hidden_dim, config.num_rbf
    interactions = {
        f"interaction_{i}": {
            "filter": dense_leaves(k, f, 3 * f),
            "update": dense_leaves(2 * f, f, 3 * f) | {"mixing_matrix": Leaf((3, 3), constant(jnp.eye(3)))},
        }
        for i in range(config.num_interactions)
    }
    return {
        "embedding": {"table": Leaf((config.max_z + 1, f), nn.initializers.normal(1.0))},
        "radial": {
            "centers": Leaf((k,), constant([config.cutoff * i / max(k - 1, 1) for i in range(k)])),
            "widths": Leaf((k,), constant(config.cutoff / k)),
        },
        **interactions,
        "readout": dense_leaves(f, f // 2, f // 4, 1),
    }


def reference_atomic_energies(
    params: Params,
    config: StudentConfig,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
) -> Float[Array, "N"]:
    """`atomic_energies` through plain functions, for autodiff to be compared with."""
    d, u = distance_reference(vectors, EPSILON)
    s = params["embedding"]["table"][numbers]
    v = jnp.zeros((s.shape[0], 3, s.shape[1]), s.dtype)
    for i, filters in enumerate(filters_reference(params, config, d)):
        ds, dv = message_reference(s, v, filters, u, pairs)
        mlp, mixing_matrix = _update_weights(params[f"interaction_{i}"])
        s, v = update_reference(s + ds, v + dv, mlp, mixing_matrix)
    return jnp.where(numbers > 0, readout_reference(s, dense_layers(params["readout"])), 0)


def filters_reference(params: Params, config: StudentConfig, d: Float[Array, "E"]) -> Filters:
    """Filters [E, 3F] of each interaction, mlp(φ(d)) or from tables, by the plain primal. d: [E] Å."""
    if tables.is_tabulated(params):
        return tables.filters_reference(params, config, d)
    phi = edge_features_reference(d, params["radial"]["centers"], params["radial"]["widths"], config.cutoff)
    return [mlp_reference(phi, layers) for layers in _filter_layers(params, config)]


def filters_fwd(params: Params, config: StudentConfig, d: Float[Array, "E"]) -> tuple[Filters, Any]:
    """The filters with what `filters_bwd` needs."""
    if tables.is_tabulated(params):
        return tables.filters_fwd(params, config, d)
    phi, phi_residuals = edge_features_fwd(d, params["radial"]["centers"], params["radial"]["widths"], config.cutoff)
    results = [mlp_fwd(phi, layers) for layers in _filter_layers(params, config)]
    return [filters for filters, _ in results], (phi_residuals, [residuals for _, residuals in results])


def filters_bwd(config: StudentConfig, residuals: Any, filters_bar: Filters) -> tuple[Array, Params, Params]:
    """φ̄ = Σ_l mlp backward of W̄_l, and d̄ of it; with the cotangents of filter networks and radial parameters."""
    if isinstance(residuals, list):
        return tables.filters_bwd(config, residuals, filters_bar)
    phi_residuals, mlp_residuals = residuals
    results = [mlp_bwd(r, bar) for r, bar in zip(mlp_residuals, filters_bar, strict=True)]
    phi_bar = functools.reduce(operator.add, [bar for bar, _ in results])
    d_bar, centers_bar, widths_bar = edge_features_bwd(config.cutoff, phi_residuals, phi_bar)
    layers_bar = {f"interaction_{i}": dense_tree(layers) for i, (_, layers) in enumerate(results)}
    return d_bar, layers_bar, {"radial": {"centers": centers_bar, "widths": widths_bar}}


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def atomic_energies(
    params: Params,
    config: StudentConfig,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
) -> Float[Array, "N"]:
    """Atomic energies [N] in eV; their gradient is the chain of hand-written rules below.

    numbers: [N], 0 for padding atoms (energy 0); vectors: [E, 3] Å; pairs: those within the cutoff, inclusive.
    """
    return reference_atomic_energies(params, config, numbers, vectors, pairs)


def forward(
    params: Params,
    config: StudentConfig,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
) -> tuple[Float[Array, "N"], Any]:
    """atomic_energies with what `backward` needs."""
    (d, u), distance_residuals = distance_fwd(vectors, EPSILON)
    all_filters, filter_residuals = filters_fwd(params, config, d)
    s = params["embedding"]["table"][numbers]
    v = jnp.zeros((s.shape[0], 3, s.shape[1]), s.dtype)
    interactions = []
    for i, filters in enumerate(all_filters):
        (ds, dv), message_residuals = message_fwd(s, v, filters, u, pairs)
        (s, v), update_residuals = update_fwd(s + ds, v + dv, *_update_weights(params[f"interaction_{i}"]))
        interactions.append((message_residuals, update_residuals))
    energies, readout_residuals = readout_fwd(s, dense_layers(params["readout"]))
    shared = (distance_residuals, filter_residuals, v, numbers, params["embedding"])
    return jnp.where(numbers > 0, energies, 0), (shared, interactions, readout_residuals)


def backward(config: StudentConfig, residuals: Any, e_bar: Float[Array, "N"]) -> tuple[Params, None, Array, None]:
    """The rules of readout, update, message, filter, edge features and distance, applied from the energies back."""
    (distance_residuals, filter_residuals, v, numbers, embedding), interactions, readout_residuals = residuals
    s_bar, readout_layers = readout_bwd(readout_residuals, jnp.where(numbers > 0, e_bar, 0))
    v_bar, u_bar = jnp.zeros_like(v), jnp.zeros_like(distance_residuals[0])
    updates, filters_bar = {}, []
    for i in reversed(range(config.num_interactions)):
        message_residuals, update_residuals = interactions[i]
        s_bar, v_bar, update_layers, mixing_bar = update_bwd(update_residuals, (s_bar, v_bar))
        s_sent, v_sent, filter_bar, u_more, _ = message_bwd(message_residuals, (s_bar, v_bar))
        s_bar, v_bar, u_bar = s_bar + s_sent, v_bar + v_sent, u_bar + u_more
        filters_bar.append(filter_bar)
        updates[f"interaction_{i}"] = dense_tree(update_layers) | {"mixing_matrix": mixing_bar}
    d_bar, filter_trees, params_bar = filters_bwd(config, filter_residuals, filters_bar[::-1])
    for name, update in updates.items():
        params_bar[name] = {"filter": filter_trees[name], "update": update}
    params_bar["embedding"] = {"table": jnp.zeros_like(embedding["table"]).at[numbers].add(s_bar)}
    params_bar["readout"] = dense_tree(readout_layers)
    (vectors_bar,) = distance_bwd(EPSILON, distance_residuals, (d_bar, u_bar))
    return params_bar, None, vectors_bar, None


atomic_energies.defvjp(forward, backward)


def _filter_layers(params: Params, config: StudentConfig) -> list[Layers]:
    return [dense_layers(params[f"interaction_{i}"]["filter"]) for i in range(config.num_interactions)]


def _update_weights(layer: Params) -> tuple[Any, Array]:
    weights = dict(layer["update"])
    mixing_matrix = weights.pop("mixing_matrix")
    return dense_layers(weights), mixing_matrix


class Student(nn.Module):
    """The student's parameters and its atomic energies, as a Flax module."""

    config: StudentConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs) -> Float[Array, "N"]:
        params = declare(self, leaves(self.config), self.dtype)
        return atomic_energies(params, self.config, numbers, vectors, pairs)
