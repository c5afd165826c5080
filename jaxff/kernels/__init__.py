"""The fused engine: kernels for symmetric pair lists, float32, tabulated filters.

On a GPU a small molecule, and up to 16 of 21 atoms by PaiNN, have one CUDA kernel for all of it (from compute
capability 9.0 on), few atoms have Pallas kernels (Triton backend), and many CUDA kernels (jaxff.kernels.cuda), or,
where those can't be had, Pallas kernels and XLA's products; on a CPU, Numba's (jaxff.kernels.native) and products too.
Imported only when chosen. The functions have the signatures of jaxff.models, on `FusedTree`s. The GPU's kernels run on
a CPU, too, interpreted and slowly: that is how they are tested.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels import batches, chain, second_order
from jaxff.kernels.message import SOME_ATOMS, Launch, Route
from jaxff.models.parameters import Params
from jaxff.ops import accumulate_forces
from jaxff.system import Pairs

__all__ = [
    "FusedTree",
    "atomic_energies",
    "energies_and_vector_gradients",
    "energy",
    "energy_of_positions",
    "prepare",
    "serves",
    "serves_positions",
    "why_not",
]

Config = StudentConfig | PainnConfig
FEW_ATOMS = 128
CUT_ATOMS = 1024  # of a system with a list: of so few, blocks of phases have some channels each, so that there are more
FEW_SLOTS = 32  # of an atom: filters of so few pairs come faster from tables than from tensor cores
MANY_ATOMS = 2048  # of small molecules, from which on filters come faster from tensor cores
MOST_SLOTS = 1024  # whose order fits into a multiprocessor's shared memory
INDEX_LIMIT = 2**31  # of the numbers in an array that a CUDA kernel reads
PARTS = 4  # programs that serve an atom, of few
# channels of a message program, and pairs at once; of many atoms, forward and backward
FEW, MANY, MANY_BACK = (32, 32), (32, 8), (128, 1)


@partial(jax.tree_util.register_dataclass, data_fields=["fused", "plain"], meta_fields=["route"])
@dataclass(frozen=True)
class FusedTree:
    """A tabulated parameter tree as the kernels read it, and as it is, for second derivatives; and what runs them."""

    fused: Params
    plain: Params
    route: Route


def prepare(tree: Params, config: Config, route: Route | None = None, cuda: bool | None = None) -> FusedTree:
    """What the kernels need of a tabulated tree in float32 (jaxff.tabulate).

    cuda: whether CUDA kernels serve many atoms; None: where they can be compiled. Models that don't fit go without.
    """
    if route is None:
        route = "triton" if jax.default_backend() == "gpu" else "native"
    if cuda is None:
        obstacle = _why_no_cuda() if route == "triton" else ""
        if obstacle:
            warnings.warn(f"CUDA kernels are not used: {obstacle}; slower ones serve many atoms", stacklevel=2)
        cuda = obstacle is None
    return FusedTree(chain.prepare(tree, config, cuda), tree, route)


def _why_no_cuda() -> str | None:
    from jaxff.kernels.cuda import launch

    return launch.why_not()


def why_not(config: Config) -> str | None:
    """Why the fused engine can't serve this model here, or None if it can. ImportError where a library is missing."""
    if jax.default_backend() == "cpu":
        from jaxff.kernels import native

        return native.why_not()
    if jax.default_backend() != "gpu":
        return f"it needs a GPU or a CPU, and JAX runs on the {jax.default_backend()}"
    if "cuda" not in jax.devices()[0].client.platform_version.lower():
        return "it was made for CUDA devices"
    if config.hidden_dim % 16:
        return f"it needs a hidden_dim that is a multiple of 16, and this model has {config.hidden_dim}"
    return None


def serves(pairs: Pairs) -> bool:
    """Whether the kernels take these pairs, of which those count that are within the cutoff.

    They sum at receivers without a scatter, transposed by symmetry.
    """
    return pairs.symmetric and pairs.layout != "edges"


def atomic_energies(
    tree: FusedTree, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, "N"]:
    """Atomic energies [N] in eV. Parameters get no gradient here: this engine serves inference.

    The gradient by `vectors` comes from the kernels, antisymmetrised: (g_e - g_rev(e)) / 2. Second order by reverse
    mode goes through jaxff.models.
    """
    return _evaluate(tree, config, numbers, vectors, pairs)[0]


def energy(
    tree: FusedTree, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, ""]:
    """Energy in eV, the sum of `atomic_energies`: atoms weigh alike, and no kernel has to multiply by their weights."""
    return _energy(_BY_VECTORS, tree, config, numbers, vectors, pairs)


