"""Updates: how scalar and vector features of one atom mix, and the gradient of that by hand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxff.ops.distance import divide_or_zero, safe_norm
from jaxff.ops.mlp import Layers, matmul, mlp_bwd, mlp_fwd, mlp_reference, outer_sum

# --- student: a 3x3 matrix mixes the Cartesian axes (and breaks rotation invariance) ----------------------------------


def update_reference(
    s: Float[Array, "N F"], v: Float[Array, "N 3 F"], layers: Layers, mixing_matrix: Float[Array, "3 3"]
) -> tuple[Float[Array, "N F"], Float[Array, "N 3 F"]]:
    """The plain primal of `update`."""
    gates = mlp_reference(jnp.concatenate([s, safe_norm(v, axis=1)], axis=1), layers)
    a, g1, g2 = jnp.split(gates, 3, axis=1)
    return s + a, v * g1[:, None, :] + _mix(mixing_matrix, v) * g2[:, None, :]


@jax.custom_vjp
def update(
    s: Float[Array, "N F"], v: Float[Array, "N 3 F"], layers: Layers, mixing_matrix: Float[Array, "3 3"]
) -> tuple[Float[Array, "N F"], Float[Array, "N 3 F"]]:
    """The student's update: n = |v|, (a, g1, g2) = mlp([s, n]), s' = s + a, v' = v g1 + (M v) g2.

    s: [N, F]; v: [N, 3, F]; layers: kernels [2F, F] and [F, 3F]; mixing_matrix M: [3, 3]. dn/dv = 0 at v = 0.
    """
    return update_reference(s, v, layers, mixing_matrix)


def update_fwd(s: Array, v: Array, layers: Layers, mixing_matrix: Array) -> tuple[tuple[Array, Array], Any]:
    """update with what its backward needs."""
    n = safe_norm(v, axis=1)
    gates, mlp_residuals = mlp_fwd(jnp.concatenate([s, n], axis=1), layers)
    a, g1, g2 = jnp.split(gates, 3, axis=1)
    w = _mix(mixing_matrix, v)
    return (s + a, v * g1[:, None, :] + w * g2[:, None, :]), (v, n, w, g1, g2, mlp_residuals, mixing_matrix)


def update_bwd(residuals: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Array, Layers, Array]:
    """With w = M v and y = v̄' g2:

    [ā, ḡ1, ḡ2] = [s̄', Σ_c v̄'_c v_c, Σ_c v̄'_c w_c],  [s̄₊, n̄] = mlp backward of it,
    s̄ = s̄' + s̄₊,  v̄ = v̄' g1 + Mᵀ y + n̄ v/n,  M̄_ck = Σ y_c v_k.
    """
    v, n, w, g1, g2, mlp_residuals, mixing_matrix = residuals
    s_bar, v_bar = cotangents
    gates_bar = jnp.concatenate([s_bar, jnp.sum(v_bar * v, axis=1), jnp.sum(v_bar * w, axis=1)], axis=1)
    z_bar, layers_bar = mlp_bwd(mlp_residuals, gates_bar)
    s_more, n_bar = jnp.split(z_bar, 2, axis=1)
    y = v_bar * g2[:, None, :]
    v_in = v_bar * g1[:, None, :] + _mix(mixing_matrix.T, y) + divide_or_zero(v, n[:, None, :]) * n_bar[:, None, :]
    mixing_bar = jnp.einsum("ncf,nkf->ck", y, v, precision=jax.lax.Precision.HIGHEST)
    return s_bar + s_more, v_in, layers_bar, mixing_bar


update.defvjp(update_fwd, update_bwd)


def _mix(matrix: Float[Array, "3 3"], v: Float[Array, "N 3 F"]) -> Float[Array, "N 3 F"]:
    return jnp.einsum("ck,nkf->ncf", matrix, v, precision=jax.lax.Precision.HIGHEST)


# --- PaiNN: two matrices mix the channels, which commutes with rotations ----------------------------------------------


def equivariant_update_reference(
    s: Float[Array, "N F"],
    v: Float[Array, "N 3 F"],
    layers: Layers,
    kernel_u: Float[Array, "F F"],
    kernel_v: Float[Array, "F F"],
    epsilon: float,
) -> tuple[Float[Array, "N F"], Float[Array, "N 3 F"]]:
    """The plain primal of `equivariant_update`."""
    uv, vv = matmul(v, kernel_u), matmul(v, kernel_v)
    n = _smooth_norm(vv, epsilon)
    a_ss, a_sv, a_vv = jnp.split(mlp_reference(jnp.concatenate([s, n], axis=1), layers), 3, axis=1)
    return s + a_ss + a_sv * jnp.sum(uv * vv, axis=1), v + a_vv[:, None, :] * uv


def _smooth_norm(x: Float[Array, "N 3 F"], epsilon: float) -> Float[Array, "N F"]:
    """sqrt(|x|² + ε²) - ε over the axes; ε = 0 is the norm."""
    if epsilon == 0:
        return safe_norm(x, axis=1)
    return jnp.sqrt(jnp.sum(x * x, axis=1) + epsilon**2) - epsilon


def _equivariant_update(
    s: Array, v: Array, layers: Layers, kernel_u: Array, kernel_v: Array, epsilon: float
) -> tuple[Array, Array]:
    """PaiNN's update (arXiv:2102.03150, eqs. 9, 10): n = |Vv|, (a_ss, a_sv, a_vv) = mlp([s, n]),

    s' = s + a_ss + a_sv <Uv, Vv>,  v' = v + a_vv Uv.  The norm is sqrt(|Vv|² + ε²) - ε, smooth at Vv = 0 for ε > 0.
    s: [N, F]; v: [N, 3, F]; layers: kernels [2F, F] and [F, 3F]; kernel_u, kernel_v: [F, F] acting on channels.
    """
    return equivariant_update_reference(s, v, layers, kernel_u, kernel_v, epsilon)


equivariant_update = jax.custom_vjp(_equivariant_update, nondiff_argnums=(5,))


def equivariant_update_fwd(
    s: Array, v: Array, layers: Layers, kernel_u: Array, kernel_v: Array, epsilon: float
) -> tuple[tuple[Array, Array], Any]:
    """equivariant_update with what its backward needs."""
    uv, vv = matmul(v, kernel_u), matmul(v, kernel_v)
    n = _smooth_norm(vv, epsilon)
    gates, mlp_residuals = mlp_fwd(jnp.concatenate([s, n], axis=1), layers)
    a_ss, a_sv, a_vv = jnp.split(gates, 3, axis=1)
    dot = jnp.sum(uv * vv, axis=1)
    out = s + a_ss + a_sv * dot, v + a_vv[:, None, :] * uv
    return out, (v, uv, vv, n, dot, a_sv, a_vv, mlp_residuals, kernel_u, kernel_v)


def equivariant_update_bwd(
    epsilon: float, residuals: Any, cotangents: tuple[Array, Array]
) -> tuple[Array, Array, Layers, Array, Array]:
    """[ā_ss, ā_sv, ā_vv] = [s̄', s̄' <Uv, Vv>, Σ_c v̄'_c (Uv)_c],  [s̄₊, n̄] = mlp backward of it,  h = s̄' a_sv,

    (Uv)‾ = v̄' a_vv + h Vv,  (Vv)‾ = h Uv + n̄ Vv/(n + ε),  v̄ = v̄' + (Uv)‾ Uᵀ + (Vv)‾ Vᵀ,
    Ū = Σ v ⊗ (Uv)‾,  V̄ = Σ v ⊗ (Vv)‾.
    """
    v, uv, vv, n, dot, a_sv, a_vv, mlp_residuals, kernel_u, kernel_v = residuals
    s_bar, v_bar = cotangents
    gates_bar = jnp.concatenate([s_bar, s_bar * dot, jnp.sum(v_bar * uv, axis=1)], axis=1)
    z_bar, layers_bar = mlp_bwd(mlp_residuals, gates_bar)
    s_more, n_bar = jnp.split(z_bar, 2, axis=1)
    h = (s_bar * a_sv)[:, None, :]
    uv_bar = v_bar * a_vv[:, None, :] + h * vv
    vv_bar = h * uv + divide_or_zero(vv, (n + epsilon)[:, None, :]) * n_bar[:, None, :]
    v_in = v_bar + matmul(uv_bar, kernel_u.T) + matmul(vv_bar, kernel_v.T)
    return s_bar + s_more, v_in, layers_bar, outer_sum(v, uv_bar), outer_sum(v, vv_bar)


equivariant_update.defvjp(equivariant_update_fwd, equivariant_update_bwd)
