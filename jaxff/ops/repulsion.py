"""Short-range repulsion of nuclei: Ziegler, Biersack, Littmark (ZBL, 1985), switched off at the covalent distance."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxff.units import Bohr, Hartree

_AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.02817)
_DECAYS = (3.19980, 0.94229, 0.40290, 0.20162)
_COULOMB = Hartree * Bohr  # e²/(4 π ε0) in eV Å
_SCREENING = 0.8854 * Bohr  # Å
_POWER = 6
_CLOSEST = 0.01  # Å; closer nuclei count as this far apart, which keeps energies finite


def zbl_reference(
    d: Float[Array, "E"], z_i: Float[Array, "E"], z_j: Float[Array, "E"], r_max: Float[Array, "E"]
) -> Float[Array, "E"]:
    """The plain primal of `zbl`."""
    return zbl_fwd(d, z_i, z_j, r_max)[0]


@jax.custom_vjp
def zbl(
    d: Float[Array, "E"], z_i: Float[Array, "E"], z_j: Float[Array, "E"], r_max: Float[Array, "E"]
) -> Float[Array, "E"]:
    """Pair energies (eV): k Z_i Z_j / d  φ(d/a)  c(d/r_max).

    φ(x) = Σ A_m exp(-B_m x),  a = 0.8854 a0/(Z_i^0.23 + Z_j^0.23),
    c(x) = 1 - 28 x⁶ + 48 x⁷ - 21 x⁸ for x < 1, else 0, has two continuous derivatives at x = 1.
    d: [E] Å; z_i, z_j: [E] atomic numbers as floats; r_max: [E] Å, the sum of covalent radii. Differentiable in d only.
    """
    return zbl_reference(d, z_i, z_j, r_max)


def zbl_fwd(d: Array, z_i: Array, z_j: Array, r_max: Array) -> tuple[Array, Array]:
    """zbl with its slope: E = k Z Z φ c / d,  E' = k Z Z ((φ'/a - φ/d) c + φ c'/r_max) / d."""
    inside = d > _CLOSEST
    d = jnp.where(inside, d, _CLOSEST)
    inverse_a = (z_i**0.23 + z_j**0.23) / _SCREENING
    terms = [(a * jnp.exp(-b * d * inverse_a), b) for a, b in zip(_AMPLITUDES, _DECAYS, strict=True)]
    phi = sum(t for t, _ in terms)
    phi_slope = -inverse_a * sum(t * b for t, b in terms)
    x = jnp.minimum(d / r_max, 1)
    p = _POWER
    c = 1 - (p + 1) * (p + 2) / 2 * x**p + p * (p + 2) * x ** (p + 1) - p * (p + 1) / 2 * x ** (p + 2)
    c_slope = -p * (p + 1) * (p + 2) / 2 * x ** (p - 1) * (1 - x) ** 2 / r_max
    front = _COULOMB * z_i * z_j / d
    slope = front * ((phi_slope - phi / d) * c + phi * c_slope)
    return front * phi * c, jnp.where(inside, slope, 0)


def zbl_bwd(slope: Array, e_bar: Float[Array, "E"]) -> tuple[Array, None, None, None]:
    """d̄ = ē E'."""
    return e_bar * slope, None, None, None


zbl.defvjp(zbl_fwd, zbl_bwd)
