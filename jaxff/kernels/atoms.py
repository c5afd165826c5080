"""Equations of single atoms, run in two ways: one program for an atom, or arrays of all atoms through XLA.

A model (jaxff.kernels.painn, jaxff.kernels.student) writes down once what happens to an atom between two messages, in
rows of F channels. For few atoms an atom has one program for all that lies between two steps in which atoms hear of
each other: message and what follows it; last message, readout and their gradient; transposed message and the gradient
of what came before it. A program streams the weights and sums in IEEE float32, without tensor cores. What limits it is
the latency of reading them, so that a program asks for a matrix while it multiplies by the one before. For many atoms
the same equations take arrays.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
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
    message,
    message_sums,
    message_transpose,
    transpose_sums,
)
from jaxff.models.parameters import Params

AXES = range(3)
SLOTS, WARPS = 8, 8  # pairs that a program takes at once, and its warps
AHEAD = 1  # matrices that a program asks for before it needs them
WIDEST = 128  # channels of a program: a matrix of as many rows and columns is in its registers

Rows = list[Array]
Named = dict[str, Rows]
Weights = Any  # trees of arrays, or of refs in a kernel


class Step(NamedTuple):
    """What one step needs of the model and the system: the equations, their constants, the pairs, how to run."""

    model: ModuleType
    config: Any
    geometry: Geometry
    launch: Launch


def fits(tree: Params, hidden_dim: int) -> bool:
    """Whether an atom's matrices fit a program: channels are a power of 2, not too many."""
    sizes = [hidden_dim, *(kernel.shape[1] for kernel, _, _ in tree["read"]["hidden"])]
    return max(sizes) <= WIDEST and all(size & (size - 1) == 0 for size in sizes)


def between(
    step: Step, weights: Weights, table: Array, sources: Sources, s: Array, v: Any
) -> dict[str, Array | list[Array]]:
    """Message and model.between for all atoms; v: [N, 3F], three of [N, F], or None. Rows by name, [N, F] each;

    those that model.JOINED names as one array.
    """
    if not step.launch.atomwise:
        on, s, rows = _heard(step, table, sources, s, v)
        made = step.model.between(on, step.config, weights, s, rows)
        return {k: jnp.concatenate(x, axis=1) if k in step.model.JOINED else x for k, x in made.items()}
    n, f = s.shape
    row = _shape(n, f)
    out = {k: _shape(n, parts * f) if k in step.model.JOINED else [row] * parts for k, parts in step.model.MADE.items()}
    return _run(_between_kernel, step, n, f, "message_between", out, table, sources, s, v, weights)


def last(
    step: Step, weights: Weights, read: Weights, table: Array, sources: Sources, s: Array, v: Any
) -> tuple[Array, Array, Array]:
    """Message, model.last and their gradient: energies [N], and what they gain by s [N, F] and v [N, 3F] before."""
    if not step.launch.atomwise:
        on, s, rows = _heard(step, table, sources, s, v)
        energies, s_bar, v_bar = step.model.last(on, step.config, weights, partial(readout, on, read), s, rows)
        return energies, s_bar, jnp.concatenate(v_bar, axis=1)
    n, f = s.shape
    out = (_shape(n), _shape(n, f), _shape(n, 3 * f))
    return _run(_last_kernel, step, n, f, "message_last", out, table, sources, s, v, weights, read)


def between_bwd(
    step: Step, weights: Weights, table: Array, sources: Sources, kept: Any, above: tuple[Array, Array]
) -> tuple[tuple[Array, Array], Float[Array, "4 E"]]:
    """Cotangents of s and v before model.between of those after the next message, and of that message's pairs."""
    n, f = above[0].shape
    if not step.launch.atomwise:
        bars, pair_bars = message_transpose(sources, above, table, step.geometry, step.launch)
        on = Atoms(f)
        rows = [] if bars.y is None else [on.own(bars.y, axis) for axis in AXES]
        rows = [bars.a, *([] if bars.b is None else [bars.b]), *rows]
        s_bar, v_bar = step.model.between_bwd(on, step.config, weights, kept, rows, *above)
        return (s_bar, jnp.concatenate(v_bar, axis=1)), pair_bars
    out = (_shape(n, f), _shape(n, 3 * f), _shape(1, 4, step.geometry.senders.shape[0]))
    inputs = (table, sources, kept, above, weights)
    s_bar, v_bar, pair_bars = _run(_between_bwd_kernel, step, n, f, "message_between_bwd", out, *inputs)
    return (s_bar, v_bar), pair_bars[0]


# --- equations that both models share ---


def prepare_readout(layers: Sequence[tuple[Array, Array]]) -> Params:
    """Kernel, transpose and bias [1, *] of each hidden layer; the last kernel as a row, and its bias."""
    *hidden, (final, offset) = layers
    return {"hidden": [(k, k.T, b[None]) for k, b in hidden], "final": final.T, "offset": offset}


