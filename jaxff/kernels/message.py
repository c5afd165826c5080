"""Message sums with tabulated filters in one kernel, and their transpose with the pair gradients in another.

Both architectures are one sum. With filters Wa, Wb, Wc of the distance, read from the table in the kernel,
    Δs_i = Σ_j a_j Wa,   Δv_i = Σ_j (u_ij b_j Wb + y_j Wc);
student: a = s, b = 1, y = v; PaiNN: a = xs, b = xu, y = xv v. Where v = 0 (first interaction), y is None.
A program sums for one atom over blocks of its slots, for a block of channels. No atomics: bit-reproducible.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

# a GPU's Pallas kernels; its CUDA kernels, for many pairs or for all of small molecules: many, with filters by tables
# or by tensor cores (packs), or few; the CPU's; the Pallas kernels on the CPU, for tests
Route = Literal["triton", "cuda", "molecules", "packs", "few", "native", "interpret"]
JOINED = ("native", "molecules", "packs")  # whose messages transposed give what `whole` would


SOME_ATOMS, SOME_BACK = 512, (32, 4)  # up to so many: channels and pairs of a program of the message transposed


class Launch(NamedTuple):
    """How kernels run: channels of a message program (a power of 2 that divides F) and pairs that it takes at once;

    how many programs serve an atom between two messages (jaxff.kernels.programs), 0 where arrays or CUDA kernels do;
    what runs messages; whether CUDA kernels run what lies between them; whether those are for few atoms; whether what
    they keep is little; whether the pairs are all those of one system or of several of as many atoms; whether one CUDA
    kernel does all of it, where no weights of atoms are asked for.
    """

    block: int
    slots: int
    parts: int
    route: Route
    cuda: bool = False
    cut: bool = False
    lean: bool = False
    dense: bool = False
    one: bool = False

    @property
    def interpret(self) -> bool:
        """Whether Pallas interprets its kernels."""
        return self.route == "interpret"


class Geometry(NamedTuple):
    """What the kernels need of the pairs, N M of them: senders, and as floats [t, mask, u_xyz, table interval]."""

    senders: Any  # [E], or None where a caller has them
    places: Float[Array, "6 E"]


class Lengths(NamedTuple):
    """What distances of pairs follow from: Å of a table's interval, and ε of directions u = r / (d + ε)."""

    interval: float
    epsilon: float


class Sources(NamedTuple):
    """What the atoms send; b None means 1, y None means 0. Or all in one array a, [N, 4F]: a, and b and y packed.

    Packed, b and y are of 16 bits each (`pack` in jaxff/kernels/cuda/device.cu).
    """

    a: Float[Array, "N F"]
    b: Float[Array, "N F"] | None
    y: Float[Array, "N 3F"] | None