def energies_and_vector_gradients(
    tree: FusedTree, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> tuple[Float[Array, "N"], Float[Array, "E 3"]]:
    """Atomic energies [N] (eV) and antisymmetrised dE/dr_e, [E, 3] (eV/Å)."""

    def run(launch: Launch, tree: FusedTree, numbers: Array, vectors: Array, pairs: Pairs) -> Any:
        args = tree.fused, config, numbers, vectors, pairs, _by_count(launch, tree, pairs)
        return chain.energies_and_gradients(*args, _of_message(config, MANY_BACK))

    return _one_or_many(run, config, pairs, (tree, numbers, vectors, pairs), MANY)


# --- the energy, whose gradient comes with it ---


class _Way(NamedTuple):
    """From vectors or positions x: energies, gradients of their sum if wanted; what a cotangent of those gives x."""

    evaluate: Callable[..., tuple[Array, Any]]  # (gradients, tree, config, numbers, x, pairs)
    transpose: Callable[..., Array]  # (tree, config, numbers, x, pairs, cotangent of the gradients)


@partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _energy(way: _Way, tree: FusedTree, config: Config, *args: Any) -> Float[Array, ""]:
    return way.evaluate(False, tree, config, *args)[0].sum()


def _energy_fwd(way: _Way, tree: FusedTree, config: Config, *args: Any) -> tuple[Array, Array]:
    return _energy_and_gradients(way, tree, config, *args)


def _energy_bwd(way: _Way, config: Config, gradients: Array, bar: Array) -> tuple[Any, ...]:
    return None, None, bar * gradients, None


_energy.defvjp(_energy_fwd, _energy_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0, 2))
def _energy_and_gradients(way: _Way, tree: FusedTree, config: Config, *args: Any) -> tuple[Array, Array]:
    energies, gradients = way.evaluate(True, tree, config, *args)
    return energies.sum(), gradients


def _energy_and_gradients_fwd(way: _Way, tree: FusedTree, config: Config, *args: Any) -> tuple[Any, tuple[Any, ...]]:
    results = _energy_and_gradients(way, tree, config, *args)  # decorated: this may be differentiated again
    return results, (results[1], tree, *args)


def _energy_and_gradients_bwd(
    way: _Way, config: Config, saved: tuple[Any, ...], bars: tuple[Array, Array]
) -> tuple[Any, ...]:
    gradients, tree, *args = saved
    energy_bar, gradients_bar = bars
    return None, None, energy_bar * gradients + way.transpose(tree, config, *args, gradients_bar), None


_energy_and_gradients.defvjp(_energy_and_gradients_fwd, _energy_and_gradients_bwd)


def _of_vectors(gradients: bool, tree: FusedTree, config: Config, *args: Any) -> tuple[Array, Any]:
    """Energies, and gradients by pair vectors if wanted."""
    if gradients:
        return energies_and_vector_gradients(tree, config, *args)

    def run(launch: Launch, tree: FusedTree, numbers: Array, vectors: Array, pairs: Pairs) -> Any:
        return chain.energies(tree.fused, config, numbers, vectors, pairs, _by_count(launch, tree, pairs))

    return _one_or_many(run, config, args[-1], (tree, *args), MANY), None


def _transpose_of_vectors(
    tree: FusedTree, config: Config, numbers: Array, vectors: Array, pairs: Pairs, bar: Array
) -> Array:
    return second_order.transpose(config, tree.plain, numbers, vectors, pairs, None, bar)[0]


# --- the same of positions, by one kernel ---


def energy_of_positions(
    tree: FusedTree, config: Config, numbers: Int[Array, "N"], positions: Float[Array, "N 3"], pairs: Pairs
) -> Float[Array, ""]:
    """Energy in eV of a molecule, of whose `pairs` (all) those count that are within the cutoff.

    Faster than `energy`, where one kernel does all of it: `serves_positions`.
    """
    return _energy(_BY_POSITIONS, tree, config, numbers, positions, pairs)


def serves_positions(tree: FusedTree, config: Config, pairs: Pairs) -> bool:
    """Whether one kernel takes positions to energies and gradients, for the pairs of a molecule or under vmap."""
    fits = pairs.layout == "all" and pairs.symmetric
    return fits and chain.one_kernel_serves(tree.fused, config, pairs.num_atoms)


