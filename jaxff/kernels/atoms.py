"""What happens to atoms between two messages, in phases, run in two ways: by programs, or as arrays through XLA.

A model (jaxff.kernels.painn, jaxff.kernels.student) writes its equations down once, in rows of F channels, cut into
phases where a row of hidden channels is a sum over all channels. For few atoms each phase is a kernel in which P
programs serve an atom, each with F/P of its channels, because what takes longest is reading the weights, and several
multiprocessors read faster than one. A product by a program's rows of a matrix, "inward", is its share of a sum over
channels, which the next phase adds up; a product by its columns, "outward", its own channels of the result. Sums are
IEEE float32, without tensor cores, in a fixed order. For many atoms the same equations take arrays of all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxff.kernels.message import (
    Geometry,
    Launch,
    Sizes,
    Sources,
    float32_shape,
    message,
    message_sums,
    message_transpose,
    total,
    transpose_sums,
)
from jaxff.models.parameters import Params
from jaxff.ops.mlp import matmul, silu_slope

AXES = range(3)
SLOTS, WARPS = 32, 4  # pairs that a program takes at once, and its warps
AHEAD = 3  # tiles of matrices that a program asks for before it needs them
WIDEST = 128  # channels of a model whose tiles fit a program's registers

Rows = list[Array]
Weights = Any  # trees of arrays, or of refs in a kernel


class Shares(NamedTuple):
    """A hidden row that is a sum over channels: [N, P, H], a share from each program; as arrays, the sum, [N, H]."""

    x: Any


class PerAtom(NamedTuple):
    """One number an atom: [N]."""

    x: Any


Made = dict[str, Any]  # by name: Rows, Shares or PerAtom; names in a model's JOINED are one array of all their rows
Phase = Callable[..., Made]  # phase(on, config, weights, state), the first phase after a message with its sums, too


class Step(NamedTuple):
    """What every phase of a step needs: the equations, their constants, the pairs, how to run."""

    model: ModuleType
    config: Any
    geometry: Geometry
    launch: Launch


class Heard(NamedTuple):
    """A message to be summed; or, with the cotangents of its sums (times `scale`, if given), to be transposed."""

    sources: Sources
    table: Array
    above: tuple[Array, Array] | None = None
    scale: Float[Array, "N"] | None = None


class Scaled(NamedTuple):
    """Rows in a state, times one number an atom."""

    rows: Any
    scale: Any


def scaled(arrays: tuple[Array, Array], scale: Float[Array, "N"] | None) -> tuple[Array, Array]:
    """Two arrays times one number an atom."""
    a, b = arrays
    return arrays if scale is None else (scale[:, None] * a, scale[:, None] * b)


def fits(tree: Params, hidden_dim: int) -> bool:
    """Whether matrices fit programs: channels are a power of 2, not too many, and the readout has a hidden layer."""
    hidden = [kernel.shape[1] for kernel, _, _ in tree["read"]["hidden"]]
    return bool(hidden) and all(size & (size - 1) == 0 and size <= WIDEST for size in (hidden_dim, *hidden))


def run(step: Step, phases: Sequence[Phase], weights: Weights, state: Made, heard: Heard) -> tuple[Made, Any]:
    """The state with all that the phases make, and the pair gradients [4, E] of a message transposed, or None."""
    if heard.above is not None:
        above, scale = (heard.above, heard.scale) if step.launch.parts else (scaled(heard.above, heard.scale), None)
        heard = Heard(heard.sources, heard.table, above, scale)
        rows: Made = {"s_bar": [above[0]], "v_bar": above[1]}
        state = state | (rows if scale is None else {name: Scaled(x, scale) for name, x in rows.items()})
    if not step.launch.parts:
        return _run_arrays(step, phases, weights, state, heard)
    pair_bars = None
    for k, phase in enumerate(phases):
        made, bars = _launch(step, phase, weights, state, heard if k == 0 else None)
        state = state | made
        pair_bars = bars if k == 0 else pair_bars
    return state, pair_bars


# --- equations that both models share ---


def prepare_readout(layers: Sequence[tuple[Array, Array]]) -> Params:
    """Kernel, transpose and bias [1, *] of each hidden layer; the last kernel as a row, and its bias."""
    *hidden, (final, offset) = layers
    return {"hidden": [(k, k.T, b[None]) for k, b in hidden], "final": final.T, "offset": offset}


def read_in(on: Any, read: Weights, s: Array) -> Shares:
    """The readout's first product."""
    return on.inward([s], read["hidden"][0][0]) if read["hidden"] else Shares(s)


