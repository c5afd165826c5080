"""Pure functions with their gradients by hand: the primal, its reference, and its rule stand side by side."""

from jaxff.ops.distance import accumulate_forces, distance, within_cutoff
from jaxff.ops.message import gated_message, message
from jaxff.ops.mlp import Dense, mlp
from jaxff.ops.radial import (
    bessel_basis,
    bessel_edge_features,
    cosine_cutoff,
    cosine_cutoff_gradient,
    edge_features,
    edge_features_gradient,
    gaussian_basis,
    gaussian_basis_gradient,
)
from jaxff.ops.readout import readout
from jaxff.ops.repulsion import zbl
from jaxff.ops.table import interpolate
from jaxff.ops.update import equivariant_update, update

__all__ = [
    "Dense",
    "accumulate_forces",
    "bessel_basis",
    "bessel_edge_features",
    "cosine_cutoff",
    "cosine_cutoff_gradient",
    "distance",
    "edge_features",
    "edge_features_gradient",
    "equivariant_update",
    "gated_message",
    "gaussian_basis",
    "gaussian_basis_gradient",
    "interpolate",
    "message",
    "mlp",
    "readout",
    "update",
    "within_cutoff",
    "zbl",
]
