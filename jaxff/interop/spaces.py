"""Is the minimum-image convention right for a jax-md space and a cutoff?

jax-md wraps a separation into the box, so that a pair sees one of the periodic images of an atom. No other
image lies within the cutoff only if the box is at least twice the cutoff high along each face normal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxff.errors import StructureError

DIRECTIONS = 4096
STEP = 1.0 / 64.0  # well inside any box, and a power of two


def refuse_small_box(displacement: Callable[..., Array], cutoff: float) -> bool:
    """StructureError if `displacement` wraps separations that are shorter than `cutoff` (Å).

    Returns whether that could be told: not for a box that is traced.
    """
    with jax.ensure_compile_time_eval():
        wrong = box_is_too_small(displacement, cutoff)
    if isinstance(wrong, jax.core.Tracer):
        return False
    if bool(wrong):
        raise StructureError(
            f"expected a periodic box of at least {2 * cutoff:g} Å (twice the cutoff) along each face normal,"
            " received a smaller one: the minimum image would miss neighbours"
        )
    return True


def box_is_too_small(displacement: Callable[..., Array], cutoff: float) -> Bool[Array, ""]:
    """Whether `displacement(Ra, Rb)` wraps a separation anywhere on the sphere of radius `cutoff` (Å).

    No box is needed: near zero, displacement(x, 0) = J x, with J = 1 for real coordinates and the box for
    fractional ones. A direction u is not wrapped if displacement(J⁻¹ cutoff u, 0) = cutoff u. The face
    normals of fractional and of rectangular boxes are among the directions, so these boxes are judged to 1e-4
    of the cutoff, skew boxes in real coordinates to 1e-3.
    """
    origin = jnp.zeros(3)
    J = jnp.stack([displacement(STEP * axis, origin) for axis in jnp.eye(3)], axis=1) / STEP
    J_inverse = _inverse(jax.lax.stop_gradient(J))
    normals = J_inverse / jnp.linalg.norm(J_inverse, axis=1, keepdims=True)
    sphere = jnp.asarray(_sphere(DIRECTIONS), dtype=J.dtype)
    wanted = (1.0 - 1e-4) * cutoff * jnp.concatenate([normals, -normals, sphere])
    found = jax.vmap(lambda x: displacement(x, origin))(wanted @ J_inverse.T)
    error = jnp.abs(jax.lax.stop_gradient(found) - wanted).max()
    return ~(error < 0.1 * cutoff)


def _inverse(m: Float[Array, "3 3"]) -> Float[Array, "3 3"]:
    """M⁻¹ by cross products of M's columns: no solver call in a simulation step."""
    a, b, c = m.T
    rows = jnp.stack([jnp.cross(b, c), jnp.cross(c, a), jnp.cross(a, b)])
    return rows / jnp.dot(a, rows[0])


def _sphere(n: int) -> Float[np.ndarray, "n 3"]:
    """n directions, evenly spread (Fibonacci's spiral), and the three axes, both ways."""
    k: Any = np.arange(n) + 0.5
    z, angle = 1.0 - 2.0 * k / n, np.pi * (1.0 + np.sqrt(5.0)) * k
    radius = np.sqrt(1.0 - z * z)
    spiral = np.stack([radius * np.cos(angle), radius * np.sin(angle), z], axis=1)
    return np.concatenate([np.eye(3), -np.eye(3), spiral])
