"""What is compiled for a simulation: jax-md's integrator over the potential's energy function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from ase import Atoms
from jaxtyping import Array, Float, Int

from jaxff.md.config import MDConfig
from jaxff.potential import Potential
from jaxff.units import fs, kB


def steps_in_a_turn(num_atoms: int) -> int:
    """How many steps a turn of the compiled loop takes: on a GPU a turn costs as much as some kernels of few atoms."""
    return 8 if jax.default_backend() == "gpu" and num_atoms <= 128 else 1


class Point(NamedTuple):
    """Where a simulation stands: jax-md's state, and its neighbour list (None: all pairs)."""

    state: Any
    neighbors: Any


class Record(NamedTuple):
    """What is recorded of T frames, on the device."""

    positions: Float[Array, "T N 3"]
    momenta: Float[Array, "T N 3"]
    forces: Float[Array, "T N 3"]
    potential: Float[Array, " T"]


@dataclass(frozen=True)
class System:
    """Functions of one system: `state` of position, momentum and force, and `block`, which is to be jitted.

    The forces are jax-md's -jax.grad of the energy function, which calls the hand-written rules.
    """

    energy: Callable[..., Float[Array, ""]]
    allocate: Callable[[Float[Array, "N 3"], int], Any]
    state: Callable[..., Any]
    step: Callable[..., Any]

    @classmethod
    def build(cls, potential: Potential, atoms: Atoms, config: MDConfig) -> Self:
        """All pairs up to `neighbor_list_above` atoms, a neighbour list above."""
        from jaxff.interop.later import import_jax_md

        import_jax_md()
        from jax_md import simulate, space

        displacement, shift = space.free()
        energy, allocate = _energy(potential, atoms, config, displacement)
        dt, kT = config.timestep_fs * fs, config.temperature_K * kB
        mass = jax.device_put(atoms.get_masses()[:, None].astype(potential.dtype))
        if config.ensemble == "nve":
            _, step = simulate.nve(energy, shift, dt)
            state = partial(simulate.NVEState, mass=mass)
        else:
            _, step = simulate.nvt_langevin(energy, shift, dt, kT, config.friction_per_ps / (1000.0 * fs))
            state = partial(simulate.NVTLangevinState, mass=mass, rng=jax.random.PRNGKey(config.seed))
        return cls(energy, allocate, state, step)

    def block(self, point: Point, frames: Int[Array, ""], *, every: int, capacity: int) -> tuple[Point, Record]:
        """`frames` (at most `capacity`) times `every` steps, a frame recorded after each `every`."""

        def one_step(_: Array, at: Point) -> Point:
            state = self.step(at.state, **_keyword(at.neighbors))
            return Point(state, None if at.neighbors is None else at.neighbors.update(state.position))

        def one_frame(index: Array, carry: tuple[Point, Record]) -> tuple[Point, Record]:
            at, record = carry
            at = jax.lax.fori_loop(0, every, one_step, at, unroll=steps_in_a_turn(len(at.state.position)))
            return at, jax.tree.map(lambda rows, row: rows.at[index].set(row), record, self._record(at))

        shapes = jax.eval_shape(self._record, point)
        empty = jax.tree.map(lambda x: jnp.zeros((capacity, *x.shape), x.dtype), shapes)
        return jax.lax.fori_loop(0, frames, one_frame, (point, empty))

    def _record(self, at: Point) -> Record:
        state = at.state
        return Record(
            state.position, state.momentum, state.force, self.energy(state.position, **_keyword(at.neighbors))
        )


def _energy(
    potential: Potential, atoms: Atoms, config: MDConfig, displacement: Callable[..., Array]
) -> tuple[Callable[..., Array], Callable[[Array, int], Any]]:
    from jaxff.interop import jax_md as interop

    if len(atoms) <= config.neighbor_list_above:
        return interop.energy(potential, atoms.numbers, displacement), lambda positions, extra: None
    neighbor_fn, listed = interop.energy_neighbor_list(
        displacement, 1.0, potential, atoms.numbers, dr_threshold=config.neighbor_skin, disable_cell_list=True
    )

    def energy(positions: Array, neighbor: Any) -> Array:
        # jax-md updates the list after a step; within one, atoms may just have left the skin
        return listed(positions, neighbor=neighbor.update(jax.lax.stop_gradient(positions)))

    return energy, lambda positions, extra: neighbor_fn.allocate(positions, extra_capacity=extra)


def _keyword(neighbors: Any) -> dict[str, Any]:
    return {} if neighbors is None else {"neighbor": neighbors}
