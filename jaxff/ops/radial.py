"""Radial functions, the cutoff, and edge features (their product), each with its derivative by hand.

An elementwise rule keeps its slope as the residual, so that its backward is one product and second order is
reverse mode through the slope.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxff.ops.distance import distance_reference, divide_or_zero

# --- Gaussians, as in the student --------------------------------------------------------------------------------


def gaussian_basis_reference(
    d: Float[Array, "E"], centers: Float[Array, "K"], widths: Float[Array, "K"]
) -> Float[Array, "E K"]:
    """The plain primal of `gaussian_basis`."""
    return jnp.exp(-(((d[:, None] - centers) / widths) ** 2))


@jax.custom_vjp
def gaussian_basis(d: Float[Array, "E"], centers: Float[Array, "K"], widths: Float[Array, "K"]) -> Float[Array, "E K"]:
    """Gaussians g_k(d) = exp(-(d - μ_k)² / w_k²).

    d: [E] Å; centers μ and widths w: [K] Å. Returns [E, K].
    """
    return gaussian_basis_reference(d, centers, widths)


def gaussian_basis_fwd(
    d: Float[Array, "E"], centers: Float[Array, "K"], widths: Float[Array, "K"]
) -> tuple[Array, tuple[Array, Array, Array]]:
    """gaussian_basis with what its backward needs."""
    x = (d[:, None] - centers) / widths
    g = gaussian_basis_reference(d, centers, widths)
    return g, (g, x, widths)


def gaussian_basis_bwd(residuals: tuple[Array, Array, Array], g_bar: Float[Array, "E K"]) -> tuple[Array, Array, Array]:
    """With x = (d - μ)/w:  d̄ = Σ_k ḡ g (-2x/w),  μ̄ = -Σ_e ḡ g (-2x/w),  w̄ = Σ_e ḡ g 2x²/w."""
    g, x, widths = residuals
    slope = g_bar * g * (-2 * x / widths)
    return slope.sum(axis=1), -slope.sum(axis=0), -(slope * x).sum(axis=0)


gaussian_basis.defvjp(gaussian_basis_fwd, gaussian_basis_bwd)


# --- spherical Bessel functions, as in PaiNN -----------------------------------------------------------------------


def bessel_basis_reference(d: Float[Array, "E"], num_rbf: int, cutoff: float) -> Float[Array, "E K"]:
    """The plain primal of `bessel_basis`."""
    k = jnp.arange(1, num_rbf + 1, dtype=d.dtype) * (math.pi / cutoff)
    return k * jnp.sinc(k * d[:, None] / math.pi)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bessel_basis(d: Float[Array, "E"], num_rbf: int, cutoff: float) -> Float[Array, "E K"]:
    """b_n(d) = sin(k_n d) / d with k_n = n π / cutoff, n = 1..K; b_n(0) = k_n (arXiv:2102.03150, eq. 10).

    d: [E] Å. Returns [E, K] in 1/Å.
    """
    return bessel_basis_reference(d, num_rbf, cutoff)


def bessel_basis_fwd(d: Float[Array, "E"], num_rbf: int, cutoff: float) -> tuple[Array, Array]:
    """bessel_basis with its slope b' = (k cos(k d) - b) / d, which is 0 at d = 0."""
    b = bessel_basis_reference(d, num_rbf, cutoff)
    k = jnp.arange(1, num_rbf + 1, dtype=d.dtype) * (math.pi / cutoff)
    return b, divide_or_zero(k * jnp.cos(k * d[:, None]) - b, d[:, None])


def bessel_basis_bwd(num_rbf: int, cutoff: float, slope: Array, b_bar: Float[Array, "E K"]) -> tuple[Array]:
    """d̄ = Σ_n b̄_n b'_n."""
    return (jnp.sum(b_bar * slope, axis=1),)


bessel_basis.defvjp(bessel_basis_fwd, bessel_basis_bwd)


# --- the cutoff -----------------------------------------------------------------------------------------------------


def cosine_cutoff_reference(d: Float[Array, "E"], cutoff: float) -> Float[Array, "E"]:
    """The plain primal of `cosine_cutoff`."""
    return jnp.where(d < cutoff, 0.5 * (jnp.cos(d * (math.pi / cutoff)) + 1), 0)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def cosine_cutoff(d: Float[Array, "E"], cutoff: float) -> Float[Array, "E"]:
    """f(d) = (cos(π d / cutoff) + 1) / 2 below the cutoff, 0 from there on (Behler 2011). d: [E] Å."""
    return cosine_cutoff_reference(d, cutoff)


def cosine_cutoff_fwd(d: Float[Array, "E"], cutoff: float) -> tuple[Array, Array]:
    """cosine_cutoff with its slope f' = -π/(2 cutoff) sin(π d / cutoff)."""
    slope = jnp.where(d < cutoff, (-0.5 * math.pi / cutoff) * jnp.sin(d * (math.pi / cutoff)), 0)
    return cosine_cutoff_reference(d, cutoff), slope


def cosine_cutoff_bwd(cutoff: float, slope: Array, f_bar: Float[Array, "E"]) -> tuple[Array]:
    """d̄ = f̄ f'."""
    return (f_bar * slope,)


cosine_cutoff.defvjp(cosine_cutoff_fwd, cosine_cutoff_bwd)


# --- edge features: the product rule ----------------------------------------------------------------------------------


