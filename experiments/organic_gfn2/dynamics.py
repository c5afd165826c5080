"""Langevin dynamics of many molecules at once, each padded to the same number of atoms: for sampling and for stability.

One step is BAOAB (Leimkuhler, Matthews 2013); with friction 0 it is velocity Verlet. Pairs are all pairs of a molecule.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ase.data import atomic_masses
from ase.units import fs, kB

from jaxff.ops.distance import accumulate_forces
from jaxff.potential import Potential
from jaxff.system import Pairs


class State(NamedTuple):
    """B molecules of n places: Å, Å/(ASE time), eV."""

    positions: jax.Array  # [B, n, 3]
    velocities: jax.Array  # [B, n, 3]
    energies: jax.Array  # [B], potential; 0 before the first step
    key: jax.Array


class Dynamics:
    """Molecules of `numbers` (a list of [N_b]) with a potential; state in, state out, `steps` at a time.

    timestep_fs: fs; friction_per_fs: 1/fs, 0 for NVE; hydrogen_mass: amu, None for the real one.
    """

    def __init__(
        self,
        potential: Potential,
        numbers: Sequence[np.ndarray],
        timestep_fs: float,
        friction_per_fs: float,
        hydrogen_mass: float | None = None,
    ) -> None:
        self.potential = potential
        self.places = max(4, -(-max(len(z) for z in numbers) // 4) * 4)
        self.counts = np.array([len(z) for z in numbers])
        self.numbers = np.stack([np.pad(z, (0, self.places - len(z))) for z in numbers]).astype(np.int32)
        self.real = self.numbers > 0
        masses = np.where(self.real, atomic_masses[self.numbers], 1.0)
        if hydrogen_mass is not None:
            masses = np.where(self.numbers == 1, hydrogen_mass, masses)
        self.masses = masses.astype(potential.dtype)[:, :, None]
        self.dt = timestep_fs * fs
        self.keep = float(np.exp(-friction_per_fs * timestep_fs))
        self._run = jax.jit(self._steps)

    def start(self, positions: Sequence[np.ndarray], temperature: Any, seed: int) -> State:
        """At `positions` (a list of [N_b, 3] Å), with Maxwell velocities at `temperature` K ([B] or one)."""
        rng = np.random.default_rng(seed)
        dtype = self.potential.dtype
        r = np.zeros((*self.numbers.shape, 3), dtype)
        for row, own in zip(r, positions, strict=True):
            row[: len(own)] = own
        spread = np.sqrt(kB * np.broadcast_to(temperature, len(r))[:, None, None] / self.masses)
        v = np.where(self.real[:, :, None], rng.normal(size=r.shape) * spread, 0)
        momentum = (self.masses * v).sum(1, keepdims=True) / (self.masses * self.real[:, :, None]).sum(1, keepdims=True)
        v = np.where(self.real[:, :, None], v - momentum, 0).astype(dtype)
        return State(jnp.asarray(r), jnp.asarray(v), jnp.zeros(len(r), dtype), jax.random.key(seed))

    def run(self, state: State, temperature: Any, steps: int) -> State:
        """The state `steps` later; temperature: K, [B] or one."""
        kelvin = jnp.asarray(np.broadcast_to(temperature, len(self.numbers)), self.potential.dtype)
        return self._run(state, kelvin, steps)

    def kinetic(self, state: State) -> np.ndarray:
        """Kinetic energies [B], eV."""
        v = np.asarray(state.velocities, np.float64)
        return 0.5 * (self.masses * v * v).sum((1, 2))

    def _forces(self, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.vmap(partial(_evaluate, self.potential))(jnp.asarray(self.numbers), positions)

    def _steps(self, state: State, kelvin: jax.Array, steps: jax.Array) -> State:
        dtype, keep = self.potential.dtype, self.keep
        dt, masses = jnp.asarray(self.dt, dtype), jnp.asarray(self.masses)
        noise = jnp.sqrt((1 - keep**2) * kB * kelvin[:, None, None] / masses).astype(dtype)
        noise = jnp.where(jnp.asarray(self.real)[:, :, None], noise, 0)

        def step(i: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            r, v, _, forces = carry
            v = v + 0.5 * dt * forces / masses
            r = r + 0.5 * dt * v
            if keep < 1:
                random = jax.random.normal(jax.random.fold_in(state.key, i), v.shape, dtype)
                v = jnp.asarray(keep, dtype) * v + noise * random
            r = r + 0.5 * dt * v
            energies, forces = self._forces(r)
            return r, v + 0.5 * dt * forces / masses, energies, forces

        # forces are not part of the state: one evaluation more in each call, one compilation less
        first = (state.positions, state.velocities, *self._forces(state.positions))
        r, v, energies, _ = jax.lax.fori_loop(0, steps, step, first)
        return State(r, v, energies, jax.random.split(state.key, 1)[0])


def _evaluate(potential: Potential, numbers: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Energy and forces of one padded molecule."""
    n = numbers.shape[0]
    index = jnp.arange(n * n, dtype=jnp.int32)
    senders, receivers = index % n, index // n
    mask = (numbers[senders] > 0) & (numbers[receivers] > 0) & (senders != receivers)
    vectors = (positions[None, :, :] - positions[:, None, :]).reshape(-1, 3)
    vectors = jnp.where(mask[:, None], vectors, 2 * potential.config.cutoff)  # beyond every pair
    pairs = Pairs(senders, receivers, mask, n, "all", symmetric=True)
    energies, gradients = potential.energies_and_vector_gradients(numbers, vectors, pairs)
    forces = accumulate_forces(
        jnp.where(mask[:, None], gradients, 0), pairs, antisymmetric=potential.gradients_are_antisymmetric(pairs)
    )
    return jnp.sum(energies), forces
