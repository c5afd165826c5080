"""Predictions of a batch, the loss, and the errors that people read.

Forces come from the hand-written rules; the loss is differentiated once more by reverse mode through them.
Sums and counts are kept apart, so that batches of several devices make one mean.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxff import models
from jaxff.config import PainnConfig, StudentConfig
from jaxff.models.parameters import Params
from jaxff.ops.distance import accumulate_forces, divide_or_zero, safe_norm
from jaxff.system import Pairs
from jaxff.train.batches import Batch
from jaxff.train.config import LossConfig, LossTerm

Sums = dict[str, Array]


def predict(
    params: Params, config: PainnConfig | StudentConfig, batch: Batch
) -> tuple[Float[Array, "B"], Float[Array, "N 3"]]:
    """Energies [B] eV and forces [N, 3] eV/Å of one device's batch (no leading axis D); 0 for padding."""
    n = batch.numbers.shape[0]
    mask = batch.receivers != n - 1
    # not marked as symmetric: the sums at senders then share what was gathered, 4 % less to move
    pairs = Pairs(batch.senders, batch.receivers, mask, n, "edges")
    vectors = batch.positions[batch.senders] - batch.positions[batch.receivers]
    atomic, gradients = models.energies_and_vector_gradients(params, config, batch.numbers, vectors, pairs)
    energies = jax.ops.segment_sum(atomic, batch.frames, batch.energies.shape[0], indices_are_sorted=True)
    return energies, accumulate_forces(gradients, pairs)


def counts(batch: Batch, config: LossConfig) -> Sums:
    """What the sums of `loss_sums` are divided by: frames, force components, atoms with a direction."""
    kind = batch.energies.dtype
    return {
        "frames": jnp.sum(batch.atoms > 0, dtype=kind),
        "components": 3 * jnp.sum(batch.numbers > 0, dtype=kind),
        "directions": jnp.sum(_has_direction(batch, config), dtype=kind),
    }


def loss_sums(energies: Float[Array, "B"], forces: Float[Array, "N 3"], batch: Batch, config: LossConfig) -> Sums:
    """Sums over a batch: the terms of the loss, and absolute and squared errors (eV/atom, eV/Å)."""
    per_atom = divide_or_zero(energies - batch.energies, batch.atoms)
    difference = forces - batch.forces
    sums = {
        "energy_loss": jnp.sum(penalty(per_atom, config.energy)),
        "force_loss": jnp.sum(penalty(difference, config.force)),
        "energy_absolute": jnp.sum(jnp.abs(per_atom)),
        "force_absolute": jnp.sum(jnp.abs(difference)),
        "energy_squared": jnp.sum(per_atom**2),
        "force_squared": jnp.sum(difference**2),
    }
    if config.angular_weight > 0:
        lengths = safe_norm(forces) * safe_norm(batch.forces)
        cosine = divide_or_zero(jnp.sum(forces * batch.forces, axis=-1), lengths)
        sums["angular_loss"] = jnp.sum(jnp.where(_has_direction(batch, config), 1 - cosine, 0))
    return sums


def total_loss(sums: Sums, totals: Sums, config: LossConfig) -> Float[Array, ""]:
    """weight_E mean energy term + weight_F mean force term + weight_a mean (1 - cos)."""
    loss = config.energy.weight * divide_or_zero(sums["energy_loss"], totals["frames"])
    loss = loss + config.force.weight * divide_or_zero(sums["force_loss"], totals["components"])
    if config.angular_weight > 0:
        loss = loss + config.angular_weight * divide_or_zero(sums["angular_loss"], totals["directions"])
    return loss


def penalty(x: Float[Array, "..."], term: LossTerm) -> Float[Array, "..."]:
    """x², |x|, or their join: x²/(2δ) for |x| < δ, |x| - δ/2 beyond."""
    if term.kind == "mse":
        return x * x
    if term.kind == "mae":
        return jnp.abs(x)
    size = jnp.abs(x)
    inner = jnp.minimum(size, term.delta)
    return inner * inner / (2 * term.delta) + (size - inner)


def by_element(forces: Float[Array, "N 3"], batch: Batch, max_z: int) -> Sums:
    """Sums of |force error| and numbers of components for each atomic number, [max_z + 1]."""
    size = jnp.sum(jnp.abs(forces - batch.forces), axis=1)
    real = (batch.numbers > 0).astype(size.dtype)
    return {
        "element_absolute": jax.ops.segment_sum(size * real, batch.numbers, max_z + 1),
        "element_components": jax.ops.segment_sum(3 * real, batch.numbers, max_z + 1),
    }


def _has_direction(batch: Batch, config: LossConfig) -> Array:
    return (batch.numbers > 0) & (safe_norm(batch.forces) >= config.angular_min_force)
