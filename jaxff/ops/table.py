"""Functions of the distance as tables: piecewise cubic polynomials, and their gradient by hand."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def _locate(
    d: Float[Array, "E"], coefficients: Float[Array, "T 4 C"], cutoff: float
) -> tuple[Int[Array, "E"], Float[Array, "E"]]:
    """Interval and place in it, 0 <= t <= 1; beyond the cutoff, the table's end."""
    x = jnp.clip(d, 0, cutoff) * (coefficients.shape[0] / cutoff)
    interval = jnp.clip(jax.lax.stop_gradient(x).astype(jnp.int32), 0, coefficients.shape[0] - 1)
    return interval, x - interval.astype(d.dtype)


def interpolate_reference(
    d: Float[Array, "E"], coefficients: Float[Array, "T 4 C"], cutoff: float
) -> Float[Array, "E C"]:
    """The plain primal of `interpolate`."""
    interval, t = _locate(d, coefficients, cutoff)
    c0, c1, c2, c3 = (jnp.squeeze(c, 1) for c in jnp.split(coefficients[interval], 4, axis=1))
    t = t[:, None]
    return c0 + t * (c1 + t * (c2 + t * c3))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def interpolate(d: Float[Array, "E"], coefficients: Float[Array, "T 4 C"], cutoff: float) -> Float[Array, "E C"]:
    """w(d) = c0 + t (c1 + t (c2 + t c3)), with the interval k = floor(T d / cutoff) and t = T d / cutoff - k.

    d: [E] Å; coefficients: [T, 4, C], T equal intervals over [0, cutoff] (jaxff.tabulate makes them). Beyond the
    cutoff, the value there. Returns [E, C]. The gradient is that of the interpolant itself, to second order.
    """
    return interpolate_reference(d, coefficients, cutoff)


def interpolate_fwd(
    d: Float[Array, "E"], coefficients: Float[Array, "T 4 C"], cutoff: float
) -> tuple[Float[Array, "E C"], tuple[Array, Array, Array, Array]]:
    """interpolate with its slope dw/dd = (c1 + t (2 c2 + 3 t c3)) T / cutoff."""
    interval, t = _locate(d, coefficients, cutoff)
    c0, c1, c2, c3 = (jnp.squeeze(c, 1) for c in jnp.split(coefficients[interval], 4, axis=1))
    inside = ((d >= 0) & (d <= cutoff))[:, None]
    s = t[:, None]
    slope = jnp.where(inside, (c1 + s * (2 * c2 + 3 * s * c3)) * (coefficients.shape[0] / cutoff), 0)
    return c0 + s * (c1 + s * (c2 + s * c3)), (slope, interval, t, coefficients)


def interpolate_bwd(
    cutoff: float, residuals: tuple[Array, Array, Array, Array], w_bar: Float[Array, "E C"]
) -> tuple[Float[Array, "E"], Float[Array, "T 4 C"]]:
    """d̄ = Σ_c w̄ dw/dd,  c̄_n = Σ_e t^n w̄ in the interval of each e."""
    slope, interval, t, coefficients = residuals
    powers = t[:, None] ** jnp.arange(4, dtype=t.dtype)
    c_bar = jnp.zeros_like(coefficients).at[interval].add(powers[:, :, None] * w_bar[:, None, :])
    return jnp.sum(w_bar * slope, axis=1), c_bar


interpolate.defvjp(interpolate_fwd, interpolate_bwd)
