"""Messages and phases on CUDA kernels, as jaxff.kernels.message and jaxff.kernels.atoms have them for other routes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels import painn, student
from jaxff.kernels.atoms import Made, PerAtom, Phase
from jaxff.kernels.cuda import launch, tiles
from jaxff.kernels.cuda.matrices import halves, power_of_two
from jaxff.kernels.message import SOME_ATOMS, Geometry, Sources
from jaxff.models.parameters import Params

Config = StudentConfig | PainnConfig
CHANNELS = range(
    32, 129, 16
)  # threads for all pairs of a block; shared memory of every GPU from compute capability 8.0
RANKS = (16, 32, 48, 64)
VALUES, SLOPES = 1e-7, 1e-6  # of the largest filter, and of the largest slope: what few functions may leave out
HALF_IS_ENOUGH = 2e-3  # likewise, for what functions add of which one half counts, 11 bits
FILTERS = ("basis", "high", "low", "scales")  # as the kernels take them
PAIRS = 64  # that message.cu takes at once
ATOMS = 16  # that tiles.cu takes at once
ELEMENTS, SLOTS_OF_ELEMENTS = 128, 1024  # of first.cu, and how many slots an atom may have
ATOMS_OF_WHOLE = 8  # that a block of pairs.cu serves
_MODELS: dict[str, Any] = {"student": student, "painn": painn}


# --- what a tree holds for these kernels ---


def prepare(tree: Params, config: Config) -> dict[str, Any] | None:
    """Filters and matrices as the kernels take them (NumPy), or None if the model doesn't fit them.

    tree: as jaxff.kernels.chain.prepare makes it.
    """
    if config.hidden_dim not in CHANNELS:
        return None
    made = [_factorised(np.asarray(tree[f"interaction_{i}"]["table"])) for i in range(config.num_interactions)]
    factors = [x for x in made if x is not None]
    if len(factors) < len(made):
        return None
    model, last = _MODELS[config.architecture], config.num_interactions - 1
    if any(width % 16 for kernel, *_ in tree["read"]["hidden"] for width in kernel.shape):
        return None
    between = [model.weights(tree, i, False) for i in range(last)]
    backward = {
        name: [_matrices(config, plan.between_bwd, w, True) for w in between]
        for name, plan in (("backward", model.PLAN), ("backward_lean", model.LEAN))
    }
    return backward | {
        "filters": [_filters(*x) for x in factors],
        "first": _of_elements(factors[0].weights, config.hidden_dim),
        "forward": [_matrices(config, model.PLAN.between, w, i > 0) for i, w in enumerate(between)],
        "last": _matrices(config, model.LAST, model.weights(tree, last, True), last > 0),
    }


class Factors(NamedTuple):
    """W(t) = Σ_k B_k(t) C_k: cubics of all B, C; how many times 16 of the functions need both halves of a number."""

    basis: Float[np.ndarray, "T 4 K"]
    weights: Float[np.ndarray, "K C"]
    full: int


def _factorised(table: Float[np.ndarray, "T 4 C"]) -> Factors | None:
    """W with the fewest functions that leave less than float32 rounds; None if those are too many.

    The directions C_k are those of most variance of values and slopes over all distances, by importance; B_k are cubics
    where W are, so that slopes remain those of the values.
    """
    table = np.asarray(table, np.float64)
    heights = [float(np.max(np.abs(table[:, power]))) or 1.0 for power in (0, 1)]
    values, slopes = (table[:, power] / height for power, height in zip((0, 1), heights, strict=True))
    thinned = np.concatenate([values[:: max(1, len(table) // 1024)], slopes[:: max(1, len(table) // 1024)]])
    directions = np.linalg.svd(thinned, full_matrices=False)[2].T
    left = [[np.max(np.abs(x - x @ d @ d.T)) for x in (values, slopes)] for d in (directions[:, :r] for r in RANKS)]
    enough = [k for k, (value, slope) in enumerate(left) if value <= VALUES and slope <= SLOPES]
    if not enough:
        return None
    rank = RANKS[enough[0]]
    full = [max(x) > HALF_IS_ENOUGH for x in left[: enough[0]]].count(True) + 1
    chosen = np.pad(directions[:, :rank], ((0, 0), (0, max(0, rank - directions.shape[1]))))
    basis = table @ chosen
    height = np.max(np.abs(basis[:, 0]), axis=0) / 64
    height = np.where(height > 0, height, 1)
    basis /= height
    return Factors(basis, (chosen * height).T, full)


def _filters(basis: Float[np.ndarray, "T 4 K"], weights: Float[np.ndarray, "K C"], full: int) -> dict[str, Any]:
    """Filters as message.cu takes them."""
    matrix, factor = halves(weights)
    slope = power_of_two(float(np.max(np.abs(basis[:, 1]))), 64.0)
    return {
        "basis": np.ascontiguousarray(basis.transpose(0, 2, 1), np.float32),
        "high": np.ascontiguousarray(matrix[..., :2]),
        "low": np.ascontiguousarray(matrix[:, :full, ..., 2:]),
        "scales": np.asarray([factor, slope, 1 / slope], np.float32),
    }


def _of_elements(weights: Float[np.ndarray, "K 2F"], f: int) -> dict[str, Any] | None:
    """What first.cu takes of the first filters besides B; None if a block has fewer warps than it needs."""
    if len(weights) > f:
        return None
    parts = weights[:, :f], weights[:, f:]
    matrices, factors = zip(*(halves(x) for x in (*parts, *(x.T for x in parts))), strict=True)
    return {"matrices": list(matrices), "factors": np.asarray(factors, np.float32)}


def _matrices(config: Config, phases: Sequence[Phase], weights: Any, has_v: bool) -> dict[str, Any]:
    leaves = [np.asarray(x) for x in jax.tree.leaves(weights)]
    made = []
    for p in _generated(config, phases, weights, has_v).products:
        if len(set(p.sources)) == 1:
            matrix = leaves[p.sources[0]][: p.blocks * p.depth]
        else:
            matrix = np.concatenate([leaves[k][: p.depth] for k in p.sources])
        made.append(halves(matrix[:, : p.parts * p.width]))
    return {"matrices": [m for m, _ in made], "factors": np.asarray([f for _, f in made], np.float32)}


# --- messages ---


def message(sources: Sources, filters: Any, geometry: Geometry) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message, with filters as `prepare` makes them."""
    n, f = sources.a.shape
    slots = geometry.senders.shape[0] // n
    kernel = _message_kernel("message", f, _ranks(filters), sources.b is not None, sources.y is not None)
    arrays = (*geometry, *(filters[name] for name in FILTERS), *_all(sources))
    ds, dv = launch.call(kernel, arrays, (n, slots), ((n, f), (n, 3 * f)), _blocks(n))
    return ds, dv