def message(
    sources: Sources,
    table: Any,
    geometry: Geometry,
    launch: Launch,
    numbers: Int[Array, "N"] | None = None,
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """Δs [N, F] and Δv [N, 3F].

    table: [T, 4, 3F] of Wa, Wb, Wc, or [T, 4, 2F] without y; for route "cuda", jaxff.kernels.cuda.engine's.
    numbers: elements of the atoms, where sources are of each element, [Z, F], and the table is for CUDA kernels that
    sum by them.
    """
    if numbers is not None:
        from jaxff.kernels.cuda import engine

        return engine.first_message(sources, table, geometry, numbers)
    sources, module = _apart(sources, table, launch), _elsewhere(launch.route)
    if module is not None:
        return module.message(sources, table, geometry)
    n, f = sources.a.shape
    return pl.pallas_call(
        partial(_message_kernel, Sizes(geometry, n, f, launch)),
        out_shape=(float32_shape(n, f), float32_shape(n, 3 * f)),
        grid=(n, f // launch.block),
        interpret=launch.interpret,
        compiler_params=triton.CompilerParams(num_warps=_warps(launch), num_stages=2),
        name="message",
    )(geometry, table, sources)


def message_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Any,
    geometry: Geometry,
    launch: Launch,
    before: Any = None,
) -> tuple[Sources, Float[Array, "..."]]:
    """Cotangents of the sources; and of distance and direction, [D, U_xyz], of each pair what i sends to j gives them.

    The list must be symmetric. With p = Δs̄, q = Δv̄ of receiver i and sender j, and u = u_ij = -u_ji:
    ā_i = Σ_j Wa p_j,  b̄_i = -Σ_j Wb u·q_j,  ȳ_i = Σ_j Wc q_j,
    D = Σ_f a_i p_j Wa' - b_i u·q_j Wb' + y_i·q_j Wc',  U = Σ_f b_i q_j Wb; `whole` joins them to pair gradients.
    Routes `JOINED` give what `whole` would. Route "few" gives it by groups of channels,
    [G, 4, E], and adds it to `before`, which another message gave; route "cuda" as [E, 4].
    """
    sources, module = _apart(sources, table, launch), _elsewhere(launch.route)
    if launch.route == "few":
        return module.message_transpose(sources, cotangents, table, geometry, before)
    if module is not None:
        return module.message_transpose(sources, cotangents, table, geometry)
    n, f = sources.a.shape
    e = geometry.senders.shape[0]
    launch = _of_so_many(launch, n, f)
    bars, pair_bars = pl.pallas_call(
        partial(_transpose_kernel, Sizes(geometry, n, f, launch)),
        out_shape=(jax.tree.map(lambda x: float32_shape(*x.shape), sources), float32_shape(f // launch.block, 4, e)),
        grid=(n, f // launch.block),
        interpret=launch.interpret,
        compiler_params=triton.CompilerParams(num_warps=_warps(launch), num_stages=2),
        name="message_transpose",
    )(geometry, table, cotangents, sources)
    return bars, total(list(pair_bars))


def first_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Any,
    geometry: Geometry,
    launch: Launch,
    numbers: Int[Array, "N"] | None = None,
    before: Any = None,
    lengths: Lengths | None = None,
) -> Float[Array, "..."]:
    """Pair gradients as `message_transpose` gives them, for sources that need no cotangents and have no y.

    The other half of each pair, what j sends to i, as `whole` may take it instead: [D, -U] with
    D = Σ_f a_j p_i Wa' + b_j u·q_i Wb',  U = Σ_f b_j q_i Wb. Where the sources follow from the elements, few of them
    come from far. numbers: as for `message`; before: as for `message_transpose`, or what programs of few atoms gave,
    by vectors, which `lengths` are for.
    """
    if numbers is not None:
        from jaxff.kernels.cuda import engine

        beside = launch.route == "cuda"
        halves = engine.first_transpose(sources, cotangents, table, geometry, numbers, beside)
        return _joined_within(halves, geometry, len(numbers)) if launch.route in JOINED else halves
    if launch.route == "few":
        return _elsewhere("few").message_transpose(sources, cotangents, table, geometry, before, sums=False)[1]
    if _elsewhere(launch.route) is not None:
        return message_transpose(sources, cotangents, table, geometry, launch)[1]
    n, f = sources.a.shape
    launch = _of_so_many(launch, n, f)
    shape = pair_bars_shape(f // launch.block, geometry, lengths)
    adds = before is not None and before.shape == shape.shape
    args = geometry, table, cotangents, sources, before if adds else None
    pair_bars = pl.pallas_call(
        partial(_first_kernel, Sizes(geometry, n, f, launch, lengths)),
        out_shape=shape,
        grid=(n, f // launch.block),
        input_output_aliases={len(jax.tree.leaves(args)) - 1: 0} if adds else {},
        interpret=launch.interpret,
        compiler_params=triton.CompilerParams(num_warps=_warps(launch), num_stages=2),
        name="first_transpose",
    )(*args)
    return total([*pair_bars] if adds or before is None else [*pair_bars, *before])


def whole(
    pair_bars: Sequence[Float[Array, "..."]], geometry: Geometry, num_atoms: int, launch: Launch, lengths: Lengths
) -> Float[Array, "C E"]:
    """[D, U_xyz], or gradients by vectors, of each pair that counts minus those of its reverse, from what both have.

    pair_bars: what all messages gave. No pair occurs twice. By vectors where CUDA kernels find the reverses. Zeros for
    pairs that don't count.
    """
    if launch.cuda and not launch.dense and launch.route not in (*JOINED, "few"):
        from jaxff.kernels.cuda import engine

        beside = pair_bars if launch.route == "cuda" else [total(pair_bars).T]
        return engine.whole(beside, geometry, num_atoms, lengths)
    return jnp.where(geometry.places[1] > 0, _joined_by_xla(pair_bars, geometry, num_atoms, launch), 0)


def _joined_by_xla(
    pair_bars: Sequence[Float[Array, "..."]], geometry: Geometry, num_atoms: int, launch: Launch
) -> Float[Array, "C E"]:
    """As `whole`, by XLA; anything for pairs that don't count."""
    if launch.route == "few":
        return total(list(total(pair_bars)))
    pair_bar = total(pair_bars).T if launch.route == "cuda" else total(pair_bars)
    if launch.route in JOINED:
        return pair_bar
    if launch.dense:
        return _joined_within(pair_bar, geometry, num_atoms)
    e, senders = geometry.senders.shape[0], geometry.senders
    slots = e // num_atoms
    valid = jnp.where(geometry.places[1] > 0, senders, -1).reshape(num_atoms, slots)
    receivers = jnp.arange(e, dtype=jnp.int32) // slots
    reverse = senders * slots + jnp.argmax(valid[senders] == receivers[:, None], axis=1).astype(jnp.int32)
    return _joined(pair_bar, pair_bar[:, reverse])


def _apart(sources: Sources, table: Any, launch: Launch) -> Sources:
    """a, b and y as arrays of their own, where kernels take them so and they are one."""
    if launch.route not in ("native", "triton", "interpret") or 2 * sources.a.shape[1] <= table.shape[2]:
        return sources
    a, *words = jnp.split(sources.a, 4, axis=1)
    first, second, third = (jax.lax.bitcast_convert_type(x, jnp.uint32) & 255 for x in words)
    fourth = jax.lax.bitcast_convert_type(first | first << 8 | second << 16 | third << 24, jnp.float32)
    return Sources(a, words[0], jnp.concatenate([*words[1:], fourth], axis=1))


def _elsewhere(route: Route) -> Any:
    """The module that runs messages by this route, or None where the Pallas kernels here do."""
    if route == "native":
        from jaxff.kernels import native

        return native
    if route == "cuda":
        from jaxff.kernels.cuda import engine

        return engine
    if route == "molecules":
        from jaxff.kernels.cuda import molecules

        return molecules
    if route == "packs":
        from jaxff.kernels.cuda import packs

        return packs
    if route == "few":
        from jaxff.kernels.cuda import few

        return few
    return None


def _joined_within(pair_bars: Float[Array, "C E"], geometry: Geometry, num_atoms: int) -> Float[Array, "C E"]:
    """Of all pairs of molecules."""
    e = geometry.senders.shape[0]
    slots = e // num_atoms
    return _joined(pair_bars, pair_bars.reshape(-1, slots, slots).swapaxes(1, 2).reshape(-1, e))


def _joined(here: Float[Array, "C E"], there: Float[Array, "C E"]) -> Float[Array, "C E"]:
    if len(here) == 3:
        return here - there
    signs = jnp.array([1, -1, -1, -1], here.dtype)[:, None]  # one expression: XLA moves D and U in one kernel
    return there + signs * here


def _of_so_many(launch: Launch, n: int, f: int) -> Launch:
    """Of some atoms, more programs a message transposed than of many."""
    if launch.parts or n > SOME_ATOMS:
        return launch
    return launch._replace(block=math.gcd(f, SOME_BACK[0]), slots=SOME_BACK[1])


class Sizes:
    """Static sizes of a launch, whether it is interpreted, and lengths where pair gradients are by vectors."""

    def __init__(self, geometry: Geometry, n: int, f: int, launch: Launch, lengths: Lengths | None = None) -> None:
        self.slots = geometry.senders.shape[0] // n
        self.f, self.block, self.at_once = f, launch.block, launch.slots
        self.interpret, self.lengths = launch.interpret, lengths


class _Pair(NamedTuple):
    """A block of pairs of one receiver."""

    sender: Array
    interval: Array
    t: Array
    valid: Array
    u: list[Array]
    edge: Array
    inside: Array


def _message_kernel(sizes: Sizes, geometry: Geometry, table: Any, sources: Sources, ds: Any, dv: Any) -> None:
    i, channels = pl.program_id(0), _channels(sizes)
    scalar, *vector = message_sums(geometry, table, sources, sizes, i, channels)
    ds[i, channels] = scalar
    for axis, total in enumerate(vector):
        dv[i, channels + axis * sizes.f] = total


def message_sums(
    geometry: Geometry, table: Any, sources: Sources, sizes: Sizes, i: Array, channels: Int[Array, "B"]
) -> list[Float[Array, "B"]]:
    """[Δs, Δv_x, Δv_y, Δv_z] of atom i within a kernel: the arguments are refs."""
    a, b, y = sources
    f, has_y = sizes.f, y is not None

    def add(step: Array, sums: list[Array]) -> list[Array]:
        pair = _load_pairs(geometry, sizes, i, step)
        wa, wb, *wc = (w for w, _ in _filters(table, pair, channels, sizes, 2 + has_y))
        if b is not None:
            wb = wb * _gather(b, pair, channels)
        scalar = sums[0] + wa * _gather(a, pair, channels)
        vector = [v + u[:, None] * wb for v, u in zip(sums[1:], pair.u, strict=True)]
        if y is not None:
            vector = [v + _gather(y, pair, channels + axis * f) * wc[0] for axis, v in enumerate(vector)]
        return [scalar, *vector]

    zero = jnp.zeros((sizes.at_once, sizes.block), jnp.float32)
    return [jnp.sum(x, axis=0) for x in _over_slots(sizes, add, [zero] * 4)]


def _transpose_kernel(
    sizes: Sizes,
    geometry: Geometry,
    table: Any,
    cotangents: tuple[Any, Any],
    sources: Sources,
    bars: Sources,
    pair_bars: Any,
) -> None:
    i, block, channels = pl.program_id(0), pl.program_id(1), _channels(sizes)
    sums = transpose_sums(geometry, table, sources, *cotangents, pair_bars, sizes, i, block, channels)
    bars.a[i, channels] = sums[0]
    if bars.b is not None:
        bars.b[i, channels] = sums[1]
    if bars.y is not None:
        for axis, total in enumerate(sums[-3:]):
            bars.y[i, channels + axis * sizes.f] = total


def transpose_sums(
    geometry: Geometry,
    table: Any,
    sources: Sources,
    p: Any,
    q: Any,
    pair_bars: Any,
    sizes: Sizes,
    i: Array,
    block: Any,
    channels: Int[Array, "B"],
    scale: Any = None,
    y_i: list[Float[Array, "B"]] | None = None,
    before: Any = None,
) -> list[Float[Array, "B"]]:
    """[ā, b̄, ȳ_x, ȳ_y, ȳ_z] of atom i (without b or y: without theirs) within a kernel; pair_bars[block] is written.

    scale: a number for each atom, by which p and q are to be multiplied. y_i: y of atom i, where the sources lack it.
    before: what is added to pair_bars, in their memory.
    """
    a, b, y = sources
    f, own = sizes.f, partial(_own, i=i)
    a_i, b_i = own(a, channels), None if b is None else own(b, channels)
    if y is not None:
        y_i = [own(y, channels + axis * f) for axis in range(3)]
    elif y_i is not None:
        y_i = [x[None, :] for x in y_i]
    has_y = y_i is not None

    def add(step: Array, sums: list[Array]) -> list[Array]:
        pair = _load_pairs(geometry, sizes, i, step)
        (wa, wa_slope), (wb, wb_slope), *wc = _filters(table, pair, channels, sizes, 2 + has_y)
        p_j = _gather(p, pair, channels)
        q_j = [_gather(q, pair, channels + axis * f) for axis in range(3)]
        if scale is not None:
            scale_j = triton.load(scale.at[pair.sender], mask=pair.valid, other=0)[:, None]
            p_j, q_j = scale_j * p_j, [scale_j * x for x in q_j]
        along = _along(pair, q_j)
        new, bq = [sums[0] + wa * p_j], q_j
        if b_i is not None:
            new.append(sums[1] - wb * along)
            along, bq = b_i * along, [b_i * x for x in q_j]
        d_bar = a_i * p_j * wa_slope - along * wb_slope
        if y_i is not None:
            d_bar = d_bar + (y_i[0] * q_j[0] + y_i[1] * q_j[1] + y_i[2] * q_j[2]) * wc[0][1]
            new += [vector + wc[0][0] * x for vector, x in zip(sums[-3:], q_j, strict=True)]
        _store_pair_bars(pair_bars, before, sizes, block, pair, d_bar, [wb * x for x in bq])
        return new

    zero = jnp.zeros((sizes.at_once, sizes.block), jnp.float32)
    count = 1 + (b is not None) + 3 * has_y
    return [jnp.sum(x, axis=0) for x in _over_slots(sizes, add, [zero] * count)]


def _first_kernel(
    sizes: Sizes,
    geometry: Geometry,
    table: Any,
    cotangents: tuple[Any, Any],
    sources: Sources,
    before: Any,
    pair_bars: Any,
) -> None:
    i, block, channels = pl.program_id(0), pl.program_id(1), _channels(sizes)
    (p, q), (a, b, _) = cotangents, sources
    p_i, q_i = _own(p, channels, i=i), [_own(q, channels + axis * sizes.f, i=i) for axis in range(3)]

    def add(step: Array, nothing: list[Array]) -> list[Array]:
        pair = _load_pairs(geometry, sizes, i, step)
        (_, wa_slope), (wb, wb_slope) = _filters(table, pair, channels, sizes, 2)
        if b is not None:
            b_j = _gather(b, pair, channels)
            wb, wb_slope = wb * b_j, wb_slope * b_j
        d_bar = _gather(a, pair, channels) * p_i * wa_slope + _along(pair, q_i) * wb_slope
        _store_pair_bars(pair_bars, before, sizes, block, pair, d_bar, [-wb * x for x in q_i])
        return nothing

    _over_slots(sizes, add, [])


def _store_pair_bars(
    pair_bars: Any,
    before: Any,
    sizes: Sizes,
    block: Any,
    pair: _Pair,
    d_bar: Float[Array, "S B"],
    u_bar: list[Float[Array, "S B"]],
) -> None:
    values = [jnp.sum(x, axis=1) for x in (d_bar, *u_bar)]
    if sizes.lengths is not None:
        values = _by_vectors(pair, values, sizes.lengths)
    places = [(block, row, pair.edge) for row in range(len(values))]
    if before is not None:  # in the memory of pair_bars
        old = [triton.load(before.at[place], mask=pair.inside, other=0) for place in places]
        values = [x + y for x, y in zip(values, old, strict=True)]
        if not sizes.interpret:
            triton.debug_barrier()  # a number is read by more threads than write it
    for place, value in zip(places, values, strict=True):
        triton.store(pair_bars.at[place], value, mask=pair.inside)


def _by_vectors(pair: _Pair, bars: list[Float[Array, "S"]], lengths: Lengths) -> list[Float[Array, "S"]]:
    """r̄ = (d̄ - <u, ū> / (d + ε)) u + ū / (d + ε), as jaxff.ops.distance has it but for ε/d, where ū is -U."""
    d_bar, *u_bar = bars
    d = (pair.interval.astype(jnp.float32) + pair.t) * lengths.interval
    t = jnp.where(d > 0, 1 / (d + lengths.epsilon), 0)
    along = d_bar / lengths.interval + t * total([x * y for x, y in zip(pair.u, u_bar, strict=True)])
    return [along * x - t * y for x, y in zip(pair.u, u_bar, strict=True)]


def _over_slots(sizes: Sizes, body: Any, start: list[Array]) -> list[Array]:
    return jax.lax.fori_loop(np.int32(0), np.int32(-(-sizes.slots // sizes.at_once)), body, start)


def _channels(sizes: Sizes) -> Int[Array, "B"]:
    return pl.program_id(1) * sizes.block + jnp.arange(sizes.block, dtype=jnp.int32)


def _load_pairs(geometry: Sequence[Any], sizes: Sizes, i: Array, step: Array) -> _Pair:
    senders, places = geometry
    slot = step * np.int32(sizes.at_once) + jnp.arange(sizes.at_once, dtype=jnp.int32)
    inside = slot < sizes.slots
    index = i * sizes.slots + slot

    def load(ref: Any) -> Array:
        return triton.load(ref, mask=inside, other=0)

    t, mask, *u, interval = (load(places.at[row, index]) for row in range(6))
    return _Pair(load(senders.at[index]), interval.astype(jnp.int32), t, mask > 0, u, index, inside)


def _gather(ref: Any, pair: _Pair, channels: Array) -> Float[Array, "S B"]:
    """Rows of the senders, 0 for pairs that don't count."""
    return triton.load(ref.at[pair.sender[:, None], channels[None, :]], mask=pair.valid[:, None], other=0)


def _filters(table: Any, pair: _Pair, channels: Array, sizes: Sizes, count: int) -> list[tuple[Array, Array]]:
    """Values and slopes (per interval) of `count` filters, 0 for pairs that don't count."""
    t = pair.t[:, None]
    results = []
    for which in range(count):
        c = [
            triton.load(
                table.at[pair.interval[:, None], power, (channels + which * sizes.f)[None, :]],
                mask=pair.valid[:, None],
                other=0,
            )
            for power in range(4)
        ]
        results.append((c[0] + t * (c[1] + t * (c[2] + t * c[3])), c[1] + t * (2 * c[2] + 3 * t * c[3])))
    return results


def _along(pair: _Pair, x: list[Array]) -> Float[Array, "S B"]:
    return pair.u[0][:, None] * x[0] + pair.u[1][:, None] * x[1] + pair.u[2][:, None] * x[2]


def _own(ref: Any, channels: Array, *, i: Array) -> Float[Array, "1 B"]:
    return ref[i, channels][None, :]


def total(terms: Sequence[Array]) -> Array:
    """Σ_k x_k, from the first. Where terms are parts of an array, XLA fuses this with what reads it, unlike a sum."""
    return functools.reduce(operator.add, terms)


def pair_bars_shape(blocks: int, geometry: Geometry, lengths: Lengths | None) -> jax.ShapeDtypeStruct:
    """Pair gradients by blocks of channels: of distance and direction, or by vectors."""
    return float32_shape(blocks, 4 if lengths is None else 3, geometry.senders.shape[0])


def float32_shape(*shape: int) -> jax.ShapeDtypeStruct:
    """Of an output."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _warps(launch: Launch) -> int:
    return min(8, max(1, launch.slots * launch.block // 128))
