"""Distance and direction of pair vectors, and the way back to forces."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxff.system import Pairs


def safe_norm(x: Float[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """|x| along an axis, with all derivatives 0 at x = 0 (as PyTorch's norm has its first)."""
    return safe_root(jnp.sum(x * x, axis=axis))


def safe_root(square: Float[Array, "..."]) -> Float[Array, "..."]:
    """√x, with all derivatives 0 at 0."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def divide_or_zero(x: Float[Array, "..."], y: Float[Array, "..."]) -> Float[Array, "..."]:
    """x / y, and 0 where y is 0."""
    nonzero = y != 0
    return jnp.where(nonzero, x / jnp.where(nonzero, y, 1), 0)


def distance_reference(
    vectors: Float[Array, "E 3"], epsilon: float = 0.0
) -> tuple[Float[Array, "E"], Float[Array, "E 3"]]:
    """The plain primal of `distance`."""
    d = safe_norm(vectors)
    return d, divide_or_zero(vectors, (d + epsilon)[:, None])


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def distance(vectors: Float[Array, "E 3"], epsilon: float = 0.0) -> tuple[Float[Array, "E"], Float[Array, "E 3"]]:
    """Distances d = |r| and directions u = r / (d + ε); the student has ε = 1e-8 Å, PaiNN 0.

    vectors: [E, 3] Å. Returns d [E] Å and u [E, 3]. At r = 0: d = 0, u = 0, and dd/dr = 0.
    """
    return distance_reference(vectors, epsilon)


def distance_fwd(vectors: Float[Array, "E 3"], epsilon: float = 0.0) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """distance with what its backward needs."""
    d, u = distance_reference(vectors, epsilon)
    return (d, u), (vectors, d)


def distance_bwd(
    epsilon: float, residuals: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Float[Array, "E 3"]]:
    """With e = r/d and t = 1/(d + ε):  r̄ = d̄ e + t ū - t² (r·ū) e."""
    vectors, d = residuals
    d_bar, u_bar = cotangents
    e = divide_or_zero(vectors, d[:, None])
    t = divide_or_zero(jnp.ones_like(d), d + epsilon)
    along = jnp.sum(vectors * u_bar, axis=-1)
    return ((d_bar - t * t * along)[:, None] * e + t[:, None] * u_bar,)


distance.defvjp(distance_fwd, distance_bwd)


def within_cutoff(vectors: Float[Array, "E 3"], pairs: Pairs, cutoff: float) -> Pairs:
    """The pairs, of which those count that did and are within the cutoff (Å), inclusive; no derivative passes."""
    square = jnp.sum(jax.lax.stop_gradient(vectors) ** 2, axis=1)
    return replace(pairs, mask=pairs.mask & (jnp.sqrt(square) <= cutoff))


def accumulate_forces(
    vector_gradients: Float[Array, "E 3"], pairs: Pairs, *, antisymmetric: bool = False
) -> Float[Array, "N 3"]:
    """Forces from edge gradients: F_i = Σ_{e received by i} g_e - Σ_{e sent by i} g_e, with g_e = dE/dr_e.

    Since r_e = R[sender] - R[receiver], each g_e enters twice with opposite signs: the net force is zero to rounding.
    `antisymmetric` promises that each pair's gradient is minus that of its reverse, as the fused engine's are: twice
    the first sum is then enough, and no scatter is left.
    vector_gradients: [E, 3] eV/Å. Returns [N, 3] eV/Å.
    """
    g = jnp.where(pairs.mask[:, None], vector_gradients, 0)
    if antisymmetric:
        return 2 * pairs.sum_at_receivers(g)
    return pairs.sum_at_receivers(g) - pairs.sum_at_senders(g)