def message_transpose(
    sources: Sources, cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]], filters: Any, geometry: Geometry
) -> tuple[Sources, Float[Array, "4 E"]]:
    """As jaxff.kernels.message.message_transpose."""
    n, f = sources.a.shape
    e = geometry.senders.shape[0]
    has_b, has_y = sources.b is not None, sources.y is not None
    kernel = _message_kernel("message_transpose", f, _ranks(filters), has_b, has_y)
    arrays = (*geometry, *(filters[name] for name in FILTERS), *cotangents, *_all(sources))
    shapes = (n, f), (n * has_b, f), (n * has_y, 3 * f), (4, e)
    a, b, y, halves_of_pairs = launch.call(kernel, arrays, (n, e // n), shapes, _blocks(n))
    return Sources(a, b if has_b else None, y if has_y else None), halves_of_pairs


def filters_of_elements(tree: Params, num_atoms: int, num_pairs: int) -> dict[str, Any] | None:
    """The first interaction's filters for first.cu, of what `prepare` makes; None where `message` is to serve."""
    if tree["first"] is None or num_atoms <= SOME_ATOMS or num_pairs > num_atoms * SLOTS_OF_ELEMENTS:
        return None
    return tree["first"] | {"basis": tree["filters"][0]["basis"]}


def first_message(
    sources: Sources, filters: Any, geometry: Geometry, numbers: Int[Array, "N"]
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As `message`, for sources that follow from the elements, with `filters_of_elements`."""
    n, f = sources.a.shape
    slots = geometry.senders.shape[0] // n
    a, b, _ = _all(sources)
    arrays = (*geometry, numbers, filters["basis"], *filters["matrices"][:2], filters["factors"], a, b)
    kernel = _first_kernel("first_message", f, filters["basis"].shape[1], sources.b is not None, slots)
    ds, dv = launch.call(kernel, arrays, (n, slots), ((n, f), (n, 3 * f)), -(-n // ATOMS))
    return ds, dv


def first_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    filters: Any,
    geometry: Geometry,
    numbers: Int[Array, "N"],
) -> Float[Array, "4 E"]:
    """As jaxff.kernels.message.first_transpose, likewise; zeros for pairs that don't count."""
    n, f = sources.a.shape
    e = geometry.senders.shape[0]
    a, b, _ = _all(sources)
    arrays = (*geometry, numbers, filters["basis"], *filters["matrices"][2:], filters["factors"], *cotangents, a, b)
    kernel = _first_kernel("first_transpose", f, filters["basis"].shape[1], sources.b is not None, e // n)
    return launch.call(kernel, arrays, (n, e // n), [(4, e)], -(-n // ATOMS))[0]


def whole(pair_bars: Float[Array, "4 E"], geometry: Geometry, num_atoms: int) -> Float[Array, "4 E"]:
    """As jaxff.kernels.message.whole; zeros for pairs that don't count."""
    e = geometry.senders.shape[0]
    defines = ("WARPS", ATOMS_OF_WHOLE), ("SLOTS", e // num_atoms)
    source = launch.read("device.cu", "pairs.cu")
    kernel = launch.Kernel("whole", source, defines, 32 * ATOMS_OF_WHOLE, 0)
    blocks = -(-num_atoms // ATOMS_OF_WHOLE)
    return launch.call(kernel, (*geometry, pair_bars), (num_atoms,), [(4, e)], blocks)[0]


def _all(sources: Sources) -> tuple[Array, Array, Array]:
    """a, b, y; where one is absent, another array, which the kernel doesn't read."""
    a, b, y = sources
    return a, a if b is None else b, a if y is None else y


def _ranks(filters: Any) -> tuple[int, int]:
    """How many functions, and how many times 16 of them have both halves."""
    return filters["basis"].shape[1], filters["low"].shape[1]


def _blocks(n: int) -> int:
    return min(n, _multiprocessors())


@functools.cache
def _multiprocessors() -> int:
    return int(getattr(jax.devices()[0], "core_count", 0) or 2)


@functools.cache
def _message_kernel(name: str, f: int, ranks: tuple[int, int], has_b: bool, has_y: bool) -> launch.Kernel:
    rank, full = ranks
    scalars, vectors, row = -(-f // 32), f // 16, 4 * (rank // 2 + 4)  # warps
    pairs = 3 * PAIRS * (16 + 4 + 4)
    values = 2 * 2 * PAIRS * row
    shared = pairs + (values if name == "message" else 2 * values + 2 * (scalars + 4 * vectors) * PAIRS * 4)
    defines = (("F", f), ("K", rank), ("FULL", full), ("HAS_B", int(has_b)), ("HAS_Y", int(has_y)))
    return launch.Kernel(name, launch.read("device.cu", "message.cu"), defines, 32 * (scalars + vectors), shared)


@functools.cache
def _first_kernel(name: str, f: int, rank: int, has_b: bool, slots: int) -> launch.Kernel:
    sums, rows = 8 * ATOMS * (rank // 2 + 4), 8 * ATOMS * (f // 2 + 4) + 4 * ATOMS * rank + 2 * ATOMS
    shared = 4 * (sums if name == "first_message" else rows) + 4 * ELEMENTS + ATOMS * slots
    defines = (("F", f), ("K", rank), ("HAS_B", int(has_b)))
    return launch.Kernel(name, launch.read("device.cu", "tiles.cu", "first.cu"), defines, 2 * f, shared)


# --- phases ---


def run_phases(
    config: Config, phases: Sequence[Phase], weights: Any, state: Made, sums: Sequence[Array], on: Any
) -> Made:
    """The state with what the phases make that is read later (names: `_wanted`).

    sums: the message's, the vector's three rows as one array; on: what `prepare` made for these phases.
    """
    model, f = _MODELS[config.architecture], config.hidden_dim
    inputs = _inputs(config, phases, "v" in state or "v_bar" in state)
    kernel = _generated(config, phases, weights, "v" in state or "v_bar" in state)
    n = sums[0].shape[0]
    leaves = jax.tree.leaves(weights)
    arrays = [x for name in inputs for x in _arrays(state[name])]
    arrays += [*sums, *(leaves[k] for k in kernel.read), *on["matrices"], on["factors"]]
    shapes = [(n, width) if width else (n,) for width in kernel.outputs]
    results = iter(launch.call(_phase_kernel(kernel, f), arrays, (n,), shapes, -(-n // ATOMS)))
    made: Made = {}
    for name, count in zip(_wanted(config, phases), kernel.counts, strict=True):
        rows = [next(results) for _ in range(count)]
        made[name] = rows[0] if name in model.JOINED else PerAtom(rows[0]) if name == "energy" else rows
    return state | made


def _arrays(x: Any) -> list[Array]:
    return list(x) if isinstance(x, list) else [x]


def _phase_kernel(kernel: tiles.Generated, f: int) -> launch.Kernel:
    groups, row = f // 16, 4 * (f // 2 + 4)
    shared = ATOMS * (2 * kernel.operands * row + 4 * groups + 4 * len(kernel.products))
    source = launch.read("device.cu", "tiles.cu") + kernel.source
    return launch.Kernel(tiles.NAME, source, (("F", f),), 32 * groups, shared)


def _wanted(config: Config, phases: Sequence[Phase]) -> tuple[str, ...]:
    model = _MODELS[config.architecture]
    for plan in (model.PLAN, model.LEAN):
        if phases == plan.between:
            return tuple(dict.fromkeys(("s", "v", *model.SENT, *plan.kept)))
    return ("energy", "s_bar", "v_bar") if phases == model.LAST else ("s_bar", "v_bar")


def _inputs(config: Config, phases: Sequence[Phase], has_v: bool) -> dict[str, int]:
    """What the phases read, and how many rows."""
    model = _MODELS[config.architecture]
    for plan in (model.PLAN, model.LEAN):
        if phases == plan.between_bwd:
            return plan.kept | {"s_bar": 1, "v_bar": 3}
    return {"s": 1, "v": 3} if has_v else {"s": 1}


def _generated(config: Config, phases: Sequence[Phase], weights: Any, has_v: bool) -> tiles.Generated:
    leaves, tree = jax.tree.flatten(weights)
    return _generate(config, tuple(phases), tree, tuple(x.shape for x in leaves), has_v)


@functools.cache
def _generate(config: Config, phases: tuple[Phase, ...], tree: Any, shapes: Any, has_v: bool) -> tiles.Generated:
    model = _MODELS[config.architecture]
    inputs, wanted = _inputs(config, phases, has_v), _wanted(config, phases)
    sums = model.BACK_SUMS if "s_bar" in inputs else 4
    weights = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    return tiles.generate(phases, config, weights, inputs, sums, wanted, model.JOINED)