def read_on(on: Any, read: Weights, first: Shares) -> tuple[PerAtom, Array]:
    """What follows it: energies, without the last bias, and their slopes by s."""
    final, x = on.row(read["final"]), on.whole(first)
    if not read["hidden"]:
        return PerAtom(jnp.sum(x * final, axis=-1)), jnp.zeros_like(x) + final
    pre = [x + on.row(read["hidden"][0][2])]
    for kernel, _, bias in read["hidden"][1:]:
        pre.append(on.product(jax.nn.silu(pre[-1]), kernel) + on.row(bias))
    energy = jnp.sum(jax.nn.silu(pre[-1]) * final, axis=-1)
    x_bar = final * silu_slope(pre[-1])
    for (_, transposed, _), z in zip(reversed(read["hidden"][1:]), reversed(pre[:-1]), strict=True):
        x_bar = on.product(x_bar, transposed) * silu_slope(z)
    (s_bar,) = on.outward(x_bar, read["hidden"][0][1], 1)
    return PerAtom(energy), s_bar


def inner(x: Rows, y: Rows) -> Array:
    """Σ_k x_k y_k."""
    return total([a * b for a, b in zip(x, y, strict=True)])


def plus(x: Rows, y: Rows) -> Rows:
    """x_k + y_k."""
    return [a + b for a, b in zip(x, y, strict=True)]


# --- what equations run on ---


class Atoms:
    """All atoms: rows are [N, F]."""

    def __init__(self, f: int) -> None:
        self.f = f

    def own(self, x: Array, part: int = 0) -> Array:
        """The part-th F channels."""
        return x[:, part * self.f : (part + 1) * self.f]

    bias = full = own

    def rows(self, x: Any) -> Rows:
        """The rows of a list, or of an array that joins three."""
        return [self.own(row) for row in x] if isinstance(x, list) else [self.own(x, axis) for axis in AXES]

    full_rows = rows

    def whole(self, shares: Shares) -> Array:
        """The sum of all shares."""
        return shares.x

    def own_share(self, shares: Shares) -> Array:
        """This program's channels of that sum; all of them as arrays."""
        return shares.x

    def row(self, x: Float[Array, "1 C"]) -> Array:
        """A row that all atoms share."""
        return x

    def entry(self, matrix: Array, row: int, column: int) -> Array:
        """One number."""
        return matrix[row, column]

    def inward(self, xs: Rows, kernel: Array) -> Shares:
        """[x_0, x_1, ...] K."""
        return Shares(self.product(jnp.concatenate(xs, axis=1), kernel[: len(xs) * self.f]))

    def outward(self, x: Array, kernel: Array, parts: int) -> Rows:
        """x K, by F columns."""
        return jnp.split(self.product(x, kernel[:, : parts * self.f]), parts, axis=1)

    def outward_each(self, *terms: tuple[Rows, Array]) -> Rows:
        """x K of each x, added up over all terms of rows and a matrix."""
        return functools.reduce(plus, [list(self.product(jnp.stack(rows), kernel)) for rows, kernel in terms])

    def product(self, x: Array, kernel: Array) -> Array:
        """x K."""
        return matmul(x, kernel)


class _Tile(NamedTuple):
    """A program's rows of the part-th F rows of a matrix, or its columns likewise; all without a part."""

    kernel: Any
    row: int | None
    column: int | None


