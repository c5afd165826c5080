"""PaiNN as published (Schütt, Unke, Gastegger 2021, arXiv:2102.03150), made smooth and given a wall.

Filters carry their bias through the cutoff function, so energy and forces are continuous; the norm in the update is
sqrt(|Vv|² + ε²) - ε, without a cone; a ZBL repulsion and reference energies of the elements can be added.
"""

from __future__ import annotations

import functools
import operator
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig
from jaxff.models import tables
from jaxff.models.parameters import Leaf, Params, constant, declare, dense_layers, dense_leaves, dense_tree
from jaxff.models.tables import Filters
from jaxff.ops.distance import distance_bwd, distance_fwd, distance_reference
from jaxff.ops.message import gated_message_bwd, gated_message_fwd, gated_message_reference
from jaxff.ops.mlp import Layers, matmul, mlp_bwd, mlp_fwd, mlp_reference, outer_sum
from jaxff.ops.radial import (
    bessel_edge_features_bwd,
    bessel_edge_features_fwd,
    bessel_edge_features_reference,
)
from jaxff.ops.readout import readout_bwd, readout_fwd, readout_reference
from jaxff.ops.repulsion import zbl_bwd, zbl_fwd, zbl_reference
from jaxff.ops.update import (
    equivariant_update_bwd,
    equivariant_update_fwd,
    equivariant_update_reference,
)
from jaxff.system import Pairs
from jaxff.units import covalent_radii


