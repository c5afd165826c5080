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
from jaxff.kernels.atoms import Heard, Made, PerAtom, Phase, Step, hear
from jaxff.kernels.cuda import cut, launch, tiles
from jaxff.kernels.cuda.filters import SLOTS, of_bins, of_elements, step_between, whole_products, width_of
from jaxff.kernels.cuda.matrices import halves, unequal
from jaxff.kernels.message import Geometry, Lengths, Sources
from jaxff.models.parameters import Params
from jaxff.system import Pairs

Config = StudentConfig | PainnConfig
CHANNELS = range(
    32, 129, 16
)  # threads for all pairs of a block; shared memory of every GPU from compute capability 8.0
FILTERS = ("basis", "matrices", "scales")  # as the kernels take them
PAIRS, GROUP = 64, 8  # that message.cu takes at once, and of how many atoms
WARPS_OF_GROUP = 4  # that arrange its pairs: fewer leave room for more groups at once
PAIRS_OF_BLOCK = 16  # of an atom, at least, where several blocks share it
STAGES, TURNS, CARRIERS = 6, 4, 4  # of message.cu: of its ring, at most; in shared memory; warps that fill both
ATOMS = 16  # that tiles.cu and cut.cu take at once
OWN = 32, 16  # channels of a block of cut.cu: fewer where that leaves multiprocessors idle
ELEMENTS, SLOTS_OF_ELEMENTS = 128, 1024  # of first.cu, and how many slots an atom may have
AT_ONCE, CHOSEN = 8, 64  # pairs of first.cu; those of an atom whose places are in shared memory
SHARED_OF_ELEMENTS = 74 * 1024  # of a block, of which a multiprocessor has three
ATOMS_OF_WHOLE = 8  # that a block of pairs.cu serves
JOINING = 1024  # threads of a block of join.cu, which each add one or two float4
_MODELS: dict[str, Any] = {"student": student, "painn": painn}


# --- what a tree holds for these kernels ---


def prepare(tree: Params, config: Config) -> dict[str, Any] | None:
    """Filters and matrices as the kernels take them (NumPy), or None if the model doesn't fit them.

    tree: as jaxff.kernels.chain.prepare makes it.
    """
    if config.hidden_dim not in CHANNELS:
        return None
    tables = [np.asarray(tree[f"interaction_{i}"]["table"], np.float64) for i in range(config.num_interactions)]
    filters = of_bins(tables)
    if filters is None:
        return None
    model, last = _MODELS[config.architecture], config.num_interactions - 1
    if any(width % 16 for kernel, *_ in tree["read"]["hidden"] for width in kernel.shape):
        return None
    between = [model.weights(tree, i, False) for i in range(last)]
    backward = {
        name: [_matrices(config, plan.between_bwd, w, True) for w in between]
        for name, plan in (("backward", model.PLAN), ("backward_lean", model.LEAN))
    }
    sent = model.first_sources(tree, np.arange(len(tree["embedding"]["table"])))
    return backward | {
        "filters": filters,
        "first": of_elements(tables[0], sent.a, sent.b),
        "forward": [_matrices(config, model.PLAN.between, w, i > 0) for i, w in enumerate(between)],
        "last": _matrices(config, model.LAST, model.weights(tree, last, True), last > 0),
    }


def _matrices(config: Config, phases: Sequence[Phase], weights: Any, has_v: bool) -> dict[str, Any]:
    leaves = [np.asarray(x) for x in jax.tree.leaves(weights)]
    made = []
    for p in _generated(config, phases, weights, has_v).products:
        if len(set(p.sources)) == 1:
            matrix = leaves[p.sources[0]][: p.blocks * p.depth]
        else:
            matrix = np.concatenate([leaves[k][: p.depth] for k in p.sources])
        made.append(halves(matrix[:, : p.parts * p.width]))
    return {"matrices": [m for m, _ in made], "factors": unequal([f for _, f in made])}


# --- messages ---


class Arranged(NamedTuple):
    """A Geometry, and its pairs in the order in which `message` takes them, with the turns."""

    senders: Int[Array, "E"]
    places: Float[Array, "6 E"]
    pairs: Float[Array, "6 E"]
    turns: Array  # words, [groups of atoms, turns, 8]


