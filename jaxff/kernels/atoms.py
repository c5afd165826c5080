"""What happens to atoms between two messages, in phases: how equations are written, and all atoms at once through XLA.

A model (jaxff.kernels.painn, jaxff.kernels.student) writes its equations down once, in rows of F channels, cut into
phases where a row of hidden channels is a sum over all channels. For many atoms they take arrays of all of them, here;
for few atoms each phase is a kernel (jaxff.kernels.programs).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxff.kernels.message import Geometry, Launch, Lengths, Sources, message, message_transpose, total
from jaxff.models.parameters import Params
from jaxff.ops.mlp import matmul, silu_slope

AXES = range(3)

Rows = list[Array]
Weights = Any  # trees of arrays, or of refs in a kernel


class Shares(NamedTuple):
    """A hidden row that is a sum over channels: [N, P, H], a share from each program; as arrays, the sum, [N, H]."""

    x: Any


class PerAtom(NamedTuple):
    """One number an atom: [N]."""

    x: Any


Made = dict[str, Any]  # by name: Rows, Shares or PerAtom; names in a model's JOINED are one array of all their rows
# phase(on, config, weights, state), the first phase after a message with its sums, too, and without other channels
Phase = Callable[..., Made]


class Plan(NamedTuple):
    """Phases between two messages, what of theirs the way back reads with how many rows, and its phases;

    what a model's `sources` takes besides s and v.
    """

    between: tuple[Phase, ...]
    kept: dict[str, int]
    between_bwd: tuple[Phase, ...]
    sent: tuple[str, ...]


class Step(NamedTuple):
    """What every phase of a step needs: the equations, their constants, the pairs, how to run.

    lengths: where pair gradients are to be by vectors.
    """

    model: ModuleType
    config: Any
    geometry: Geometry
    launch: Launch
    lengths: Lengths | None = None

    @property
    def plan(self) -> Plan:
        """The phases."""
        return self.model.LEAN if self.launch.lean else self.model.PLAN


class Heard(NamedTuple):
    """A message to be summed; or, with the cotangents of its sums (times `scale`, if given), to be transposed.

    numbers, before: as for jaxff.kernels.message.message, and for its transpose.
    """

    sources: Sources
    table: Any
    above: tuple[Array, Array] | None = None
    scale: Float[Array, "N"] | None = None
    numbers: Int[Array, "N"] | None = None
    before: Any = None


class Scaled(NamedTuple):
    """Rows in a state, times one number an atom."""

    rows: Any
    scale: Any


def scaled(arrays: tuple[Array, Array], scale: Float[Array, "N"] | None) -> tuple[Array, Array]:
    """Two arrays times one number an atom."""
    a, b = arrays
    return arrays if scale is None else (scale[:, None] * a, scale[:, None] * b)


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


# --- arrays of many atoms ---


def run_arrays(step: Step, phases: Sequence[Phase], weights: Weights, state: Made, heard: Heard) -> tuple[Made, Any]:
    """The state with all that the phases make, and the pair gradients [4, E] of a message transposed, or None."""
    sums, pair_bars = hear(step, heard)
    rows = [*sums[:-1], *Atoms(step.config.hidden_dim).rows(sums[-1])]
    return _on_arrays(step, phases, weights, state, rows), pair_bars


def hear(step: Step, heard: Heard) -> tuple[list[Array], Any]:
    """The sums of a message, those of vectors as one array; or of its transpose, and the pair gradients [4, E]."""
    if heard.above is None:
        return list(message(heard.sources, heard.table, step.geometry, step.launch, heard.numbers)), None
    args = heard.sources, heard.above, heard.table, step.geometry, step.launch
    bars, pair_bars = message_transpose(*args, heard.before)
    return [x for x in bars if x is not None], pair_bars


def _on_arrays(step: Step, phases: Sequence[Phase], weights: Weights, state: Made, sums: Rows) -> Made:
    on, joined = Atoms(step.config.hidden_dim), step.model.JOINED
    for k, phase in enumerate(phases):
        made = phase(on, step.config, weights, state, *([] if k else [sums]))
        state = state | {name: jnp.concatenate(x, axis=1) if name in joined else x for name, x in made.items()}
    return state
