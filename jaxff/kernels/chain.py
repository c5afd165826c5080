"""Energies and pair gradients with fused kernels: the chain of jaxff.models once more, for inference.

Filters come from tables (jaxff.tabulate). The list must be symmetric: every transposed sum is then a sum at the
receivers, and the gradient of a pair comes out antisymmetrised, (g_e - g_rev(e)) / 2, which has the same forces.
Work that no energy depends on is left out: v = 0 entering the first interaction, the vectors leaving the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels import atoms, painn, programs, student
from jaxff.kernels.message import Geometry, Launch, Lengths, first_transpose, whole
from jaxff.models.painn import pair_repulsion, pair_repulsion_bwd
from jaxff.models.parameters import Params, dense_layers
from jaxff.models.student import EPSILON
from jaxff.ops import accumulate_forces
from jaxff.ops.distance import distance_bwd, distance_reference, divide_or_zero, safe_root
from jaxff.system import Pairs

Config = StudentConfig | PainnConfig


def prepare(tree: Params, config: Config, cuda: bool = False) -> Params:
    """A tabulated tree with each table in the kernels' order (a, b, y), and without its dead third at first.

    cuda: with what the CUDA kernels take, as "cuda", "one", "several" and "packs", if the model fits them.
    NumPy arrays on the way: of many shapes, XLA would compile each operation.
    """
    tree = jax.tree.map(np.asarray, tree)
    result = dict(tree)
    for i in range(config.num_interactions):
        layer = dict(tree[f"interaction_{i}"])
        scalar, second, third = np.split(layer.pop("filter")["coefficients"], 3, axis=2)
        along, vector = (third, second) if config.architecture == "student" else (second, third)
        layer["table"] = np.concatenate([scalar, along] if i == 0 else [scalar, along, vector], axis=2)
        result[f"interaction_{i}"] = layer
    result["read"] = atoms.prepare_readout(dense_layers(result.pop("readout")))
    result = jax.tree.map(np.asarray, _MODELS[config.architecture].prepare(result, config))
    if cuda:
        from jaxff.kernels.cuda import engine, one, packs, several

        for name, module in (("cuda", engine), ("one", one), ("several", several), ("packs", packs)):
            made = module.prepare(result, config)
            result |= {} if made is None else {name: made}
    return jax.device_put(result)


def forward(
    tree: Params,
    config: Config,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
    launch: Launch,
) -> tuple[Float[Array, "N"], Any]:
    """Atomic energies with what `backward` needs besides the arguments."""
    geometry = _arranged(None, vectors, pairs, tree, config, launch)
    step, last = _step(tree, config, geometry, launch), config.num_interactions - 1
    model, state, saved = step.model, {"s": [tree["embedding"]["table"][numbers]]}, []
    heard = _first(step, tree, numbers)
    sources = heard.sources
    for i in range(last):
        made, _ = _run(step, step.plan.between, model.weights(tree, i, False), state, heard, _cuda(tree, "forward", i))
        sources, state = model.sources(made), {"s": made["s"], "v": made["v"]}
        saved.append((sources, {name: made[name] for name in step.plan.kept}))
        heard = atoms.Heard(sources, _table(tree, i + 1, launch))
    made, _ = _run(step, model.LAST, model.weights(tree, last, True), state, heard, _cuda(tree, "last"))
    energies, repulsion = _completed(made["energy"].x, tree, config, numbers, geometry, pairs)
    (s_bar,) = made["s_bar"]
    return energies, (Geometry(None, geometry.places), (saved, s_bar, made["v_bar"]), repulsion)


def _completed(
    energies: Array, tree: Params, config: Config, numbers: Array, geometry: Any, pairs: Pairs
) -> tuple[Float[Array, "N"], Any]:
    """Energies with what kernels left out, but for a repulsion without geometry; and what its gradient needs."""
    energies, repulsion = energies + tree["read"]["offset"][0], None
    if "reference" in tree:
        energies = energies + tree["reference"]["energies"][numbers]
    if geometry is not None and has_repulsion(config):
        more, repulsion = pair_repulsion(_distances(geometry, tree, config), numbers, _inside(geometry, pairs))
        energies = energies + more
    return jnp.where(numbers > 0, energies, 0), repulsion


def backward(
    tree: Params,
    config: Config,
    residuals: Any,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
    e_bar: Float[Array, "N"] | None,
    launch: Launch,
) -> Float[Array, "E 3"]:
    """Antisymmetrised gradients of Σ ē_i E_i (None: ē = 1) by the pair vectors."""
    (_, places), (saved, s_bar, v_bar), repulsion = residuals
    geometry = _arranged(places, vectors, pairs, tree, config, launch)
    e_bar = None if e_bar is None else jnp.where(numbers > 0, e_bar, 0)
    step, pair_bars = _step(tree, config, geometry, launch), list[Any]()
    if not step.launch.parts:  # or XLA would save what forward and backward both compute, which soon comes to more
        saved = jax.lax.optimization_barrier(saved)
    scale = e_bar
    for i in reversed(range(1, config.num_interactions)):
        sources, kept = saved[i - 1]
        before = _to_add_to(pair_bars, step.launch)
        heard = atoms.Heard(sources, _table(tree, i, launch), (s_bar, v_bar), scale, before=before)
        weights = step.model.weights(tree, i - 1, False)
        cuda = _cuda(tree, "backward_lean" if launch.lean else "backward", i - 1)
        made, pair_bar = _run(step, step.plan.between_bwd, weights, kept, heard, cuda)
        (s_bar,), v_bar, scale = made["s_bar"], made["v_bar"], None
        pair_bars.append(pair_bar)
    first, above = _first(step, tree, numbers), atoms.scaled((s_bar, v_bar), scale)
    before = _to_add_to(pair_bars, step.launch)
    args = first.sources, above, first.table, geometry, launch, first.numbers, before, step.lengths
    pair_bars.append(first_transpose(*args))
    pair_bar = whole(pair_bars, geometry, pairs.num_atoms, launch, _lengths(tree, config))
    return _by_vectors(pair_bar, tree, config, geometry, pairs, e_bar, repulsion)


def energies(
    tree: Params,
    config: Config,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
    launch: Launch,
) -> Float[Array, "N"]:
    """Atomic energies."""
    if not launch.one:
        return forward(tree, config, numbers, vectors, pairs, launch)[0]
    from jaxff.kernels.cuda import one

    geometry = _geometry(vectors, pairs, tree, config)
    made = one.energies(tree, config, numbers, one.Places(geometry.places))
    return _completed(made, tree, config, numbers, geometry, pairs)[0]


def energies_and_gradients(
    tree: Params,
    config: Config,
    numbers: Int[Array, "N"],
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
    launch: Launch,
    back: tuple[int, int],
) -> tuple[Float[Array, "N"], Float[Array, "E 3"]]:
    """Atomic energies, and antisymmetrised gradients of their sum by the pair vectors.

    back: for many atoms, channels and pairs of a program on the way back.
    """
    if not launch.one:
        made, residuals = forward(tree, config, numbers, vectors, pairs, launch)
        launch = launch if launch.parts else launch._replace(block=back[0], slots=back[1])
        return made, backward(tree, config, residuals, numbers, vectors, pairs, None, launch)
    from jaxff.kernels.cuda import one

    geometry = _geometry(vectors, pairs, tree, config)
    made, pair_bars = one.energies_and_gradients(tree, config, numbers, one.Places(geometry.places))
    made, repulsion = _completed(made, tree, config, numbers, geometry, pairs)
    pair_bar = whole(list(pair_bars), geometry, pairs.num_atoms, launch, _lengths(tree, config))
    return made, _by_vectors(pair_bar, tree, config, geometry, pairs, None, repulsion)


def energies_and_position_gradients(
    tree: Params,
    config: Config,
    numbers: Int[Array, "N"],
    positions: Float[Array, "N 3"],
    pairs: Pairs,
    gradients: bool,
) -> tuple[Float[Array, "N"], Float[Array, "N 3"] | None]:
    """Atomic energies of a molecule by one CUDA kernel, and if wanted gradients of their sum by its positions.

    The model has no repulsion, and pairs are all, of which those count that are within the cutoff.
    """
    from jaxff.kernels.cuda import one

    where, by_positions = one.Positions(positions, jnp.asarray(pairs.mask)), None
    if gradients:
        made, by_positions = one.energies_and_gradients(tree, config, numbers, where)
    else:
        made = one.energies(tree, config, numbers, where)
    return _completed(made, tree, config, numbers, None, pairs)[0], by_positions


def energies_and_position_gradients_of_several(
    tree: Params,
    config: Config,
    numbers: Int[Array, "B N"],
    positions: Float[Array, "B N 3"],
    pairs: Pairs,
    gradients: bool,
) -> tuple[Float[Array, "B N"], Float[Array, "B N 3"] | None]:
    """The same of several molecules, the arrays of whose pairs have an axis of molecules, too; with a repulsion."""
    from jaxff.kernels.cuda import several

    args = tree, config, numbers, positions, jnp.asarray(pairs.mask), gradients
    made, by_positions = several.energies_and_gradients(*args)
    made, _ = _completed(made, tree, config, numbers, None, pairs)
    if not has_repulsion(config):
        return made, by_positions
    more, more_by_positions = jax.vmap(partial(_repulsion, config))(numbers, positions, pairs)
    made = jnp.where(numbers > 0, made + more, 0)
    return made, by_positions if by_positions is None else by_positions + more_by_positions


def _repulsion(
    config: Config, numbers: Int[Array, "N"], positions: Float[Array, "N 3"], pairs: Pairs
) -> tuple[Float[Array, "N"], Float[Array, "N 3"]]:
    """Energies of a molecule's pair repulsion, and gradients of their sum by positions."""
    d, u = distance_reference(pairs.at_senders(positions) - pairs.at_receivers(positions), _epsilon(config))
    inside = replace(pairs, mask=pairs.mask & (d <= config.cutoff))
    energies, saved = pair_repulsion(d, numbers, inside)
    d_bar = pair_repulsion_bwd(saved, jnp.ones_like(energies), inside, antisymmetric=True)
    return energies, -accumulate_forces(u * d_bar[:, None] / 2, inside, antisymmetric=True)