def arranged(
    vectors: Float[Array, "E 3"],
    pairs: Pairs,
    filters: Any,
    intervals: int,
    cutoff: float,
    within: float,
    epsilon: float,
) -> Arranged:
    """What `message` and its transpose need of pair vectors in slots, with filters as `prepare` makes them.

    Those of `pairs` count that are no longer than `within` (Å); the table's intervals divide the cutoff (Å); u =
    r / (d + ε).
    """
    senders, n, e = jnp.asarray(pairs.senders, jnp.int32), pairs.num_atoms, len(vectors)
    slots, bins, width = e // n, len(filters["matrices"]), width_of(filters)
    step, groups = step_between(width), -(-n // GROUP)
    capacity = slots + bins  # turns of c times 16 pairs have 2 c - 1 of some atom, and up to four stand together
    defines = ("BIN", width), ("STEP", step), ("BINS", bins), ("WARPS", WARPS_OF_GROUP)
    source, shared = launch.read("device.cu", "arrange.cu"), 4 * GROUP * (7 * (slots + 3) + capacity)
    kernel = launch.Kernel("arrange", source, defines, 32 * WARPS_OF_GROUP, shared)
    shapes = (6, e), (6, e), (groups, capacity, GROUP)
    integers = n, slots, capacity, intervals, *_words(cutoff, within, intervals / cutoff, epsilon)
    arrays = senders, vectors.T, jnp.asarray(pairs.mask)
    return Arranged(senders, *launch.call(kernel, arrays, integers, shapes, groups))


def _words(*numbers: float) -> list[int]:
    """In float32, as kernels take them among integers."""
    return [int(np.float32(x).view(np.int32)) for x in numbers]


class Parted(NamedTuple):
    """Sums of atoms, and what blocks of message.cu left to be added to some of them: eight atoms of each block."""

    sums: list[Array]
    rest: Float[Array, "R C"]

    def are_whole(self) -> bool:
        """Whether nothing was left."""
        return -(-len(self.sums[0]) // GROUP) % (len(self.rest) // GROUP) == 0

    def joined(self) -> list[Array]:
        """The whole sums, in their memory."""
        n, blocks, arrays = len(self.sums[0]), len(self.rest) // GROUP, self.sums
        if self.are_whole():
            return arrays
        widths = [x.shape[1] for x in arrays] + [0] * (3 - len(arrays))
        defines = *((f"WIDTH_{k}", width) for k, width in enumerate(widths)), ("THREADS", JOINING)
        kernel = launch.Kernel("join", launch.read("device.cu", "join.cu"), defines, JOINING, 0)
        shapes = [x.shape for x in arrays]
        places = range(1, 1 + len(arrays))
        return launch.call(kernel, (self.rest, *arrays), (n, blocks), shapes, blocks - 1, places)


def hear_parts(step: Step, heard: Heard) -> tuple[Parted | list[Array], Any]:
    """As jaxff.kernels.atoms.hear, for `run_phases`; where many blocks leave parts of sums, these as they are."""
    if heard.above is None:
        parted, pair_bars = _message(heard.sources, heard.table, step.geometry), None
    else:
        parted, pair_bars = _message_transpose(heard.sources, heard.above, heard.table, step.geometry)
    groups, blocks = -(-len(parted.sums[0]) // GROUP), len(parted.rest) // GROUP
    return parted.joined() if parted.are_whole() or blocks > groups else parted, pair_bars


def message(sources: Sources, filters: Any, geometry: Any) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message, with filters as `prepare` makes them, and an `Arranged` geometry."""
    ds, dv = _message(sources, filters, geometry).joined()
    return ds, dv


def _message(sources: Sources, filters: Any, geometry: Any) -> Parted:
    n, sent = len(sources.a), _sent(sources, filters)
    blocks = _blocks(geometry, n)
    f, kernel = sent.f, _message_kernel("message", width_of(filters), sent)
    arrays = (geometry.pairs, geometry.turns, *(filters[name] for name in FILTERS), *with_stand_ins(sources))
    shapes = (n, f), (n, 3 * f), (blocks * GROUP, 4 * f)
    *sums, rest = launch.call(kernel, arrays, _sizes(geometry, n), shapes, blocks)
    return Parted(sums, rest)


def message_transpose(
    sources: Sources, cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]], filters: Any, geometry: Any
) -> tuple[Sources, Float[Array, "E 4"]]:
    """As jaxff.kernels.message.message_transpose, likewise; anything for pairs that don't count."""
    parted, halves_of_pairs = _message_transpose(sources, cotangents, filters, geometry)
    sent, bars = _sent(sources, filters), iter(parted.joined())
    return Sources(next(bars), next(bars) if sent.has_b else None, next(bars) if sent.has_y else None), halves_of_pairs


def _message_transpose(
    sources: Sources, cotangents: tuple[Array, Array], filters: Any, geometry: Any
) -> tuple[Parted, Float[Array, "E 4"]]:
    n, e, sent = len(sources.a), geometry.senders.shape[0], _sent(sources, filters)
    f, has_b, has_y, _ = sent
    kernel = _message_kernel("message_transpose", width_of(filters), sent)
    arrays = (
        geometry.pairs,
        geometry.turns,
        *(filters[name] for name in FILTERS),
        *cotangents,
        *with_stand_ins(sources),
    )
    blocks = _blocks(geometry, n)
    rest_shape = blocks * GROUP, (1 + has_b + 3 * has_y) * f
    shapes = (n, f), (n * has_b, f), (n * has_y, 3 * f), rest_shape, (e, 4)
    *bars, rest, halves_of_pairs = launch.call(kernel, arrays, _sizes(geometry, n), shapes, blocks)
    return Parted([x for x in bars if x.size], rest), halves_of_pairs


class _Sent(NamedTuple):
    """What message.cu knows of sources: channels, whether there are b and y, whether all lie in one array, packed."""

    f: int
    has_b: bool
    has_y: bool
    packed: bool


def _sent(sources: Sources, filters: Any) -> _Sent:
    width, columns = sources.a.shape[1], 16 * filters["matrices"].shape[1]  # of two or three filters
    if 2 * width > columns:
        return _Sent(columns // 3, True, True, True)
    return _Sent(width, sources.b is not None, sources.y is not None, False)


def filters_of_elements(tree: Params, num_atoms: int, num_pairs: int) -> dict[str, Any] | None:
    """The first interaction's filters for first.cu, of what `prepare` makes; None where `message` is to serve."""
    if tree["first"] is None or num_pairs > num_atoms * SLOTS_OF_ELEMENTS:
        return None
    return tree["first"]


def first_message(
    sources: Sources, filters: Any, geometry: Geometry, numbers: Int[Array, "N"]
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As `message`, for sources of each element, [Z, F], with `filters_of_elements` that were made with them."""
    n, f = len(numbers), sources.a.shape[1]
    slots = geometry.senders.shape[0] // n
    basis = filters["packed"]
    arrays = (*geometry[:2], numbers, basis, *filters["sent"], *filters["matrices"][:2], filters["factors"])
    kernel = _first_kernel("first_message", f, basis.shape[1], sources.b is not None, slots)
    ds, dv = launch.call(kernel, arrays, (n, slots), ((n, f), (n, 3 * f)), -(-n // ATOMS))
    return ds, dv


def first_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    filters: Any,
    geometry: Geometry,
    numbers: Int[Array, "N"],
    beside: bool,
) -> Float[Array, "..."]:
    """As jaxff.kernels.message.first_transpose, likewise; zeros for pairs that don't count.

    [E, 4] if what a pair has is to lie side by side, as message.cu has it, or [4, E].
    """
    n, f = len(numbers), sources.a.shape[1]
    e = geometry.senders.shape[0]
    basis = filters["basis"]
    arrays = (*geometry[:2], numbers, basis, *filters["matrices"][2:], filters["factors"], *cotangents)
    kernel = _first_kernel("first_transpose", f, basis.shape[1], sources.b is not None, e // n, beside)
    return launch.call(kernel, arrays, (n, e // n), [(e, 4) if beside else (4, e)], -(-n // ATOMS))[0]


def whole(
    pair_bars: Sequence[Float[Array, "E 4"]], geometry: Geometry, num_atoms: int, lengths: Lengths
) -> Float[Array, "3 E"]:
    """Gradients by pair vectors, each minus its reverse's, of the halves [D, U_xyz] that all interactions gave.

    Zeros for pairs that don't count.
    """
    e, arrays = geometry.senders.shape[0], " ".join(f"x({k})" for k in range(len(pair_bars)))
    defines = ("WARPS", ATOMS_OF_WHOLE), ("SLOTS", e // num_atoms)
    source = f"#define EACH_ARRAY(x) {arrays}\n" + launch.read("device.cu", "pairs.cu")
    kernel = launch.Kernel("whole", source, defines, 32 * ATOMS_OF_WHOLE, 0)
    integers = num_atoms, *_words(*lengths)
    blocks = -(-num_atoms // ATOMS_OF_WHOLE)
    return launch.call(kernel, (*geometry[:2], *pair_bars), integers, [(3, e)], blocks)[0]


def with_stand_ins(sources: Sources) -> tuple[Array, Array, Array]:
    """a, b, y; where one is absent, another array, which the kernel doesn't read."""
    a, b, y = sources
    return a, a if b is None else b, a if y is None else y


def _sizes(geometry: Arranged, n: int) -> tuple[int, int, int]:
    return n, geometry.senders.shape[0] // n, geometry.turns.shape[1]


def _blocks(geometry: Arranged, n: int) -> int:
    """Of message.cu: several for a group of atoms where that would leave most multiprocessors idle."""
    groups, (_, slots, _) = -(-n // GROUP), _sizes(geometry, n)
    if 2 * groups <= multiprocessors():
        groups *= max(1, slots // PAIRS_OF_BLOCK)
    return min(groups, multiprocessors())


@functools.cache
def multiprocessors() -> int:
    """Of this GPU; on a CPU, a number for tests."""
    return int(getattr(jax.devices()[0], "core_count", 0) or 2)


@functools.cache
def _message_kernel(name: str, width: int, sent: _Sent) -> launch.Kernel:
    f, has_b, has_y, packed = sent
    back, scalars = name == "message_transpose", -(-f // 32)  # warps; twice as many have vectors
    values, shares = (1 + back) * 2 * PAIRS * 2 * SLOTS, back * 5 * scalars * PAIRS * 4
    turns = TURNS * (PAIRS * 20 + 8 * 4 + 2 * 8 + values + shares)
    stage = 16 * 4 * ((4 if back or packed else 1 + has_b + 3 * has_y) * f + 4) + 2 * 8
    stages = min(STAGES, (launch.most_shared() - turns) // stage)
    of = ("F", f), ("HAS_B", int(has_b)), ("HAS_Y", int(has_y)), ("PACKED", int(packed))
    defines = *of, ("BIN", width), ("STEP", step_between(width)), ("STAGES", stages)
    shared, source = turns + stages * stage, launch.read("device.cu", "message.cu")
    return launch.Kernel(name, source, defines, 32 * (3 * scalars + CARRIERS), shared)


@functools.cache
def _first_kernel(name: str, f: int, functions: int, has_b: bool, slots: int, beside: bool = False) -> launch.Kernel:
    rank = whole_products(functions)

    def shared_with(batch: int) -> int:
        rows, chosen = 4 * batch if has_b else batch + 3, 5 * ATOMS * CHOSEN
        row_of_halves = rank // 2 + 4
        sums = 2 * ATOMS * (rows * row_of_halves + 4 * (rows % 2 == 0)) + chosen
        above = max(8 * ATOMS * (f // 2 + 4), chosen) + rows * (ATOMS * rank + 4) + 2 * ATOMS
        words = (sums if name == "first_message" else above) + ATOMS + batch + ELEMENTS
        return 4 * words + ATOMS * (2 * (slots + AT_ONCE) + slots)

    batch = next(k for k in (4, 2, 1) if k == 1 or shared_with(k) <= SHARED_OF_ELEMENTS)
    shared = shared_with(batch)
    defines = ("F", f), ("FUNCTIONS", functions), ("HAS_B", int(has_b)), ("BATCH", batch), ("BESIDE", int(beside))
    return launch.Kernel(name, launch.read("device.cu", "tiles.cu", "first.cu"), defines, 2 * f, shared)


# --- phases ---


def run_few(
    step: Step, phases: Sequence[Phase], weights: Any, state: Made, heard: Heard, on: Any
) -> tuple[Made, Array | None]:
    """The message and the phases of few atoms, as jaxff.kernels.programs.run_programs; on: as for `run_phases`."""
    products = _generated(step.config, phases, weights, "v" in state or "v_bar" in state).products
    of = {p.sources: cut.Matrix(x, k) for k, (p, x) in enumerate(zip(products, on["matrices"], strict=True))}
    f, tiles_of_atoms = step.config.hidden_dim, -(-jax.tree.leaves(state)[0].shape[0] // ATOMS)
    own = next(c for c in OWN if f % c == 0 and (2 * tiles_of_atoms * (f // c) > multiprocessors() or c == OWN[-1]))
    matrices = cut.Matrices(of, on["factors"])
    if step.launch.route == "few":
        from jaxff.kernels.cuda import few

        together = few.run_phase(step, phases[0], weights, state, heard, matrices)
        if together is not None:
            made, pair_bars = together
            return cut.run(step, phases[1:], weights, state | made, [], matrices, own), pair_bars
    sums, pair_bars = hear(step, heard)
    return cut.run(step, phases, weights, state, sums, matrices, own), pair_bars


def run_phases(
    config: Config, phases: Sequence[Phase], weights: Any, state: Made, sums: Parted | Sequence[Array], on: Any
) -> Made:
    """The state with what the phases make that is read later (names: `_wanted`).

    sums: the message's, the vector's three rows as one array; on: what `prepare` made for these phases.
    """
    model, f = _MODELS[config.architecture], config.hidden_dim
    inputs = _inputs(config, phases, "v" in state or "v_bar" in state)
    sums, rest = (sums.sums, [sums.rest]) if isinstance(sums, Parted) else (list(sums), [])
    kernel = _generated(config, phases, weights, "v" in state or "v_bar" in state, bool(rest))
    n, integers = sums[0].shape[0], [len(x) // GROUP for x in rest]
    leaves = jax.tree.leaves(weights)
    arrays = [x for name in inputs for x in _arrays(state[name])]
    arrays += [*sums, *(leaves[k] for k in kernel.read), *on["matrices"], on["factors"], *rest]
    shapes = [(n, width) if width else (n,) for width in kernel.outputs]
    resident = 1 if n <= ATOMS * multiprocessors() else 2
    results = iter(launch.call(_phase_kernel(kernel, f, resident), arrays, (n, *integers), shapes, -(-n // ATOMS)))
    made: Made = {}
    for name, count in zip(_wanted(config, phases), kernel.counts, strict=True):
        rows = [next(results) for _ in range(count)]
        made[name] = rows[0] if name in model.JOINED else PerAtom(rows[0]) if name == "energy" else rows
    return state | made


def _arrays(x: Any) -> list[Array]:
    return list(x) if isinstance(x, list) else [x]


def _phase_kernel(kernel: tiles.Generated, f: int, resident: int) -> launch.Kernel:
    """For so many blocks of a multiprocessor at once."""
    groups, row = f // 16, 4 * (f // 2 + 4)
    shared = ATOMS * (2 * kernel.units * row + 4 * groups + 4 * len(kernel.products))
    source = launch.read("device.cu", "tiles.cu") + kernel.source
    return launch.Kernel(tiles.NAME, source, (("F", f), ("RESIDENT", resident)), 32 * groups, shared)


def _wanted(config: Config, phases: Sequence[Phase]) -> tuple[str, ...]:
    model = _MODELS[config.architecture]
    for plan in (model.PLAN, model.LEAN):
        if phases == plan.between:
            return tuple(dict.fromkeys(("s", "v", *plan.sent, *plan.kept)))
    return ("energy", "s_bar", "v_bar") if phases == model.LAST else ("s_bar", "v_bar")


def _inputs(config: Config, phases: Sequence[Phase], has_v: bool) -> dict[str, int]:
    """What the phases read, and how many rows."""
    model = _MODELS[config.architecture]
    for plan in (model.PLAN, model.LEAN):
        if phases == plan.between_bwd:
            return plan.kept | {"s_bar": 1, "v_bar": 3}
    return {"s": 1, "v": 3} if has_v else {"s": 1}


def _generated(
    config: Config, phases: Sequence[Phase], weights: Any, has_v: bool, parted: bool = False
) -> tiles.Generated:
    leaves, tree = jax.tree.flatten(weights)
    return _generate(config, tuple(phases), tree, tuple(x.shape for x in leaves), has_v, parted)


@functools.cache
def _generate(
    config: Config, phases: tuple[Phase, ...], tree: Any, shapes: Any, has_v: bool, parted: bool
) -> tiles.Generated:
    model = _MODELS[config.architecture]
    inputs, wanted = _inputs(config, phases, has_v), _wanted(config, phases)
    sums = model.BACK_SUMS if "s_bar" in inputs else 4
    weights = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes])
    return tiles.generate(phases, config, weights, inputs, sums, wanted, model.JOINED, model.PACKED, parted)