class _Read(NamedTuple):
    """Something small that a program reads: what kind of row or number, from where, and which part."""

    kind: str
    ref: Any
    where: tuple[int, ...] = ()


class _ByTiles:
    """One atom: rows are a program's channels, [F/P], and matrices come in tiles."""

    def __init__(self, f: int, parts: int) -> None:
        self.f, self.parts, self.size = f, parts, f // parts

    def read(self, what: _Read) -> Array:
        raise NotImplementedError

    def tile(self, tile: _Tile) -> Array:
        raise NotImplementedError

    def own(self, ref: Any, part: int = 0) -> Array:
        return self.read(_Read("own", ref, (part,)))

    def full(self, ref: Any, part: int = 0) -> Array:
        return self.read(_Read("full", ref, (part,)))

    def bias(self, ref: Any, part: int = 0) -> Array:
        return self.read(_Read("bias", ref, (part,)))

    def row(self, ref: Any) -> Array:
        return self.read(_Read("row", ref))

    def entry(self, ref: Any, row: int, column: int) -> Array:
        return self.read(_Read("entry", ref, (row, column)))

    def whole(self, shares: Shares) -> Array:
        return total([self.read(_Read("share", shares.x, (k,))) for k in range(self.parts)])

    def own_share(self, shares: Shares) -> Array:
        return total([self.read(_Read("own of share", shares.x, (k,))) for k in range(self.parts)])

    def rows(self, ref: Any) -> Rows:
        if isinstance(ref, Scaled):
            scale = self.read(_Read("number", ref.scale))
            return [scale * row for row in self.rows(ref.rows)]
        return [self.own(x) for x in ref] if isinstance(ref, list) else [self.own(ref, axis) for axis in AXES]

    def full_rows(self, ref: Any) -> Rows:
        return [self.full(x) for x in ref] if isinstance(ref, list) else [self.full(ref, axis) for axis in AXES]

    def inward(self, xs: Rows, kernel: Any) -> Shares:
        return Shares(_times(xs, [self.tile(_Tile(kernel, k, None)) for k in range(len(xs))]))

    def outward(self, x: Array, kernel: Any, parts: int) -> Rows:
        return [_times([x], [self.tile(_Tile(kernel, None, k))]) for k in range(parts)]

    def outward_each(self, *terms: tuple[Rows, Any]) -> Rows:
        tiles = [self.tile(_Tile(kernel, None, 0)) for _, kernel in terms]
        return [_times(xs, tiles) for xs in zip(*(rows for rows, _ in terms), strict=True)]

    def product(self, x: Array, kernel: Any) -> Array:
        return _times([x], [self.tile(_Tile(kernel, None, None))])


class _Listing(_ByTiles):
    """Notes what equations read, and which tiles, in order; what they compute has the right shape and no other use."""

    def __init__(self, f: int, parts: int) -> None:
        super().__init__(f, parts)
        self.reads: list[_Read] = []
        self.tiles: list[_Tile] = []

    def read(self, what: _Read) -> Array:
        self.reads.append(what)
        if what.kind in ("number", "entry"):
            return jnp.zeros((), jnp.float32)
        sizes = {"own": self.size, "bias": self.size, "own of share": self.size, "full": self.f}
        return jnp.zeros(sizes.get(what.kind, what.ref.shape[-1]), jnp.float32)

    def tile(self, tile: _Tile) -> Array:
        self.tiles.append(tile)
        rows, columns = tile.kernel.shape
        return jnp.zeros(
            (rows if tile.row is None else self.size, columns if tile.column is None else self.size), jnp.float32
        )


