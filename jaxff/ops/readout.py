"""Readout: atomic energies from scalar features."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

from jaxff.ops.mlp import Layers, mlp_bwd, mlp_fwd, mlp_reference


def readout_reference(s: Float[Array, "N F"], layers: Layers) -> Float[Array, "N"]:
    """The plain primal of `readout`."""
    return mlp_reference(s, layers)[:, 0]


@jax.custom_vjp
def readout(s: Float[Array, "N F"], layers: Layers) -> Float[Array, "N"]:
    """Atomic energies e_i = mlp(s_i). s: [N, F]; the last kernel is [*, 1]. Returns [N] eV."""
    return readout_reference(s, layers)


def readout_fwd(s: Float[Array, "N F"], layers: Layers) -> tuple[Float[Array, "N"], Any]:
    """readout with what its backward needs."""
    energies, residuals = mlp_fwd(s, layers)
    return energies[:, 0], residuals


def readout_bwd(residuals: Any, e_bar: Float[Array, "N"]) -> tuple[Float[Array, "N F"], Layers]:
    """s̄ = mlp backward of ē."""
    return mlp_bwd(residuals, e_bar[:, None])


readout.defvjp(readout_fwd, readout_bwd)
