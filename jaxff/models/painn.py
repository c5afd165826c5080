"""PaiNN as published (Schütt, Unke, Gastegger 2021, arXiv:2102.03150), made smooth and given a wall.

Filters carry their bias through the cutoff function, so energy and forces are continuous; the norm in the update is
sqrt(|Vv|² + ε²) - ε, without a cone; a ZBL repulsion and reference energies of the elements can be added.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig
from jaxff.models.parameters import Leaf, Params, constant, declare, dense_layers, dense_leaves, dense_tree
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
    phi = bessel_edge_features_reference(d, config.num_rbf, config.cutoff)
    s = params["embedding"]["table"][numbers]
    v = jnp.zeros((s.shape[0], 3, s.shape[1]), s.dtype)
    for i in range(config.num_interactions):
        layer = params[f"interaction_{i}"]
        x = mlp_reference(s, dense_layers(layer["gate"]))
        ds, dv = gated_message_reference(x, v, matmul(phi, _filter_kernel(layer)), u, pairs)
        s, v = equivariant_update_reference(s + ds, v + dv, *_update_weights(layer), config.vector_norm_epsilon)
    energies = readout_reference(s, dense_layers(params["readout"])) + params["reference"]["energies"][numbers]
    if config.repulsion == "zbl":
        energies = energies + _sum_halves(zbl_reference(d, *_zbl_elements(numbers, pairs, d.dtype)), pairs)
    return jnp.where(numbers > 0, energies, 0)


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
    phi, phi_residuals = bessel_edge_features_fwd(d, config.num_rbf, config.cutoff)
    s = params["embedding"]["table"][numbers]
    v = jnp.zeros((s.shape[0], 3, s.shape[1]), s.dtype)
    interactions = []
    for i in range(config.num_interactions):
        layer = params[f"interaction_{i}"]
        x, gate_residuals = mlp_fwd(s, dense_layers(layer["gate"]))
        kernel = _filter_kernel(layer)
        (ds, dv), message_residuals = gated_message_fwd(x, v, matmul(phi, kernel), u, pairs)
        (s, v), update_residuals = equivariant_update_fwd(
            s + ds, v + dv, *_update_weights(layer), config.vector_norm_epsilon
        )
        interactions.append((gate_residuals, kernel, message_residuals, update_residuals))
    energies, readout_residuals = readout_fwd(s, dense_layers(params["readout"]))
    energies = energies + params["reference"]["energies"][numbers]
    repulsion = None
    if config.repulsion == "zbl":
        pair_energies, repulsion = zbl_fwd(d, *_zbl_elements(numbers, pairs, d.dtype))
        energies = energies + _sum_halves(pair_energies, pairs)
    shared = (distance_residuals, phi_residuals, phi, v, numbers, pairs, params["embedding"])
    return jnp.where(numbers > 0, energies, 0), (shared, interactions, readout_residuals, repulsion)


def backward(config: PainnConfig, residuals: Any, e_bar: Float[Array, "N"]) -> tuple[Params, None, Array, None]:
    """The rules of readout, update, message, gate, filter, features, repulsion and distance, from the energies back."""
    shared, interactions, readout_residuals, repulsion = residuals
    distance_residuals, phi_residuals, phi, v, numbers, pairs, embedding = shared
    e_bar = jnp.where(numbers > 0, e_bar, 0)
    s_bar, readout_layers = readout_bwd(readout_residuals, e_bar)
    v_bar, phi_bar, u_bar = jnp.zeros_like(v), jnp.zeros_like(phi), jnp.zeros_like(distance_residuals[0])
    params_bar: Params = {"readout": dense_tree(readout_layers)}
    for i in reversed(range(config.num_interactions)):
        gate_residuals, kernel, message_residuals, update_residuals = interactions[i]
        s_bar, v_bar, *update_bar = equivariant_update_bwd(config.vector_norm_epsilon, update_residuals, (s_bar, v_bar))
        x_bar, v_sent, filters_bar, u_more, _ = gated_message_bwd(message_residuals, (s_bar, v_bar))
        s_more, gate_layers = mlp_bwd(gate_residuals, x_bar)
        s_bar, v_bar, u_bar = s_bar + s_more, v_bar + v_sent, u_bar + u_more
        phi_bar = phi_bar + matmul(filters_bar, kernel.T)
        params_bar[f"interaction_{i}"] = _interaction_tree(gate_layers, outer_sum(phi, filters_bar), update_bar)
    table = embedding["table"]
    params_bar["embedding"] = {"table": jnp.zeros_like(table).at[numbers].add(s_bar)}
    params_bar["reference"] = {"energies": jnp.zeros_like(table[:, 0]).at[numbers].add(e_bar)}
    (d_bar,) = bessel_edge_features_bwd(config.num_rbf, config.cutoff, phi_residuals, phi_bar)
    if repulsion is not None:
        pair_bar = jnp.where(pairs.mask, pairs.at_receivers(e_bar) / 2, 0)
        d_bar = d_bar + zbl_bwd(repulsion, pair_bar)[0]
    (vectors_bar,) = distance_bwd(0.0, distance_residuals, (d_bar, u_bar))
    return params_bar, None, vectors_bar, None


def _forward_rule(params: Params, config: PainnConfig, *args: Any) -> tuple[Array, Any]:
    return forward(params, config, *args)


def _backward_rule(config: PainnConfig, residuals: Any, e_bar: Array) -> tuple[Params, None, Array, None]:
    return backward(config, residuals, e_bar)


atomic_energies.defvjp(_forward_rule, _backward_rule)


def _filter_kernel(layer: Params) -> Float[Array, "K+1 3F"]:
    """[kernel; bias]: the last feature is the cutoff function itself."""
    return jnp.concatenate([layer["filter"]["dense_0"]["kernel"], layer["filter"]["dense_0"]["bias"][None]])


def _update_weights(layer: Params) -> tuple[Layers, Array, Array]:
    weights = dict(layer["update"])
    kernel_u, kernel_v = weights.pop("kernel_u"), weights.pop("kernel_v")
    return dense_layers(weights), kernel_u, kernel_v


def _interaction_tree(gate: Layers, filter_kernel: Array, update: list[Any]) -> Params:
    layers, kernel_u, kernel_v = update
    return {
        "gate": dense_tree(gate),
        "filter": {"dense_0": {"kernel": filter_kernel[:-1], "bias": filter_kernel[-1]}},
        "update": dense_tree(layers) | {"kernel_u": kernel_u, "kernel_v": kernel_v},
    }


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