def readout(on: Any, read: Weights, s: Array) -> tuple[Array, Array]:
    """Energies, without the last bias, and their slopes by s."""
    x, pre = s, []
    for kernel, _, bias in read["hidden"]:
        pre.append(on.product(x, kernel) + on.row(bias))
        x = silu(pre[-1])
    final = on.row(read["final"])
    x_bar = jnp.zeros_like(x) + final
    for (_, transposed, _), z in zip(reversed(read["hidden"]), reversed(pre), strict=True):
        x_bar = on.product(x_bar * silu_slope(z), transposed)
    return jnp.sum(x * final, axis=-1), x_bar


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + jnp.exp(-x))


def silu(x: Array) -> Array:
    """x σ(x)."""
    return x * sigmoid(x)


def silu_slope(x: Array) -> Array:
    """σ(x) (1 + x (1 - σ(x)))."""
    sigma = sigmoid(x)
    return sigma * (1 + x * (1 - sigma))


def inner(x: Rows, y: Rows) -> Array:
    """Σ_k x_k y_k."""
    return total([a * b for a, b in zip(x, y, strict=True)])


def total(terms: Sequence[Array]) -> Array:
    """Σ_k x_k, from the first."""
    return functools.reduce(operator.add, terms)


def rows_of(on: Any, v: Any) -> Rows:
    """A vector's three rows, of one array or of three."""
    return [on.own(x) for x in v] if isinstance(v, list) else [on.own(v, axis) for axis in AXES]


# --- what equations run on ---


class Atoms:
    """All atoms: rows are [N, F]."""

    def __init__(self, f: int) -> None:
        self.f = f

    def own(self, x: Array, part: int = 0) -> Array:
        """The part-th F channels."""
        return x[:, part * self.f : (part + 1) * self.f]

    bias = own

    def row(self, x: Float[Array, "1 C"]) -> Array:
        """A row that all atoms share."""
        return x

    def entry(self, matrix: Array, row: int, column: int) -> Array:
        """One number."""
        return matrix[row, column]

    def each(self, xs: Rows, kernel: Array) -> Rows:
        """x K of each x."""
        return list(self.product(jnp.stack(xs), kernel))

    def spread(self, x: Array, kernel: Array, parts: int) -> Rows:
        """x K, by F columns."""
        return jnp.split(self.product(x, kernel[:, : parts * self.f]), parts, axis=1)

    def total(self, xs: Rows, kernel: Array) -> Array:
        """[x_0, x_1, ...] K."""
        return self.product(jnp.concatenate(xs, axis=1), kernel[: len(xs) * self.f])

    def product(self, x: Array, kernel: Array) -> Array:
        """x K."""
        return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST)


class _Tile(NamedTuple):
    """The part-th F rows or columns of a matrix; all of them without a part."""

    kernel: Any
    row: int | None
    column: int | None

    def slices(self, f: int) -> tuple[slice, ...]:
        return tuple(slice(None) if k is None else slice(k * f, (k + 1) * f) for k in (self.row, self.column))


class _ByTiles:
    """One atom: rows are [F], matrices come in tiles."""

    def __init__(self, f: int) -> None:
        self.f = f

    def tile(self, tile: _Tile) -> Array:
        raise NotImplementedError

    def each(self, xs: Rows, kernel: Any) -> Rows:
        tile = self.tile(_Tile(kernel, None, None))
        return [_times(x, tile) for x in xs]

    def spread(self, x: Array, kernel: Any, parts: int) -> Rows:
        return [_times(x, self.tile(_Tile(kernel, None, k))) for k in range(parts)]

    def total(self, xs: Rows, kernel: Any) -> Array:
        return total([_times(x, self.tile(_Tile(kernel, k, None))) for k, x in enumerate(xs)])

    def product(self, x: Array, kernel: Any) -> Array:
        return _times(x, self.tile(_Tile(kernel, None, None)))


class _Listing(_ByTiles):
    """Notes which tiles equations ask for, in order; what they compute is of no use."""

    def __init__(self, f: int) -> None:
        super().__init__(f)
        self.tiles: list[_Tile] = []

    def own(self, ref: Any, part: int = 0) -> Array:
        return jnp.zeros(self.f, jnp.float32)

    bias = own

    def row(self, ref: Any) -> Array:
        return jnp.zeros(ref.shape[1], jnp.float32)

    def entry(self, ref: Any, row: int, column: int) -> Array:
        return jnp.zeros((), jnp.float32)

    def tile(self, tile: _Tile) -> Array:
        self.tiles.append(tile)
        rows, columns = (len(range(*s.indices(n))) for s, n in zip(tile.slices(self.f), tile.kernel.shape, strict=True))
        return jnp.zeros((rows, columns), jnp.float32)


