"""Dense layers with SiLU between them, and their gradient by hand.

Matrix products run at `highest` precision: JAX's default on recent GPUs is TF32, which costs parity and heats NVE.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Dense(NamedTuple):
    """One layer x -> x kernel + bias."""

    kernel: Float[Array, "in out"]
    bias: Float[Array, "out"]


Layers = tuple[Dense, ...]


def matmul(x: Float[Array, "... in"], kernel: Float[Array, "in out"]) -> Float[Array, "... out"]:
    """x kernel at full float32 precision."""
    return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)


def outer_sum(x: Float[Array, "... in"], y: Float[Array, "... out"]) -> Float[Array, "in out"]:
    """sum over all leading axes of x ⊗ y: the cotangent of a kernel."""
    return matmul(x.reshape(-1, x.shape[-1]).T, y.reshape(-1, y.shape[-1]))


def silu_slope(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """d silu/dx = σ(x) (1 + x (1 - σ(x)))."""
    sigma = jax.nn.sigmoid(x)
    return sigma * (1 + x * (1 - sigma))


def mlp_reference(x: Float[Array, "... in"], layers: Layers) -> Float[Array, "... out"]:
    """The plain primal of `mlp`."""
    return mlp_fwd(x, layers)[0]


@jax.custom_vjp
def mlp(x: Float[Array, "... in"], layers: Layers) -> Float[Array, "... out"]:
    """Dense layers with SiLU between them: h_0 = x, z_l = h_l K_l + b_l, h_{l+1} = silu(z_l); the last z is returned.

    x: [..., in]; layers: `Dense` tuples, each kernel [in, out]. Returns [..., out].
    """
    return mlp_reference(x, layers)


def mlp_fwd(
    x: Float[Array, "... in"], layers: Layers
) -> tuple[Float[Array, "... out"], tuple[list[Array], list[Array], Layers]]:
    """mlp with what its backward needs: inputs h_l and pre-activations z_l of each layer."""
    inputs: list[Array] = []
    pre: list[Array] = []
    for i, (kernel, bias) in enumerate(layers):
        inputs.append(x if i == 0 else jax.nn.silu(pre[-1]))
        pre.append(matmul(inputs[-1], kernel) + bias)
    return pre[-1], (inputs, pre, layers)


def mlp_bwd(
    residuals: tuple[list[Array], list[Array], Layers], z_bar: Float[Array, "... out"]
) -> tuple[Float[Array, "... in"], Layers]:
    """K̄_l = Σ h_l ⊗ z̄_l,  b̄_l = Σ z̄_l,  h̄_l = z̄_l K_lᵀ,  z̄_{l-1} = h̄_l silu'(z_{l-1})."""
    inputs, pre, layers = residuals
    layers_bar: list[Dense] = []
    h_bar = z_bar
    for i in reversed(range(len(layers))):
        kernel, bias = layers[i]
        layers_bar.append(Dense(outer_sum(inputs[i], z_bar), z_bar.reshape(-1, bias.shape[0]).sum(axis=0)))
        h_bar = matmul(z_bar, kernel.T)
        if i:
            z_bar = h_bar * silu_slope(pre[i - 1])
    return h_bar, tuple(reversed(layers_bar))


mlp.defvjp(mlp_fwd, mlp_bwd)
