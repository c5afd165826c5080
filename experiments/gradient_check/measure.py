"""Forces of one structure by several roads: explicit rules, autodiff of the plain reference, differences."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from molecules import Structure

from jaxff import models
from jaxff.neighbors import neighbor_pairs
from jaxff.potential import Potential
from jaxff.system import Pairs

# Å, of the five-point central difference: small, because of the student's cone at |v| = 0, which real structures
# come close to; rounding then leaves about 4e-9 eV/Å
STEP = 2e-5
ATOM_STEP = 16  # shapes of the reference: atoms padded to a multiple of this


@dataclass
class Sample:
    """Force components of one structure in eV/Å, and the coordinates that were differenced."""

    explicit64: Float[np.ndarray, " 3N"]
    autodiff64: Float[np.ndarray, " 3N"]
    explicit32: Float[np.ndarray, " 3N"]
    autodiff32: Float[np.ndarray, " 3N"]
    coordinates: np.ndarray
    differences: np.ndarray
    net_force: float
    energy_error: float


@dataclass
class Study:
    """One model in both precisions, and the padded sizes of the reference's compiled code."""

    exact: Potential
    single: Potential
    capacity: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, params: Any, config: Any) -> Study:
        """Both potentials of one parameter tree."""
        return cls(Potential(params, config, dtype="float64"), Potential(params, config, dtype="float32"))

    def reserve(self, structures: list[Structure]) -> None:
        """Choose one number of edges for each padded number of atoms."""
        for s in structures:
            padded, edges = _padded(s), len(neighbor_pairs(s.positions, self.exact.config.cutoff)[0])
            self.capacity[padded] = max(self.capacity.get(padded, 0), edges)

    def measure(self, s: Structure, coordinates: int, rng: np.random.Generator) -> Sample:
        """All roads for one structure."""
        energies, explicit64 = self.exact.evaluate(s.numbers, s.positions)
        _, explicit32 = self.single.evaluate(s.numbers, s.positions)
        graph = self._graph(s)
        energy, autodiff64 = _autodiff(self.exact, graph, len(s.numbers))
        _, autodiff32 = _autodiff(self.single, graph, len(s.numbers))
        chosen = self._draw(s, coordinates, rng)
        return Sample(
            explicit64=explicit64.ravel(),
            autodiff64=autodiff64.ravel(),
            explicit32=explicit32.astype(np.float64).ravel(),
            autodiff32=autodiff32.astype(np.float64).ravel(),
            coordinates=chosen,
            differences=-_differences(self.exact, graph, chosen),
            net_force=float(np.abs(explicit64.sum(axis=0)).max()),
            energy_error=abs(float(energies.sum()) - energy),
        )

    def _graph(self, s: Structure) -> _Graph:
        padded = _padded(s)
        senders, receivers = neighbor_pairs(s.positions, self.exact.config.cutoff)
        more = self.capacity[padded] - len(senders)
        mask = np.pad(np.ones(len(senders), bool), (0, more))
        vectors = np.pad(s.positions[senders] - s.positions[receivers], ((0, more), (0, 0)))
        senders, receivers = (np.pad(x.astype(np.int32), (0, more)) for x in (senders, receivers))
        numbers = np.pad(s.numbers, (0, padded - len(s.numbers)))
        return _Graph(numbers, vectors, Pairs(senders, receivers, mask, padded))

    def _draw(self, s: Structure, count: int, rng: np.random.Generator) -> np.ndarray:
        """Random coordinates, of atoms without a pair that a step could carry across the cutoff's kink."""
        distance = np.linalg.norm(s.positions[:, None] - s.positions[None], axis=-1)
        quiet = (np.abs(distance - self.exact.config.cutoff) > 4 * STEP).all(axis=1)
        candidates = np.flatnonzero(np.repeat(quiet, 3))
        return rng.choice(candidates, min(count, len(candidates)), replace=False)


def _padded(s: Structure) -> int:
    return -(-len(s.numbers) // ATOM_STEP) * ATOM_STEP


class _Graph(NamedTuple):
    """Padded numbers, pair vectors (Å, f64) and pairs of one structure."""

    numbers: Int[Array | np.ndarray, " N"]
    vectors: Float[Array | np.ndarray, "E 3"]
    pairs: Pairs


def _reference(params: Any, config: Any, graph: _Graph, shift: Float[Array, "N 3"]) -> Float[Array, ""]:
    """The plain energy (eV) when every atom moves by `shift` (Å) and the edges stay the same.

    Autodiff with respect to `shift` is that with respect to the positions, but the vectors are those that the
    explicit road sees, to the last bit in float32 too.
    """
    numbers, pairs = jnp.asarray(graph.numbers), graph.pairs
    vectors = jnp.asarray(graph.vectors) + shift[pairs.senders] - shift[pairs.receivers]
    return models.reference_atomic_energies(params, config, numbers, vectors, pairs).sum()


_reference_gradient = jax.jit(jax.value_and_grad(_reference, argnums=3), static_argnums=1)


@partial(jax.jit, static_argnums=1)
def _reference_energies(params: Any, config: Any, graph: _Graph, shifts: Float[Array, "M N 3"]) -> Float[Array, " M"]:
    return jax.lax.map(lambda shift: _reference(params, config, graph, shift), shifts)


def _autodiff(potential: Potential, graph: _Graph, n: int) -> tuple[float, Float[np.ndarray, "N 3"]]:
    """Energy (eV) and forces (eV/Å) by jax.grad of the reference, in the potential's precision."""
    graph = graph._replace(vectors=graph.vectors.astype(potential.dtype))
    shift = np.zeros((len(graph.numbers), 3), potential.dtype)
    energy, gradient = _reference_gradient(potential.params, models.jit_key(potential.config), graph, shift)
    return float(energy), -np.asarray(gradient)[:n]


def _differences(potential: Potential, graph: _Graph, chosen: np.ndarray) -> Float[np.ndarray, " M"]:
    """dE/dx of the chosen coordinates by (8 (E₊₁ - E₋₁) - (E₊₂ - E₋₂)) / 12 h."""
    shifts = np.zeros((len(chosen), 4, 3 * len(graph.numbers)))
    shifts[np.arange(len(chosen)), :, chosen] = STEP * np.array([1.0, -1.0, 2.0, -2.0])
    shifts = shifts.reshape(-1, len(graph.numbers), 3)
    e = np.asarray(_reference_energies(potential.params, models.jit_key(potential.config), graph, shifts))
    e = e.reshape(-1, 4)
    return (8 * (e[:, 0] - e[:, 1]) - (e[:, 2] - e[:, 3])) / (12 * STEP)