def edge_features_reference(
    d: Float[Array, "E"], centers: Float[Array, "K"], widths: Float[Array, "K"], cutoff: float
) -> Float[Array, "E K"]:
    """The plain primal of `edge_features`."""
    return gaussian_basis_reference(d, centers, widths) * cosine_cutoff_reference(d, cutoff)[:, None]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def edge_features(
    d: Float[Array, "E"], centers: Float[Array, "K"], widths: Float[Array, "K"], cutoff: float
) -> Float[Array, "E K"]:
    """The student's features φ_k(d) = g_k(d) f(d). d: [E] Å. Returns [E, K]."""
    return edge_features_reference(d, centers, widths, cutoff)


def edge_features_fwd(
    d: Float[Array, "E"], centers: Float[Array, "K"], widths: Float[Array, "K"], cutoff: float
) -> tuple[Array, Any]:
    """edge_features with the residuals of its two factors."""
    g, g_residuals = gaussian_basis_fwd(d, centers, widths)
    f, f_slope = cosine_cutoff_fwd(d, cutoff)
    return g * f[:, None], (g, g_residuals, f, f_slope)


def edge_features_bwd(cutoff: float, residuals: Any, phi_bar: Float[Array, "E K"]) -> tuple[Array, Array, Array]:
    """φ = g f:  ḡ = φ̄ f,  f̄ = Σ_k φ̄ g,  d̄ = Σ_k ḡ g' + f̄ f'."""
    g, g_residuals, f, f_slope = residuals
    d_bar, centers_bar, widths_bar = gaussian_basis_bwd(g_residuals, phi_bar * f[:, None])
    (d_bar_cutoff,) = cosine_cutoff_bwd(cutoff, f_slope, jnp.sum(phi_bar * g, axis=1))
    return d_bar + d_bar_cutoff, centers_bar, widths_bar


edge_features.defvjp(edge_features_fwd, edge_features_bwd)


def bessel_edge_features_reference(d: Float[Array, "E"], num_rbf: int, cutoff: float) -> Float[Array, "E K+1"]:
    """The plain primal of `bessel_edge_features`."""
    f = cosine_cutoff_reference(d, cutoff)[:, None]
    return jnp.concatenate([bessel_basis_reference(d, num_rbf, cutoff) * f, f], axis=1)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def bessel_edge_features(d: Float[Array, "E"], num_rbf: int, cutoff: float) -> Float[Array, "E K+1"]:
    """PaiNN's features [b_1 f, ..., b_K f, f]: the last column carries the filters' bias through the cutoff.

    A filter (b k + bias) f is then one product with [k; bias], and vanishes with its slope at the cutoff.
    d: [E] Å. Returns [E, K + 1].
    """
    return bessel_edge_features_reference(d, num_rbf, cutoff)


def bessel_edge_features_fwd(d: Float[Array, "E"], num_rbf: int, cutoff: float) -> tuple[Array, Any]:
    """bessel_edge_features with its slope, by the product rule."""
    b, b_slope = bessel_basis_fwd(d, num_rbf, cutoff)
    f, f_slope = (x[:, None] for x in cosine_cutoff_fwd(d, cutoff))
    return jnp.concatenate([b * f, f], axis=1), jnp.concatenate([b_slope * f + b * f_slope, f_slope], axis=1)


def bessel_edge_features_bwd(num_rbf: int, cutoff: float, slope: Array, phi_bar: Array) -> tuple[Array]:
    """d̄ = Σ φ̄ φ',  φ' = [b'_n f + b_n f', f']."""
    return (jnp.sum(phi_bar * slope, axis=1),)


bessel_edge_features.defvjp(bessel_edge_features_fwd, bessel_edge_features_bwd)


# --- gradients with respect to atom positions, for those who want them alone -----------------------------------------


def _gradient(d_slope: Float[Array, "E ..."], vectors: Float[Array, "E 3"]) -> Float[Array, "E 3 ..."]:
    direction = distance_reference(vectors)[1]
    return direction.reshape(*direction.shape, *([1] * (d_slope.ndim - 1))) * d_slope[:, None]


def gaussian_basis_gradient(
    vectors: Float[Array, "E 3"], centers: Float[Array, "K"], widths: Float[Array, "K"]
) -> Float[Array, "E 3 K"]:
    """dg_k/dR of the pair's sender, [E, 3, K] in 1/Å; the receiver's is its negative.

    vectors: [E, 3] Å, R[sender] - R[receiver]; centers, widths: [K] Å. Zero at zero distance.
    """
    d = distance_reference(vectors)[0]
    slope = gaussian_basis_reference(d, centers, widths) * (-2 * (d[:, None] - centers) / widths**2)
    return _gradient(slope, vectors)


def cosine_cutoff_gradient(vectors: Float[Array, "E 3"], cutoff: float) -> Float[Array, "E 3"]:
    """df/dR of the pair's sender, [E, 3] in 1/Å; the receiver's is its negative. vectors: [E, 3] Å."""
    return _gradient(cosine_cutoff_fwd(distance_reference(vectors)[0], cutoff)[1], vectors)


def edge_features_gradient(
    vectors: Float[Array, "E 3"], centers: Float[Array, "K"], widths: Float[Array, "K"], cutoff: float
) -> Float[Array, "E 3 K"]:
    """dφ_k/dR of the pair's sender by the product rule g' f + g f', [E, 3, K] in 1/Å; the receiver's is its negative.

    vectors: [E, 3] Å, R[sender] - R[receiver]; centers, widths: [K] Å; cutoff in Å.
    """
    d = distance_reference(vectors)[0]
    g = gaussian_basis_reference(d, centers, widths)
    f = cosine_cutoff_reference(d, cutoff)
    return (
        gaussian_basis_gradient(vectors, centers, widths) * f[:, None, None]
        + g[:, None, :] * cosine_cutoff_gradient(vectors, cutoff)[:, :, None]
    )