def one_kernel_serves_several(tree: Params, config: Config, num_atoms: int, molecules: int) -> bool:
    """Whether one CUDA kernel does all of so many molecules here."""
    if "several" not in tree:
        return False
    from jaxff.kernels.cuda import several

    return several.serves(tree, config, num_atoms, molecules)


def one_kernel_serves(tree: Params, config: Config, num_atoms: int) -> bool:
    """Whether one CUDA kernel does all of a molecule of so many atoms here."""
    if "one" not in tree:
        return False
    from jaxff.kernels.cuda import one

    return one.serves(tree, config, num_atoms)


def _by_vectors(
    pair_bar: Float[Array, "C E"],
    tree: Params,
    config: Config,
    geometry: Any,
    pairs: Pairs,
    e_bar: Float[Array, "N"] | None,
    repulsion: Any,
) -> Float[Array, "E 3"]:
    """Antisymmetrised gradients by pair vectors: given, or of distance and direction; and of the repulsion."""
    places, pairs = geometry.places, _inside(geometry, pairs)
    if repulsion is not None:
        e_bar = jnp.ones(pairs.num_atoms, pair_bar.dtype) if e_bar is None else e_bar
        repulsion = pair_repulsion_bwd(repulsion, e_bar, pairs, antisymmetric=True)
    if len(pair_bar) == 3:
        return (pair_bar if repulsion is None else pair_bar + repulsion * places[2:5]).T / 2
    d_bar = pair_bar[0] * _intervals_per_angstrom(tree, config)
    d_bar = d_bar if repulsion is None else d_bar + repulsion
    epsilon, d = _epsilon(config), _distances(geometry, tree, config)
    vectors = (places[2:5] * (d + epsilon)).T
    (vectors_bar,) = distance_bwd(epsilon, (vectors, d), (d_bar, pair_bar[1:].T))
    return vectors_bar / 2


