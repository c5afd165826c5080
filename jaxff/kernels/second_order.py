"""Second derivatives of the fused energy, by reverse mode over the rules of jaxff.models on the same tables."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxff import models
from jaxff.kernels import chain
from jaxff.models.parameters import Params
from jaxff.ops import within_cutoff
from jaxff.system import Pairs


def transpose(
    config: Any,
    plain: Params,
    numbers: Array,
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
    e_bar: Float[Array, "N"] | None,
    g_bar: Float[Array, "E 3"],
) -> tuple[Float[Array, "E 3"], Float[Array, "N"] | None]:
    """Cotangents of vectors and ē, where g = P dE/dr with P the antisymmetriser of `antisymmetrise`.

    Without ē it is 1, and has no cotangent.

    The vectors' cotangent is antisymmetrised too: vectors come antisymmetric from positions, so that changes nothing,
    and whoever sums it at the receivers alone gets the same.
    """
    pairs = within_cutoff(vectors, pairs, chain.within(config))

    def gradients(vectors: Array, e_bar: Array | None) -> Array:
        def energy(r: Array) -> Array:
            energies = models.atomic_energies(plain, config, numbers, r, pairs)
            return jnp.sum(energies if e_bar is None else e_bar * energies)

        return jax.grad(energy)(vectors)

    _, pullback = jax.vjp(gradients, vectors, e_bar)
    vectors_bar, e_bar_bar = pullback(antisymmetrise(g_bar, pairs))
    return antisymmetrise(vectors_bar, pairs), e_bar_bar


def antisymmetrise(x: Float[Array, "E 3"], pairs: Pairs) -> Float[Array, "E 3"]:
    """(x_e - x_rev(e)) / 2 of a symmetric list without double pairs; 0 where masked."""
    n = pairs.num_atoms
    masked = jnp.where(pairs.mask[:, None], x, 0)
    if pairs.layout == "all":
        return (masked - masked.reshape(n, n, 3).swapaxes(0, 1).reshape(-1, 3)) / 2
    slots = pairs.mask.shape[0] // n
    senders = jnp.where(pairs.mask, pairs.senders, -1).reshape(n, slots)
    receivers = jnp.repeat(jnp.arange(n, dtype=senders.dtype), slots, total_repeat_length=n * slots)
    place = jnp.argmax(senders[pairs.senders] == receivers[:, None], axis=1)
    reverse = masked[pairs.senders * slots + place.astype(senders.dtype)]
    return jnp.where(pairs.mask[:, None], (masked - reverse) / 2, 0)
