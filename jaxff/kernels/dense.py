"""Dense layers of atoms in kernels: a program computes a block of output columns for a block of atoms.

Products run in IEEE float32, spread over many programs; a sum over input channels goes in chunks. The same code runs on
whole arrays, through XLA's matrix products, where there are atoms enough: in large systems, and under vmap.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from jaxff.kernels.message import Launch

PRECISION = jax.lax.Precision.HIGHEST
ATOMS = 16  # rows of a program
COLUMNS = 16
CHUNK = 64


class Tile(NamedTuple):
    """The atoms and columns of a program, and the number of channels F."""

    atoms: Int[Array, "A"]
    inside: Bool[Array, "A"]
    columns: Int[Array, "C"]
    f: int

    def load(self, ref: Any, channels: Array) -> Float[Array, "A B"]:
        """Rows of this program's atoms, 0 beyond the last."""
        return triton.load(ref.at[self.atoms[:, None], channels[None, :]], mask=self.inside[:, None], other=0)

    def own(self, ref: Any, part: int = 0) -> Float[Array, "A C"]:
        """This program's columns of the part-th F channels."""
        return self.load(ref, self.columns + part * self.f)

    def store(self, ref: Any, value: Array, part: int = 0) -> None:
        """Write this program's columns of the part-th F channels."""
        index = ref.at[self.atoms[:, None], (self.columns + part * self.f)[None, :]]
        triton.store(index, value, mask=self.inside[:, None])

    def bias(self, ref: Any, part: int = 0) -> Float[Array, "1 C"]:
        """This program's columns of a bias [1, ...]."""
        return ref[0, self.columns + part * self.f][None, :]

    def total(self, xs: Sequence[Callable[[Array], Array]], kernel: Any) -> Float[Array, "A C"]:
        """[x_0, x_1, ...] K, each x F channels."""
        return functools.reduce(operator.add, [self._product(x, kernel, row=k) for k, x in enumerate(xs)])

    def spread(self, x: Callable[[Array], Array], kernel: Any, parts: int) -> list[Float[Array, "A C"]]:
        """x K, this program's columns of each F."""
        return [self._product(x, kernel, column=k) for k in range(parts)]

    def _product(self, x: Callable[[Array], Array], kernel: Any, row: int = 0, column: int = 0) -> Float[Array, "A C"]:
        """x K of F input channels: x(channels) [A, B] in chunks, and K's rows from row F, columns from column F on."""
        size = math.gcd(self.f, CHUNK)
        total = jnp.zeros((ATOMS, COLUMNS), jnp.float32)
        for start in range(0, self.f, size):
            channels = start + jnp.arange(size, dtype=jnp.int32)
            rows, columns = channels + row * self.f, self.columns + column * self.f
            total = total + dot(x(channels), kernel[rows[:, None], columns[None, :]])
        return total


def dot(x: Float[Array, "A B"], y: Float[Array, "B C"]) -> Float[Array, "A C"]:
    """x y in IEEE float32."""
    return jnp.dot(x, y, precision=PRECISION)


class Span(NamedTuple):
    """F channels from `start` on."""

    start: int

    def __add__(self, offset: Any) -> Span:  # type: ignore[override]
        return Span(self.start + offset)


class Whole:
    """A `Tile` of all atoms and columns, over arrays; outputs are lists of their parts."""

    def __init__(self, f: int) -> None:
        self.f = f

    def load(self, ref: Array, channels: Span) -> Array:
        return ref[:, channels.start : channels.start + self.f]

    def own(self, ref: Array, part: int = 0) -> Array:
        return self.load(ref, Span(part * self.f))

    bias = own

    def store(self, ref: list[Array], value: Array, part: int = 0) -> None:
        assert len(ref) == part
        ref.append(value)

    def total(self, xs: Sequence[Callable[[Span], Array]], kernel: Array) -> Array:
        return dot(jnp.concatenate([x(Span(0)) for x in xs], axis=1), kernel[: len(xs) * self.f])

    def spread(self, x: Callable[[Span], Array], kernel: Array, parts: int) -> list[Array]:
        return jnp.split(dot(x(Span(0)), kernel[:, : parts * self.f]), parts, axis=1)


def launch(
    kernel: Callable[..., None],
    inputs: Sequence[Array],
    widths: Sequence[int],
    f: int,
    how: Launch,
    name: str,
) -> tuple[Array, ...]:
    """Run kernel(tile, *refs) over all atoms and columns; outputs [N, width] for each of `widths`."""
    n = inputs[0].shape[0]

    def whole(*arrays: Array) -> tuple[Array, ...]:
        outputs: list[list[Array]] = [[] for _ in widths]
        kernel(Whole(f), *arrays, *outputs)
        return tuple(jnp.concatenate(parts, axis=1) for parts in outputs)

    if not how.dense:
        return whole(*inputs)
    tiled = jax.custom_batching.custom_vmap(
        pl.pallas_call(
            partial(_with_tile, kernel, n, f),
            out_shape=tuple(jax.ShapeDtypeStruct((n, width), jnp.float32) for width in widths),
            grid=(-(-n // ATOMS), f // COLUMNS),
            interpret=how.interpret,
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            name=name,
        )
    )

    @tiled.def_vmap
    def _(size: int, batched: Sequence[bool], *arrays: Array) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        axes = [0 if x else None for x in batched]
        return jax.vmap(whole, in_axes=axes, axis_size=size)(*arrays), (True,) * len(widths)

    return tiled(*inputs)


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


def norm(vectors: Sequence[Array]) -> Array:
    """|v| of three components."""
    return jnp.sqrt(vectors[0] * vectors[0] + vectors[1] * vectors[1] + vectors[2] * vectors[2])


def _with_tile(kernel: Callable[..., None], n: int, f: int, *refs: Any) -> None:
    atoms = pl.program_id(0) * np.int32(ATOMS) + jnp.arange(ATOMS, dtype=jnp.int32)
    columns = pl.program_id(1) * np.int32(COLUMNS) + jnp.arange(COLUMNS, dtype=jnp.int32)
    kernel(Tile(atoms, atoms < n, columns, f), *refs)