class _Atom(_ByTiles):
    """One atom in a program, which has the next AHEAD tiles of `equations` under way."""

    def __init__(self, f: int, equations: Callable[..., Any], *shapes: Any) -> None:
        super().__init__(f)
        self.i = pl.program_id(0)
        listing = _Listing(f)
        jax.eval_shape(partial(equations, listing), *shapes)
        self._left = iter(listing.tiles)
        self._coming = [self._ask() for _ in range(AHEAD)]

    def _ask(self) -> tuple[_Tile, Array] | None:
        tile = next(self._left, None)
        return None if tile is None else (tile, tile.kernel[tile.slices(self.f)])

    def tile(self, tile: _Tile) -> Array:
        self._coming.append(self._ask())
        came = self._coming.pop(0)
        assert came is not None
        assert came[0].kernel is tile.kernel
        assert came[0][1:] == tile[1:]
        return came[1]

    def own(self, ref: Any, part: int = 0) -> Array:
        return ref[self.i, part * self.f : (part + 1) * self.f]

    def bias(self, ref: Any, part: int = 0) -> Array:
        return ref[0, part * self.f : (part + 1) * self.f]

    def row(self, ref: Any) -> Array:
        return ref[0, :]

    def entry(self, ref: Any, row: int, column: int) -> Array:
        return ref[row, column]

    def store(self, ref: Any, rows: Rows) -> None:
        """Write rows into one array, or each into its own."""
        for k, row in enumerate(rows):
            if isinstance(ref, list):
                ref[k][self.i, :] = row
            else:
                ref[self.i, k * self.f : (k + 1) * self.f] = row


def _times(x: Float[Array, "K"], tile: Float[Array, "K C"]) -> Float[Array, "C"]:
    return jnp.sum(x[:, None] * tile, axis=0)


# --- arrays of many atoms ---


def _heard(step: Step, table: Array, sources: Sources, s: Array, v: Any) -> tuple[Atoms, Array, Rows]:
    on = Atoms(s.shape[1])
    ds, dv = message(sources, table, step.geometry, step.launch)
    return on, s + ds, _plus(rows_of(on, dv), None if v is None else rows_of(on, v))


def _plus(x: Rows, y: Rows | None) -> Rows:
    return x if y is None else [a + b for a, b in zip(x, y, strict=True)]


# --- one program for each of few atoms ---


def _run(kernel: Any, step: Step, n: int, f: int, name: str, out: Any, *inputs: Any) -> Any:
    """Run kernel(step, sizes, geometry, *inputs, *outputs) for each atom; inputs and outputs are trees of refs."""
    sizes = Sizes(step.geometry, n, f, Launch(f, SLOTS, True, step.launch.route))
    return pl.pallas_call(
        partial(kernel, step._replace(geometry=None), sizes),  # type: ignore[arg-type]
        out_shape=out,
        grid=(n,),
        interpret=step.launch.interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=1),
        name=name,
    )(step.geometry, *inputs)


def _between_kernel(
    step: Step,
    sizes: Sizes,
    geometry: Geometry,
    table: Any,
    sources: Sources,
    s: Any,
    v: Any,
    weights: Weights,
    out: dict[str, Any],
) -> None:
    def equations(on: Any, s: Array, v: Rows) -> Named:
        return step.model.between(on, step.config, weights, s, v)

    row = _shape(sizes.f)
    on = _Atom(sizes.f, equations, row, [row] * 3)
    for name, rows in equations(on, *_hears(on, sizes, geometry, table, sources, s, v)).items():
        on.store(out[name], rows)


def _last_kernel(
    step: Step,
    sizes: Sizes,
    geometry: Geometry,
    table: Any,
    sources: Sources,
    s: Any,
    v: Any,
    weights: Weights,
    read: Weights,
    *out: Any,
) -> None:
    def equations(on: Any, s: Array, v: Rows) -> tuple[Array, Array, Rows]:
        return step.model.last(on, step.config, weights, partial(readout, on, read), s, v)

    row = _shape(sizes.f)
    on = _Atom(sizes.f, equations, row, [row] * 3)
    energy, s_bar, v_bar = equations(on, *_hears(on, sizes, geometry, table, sources, s, v))
    out[0][on.i] = energy
    on.store(out[1], [s_bar])
    on.store(out[2], v_bar)


def _between_bwd_kernel(
    step: Step,
    sizes: Sizes,
    geometry: Geometry,
    table: Any,
    sources: Sources,
    kept: Any,
    above: tuple[Any, Any],
    weights: Weights,
    *out: Any,
) -> None:
    def equations(on: Any, bars: Rows) -> tuple[Array, Rows]:
        return step.model.between_bwd(on, step.config, weights, kept, bars, *above)

    count = 1 + (sources.b is not None) + 3 * (sources.y is not None)
    on = _Atom(sizes.f, equations, [_shape(sizes.f)] * count)
    channels = _all_channels(sizes)
    bars = transpose_sums(geometry, table, sources, *above, out[2], sizes, on.i, 0, channels)
    s_bar, v_bar = equations(on, bars)
    on.store(out[0], [s_bar])
    on.store(out[1], v_bar)


def _hears(
    on: _Atom, sizes: Sizes, geometry: Geometry, table: Any, sources: Sources, s: Any, v: Any
) -> tuple[Array, Rows]:
    ds, *dv = message_sums(geometry, table, sources, sizes, on.i, _all_channels(sizes))
    return on.own(s) + ds, _plus(dv, None if v is None else rows_of(on, v))


def _all_channels(sizes: Sizes) -> Int[Array, "F"]:
    return jnp.arange(sizes.f, dtype=jnp.int32)


def _shape(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)