class _Program(_ByTiles):
    """One atom, and this program's channels of it.

    All small reads of a listing are asked for at once, before anything waits, then the first AHEAD of its tiles.
    """

    def __init__(self, f: int, parts: int, listing: _Listing, interpret: bool) -> None:
        super().__init__(f, parts)
        self.i, self.part, self.interpret = pl.program_id(0), pl.program_id(1), interpret
        self._came: dict[Any, Array] = {}
        for what in listing.reads:
            self.read(what)
        self._left = iter(listing.tiles)
        self._coming = [self._ask() for _ in range(AHEAD)]

    @property
    def channels(self) -> Int[Array, "F/P"]:
        return self.part * self.size + jnp.arange(self.size, dtype=jnp.int32)

    def span(self, part: int) -> Any:
        """This program's channels of the part-th F."""
        return pl.ds(self.part * self.size + part * self.f, self.size)

    def read(self, what: _Read) -> Array:
        key = what.kind, id(what.ref), what.where
        if key not in self._came:
            self._came[key] = what.ref[_PLACES[what.kind](self, *what.where)]
        return self._came[key]

    def tile(self, tile: _Tile) -> Array:
        self._coming.append(self._ask())
        came = self._coming.pop(0)
        assert came is not None
        assert came[0].kernel is tile.kernel
        assert came[0][1:] == tile[1:]
        return came[1]

    def store(self, ref: Any, value: Any) -> None:
        """Write what a phase made where `_out_shape` has it."""
        if isinstance(value, Shares):
            self._put(value.x, ref.x, self.part, jnp.arange(value.x.shape[0], dtype=jnp.int32))
        elif isinstance(value, PerAtom):
            ref.x[self.i] = value.x  # the same from all programs
        else:
            for k, row in enumerate(value):
                if isinstance(ref, list):
                    self._put(row, ref[k], self.channels)
                else:
                    self._put(row, ref, self.channels + k * self.f)

    def _ask(self) -> tuple[_Tile, Array] | None:
        tile = next(self._left, None)
        if tile is None:
            return None
        rows, columns = (slice(None) if k is None else self.span(k) for k in (tile.row, tile.column))
        return tile, tile.kernel[rows, columns]

    def _put(self, row: Float[Array, "C"], ref: Any, *where: Array) -> None:
        """A row, as the first of as many copies as a tile has rows at a time.

        Triton then stores numbers from where a product left them: otherwise they go through shared memory first.
        """
        copies = 128 * WARPS // len(row)
        if self.interpret or copies < 2:
            ref[(self.i, *where)] = row
            return
        shape = copies, len(row)
        first = jnp.broadcast_to(jnp.arange(copies, dtype=jnp.int32)[:, None] == 0, shape)
        place = ref.at[(self.i, *where[:-1], jnp.broadcast_to(where[-1][None], shape))]
        triton.store(place, jnp.broadcast_to(row[None], shape), mask=first)


_PLACES: dict[str, Callable[..., Any]] = {  # of what is read, by its kind
    "own": lambda on, part: (on.i, on.span(part)),
    "full": lambda on, part: (on.i, slice(part * on.f, (part + 1) * on.f)),
    "share": lambda on, part: (on.i, part, slice(None)),
    "own of share": lambda on, part: (on.i, part, on.span(0)),
    "number": lambda on: (on.i,),
    "bias": lambda on, part: (0, on.span(part)),
    "row": lambda on: (0, slice(None)),
    "entry": lambda on, row, column: (row, column),
}


def _times(xs: Sequence[Float[Array, "K"]], tiles: Sequence[Float[Array, "K C"]]) -> Float[Array, "C"]:
    """Σ_k x_k K_k."""
    return jnp.sum(total([x[:, None] * tile for x, tile in zip(xs, tiles, strict=True)]), axis=0)


# --- arrays of many atoms ---


def _run_arrays(step: Step, phases: Sequence[Phase], weights: Weights, state: Made, heard: Heard) -> tuple[Made, Any]:
    on, pair_bars = Atoms(step.config.hidden_dim), None
    if heard.above is None:
        ds, dv = message(heard.sources, heard.table, step.geometry, step.launch)
        sums = [ds, *on.rows(dv)]
    else:
        bars, pair_bars = message_transpose(heard.sources, heard.above, heard.table, step.geometry, step.launch)
        sums = [x for x in bars[:2] if x is not None] + ([] if bars.y is None else on.rows(bars.y))
    return _on_arrays(step, phases, weights, state, sums), pair_bars


