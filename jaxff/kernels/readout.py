"""The readout and its slope in one kernel: e_i = mlp(s_i) and de_i/ds_i, a block of atoms in a program."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from jaxff.kernels.dense import ATOMS, dot, silu, silu_slope
from jaxff.kernels.message import Launch
from jaxff.ops.mlp import Layers
from jaxff.ops.readout import readout_bwd, readout_fwd


def readout(s: Float[Array, "N F"], layers: Layers, how: Launch) -> tuple[Float[Array, "N"], Float[Array, "N F"]]:
    """Atomic energies [N] in eV and their slopes [N, F]; through XLA where layers don't fit and under vmap."""

    if not (how.dense and fits(layers)):
        return _plain(s, layers)
    # everything traced is an argument: custom_vmap closes over no tracers
    tiled = jax.custom_batching.custom_vmap(partial(_tiled, how.interpret))

    @tiled.def_vmap
    def _(size: int, batched: Any, s: Array, layers: Layers) -> tuple[tuple[Array, Array], tuple[bool, bool]]:
        axes = jax.tree.map(lambda x: 0 if x else None, batched)
        return jax.vmap(_plain, in_axes=tuple(axes), axis_size=size)(s, layers), (True, True)

    return tiled(s, layers)


def _plain(s: Array, layers: Layers) -> tuple[Array, Array]:
    energies, residuals = readout_fwd(s, layers)
    return energies, readout_bwd(residuals, jnp.ones_like(energies))[0]


def _tiled(interpret: bool, s: Array, layers: Layers) -> tuple[Array, Array]:
    n, f = s.shape
    weights = [x for kernel, bias in layers[:-1] for x in (kernel, kernel.T, bias[None])]
    final, offset = layers[-1]
    energies, slopes = pl.pallas_call(
        partial(_kernel, n, f, len(layers) - 1),
        out_shape=(jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((n, f), jnp.float32)),
        grid=(-(-n // ATOMS),),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        name="readout",
    )(s, *weights, final.T)
    return energies + offset[0], slopes


def fits(layers: Layers) -> bool:
    """Whether the kernel takes these layers: sizes between them are powers of 2, 16 or more."""
    sizes = [size for kernel, _ in layers for size in kernel.shape][:-1]
    return all(size >= 16 and size & (size - 1) == 0 for size in sizes)


def _kernel(n: int, f: int, depth: int, s: Any, *refs: Any) -> None:
    *weights, final, energies, slopes = refs
    atoms = pl.program_id(0) * np.int32(ATOMS) + jnp.arange(ATOMS, dtype=jnp.int32)
    channels = jnp.arange(f, dtype=jnp.int32)
    inside = (atoms < n)[:, None]
    x = triton.load(s.at[atoms[:, None], channels[None, :]], mask=inside, other=0)
    pre = []
    for i in range(depth):
        kernel, _, bias = weights[3 * i : 3 * i + 3]
        pre.append(dot(x, kernel[...]) + bias[...])
        x = silu(pre[-1])
    triton.store(energies.at[atoms], jnp.sum(x * final[...], axis=1), mask=atoms < n)
    x_bar = jnp.broadcast_to(final[...], x.shape)
    for i in reversed(range(depth)):
        x_bar = dot(x_bar * silu_slope(pre[i]), weights[3 * i + 1][...])
    triton.store(slopes.at[atoms[:, None], channels[None, :]], x_bar, mask=inside)