def _to_add_to(pair_bars: list[Any], launch: Launch) -> Any:
    """What the next message's kernel adds its pair gradients to, taken from the list; None where XLA adds them up."""
    return pair_bars.pop() if pair_bars and (launch.route == "few" or launch.parts) else None


def _step(tree: Params, config: Config, geometry: Geometry, launch: Launch) -> atoms.Step:
    parts = min(launch.parts, config.hidden_dim // 16) if programs.fits(tree, config.hidden_dim) else 0
    lengths = _lengths(tree, config) if parts else None
    return atoms.Step(_MODELS[config.architecture], config, geometry, launch._replace(parts=parts), lengths)


def _lengths(tree: Params, config: Config) -> Lengths:
    return Lengths(1 / _intervals_per_angstrom(tree, config), _epsilon(config))


def _run(
    step: atoms.Step, phases: Sequence[atoms.Phase], weights: Any, state: atoms.Made, heard: atoms.Heard, cuda: Any
) -> tuple[atoms.Made, Any]:
    """The state with what the phases make, and the pair gradients of a message transposed, or None."""
    if heard.above is not None:
        above, scale = heard.above, heard.scale
        if not step.launch.parts:
            above, scale = atoms.scaled(above, scale), None
        heard = heard._replace(above=above, scale=scale)
        bars: atoms.Made = {"s_bar": [above[0]], "v_bar": above[1]}
        state = state | (bars if scale is None else {name: atoms.Scaled(x, scale) for name, x in bars.items()})
    if step.launch.cuda:
        from jaxff.kernels.cuda import engine

        if step.launch.cut:
            return engine.run_few(step, phases, weights, state, heard, cuda)
        by_itself = step.launch.route == "cuda" and heard.numbers is None
        sums, pair_bars = (engine.hear_parts if by_itself else atoms.hear)(step, heard)
        return engine.run_phases(step.config, phases, weights, state, sums, cuda), pair_bars
    return (programs.run_programs if step.launch.parts else atoms.run_arrays)(step, phases, weights, state, heard)


def _first(step: atoms.Step, tree: Params, numbers: Array) -> atoms.Heard:
    """The first message; by elements, where CUDA kernels sum it so."""
    table = None
    if step.launch.cuda and not step.launch.cut:
        from jaxff.kernels.cuda import engine

        table = engine.filters_of_elements(tree["cuda"], len(numbers), len(step.geometry.senders))
    if table is None:
        return atoms.Heard(step.model.first_sources(tree, numbers), _table(tree, 0, step.launch))
    elements = np.arange(tree["embedding"]["table"].shape[0])
    return atoms.Heard(step.model.first_sources(tree, elements), table, numbers=numbers)


def _table(tree: Params, i: int, launch: Launch) -> Any:
    if launch.route == "packs":
        return tree["packs"][i]
    return tree["cuda"]["filters"][i] if launch.route == "cuda" else tree[f"interaction_{i}"]["table"]


def _cuda(tree: Params, which: str, i: int | None = None) -> Any:
    """What the CUDA kernels take of some phases' weights, where the tree has it."""
    if "cuda" not in tree:
        return None
    return tree["cuda"][which] if i is None else tree["cuda"][which][i]


def _epsilon(config: Config) -> float:
    return EPSILON if config.architecture == "student" else 0.0


def within(config: Config) -> float:
    """Up to which distance (Å) pairs count: who found them in float64 has decided, and vectors are rounded since."""
    return config.cutoff * (1 + 2.0**-21)


def has_repulsion(config: Config) -> bool:
    """Whether pairs repel each other, too, which no kernel computes."""
    return isinstance(config, PainnConfig) and config.repulsion == "zbl"


def _geometry(vectors: Array, pairs: Pairs, tree: Params, config: Config) -> Geometry:
    """Places of pairs. Behind the barrier nothing reads the vectors, so that XLA makes all of it in one kernel."""
    x, y, z = vectors.T  # by components: a sum over an axis is a kernel of its own to XLA
    square, epsilon = x * x + y * y + z * z, _epsilon(config)
    d, counts = safe_root(square), pairs.mask & (jnp.sqrt(square) <= within(config))
    u = [divide_or_zero(c, d + epsilon) for c in (x, y, z)]
    place = jnp.clip(d, 0, config.cutoff) * _intervals_per_angstrom(tree, config)
    interval = jnp.clip(place.astype(jnp.int32), 0, _intervals(tree) - 1)
    t = place - interval.astype(d.dtype)
    places = jnp.stack([t, counts.astype(d.dtype), *u, interval.astype(d.dtype)])
    return Geometry(_senders(pairs), jax.lax.optimization_barrier(places))


def _senders(pairs: Pairs) -> Array:
    return jnp.asarray(pairs.senders, jnp.int32)


def _arranged(places: Any, vectors: Array, pairs: Pairs, tree: Params, config: Config, launch: Launch) -> Any:
    """The geometry as the messages' route wants it, with its places or None.

    What was made before in the same program is not made again: kernels' calls that are alike are one to XLA.
    """
    if launch.route == "cuda":
        from jaxff.kernels.cuda import engine

        reach = _intervals(tree), config.cutoff, within(config), _epsilon(config)
        return engine.arranged(vectors, pairs, tree["cuda"]["filters"][0], *reach)
    known = places is not None
    geometry = Geometry(_senders(pairs), places) if known else _geometry(vectors, pairs, tree, config)
    if launch.route != "packs":
        return geometry
    from jaxff.kernels.cuda import packs

    return packs.arranged(geometry, pairs.num_atoms, tree["packs"][0])


def _intervals(tree: Params) -> int:
    return int(tree["interaction_0"]["table"].shape[0])


def _intervals_per_angstrom(tree: Params, config: Config) -> float:
    return _intervals(tree) / config.cutoff


def _distances(geometry: Geometry, tree: Params, config: Config) -> Float[Array, "E"]:
    """Distances within the cutoff, to float32's rounding as they were."""
    return (geometry.places[0] + geometry.places[5]) / _intervals_per_angstrom(tree, config)


def _inside(geometry: Geometry, pairs: Pairs) -> Pairs:
    """The pairs, masked as the places have it."""
    return replace(pairs, mask=geometry.places[1] > 0)


_MODELS: dict[str, Any] = {"student": student, "painn": painn}