def _on_arrays(step: Step, phases: Sequence[Phase], weights: Weights, state: Made, sums: Rows) -> Made:
    on, joined = Atoms(step.config.hidden_dim), step.model.JOINED
    for k, phase in enumerate(phases):
        made = phase(on, step.config, weights, state, *([] if k else [sums]))
        state = state | {name: jnp.concatenate(x, axis=1) if name in joined else x for name, x in made.items()}
    return state


# --- programs for few atoms ---


class _Noting(dict[str, Any]):
    """A state that notes which names are read."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__(state)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return super().__getitem__(name)

    def __iter__(self) -> Iterator[str]:
        raise TypeError("phases name what they read")


def _launch(step: Step, phase: Phase, weights: Weights, state: Made, heard: Heard | None) -> tuple[Made, Any]:
    """One phase as a kernel: what it makes, and the pair gradients of a message transposed."""
    f, parts = step.config.hidden_dim, step.launch.parts
    n, pairs = jax.tree.leaves(state)[0].shape[0], step.geometry.senders.shape[0]
    noting = _Noting(state)
    sums = _sums_shape(heard, f // parts)
    made = jax.eval_shape(lambda *sums: phase(_Listing(f, parts), step.config, weights, noting, *sums), *sums)
    out = {name: _out_shape(value, n, f, parts, name in step.model.JOINED) for name, value in made.items()}
    bars = float32_shape(parts, 4, pairs) if heard is not None and heard.above is not None else None
    results, bars = pl.pallas_call(
        partial(_kernel, step._replace(geometry=None), phase, Sizes(step.geometry, n, f, _pairwise(step))),  # type: ignore[arg-type]
        out_shape=(out, bars),
        grid=(n, parts),
        interpret=step.launch.interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"{step.config.architecture}_{phase.__name__}",
    )(None if heard is None else step.geometry, heard, {name: state[name] for name in noting.read}, weights)
    return results, None if bars is None else total(list(bars))


def _kernel(
    step: Step,
    phase: Phase,
    sizes: Sizes,
    geometry: Geometry | None,
    heard: Heard | None,
    state: Made,
    weights: Weights,
    out: Made,
    pair_bars: Any = None,
) -> None:
    f, parts = step.config.hidden_dim, step.launch.parts

    def equations(on: Any, *sums: Rows) -> Made:
        return phase(on, step.config, weights, state, *sums)

    listing = _Listing(f, parts)
    jax.eval_shape(lambda *sums: equations(listing, *sums), *_sums_shape(heard, f // parts))
    on, sums = _Program(f, parts, listing, step.launch.interpret), []
    if heard is not None and geometry is not None:
        args = (geometry, heard.table, heard.sources)
        if heard.above is None:
            sums = [message_sums(*args, sizes, on.i, on.channels)]
        else:
            sums = [transpose_sums(*args, *heard.above, pair_bars, sizes, on.i, on.part, on.channels, heard.scale)]
    for name, value in equations(on, *sums).items():
        on.store(out[name], value)


def _sums_shape(heard: Heard | None, size: int) -> list[list[jax.ShapeDtypeStruct]]:
    if heard is None:
        return []
    has_b, has_y = heard.sources.b is not None, heard.sources.y is not None
    return [[float32_shape(size)] * (4 if heard.above is None else 1 + has_b + 3 * has_y)]


def _out_shape(value: Any, n: int, f: int, parts: int, joined: bool) -> Any:
    if isinstance(value, Shares):
        return Shares(float32_shape(n, parts, *value.x.shape))
    if isinstance(value, PerAtom):
        return PerAtom(float32_shape(n))
    return float32_shape(n, len(value) * f) if joined else [float32_shape(n, f)] * len(value)


def _pairwise(step: Step) -> Launch:
    return step.launch._replace(block=step.config.hidden_dim // step.launch.parts, slots=SLOTS)
