"""NVE and Langevin dynamics by jax-md, in compiled blocks that record frames on the device."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from ase import Atoms
from jaxtyping import Float

from jaxff.errors import SimulationError
from jaxff.md.config import MDConfig
from jaxff.md.system import Point, Record, System
from jaxff.md.trajectory import Frames
from jaxff.md.velocities import degrees_of_freedom, kinetic_energy, temperature
from jaxff.potential import Potential

BLOCK_SECONDS = 1.0  # a block grows to about this long: progress and Ctrl-C answer at this pace
RECORD_BYTES = 64 * 2**20  # at most this much of recorded frames on the device in a block
REALLOCATIONS = 20


@dataclass(frozen=True)
class _Block:
    """A block that was launched; its arrays may still be on their way."""

    start: Point
    end: Point
    record: Record
    frames: int
    every: int
    first_step: int

    @property
    def last_step(self) -> int:
        return self.first_step + self.frames * self.every


class Simulation:
    """One trajectory, block by block. All arrays keep the potential's dtype.

    jax-md's velocity Verlet rounds the time step to float32 (6e-8 of it at most); the state stays in the
    potential's dtype all the same. The next block runs on the device while the last one is written.
    """

    def __init__(self, potential: Potential, atoms: Atoms, momenta: Float[np.ndarray, "N 3"], config: MDConfig) -> None:
        self.compile_seconds = 0.0
        self.reallocations = 0
        self._dtype = potential.dtype
        self._config = config
        self._masses = atoms.get_masses()
        langevin = config.ensemble == "nvt_langevin"
        self.degrees_of_freedom = 3 * len(atoms) if langevin else degrees_of_freedom(atoms, config.remove_rotation)
        frame_bytes = 9 * len(atoms) * self._dtype.itemsize
        self._capacity = max(1, min(config.block // config.record_every, RECORD_BYTES // frame_bytes))
        self._frames = 1  # of the next block
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._potential = copy(potential)  # which no other thread knows
        potential_energy, forces = potential.energy_and_forces(atoms.numbers, atoms.positions)
        start = [np.array(x, self._dtype) for x in (atoms.positions, momenta, forces)]
        with self._numerics():
            self._build = partial(System.build, self._potential, atoms, config)
            self._system = self._build()
            position, momentum, force = jax.device_put(start)
            state = self._system.state(position=position, momentum=momentum, force=force)
            self._point = Point(state, self._system.allocate(position, 0))
            first = *(x[None] for x in start), np.array([potential_energy], self._dtype)
            self._first = Record._make(jax.device_put(first))

    @property
    def state(self) -> Any:
        """jax-md's state at the end of the last block that was yielded."""
        return self._point.state

    def first_frame(self) -> Frames:
        """The frame of step 0. Raises SimulationError where its energy or forces aren't finite."""
        frames = self._to_host(self._first, 1, 0, 0)
        self._require(frames, self._good(frames))
        return frames

    def run(self, steps: int) -> Iterator[Frames]:
        """Frames of the next `steps` steps, block by block, the last step included.

        Raises SimulationError when an energy, position or force isn't finite or the temperature passes
        `max_temperature_K`; the frames before that are yielded first.
        """
        current = self._launch(self._point, 0, steps)
        since = time.perf_counter()
        while current is not None:
            ahead = self._launch(current.end, current.last_step, steps)
            if self._overflowed(current):
                current = self._launch(self._reallocated(current.start), current.first_step, steps)
                continue
            frames = self._to_host(current.record, current.frames, current.first_step, current.every)
            good = self._good(frames)
            self._point = current.end if good == len(frames) else self._point
            now = time.perf_counter()
            self._pace((now - since) / current.frames)
            since = now
            if good:
                yield frames.first(good)
            self._require(frames, good)
            current = ahead

    def _launch(self, point: Point, done: int, steps: int) -> _Block | None:
        left = steps - done
        if left <= 0:
            return None
        every = min(self._config.record_every, left)
        frames = min(self._frames, left // every)
        with self._numerics():
            count = np.int32(frames)
            shapes = None if point.neighbors is None else point.neighbors.idx.shape
            if (every, shapes) not in self._compiled:
                begin = time.perf_counter()
                # of a new system: jax-md's step remembers what it was traced with
                block = partial(self._build().block, every=every, capacity=self._capacity)
                traced = jax.jit(self._potential.with_arrays(block)).lower(self._potential.arrays, point, count)
                self._compiled[every, shapes] = traced.compile()
                self.compile_seconds += time.perf_counter() - begin
            end, record = self._compiled[every, shapes](self._potential.arrays, point, count)
        return _Block(point, end, record, frames, every, done)

    def _overflowed(self, block: _Block) -> bool:
        return block.end.neighbors is not None and bool(block.end.neighbors.did_buffer_overflow)

    def _reallocated(self, point: Point) -> Point:
        # a longer list each time: the overflow may lie ahead of the block's start
        self.reallocations += 1
        if self.reallocations > REALLOCATIONS:
            raise SimulationError(f"the neighbour list overflowed {REALLOCATIONS} times: the system is collapsing")
        with self._numerics():
            return Point(point.state, self._system.allocate(point.state.position, 4 * self.reallocations))

    def _to_host(self, record: Record, count: int, first_step: int, every: int) -> Frames:
        positions, momenta, forces, potential = (np.asarray(values)[:count] for values in record)
        step = first_step + every * np.arange(1, count + 1)
        kinetic = kinetic_energy(momenta, self._masses)
        return Frames(
            step=step,
            time_fs=step * self._config.timestep_fs,
            positions=positions,
            momenta=momenta,
            forces=forces,
            potential=potential.astype(np.float64),
            kinetic=kinetic,
            temperature=temperature(kinetic, self.degrees_of_freedom),
        )

    def _good(self, frames: Frames) -> int:
        # how many frames come before the first bad one
        parts = (frames.positions, frames.momenta, frames.forces)
        finite = np.isfinite(frames.potential) & np.all([np.isfinite(x).all(axis=(1, 2)) for x in parts], axis=0)
        good = finite & ~(frames.temperature > self._config.max_temperature_K)
        return len(frames) if good.all() else int(np.argmin(good))

    def _require(self, frames: Frames, good: int) -> None:
        if good == len(frames):
            return
        step, kelvin = frames.step[good], frames.temperature[good]
        if np.isfinite(frames.potential[good]) and np.isfinite(kelvin):
            what = f"the temperature reached {kelvin:.4g} K (limit {self._config.max_temperature_K:g} K)"
        else:
            what = "energy, forces or positions are no longer finite"
        advice = "try --relax or a smaller --timestep" if step else "check the structure"
        raise SimulationError(f"the simulation exploded by step {step}: {what}; {advice}")

    def _pace(self, seconds_per_frame: float) -> None:
        wanted = int(BLOCK_SECONDS / max(seconds_per_frame, 1e-9))
        self._frames = max(1, min(wanted, 4 * self._frames, self._capacity))

    def _numerics(self) -> AbstractContextManager[Any]:
        # float64 only here and only if asked for; jax-md relies on the standard promotion rules, and its lists
        # store int64 indices (all below N) in int32 arrays
        stack = ExitStack()
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "scatter inputs have incompatible types", FutureWarning)
        stack.enter_context(jax.enable_x64(self._dtype == np.float64))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        return stack