def _of_positions(gradients: bool, tree: FusedTree, config: Config, *args: Any) -> tuple[Array, Any]:
    """Energies, and gradients by positions if wanted. Under vmap by one kernel for several, or as of pair vectors."""

    def by_one(tree: FusedTree, numbers: Array, positions: Array, pairs: Pairs) -> Any:
        return chain.energies_and_position_gradients(tree.fused, config, numbers, positions, pairs, gradients)

    def by_vectors(tree: FusedTree, numbers: Array, positions: Array, pairs: Pairs) -> Any:
        vectors = _vectors(positions, pairs)
        energies, by_pairs = _of_vectors(gradients, tree, config, numbers, vectors, pairs)
        return energies, -accumulate_forces(by_pairs, pairs, antisymmetric=True) if gradients else None

    def by_several(tree: FusedTree, numbers: Array, positions: Array, pairs: Pairs) -> Any:
        several = chain.energies_and_position_gradients_of_several
        return several(tree.fused, config, numbers, positions, pairs, gradients)

    def several(size: int) -> Callable[..., Any] | None:
        serves = chain.one_kernel_serves_several(tree.fused, config, args[-1].num_atoms, size)
        return by_several if serves else None

    # a repulsion needs pair vectors anyway, and there one kernel more is little
    alone = by_vectors if chain.has_repulsion(config) else by_one
    return _alone_or_batched(alone, by_vectors, several)(tree, *args)


def _transpose_of_positions(
    tree: FusedTree, config: Config, numbers: Array, positions: Array, pairs: Pairs, bar: Array
) -> Array:
    def of_vectors(positions: Array) -> Array:
        return energy(tree, config, numbers, _vectors(positions, pairs), pairs)

    return jax.vjp(jax.grad(of_vectors), positions)[1](bar)[0]


def _vectors(positions: Array, pairs: Pairs) -> Array:
    return pairs.at_senders(positions) - pairs.at_receivers(positions)


_BY_VECTORS = _Way(_of_vectors, _transpose_of_vectors)
_BY_POSITIONS = _Way(_of_positions, _transpose_of_positions)


# --- energies of atoms, whose gradient waits for their weights ---


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _evaluate(tree: FusedTree, config: Config, *args: Any) -> tuple[Array, Any]:
    """Energies, and what the backward needs; no cotangent of the latter counts."""
    return _forward(config, tree, *args)


def _evaluate_fwd(tree: FusedTree, config: Config, *args: Any) -> tuple[tuple[Array, Any], tuple[Any, ...]]:
    energies, residuals = _evaluate(tree, config, *args)  # decorated: this may be differentiated again
    return (energies, residuals), (residuals, tree, *args)


def _evaluate_bwd(config: Config, saved: tuple[Any, ...], cotangents: tuple[Array, Any]) -> tuple[Any, ...]:
    return None, None, _vector_gradients(config, *saved, cotangents[0]), None


_evaluate.defvjp(_evaluate_fwd, _evaluate_bwd)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _vector_gradients(
    config: Config, residuals: Any, tree: FusedTree, numbers: Array, vectors: Array, pairs: Pairs, e_bar: Array
) -> Float[Array, "E 3"]:
    """Of Σ ē_i E_i."""
    return _backward(config, tree, residuals, numbers, vectors, pairs, e_bar)


def _vector_gradients_fwd(config: Config, residuals: Any, *rest: Any) -> tuple[Array, tuple[Any, ...]]:
    return _vector_gradients(config, residuals, *rest), rest


def _vector_gradients_bwd(config: Config, saved: Any, g_bar: Array) -> tuple[Any, ...]:
    tree, numbers, vectors, pairs, e_bar = saved
    vectors_bar, e_bar_bar = second_order.transpose(config, tree.plain, numbers, vectors, pairs, e_bar, g_bar)
    return None, None, None, vectors_bar, None, e_bar_bar


_vector_gradients.defvjp(_vector_gradients_fwd, _vector_gradients_bwd)


def _forward(config: Config, *args: Any) -> tuple[Array, Any]:
    """chain.forward(tree, config, numbers, vectors, pairs, launch)."""

    def run(launch: Launch, tree: FusedTree, numbers: Array, vectors: Array, pairs: Pairs) -> Any:
        return chain.forward(tree.fused, config, numbers, vectors, pairs, _by_count(launch, tree, pairs))

    return _one_or_many(run, config, args[-1], args, MANY)


def _backward(config: Config, *args: Any) -> Float[Array, "E 3"]:
    """chain.backward(tree, config, residuals, numbers, vectors, pairs, e_bar, launch)."""

    def run(launch: Launch, tree: FusedTree, kept: Any, numbers: Array, *rest: Any) -> Any:
        vectors, pairs, e_bar = rest
        return chain.backward(tree.fused, config, kept, numbers, vectors, pairs, e_bar, _by_count(launch, tree, pairs))

    return _one_or_many(run, config, args[-2], args, MANY_BACK)


def _of_message(config: Config, block_and_slots: tuple[int, int]) -> tuple[int, int]:
    """Channels of a message program and pairs that it takes at once, for a model."""
    block, slots = block_and_slots
    return math.gcd(config.hidden_dim, block), slots