def leaves(config: PainnConfig) -> dict[str, Any]:
    """Shapes and initial values of all parameters."""
    f, k = config.hidden_dim, config.num_rbf
    xavier = nn.initializers.xavier_uniform()
    interactions = {
        f"interaction_{i}": {
            "gate": dense_leaves(f, f, 3 * f),
            "filter": dense_leaves(k, 3 * f),
            "update": dense_leaves(2 * f, f, 3 * f)
            | {"kernel_u": Leaf((f, f), xavier), "kernel_v": Leaf((f, f), xavier)},
        }
        for i in range(config.num_interactions)
    }
    return {
        "embedding": {"table": Leaf((config.max_z + 1, f), nn.initializers.normal(1.0))},
        **interactions,
        "readout": dense_leaves(f, f // 2, 1),
        "reference": {"energies": Leaf((config.max_z + 1,), constant(0.0))},
    }


def reference_atomic_energies(
    params: Params, config: PainnConfig, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, "N"]:
    """`atomic_energies` through plain functions, for autodiff to be compared with."""
    d, u = distance_reference(vectors)
    s = params["embedding"]["table"][numbers]
    v = jnp.zeros((s.shape[0], 3, s.shape[1]), s.dtype)
    for i, filters in enumerate(filters_reference(params, config, d)):
        layer = params[f"interaction_{i}"]
        x = mlp_reference(s, dense_layers(layer["gate"]))
        ds, dv = gated_message_reference(x, v, filters, u, pairs)
        s, v = equivariant_update_reference(s + ds, v + dv, *_update_weights(layer), config.vector_norm_epsilon)
    energies = readout_reference(s, dense_layers(params["readout"])) + params["reference"]["energies"][numbers]
    if config.repulsion == "zbl":
        energies = energies + _sum_halves(zbl_reference(d, *_zbl_elements(numbers, pairs, d.dtype)), pairs)
    return jnp.where(numbers > 0, energies, 0)


def filters_reference(params: Params, config: PainnConfig, d: Float[Array, "E"]) -> Filters:
    """Filters [E, 3F] of each interaction, φ(d) [kernel; bias] or from tables, by the plain primal. d: [E] Å."""
    if tables.is_tabulated(params):
        return tables.filters_reference(params, config, d)
    phi = bessel_edge_features_reference(d, config.num_rbf, config.cutoff)
    return [matmul(phi, kernel) for kernel in _filter_kernels(params, config)]


def filters_fwd(params: Params, config: PainnConfig, d: Float[Array, "E"]) -> tuple[Filters, Any]:
    """The filters with what `filters_bwd` needs."""
    if tables.is_tabulated(params):
        return tables.filters_fwd(params, config, d)
    phi, phi_residuals = bessel_edge_features_fwd(d, config.num_rbf, config.cutoff)
    kernels = _filter_kernels(params, config)
    return [matmul(phi, kernel) for kernel in kernels], (phi, phi_residuals, kernels)


def filters_bwd(config: PainnConfig, residuals: Any, filters_bar: Filters) -> tuple[Array, Params, Params]:
    """φ̄ = Σ_l W̄_l [kernel; bias]_lᵀ, and d̄ of it; with the cotangents of kernels and biases."""
    if isinstance(residuals, list):
        return tables.filters_bwd(config, residuals, filters_bar)
    phi, phi_residuals, kernels = residuals
    products = [matmul(bar, kernel.T) for bar, kernel in zip(filters_bar, kernels, strict=True)]
    (d_bar,) = bessel_edge_features_bwd(
        config.num_rbf, config.cutoff, phi_residuals, functools.reduce(operator.add, products)
    )
    trees = {}
    for i, bar in enumerate(filters_bar):
        kernel_bar = outer_sum(phi, bar)
        trees[f"interaction_{i}"] = {"dense_0": {"kernel": kernel_bar[:-1], "bias": kernel_bar[-1]}}
    return d_bar, trees, {}


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def atomic_energies(
    params: Params, config: PainnConfig, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, "N"]:
    """Atomic energies [N] in eV; their gradient is the chain of hand-written rules below.

    numbers: [N], 0 for padding atoms (energy 0); vectors: [E, 3] Å; pairs: those within the cutoff.
    """
    return reference_atomic_energies(params, config, numbers, vectors, pairs)


def forward(
    params: Params, config: PainnConfig, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> tuple[Float[Array, "N"], Any]:
    """atomic_energies with what `backward` needs."""
    (d, u), distance_residuals = distance_fwd(vectors)
    all_filters, filter_residuals = filters_fwd(params, config, d)
    s = params["embedding"]["table"][numbers]
    v = jnp.zeros((s.shape[0], 3, s.shape[1]), s.dtype)
    interactions = []
    for i, filters in enumerate(all_filters):
        layer = params[f"interaction_{i}"]
        x, gate_residuals = mlp_fwd(s, dense_layers(layer["gate"]))
        (ds, dv), message_residuals = gated_message_fwd(x, v, filters, u, pairs)
        (s, v), update_residuals = equivariant_update_fwd(
            s + ds, v + dv, *_update_weights(layer), config.vector_norm_epsilon
        )
        interactions.append((gate_residuals, message_residuals, update_residuals))
    energies, readout_residuals = readout_fwd(s, dense_layers(params["readout"]))
    energies = energies + params["reference"]["energies"][numbers]
    repulsion = None
    if config.repulsion == "zbl":
        more, repulsion = pair_repulsion(d, numbers, pairs)
        energies = energies + more
    shared = (distance_residuals, filter_residuals, v, numbers, pairs, params["embedding"])
    return jnp.where(numbers > 0, energies, 0), (shared, interactions, readout_residuals, repulsion)


def backward(config: PainnConfig, residuals: Any, e_bar: Float[Array, "N"]) -> tuple[Params, None, Array, None]:
    """The rules of readout, update, message, gate, filter, features, repulsion and distance, from the energies back."""
    shared, interactions, readout_residuals, repulsion = residuals
    distance_residuals, filter_residuals, v, numbers, pairs, embedding = shared
    e_bar = jnp.where(numbers > 0, e_bar, 0)
    s_bar, readout_layers = readout_bwd(readout_residuals, e_bar)
    v_bar, u_bar = jnp.zeros_like(v), jnp.zeros_like(distance_residuals[0])
    layers_bar, filters_bar = {}, []
    for i in reversed(range(config.num_interactions)):
        gate_residuals, message_residuals, update_residuals = interactions[i]
        s_bar, v_bar, *update_bar = equivariant_update_bwd(config.vector_norm_epsilon, update_residuals, (s_bar, v_bar))
        x_bar, v_sent, filter_bar, u_more, _ = gated_message_bwd(message_residuals, (s_bar, v_bar))
        s_more, gate_layers = mlp_bwd(gate_residuals, x_bar)
        s_bar, v_bar, u_bar = s_bar + s_more, v_bar + v_sent, u_bar + u_more
        filters_bar.append(filter_bar)
        layers_bar[f"interaction_{i}"] = _interaction_tree(gate_layers, update_bar)
    d_bar, filter_trees, params_bar = filters_bwd(config, filter_residuals, filters_bar[::-1])
    for name, layer_bar in layers_bar.items():
        params_bar[name] = layer_bar | {"filter": filter_trees[name]}
    params_bar["readout"] = dense_tree(readout_layers)
    table = embedding["table"]
    params_bar["embedding"] = {"table": jnp.zeros_like(table).at[numbers].add(s_bar)}
    params_bar["reference"] = {"energies": jnp.zeros_like(table[:, 0]).at[numbers].add(e_bar)}
    if repulsion is not None:
        d_bar = d_bar + pair_repulsion_bwd(repulsion, e_bar, pairs)
    (vectors_bar,) = distance_bwd(0.0, distance_residuals, (d_bar, u_bar))
    return params_bar, None, vectors_bar, None


atomic_energies.defvjp(forward, backward)


def _filter_kernels(params: Params, config: PainnConfig) -> list[Float[Array, "K+1 3F"]]:
    """[kernel; bias] of each interaction: the last feature is the cutoff function itself."""
    layers = [params[f"interaction_{i}"]["filter"]["dense_0"] for i in range(config.num_interactions)]
    return [jnp.concatenate([layer["kernel"], layer["bias"][None]]) for layer in layers]


def _update_weights(layer: Params) -> tuple[Layers, Array, Array]:
    weights = dict(layer["update"])
    kernel_u, kernel_v = weights.pop("kernel_u"), weights.pop("kernel_v")
    return dense_layers(weights), kernel_u, kernel_v


def _interaction_tree(gate: Layers, update: list[Any]) -> Params:
    layers, kernel_u, kernel_v = update
    return {
        "gate": dense_tree(gate),
        "update": dense_tree(layers) | {"kernel_u": kernel_u, "kernel_v": kernel_v},
    }


def pair_repulsion(d: Float[Array, "E"], numbers: Int[Array, "N"], pairs: Pairs) -> tuple[Float[Array, "N"], Any]:
    """The repulsion's part of the atomic energies, with what `pair_repulsion_bwd` needs."""
    pair_energies, residuals = zbl_fwd(d, *_zbl_elements(numbers, pairs, d.dtype))
    return _sum_halves(pair_energies, pairs), residuals


def pair_repulsion_bwd(
    residuals: Any, e_bar: Float[Array, "N"], pairs: Pairs, *, antisymmetric: bool = False
) -> Float[Array, "E"]:
    """d̄ of each pair, ē_i/2 of the zbl; `antisymmetric` adds that of its reverse, ē_j/2."""
    half = pairs.at_receivers(e_bar) / 2
    if antisymmetric:
        half = half + pairs.at_senders(e_bar) / 2
    return zbl_bwd(residuals, jnp.where(pairs.mask, half, 0))[0]


def _zbl_elements(numbers: Array, pairs: Pairs, dtype: Any) -> tuple[Array, Array, Array]:
    """Both atomic numbers and the sum of covalent radii (Å) of each pair; padding counts as hydrogen."""
    z = jnp.maximum(numbers, 1)
    radii = jnp.asarray(np.nan_to_num(covalent_radii, nan=1.5), dtype)[z]
    z = z.astype(dtype)
    return pairs.at_receivers(z), pairs.at_senders(z), pairs.at_receivers(radii) + pairs.at_senders(radii)


def _sum_halves(pair_energies: Float[Array, "E"], pairs: Pairs) -> Float[Array, "N"]:
    """Half of each directed pair's energy to its receiver."""
    return pairs.sum_at_receivers(jnp.where(pairs.mask, pair_energies / 2, 0))


class Painn(nn.Module):
    """PaiNN's parameters and its atomic energies, as a Flax module."""

    config: PainnConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs) -> Float[Array, "N"]:
        params = declare(self, leaves(self.config), self.dtype)
        return atomic_energies(params, self.config, numbers, vectors, pairs)
