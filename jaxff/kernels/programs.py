"""Phases between two messages as kernels, for few atoms.

P programs serve an atom, each with F/P of its channels, because what takes longest is reading the weights, and several
multiprocessors read faster than one. A product by a program's rows of a matrix, "inward", is its share of a sum over
channels, which the next phase adds up; a product by its columns, "outward", its own channels of the result. Sums are
IEEE float32, without tensor cores, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from jaxff.kernels.atoms import AXES, Heard, Made, PerAtom, Phase, Rows, Scaled, Shares, Step, Weights
from jaxff.kernels.message import (
    Geometry,
    Launch,
    Sizes,
    float32_shape,
    message_sums,
    pair_bars_shape,
    total,
    transpose_sums,
)
from jaxff.models.parameters import Params

SLOTS, WARPS = 32, 4  # pairs that a program takes at once, and its warps
AHEAD = 3  # tiles of matrices that a program asks for before it needs them
WIDEST = 128  # channels of a model whose tiles fit a program's registers


def fits(tree: Params, hidden_dim: int) -> bool:
    """Whether matrices fit programs: channels are a power of 2, not too many, and the readout has a hidden layer."""
    hidden = [kernel.shape[1] for kernel, _, _ in tree["read"]["hidden"]]
    return bool(hidden) and all(size & (size - 1) == 0 and size <= WIDEST for size in (hidden_dim, *hidden))


def run_programs(step: Step, phases: Sequence[Phase], weights: Weights, state: Made, heard: Heard) -> tuple[Made, Any]:
    """What `atoms.run_arrays` returns, by a kernel for each phase; pair gradients by vectors and parts, [P, 3, E]."""
    pair_bars = None
    for k, phase in enumerate(phases):
        made, bars = _launch(step, phase, weights, state, heard if k == 0 else None)
        state = state | made
        pair_bars = bars if k == 0 else pair_bars
    return state, pair_bars


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
    n = jax.tree.leaves(state)[0].shape[0]
    noting, sums, remakes = _Noting(state), _sums_shape(heard, f // parts), False
    if heard is not None and heard.above is not None and heard.sources.y is not None:
        heard, remakes = heard._replace(sources=heard.sources._replace(y=None)), True  # so that memory needn't keep it
    listing, made = _listed(step, phase, weights, noting, sums, remakes)
    out = {name: _out_shape(value, n, f, parts, name in step.model.JOINED) for name, value in made.items()}
    back = heard is not None and heard.above is not None
    bars = pair_bars_shape(parts, step.geometry, step.lengths) if back else None
    sizes = Sizes(step.geometry, n, f, _pairwise(step), step.lengths)
    args = None if heard is None else step.geometry, heard, {name: state[name] for name in noting.read}, weights
    taken = _taken(step.model.TAKES.get(phase, {}), listing, args, (out, bars))
    results, bars = pl.pallas_call(
        partial(_kernel, step._replace(geometry=None), phase, sizes, sums, remakes, bool(taken)),  # type: ignore[arg-type]
        out_shape=(out, bars),
        grid=(n, parts),
        input_output_aliases=taken,
        interpret=step.launch.interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=f"{step.config.architecture}_{phase.__name__}",
    )(*args)
    return results, bars


def _taken(names: Mapping[str, str], listing: _Listing, args: Any, out: Any) -> dict[int, int]:
    """Which output, counted, takes which argument's memory.

    All of what a phase reads for the last time, if each program reads no more than the channels that it then writes; of
    pair gradients that are added to, which a message's kernel sees to.
    """
    (_, heard, state, _), (places, bars) = (_counted(tree) for tree in (args, out))
    found = {} if heard is None or heard.before is None else {heard.before: bars}
    for made, read in names.items():
        if made not in places or (read not in state and read != "sent") or isinstance(state.get(read), Scaled):
            continue
        arrays, where = (args[1].sources.a, heard.sources.a) if read == "sent" else (args[2][read], state[read])
        for array in jax.tree.leaves(arrays):
            assert all(what.kind == "own" for what in listing.reads if what.ref is array)
        dying, made_of_it = jax.tree.leaves(where), jax.tree.leaves(places[made])
        found |= zip(dying, made_of_it[: len(dying)], strict=True)
    return found


def _counted(tree: Any) -> Any:
    """The numbers of a tree's leaves in their places."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, range(len(leaves)))


def _listed(
    step: Step, phase: Phase, weights: Weights, state: Made, sums: Any, remakes: bool
) -> tuple[_Listing, dict[str, Any]]:
    """What a program reads, for the vectors that were sent too if it makes them again; shapes of what a phase makes."""
    listing = _Listing(step.config.hidden_dim, step.launch.parts)

    def equations(*sums: Rows) -> Made:
        if remakes:
            step.model.sent_vectors(listing, weights, state)
        return phase(listing, step.config, weights, state, *sums)

    return listing, jax.eval_shape(equations, *sums)


def _kernel(
    step: Step,
    phase: Phase,
    sizes: Sizes,
    sums_shape: Any,
    remakes: bool,
    takes: bool,
    geometry: Geometry | None,
    heard: Heard | None,
    state: Made,
    weights: Weights,
    out: Made,
    pair_bars: Any = None,
) -> None:
    listing, _ = _listed(step, phase, weights, state, sums_shape, remakes)
    on, sums = _Program(step.config.hidden_dim, step.launch.parts, listing, step.launch.interpret), []
    if heard is not None and geometry is not None:
        args = (geometry, heard.table, heard.sources)
        if heard.above is None:
            sums = [message_sums(*args, sizes, on.i, on.channels)]
        else:
            sent = step.model.sent_vectors(on, weights, state) if remakes else None
            more = {"scale": heard.scale, "y_i": sent, "before": heard.before}
            sums = [transpose_sums(*args, *heard.above, pair_bars, sizes, on.i, on.part, on.channels, **more)]
    made = phase(on, step.config, weights, state, *sums)
    if takes and not step.launch.interpret:
        triton.debug_barrier()  # threads read numbers that others write
    for name, value in made.items():
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