def _one_or_many(
    run: Callable[..., Any], config: Config, pairs: Pairs, args: tuple[Any, ...], message: tuple[int, int]
) -> Any:
    """run(launch, *args): for few atoms as one molecule wants it, under vmap as many do.

    Few atoms: one CUDA kernel, or programs for each (jaxff.kernels.programs). Many: CUDA kernels for them; without
    those and on a CPU XLA's products.
    """
    route, cuda = args[0].route, "cuda" in args[0].fused
    dense = pairs.layout == "all"
    arrays = Launch(*_of_message(config, message), 0, route, dense=dense)
    slots = pairs.mask.shape[-1] // max(1, pairs.num_atoms)
    lean = cuda and pairs.num_atoms > CUT_ATOMS  # of one system, whether or not it is in a batch
    launch = arrays._replace(cuda=cuda, lean=lean, route=_of_many(route, slots, dense) if cuda else route)
    if route == "native" or pairs.layout != "all" or pairs.num_atoms > FEW_ATOMS:
        return _many(run, launch, arrays, *args)
    one = chain.one_kernel_serves(args[0].fused, config, pairs.num_atoms)
    few = partial(run, Launch(*_of_message(config, FEW), PARTS, route, dense=True, one=one))
    many = partial(_many, run, launch._replace(lean=False), arrays)  # keeps what `few` does, as vmap wants it
    # everything traced is an argument: custom_vmap closes over no tracers
    return _alone_or_batched(few, many)(*args)


def _alone_or_batched(
    alone: Callable[..., Any],
    batched_one: Callable[..., Any],
    several: Callable[[int], Callable[..., Any] | None] = lambda size: None,
) -> Callable[..., Any]:
    """A function of a tree and more that is `alone`, and under vmap `batched_one` under vmap.

    several: of a number of systems with one tree, what takes them at once, if there is such a function.
    """
    either = jax.custom_batching.custom_vmap(alone)

    @either.def_vmap
    def _(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        at_once = None if any(jax.tree.leaves(batched[0])) else several(size)
        if at_once is None:
            out = _under_vmap(batched_one, size, batched, *args)
        else:
            full = batches.full(size, batched[1:], args[1:])
            each = jax.vmap(batched_one, in_axes=(None, *[0] * len(full)), axis_size=size)
            out = _alone_or_batched(at_once, each)(args[0], *full)
        return out, jax.tree.map(lambda _: True, out)

    return either


def _under_vmap(function: Callable[..., Any], size: int, batched: Any, *args: Any) -> Any:
    axes = jax.tree.map(lambda x: 0 if x else None, batched)
    return jax.vmap(function, in_axes=tuple(axes), axis_size=size)(*args)


def _of_many(route: Route, slots: int, dense: bool) -> Route:
    """What runs messages of many atoms where CUDA kernels are to be had."""
    if slots <= FEW_SLOTS:
        return "molecules" if dense else route
    return "cuda" if slots <= MOST_SLOTS else route


def _by_count(launch: Launch, tree: FusedTree, pairs: Pairs) -> Launch:
    """The launch for so many atoms: blocks of CUDA kernels that serve many atoms would leave multiprocessors idle."""
    if not launch.cuda or launch.lean:
        return launch
    if pairs.num_atoms > (SOME_ATOMS if launch.route == "molecules" else CUT_ATOMS):
        return launch._replace(route="packs") if _in_packs(launch, tree, pairs) else launch
    return launch._replace(cut=True, route="few" if launch.route == "molecules" else launch.route)


def _in_packs(launch: Launch, tree: FusedTree, pairs: Pairs) -> bool:
    """Whether blocks of CUDA kernels serve several molecules, with filters by tensor cores."""
    if launch.route != "molecules" or "packs" not in tree.fused or pairs.num_atoms < MANY_ATOMS:
        return False
    from jaxff.kernels.cuda import packs

    return packs.serves(tree.fused, pairs.mask.shape[-1] // pairs.num_atoms)


def _many(run: Callable[..., Any], launch: Launch, arrays: Launch, *args: Any) -> Any:
    """run(launch, *args) for many atoms: in CUDA, where a batch of systems is one larger system, or as arrays."""
    if not launch.cuda or any(x.size * 3 >= INDEX_LIMIT for x in jax.tree.leaves(args[1:])):
        return run(arrays._replace(lean=launch.lean), *args)
    either = jax.custom_batching.custom_vmap(partial(run, launch))

    @either.def_vmap
    def _(size: int, batched: Any, *args: Any) -> tuple[Any, Any]:
        if any(jax.tree.leaves(batched[0])):  # other weights: other models
            out = _under_vmap(partial(run, arrays._replace(lean=launch.lean)), size, batched, *args)
        else:
            together = batches.joined(size, batched[1:], args[1:])
            out = batches.parted(size, _many(run, launch, arrays, args[0], *together))
        return out, jax.tree.map(lambda _: True, out)

    return either(*args)
