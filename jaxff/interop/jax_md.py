"""A Potential as jax-md energy functions, for jax_md.simulate, minimize and quantity as they are.

`jax.grad` of them runs the model's hand-written rules; second order works by reverse mode, as in
jax.jacrev(jax.grad(energy_fn)). The vector of a pair is r_e = R[sender] - R[receiver] =
displacement(R[sender], R[receiver]), and the energy depends on vectors alone, so periodic spaces work through
jax-md's minimum-image displacements (jaxff.interop.spaces refuses the boxes that are too small for them).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxff.errors import ConfigError, StructureError
from jaxff.interop.later import import_jax_md
from jaxff.interop.spaces import box_is_too_small, refuse_small_box
from jaxff.potential import Potential
from jaxff.system import Layout, Pairs

import_jax_md()
from jax_md import partition  # noqa: E402

# jax-md keeps distances < radius, squared and rounded; the model's edges end at the cutoff, inclusive
LIST_MARGIN = 1e-3  # Å

Displacement = Callable[..., Array]
EnergyFn = Callable[..., Array]


def energy(potential: Potential, numbers: Any, displacement: Displacement, *, per_particle: bool = False) -> EnergyFn:
    """`energy_fn(R, **kwargs)` over all N² pairs: right for N up to a few hundred.

    `numbers` [N] are the atomic numbers, R [N, 3] positions in Å (fractional, if `displacement` takes those);
    kwargs go to `displacement` (box=, perturbation=). Returns a scalar in eV, or [N] with `per_particle`.

    Raises StructureError for unknown elements, another shape of R, and a periodic box below twice the cutoff;
    ConfigError for a float64 potential without x64. A traced `box=` that shrinks below that gives NaN.
    """
    model = _PairModel(potential, numbers, displacement)
    pairs = _all_pairs(len(model.numbers))

    def energy_fn(R: Array, **kwargs: Any) -> Array:
        return model.energy(R, pairs, kwargs, per_particle)

    return energy_fn


def energy_neighbor_list(
    displacement: Displacement,
    box: Any,
    potential: Potential,
    numbers: Any,
    dr_threshold: float = 0.5,
    fractional_coordinates: bool = False,
    format: partition.NeighborListFormat = partition.Dense,
    *,
    per_particle: bool = False,
    **neighbor_kwargs: Any,
) -> tuple[partition.NeighborListFns, EnergyFn]:
    """`(neighbor_fn, energy_fn)` by the conventions of jax_md.energy.*_neighbor_list.

    `energy_fn(R, neighbor=nbrs, **kwargs)` takes lists that `neighbor_fn.allocate(R)` made and
    `nbrs.update(R)` renewed, in any of jax-md's three formats; their overflow flag is jax-md's own.
    `neighbor_kwargs` are those of jax_md.partition.neighbor_list. Results and errors are those of `energy`.
    """
    unknown = set(neighbor_kwargs) - set(inspect.signature(partition.neighbor_list).parameters)
    if unknown:
        raise TypeError(f"jax_md.partition.neighbor_list has no argument {sorted(unknown)[0]!r}")
    model = _PairModel(potential, numbers, displacement)
    symmetric = neighbor_kwargs.get("custom_mask_function") is None
    neighbor_fn = partition.neighbor_list(
        displacement,
        box,
        potential.config.cutoff + LIST_MARGIN,
        dr_threshold,
        fractional_coordinates=fractional_coordinates,
        format=format,
        **neighbor_kwargs,
    )

    def energy_fn(R: Array, neighbor: partition.NeighborList, **kwargs: Any) -> Array:
        return model.energy(R, _listed_pairs(neighbor, len(model.numbers), symmetric), kwargs, per_particle)

    return neighbor_fn, energy_fn


class _PairModel:
    """Energies as a function of positions and pairs in one jax-md space."""

    def __init__(self, potential: Potential, numbers: Any, displacement: Displacement) -> None:
        _check_x64(potential)
        # only the numbers are at hand yet; the positions are whatever jax-md makes of them
        self.numbers, _ = potential.check(numbers, np.zeros((np.size(numbers), 3)))
        self.potential, self.displacement = potential, displacement
        self.is_difference = _is_difference(displacement)
        self.box_was_checked = self.is_difference or refuse_small_box(displacement, potential.config.cutoff)

    def energy(self, R: Array, pairs: Pairs, kwargs: dict[str, Any], per_particle: bool = False) -> Array:
        """In eV, of all or [N] of each particle; NaN where a traced box is too small for the minimum image."""
        _check_x64(self.potential)
        if jnp.shape(R) != (len(self.numbers), 3):
            raise StructureError(f"expected positions of shape [{len(self.numbers)}, 3], received {list(jnp.shape(R))}")
        plain = self.is_difference and not kwargs and not per_particle
        if plain and jnp.result_type(R) == self.potential.dtype and self.potential.serves_positions(pairs):
            return self.potential.energy_of_positions(jnp.asarray(self.numbers), jnp.asarray(R), pairs)
        displacement = partial(self.displacement, **kwargs)
        antisymmetric = self.potential.gradients_are_antisymmetric(pairs)
        vectors = _pair_vectors(displacement, jnp.asarray(R), pairs, antisymmetric).astype(self.potential.dtype)
        if pairs.layout != "all":
            vectors = _computed_once(vectors)
        evaluate = self.potential.atomic_energies_of_vectors if per_particle else self.potential.energy_of_vectors
        energy = evaluate(jnp.asarray(self.numbers), vectors, pairs)
        if self.box_was_checked and not {"box", "new_box"} & set(kwargs):
            return energy
        wrong = box_is_too_small(displacement, self.potential.config.cutoff)
        return energy * jnp.where(wrong, jnp.nan, 1.0).astype(energy.dtype)


def _is_difference(displacement: Displacement) -> bool:
    """Whether displacement(a, b) is a - b and nothing else, as jax_md.space.free has it."""
    point = jax.ShapeDtypeStruct((3,), jnp.float32)
    try:
        traced = jax.make_jaxpr(displacement)(point, point).jaxpr
    except TypeError:  # it needs more than two positions
        return False
    return [e.primitive.name for e in traced.eqns] == ["sub"] and (
        traced.eqns[0].invars == traced.invars and traced.eqns[0].outvars == traced.outvars
    )


def _check_x64(potential: Potential) -> None:
    if jax.dtypes.canonicalize_dtype(potential.dtype) != potential.dtype:
        raise ConfigError(
            "expected jax_enable_x64 for a float64 potential, received it switched off: call"
            ' jax.config.update("jax_enable_x64", True) first, or load the potential with dtype="float32"'
        )


@jax.custom_jvp
def _computed_once(x: Array) -> Array:
    """x, which XLA would otherwise compute anew in each kernel that reads it."""
    return jax.lax.optimization_barrier(x)


@_computed_once.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    return _computed_once(*primals), *tangents


def _pair_vectors(
    displacement: Displacement, R: Float[Array, "N 3"], pairs: Pairs, antisymmetric: bool = False
) -> Float[Array, "E 3"]:
    """r_e = displacement(R[sender], R[receiver]), exactly opposite for the two directions of a pair.

    Wrapping into a box rounds differently for the two signs, so both directions are computed with the larger
    index first: |r_e| then agrees to the last bit, and both edges of a pair pass the cutoff together.

    Where gradients of the vectors are known to be `antisymmetric`, the transpose is a sum at one end, twice: no
    scatter, and the same bits in every run. Of all pairs at the senders: a GPU's threads then read side by side.
    """
    if antisymmetric:
        still = jax.lax.stop_gradient(R)
        at_senders, at_receivers = (R + (R - still), still) if pairs.layout == "all" else (still, R + (R - still))
        sender, receiver = pairs.at_senders(at_senders), pairs.at_receivers(at_receivers)
    else:
        sender, receiver = pairs.at_senders(R), pairs.at_receivers(R)
    forward = (pairs.senders > pairs.receivers)[:, None]
    first, second = jnp.where(forward, sender, receiver), jnp.where(forward, receiver, sender)
    vectors = jax.vmap(displacement)(first, second)
    return jnp.where(forward, vectors, -vectors)


def _all_pairs(n: int) -> Pairs:
    receivers, senders = np.divmod(np.arange(n * n, dtype=np.int32), np.int32(n))
    senders, receivers, mask = jax.device_put((senders, receivers, senders != receivers))
    return Pairs(senders, receivers, mask, n, "all", symmetric=True)


def _listed_pairs(neighbor: partition.NeighborList, n: int, symmetric: bool) -> Pairs:
    """The pairs of a jax-md list. Free slots hold the index N: they become masked self-pairs."""
    index = neighbor.idx.astype(jnp.int32)
    if not partition.is_sparse(neighbor.format):
        receivers = jnp.repeat(jnp.arange(n, dtype=jnp.int32), index.shape[1], total_repeat_length=index.size)
        senders = index.reshape(-1)
    elif neighbor.format is partition.Sparse:
        senders, receivers = index[0], index[1]
    else:
        senders, receivers = jnp.concatenate(index), jnp.concatenate(index[::-1])
    valid = (senders < n) & (receivers < n)
    receivers = jnp.minimum(receivers, n - 1)
    senders = jnp.where(valid, senders, receivers)
    layout: Layout = "edges" if partition.is_sparse(neighbor.format) else "slots"
    return Pairs(senders, receivers, valid & (senders != receivers), n, layout, symmetric)
