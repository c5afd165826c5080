"""Rows of the table that JAX measures in the running process: NVE steps, batches, one large system, single calls."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from results import matched
from systems import OPEN_LIMIT, box, structure

import jaxff
from jaxff import interop, models
from jaxff.config import PainnConfig, StudentConfig
from jaxff.md.system import steps_in_a_turn
from jaxff.neighbors import slot_pairs
from jaxff.potential import Potential
from jaxff.system import Pairs
from jaxff.units import fs

CONFIGS: dict[str, Any] = {"student": StudentConfig(), "painn": PainnConfig()}
ENGINES = {  # name: (engine, filters)
    "fused": ("fused", "table"),
    "xla-table": ("xla", "table"),
    "xla-exact": ("xla", "exact"),
    "autodiff": ("xla", "exact"),
}
TIMESTEP = 0.01 * fs
_SIZED = re.compile(rf"({'|'.join(CONFIGS)}):([1-9][0-9]*)")


def sized(names: Sequence[str]) -> dict[str, tuple[str, int]]:
    """Architecture and atoms of rows like painn:10648; refuses others."""
    return {name: (match[1], int(match[2])) for name, match in matched(_SIZED, names, "painn:10648").items()}


@cache
def potential(architecture: str, engine: str) -> Potential:
    """A potential with random weights, made once; biases, too: XLA knows what to do with zeros."""
    config = CONFIGS[architecture]
    chosen, filters = ENGINES[engine]
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.asarray, models.init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda x: x if x.any() else rng.normal(scale=0.1, size=x.shape).astype(x.dtype), params)
    return Potential(params, config, engine=chosen, filters=filters)


def energies_function(architecture: str, engine: str) -> Callable[..., jax.Array]:
    """Atomic energies of traced vectors: the potential's, or plain functions for autodiff."""
    model = potential(architecture, engine)
    if engine != "autodiff":
        return model.atomic_energies_of_vectors
    config = model.config

    def plain(numbers: Any, vectors: Any, pairs: Pairs) -> jax.Array:
        pairs = jaxff.ops.within_cutoff(vectors, pairs, config.cutoff)
        return models.reference_atomic_energies(model.params, config, numbers, vectors, pairs)

    return plain


class Problem(NamedTuple):
    """A system in jax-md's space: numbers [N], positions [N, 3] Å, its fixed pairs, displacement and shift."""

    numbers: np.ndarray
    positions: jax.Array
    pairs: Pairs
    displacement: Callable[..., jax.Array]
    shift: Callable[..., jax.Array]

    def energy(self, architecture: str, engine: str) -> Callable[[jax.Array, Pairs], jax.Array]:
        """energy(R, pairs) in eV by an engine; the pairs are an argument, or XLA would fold them as constants."""
        if engine == "autodiff":
            energies, numbers = energies_function(architecture, engine), jnp.asarray(self.numbers)

            def plain(R: jax.Array, pairs: Pairs) -> jax.Array:
                vectors = jax.vmap(self.displacement)(R[pairs.senders], R[pairs.receivers])
                return energies(numbers, vectors, pairs).sum()

            return plain
        model = interop.jax_md._PairModel(potential(architecture, engine), self.numbers, self.displacement)
        return lambda R, pairs: model.energy(R, pairs, {})


@cache
def problem(atoms: int) -> Problem:
    """All pairs of an open structure, or slots in a periodic box."""
    from jax_md import space

    if atoms <= OPEN_LIMIT:
        numbers, positions = structure(atoms)
        pairs, (displacement, shift) = interop.jax_md._all_pairs(atoms), space.free()
    else:
        b = box(atoms)
        numbers, positions = b.numbers, b.positions
        _, pairs = slot_pairs(b.positions, b.senders, b.receivers, atoms, b.slots)
        displacement, shift = space.periodic(b.side)
    return Problem(numbers, jnp.asarray(positions, jnp.float32), jax.tree.map(jnp.asarray, pairs), displacement, shift)


def prepared(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], dict[str, float]]:
    """The compiled function; seconds that took, and MB of temporaries."""
    start = time.perf_counter()
    compiled = function.lower(*args).compile()  # type: ignore[attr-defined]
    compile_time = time.perf_counter() - start
    memory = compiled.memory_analysis()
    temporaries = 0.0 if memory is None else memory.temp_size_in_bytes / 1e6
    return compiled, {"compile_s": compile_time, "temporaries_MB": temporaries}


def spread(seconds: Sequence[float], scale: float = 1.0, unit: str = "") -> dict[str, float]:
    """Median, fastest and slowest, times `scale`."""
    values = {"median": float(np.median(seconds)), "fastest": min(seconds), "slowest": max(seconds)}
    return {name + unit: value * scale for name, value in values.items()}


def timed(function: Callable[..., Any], *args: Any, calls: int = 7) -> tuple[dict[str, float], tuple[Any, Any]]:
    """Seconds of a compiled call: median, extremes, compile time; temporaries in MB; its first and last result."""
    compiled, facts = prepared(function, *args)
    first = last = jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        last = jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    return spread(seconds) | facts, (first, last)


def nve_loop(
    architecture: str, engine: str, atoms: int, batch: int, steps: int
) -> tuple[Callable[[Any], Any], Callable[[], Any]]:
    """block(state) -> state after `steps` of jax-md's NVE steps, and what makes the first state; of many under vmap."""
    from jax_md import simulate, space

    numbers, positions = structure(atoms)
    displacement, shift = space.free()
    energy = interop.jax_md.energy(potential(architecture, engine), numbers, displacement)
    if engine == "autodiff":
        pairs, energies = interop.jax_md._all_pairs(atoms), energies_function(architecture, engine)

        def energy(R: jax.Array, **_: Any) -> jax.Array:
            vectors = (R[None] - R[:, None]).reshape(-1, 3)
            return energies(jnp.asarray(numbers), vectors, pairs).sum()

    init, step = simulate.nve(energy, shift, TIMESTEP)

    def block(state: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, s: step(s), state, unroll=steps_in_a_turn(atoms))

    def start(key: jax.Array) -> Any:
        return init(key, jnp.asarray(positions, jnp.float32), 1e-4, mass=12.0)

    if batch:
        keys = jax.random.split(jax.random.key(0), batch)
        return jax.vmap(block), lambda: jax.vmap(start)(keys)
    return block, lambda: start(jax.random.key(0))


def nve(architecture: str, engine: str, atoms: int, batch: int = 0, steps: int = 0) -> dict[str, Any]:
    """jax-md's NVE step in a compiled loop; microseconds for a step and molecule; twice the same bits?"""
    steps = steps or (20 if batch > 100 else 400)
    block, start = nve_loop(architecture, engine, atoms, batch, steps)
    times, (first, again) = timed(jax.jit(block), jax.jit(start)(), calls=5)
    scale = 1e6 / steps / max(batch, 1)
    row = {f"{k}_us": times.pop(k) * scale for k in ("median", "fastest", "slowest")}
    same = bool(jnp.array_equal(first.position, again.position))
    return row | times | {"finite": bool(jnp.isfinite(first.position).all()), "same_bits": same}


def large(architecture: str, engine: str, atoms: int = 10648) -> dict[str, Any]:
    """Energy and forces of one periodic system at 0.1 atoms/Å³, fixed list of vectors; microseconds an atom."""
    b = box(atoms)
    vectors, pairs = slot_pairs(b.positions, b.senders, b.receivers, atoms, b.slots)
    vectors -= b.side * np.round(vectors / b.side)
    numbers = jnp.asarray(b.numbers)
    energies = energies_function(architecture, engine)
    antisymmetric = potential(architecture, engine).gradients_are_antisymmetric(pairs)

    def evaluate(vectors: jax.Array) -> Any:
        total, g = jax.value_and_grad(lambda v: energies(numbers, v, pairs).sum())(vectors)
        return total, jaxff.ops.accumulate_forces(g, pairs, antisymmetric=antisymmetric)

    times, ((_, first), (_, forces)) = timed(jax.jit(evaluate), jnp.asarray(vectors, jnp.float32))
    row = {f"{k}_us_per_atom": times.pop(k) * 1e6 / atoms for k in ("median", "fastest", "slowest")}
    checks = {"finite": bool(jnp.isfinite(forces).all()), "same_bits": bool((first == forces).all())}
    return row | times | checks | {"slots": b.slots, "atoms": atoms}


def call(architecture: str, engine: str, atoms: int) -> dict[str, Any]:
    """energy_and_forces as a user calls it, or the PyTorch student; microseconds a call."""
    numbers, positions = structure(atoms)
    if engine == "torch":
        from jaxff.convert.torch_reference import torch_energy_and_forces, torch_student

        model = torch_student(CONFIGS["student"])
        once = lambda: torch_energy_and_forces(model, numbers, positions)  # noqa: E731
    else:
        model = potential(architecture, engine)
        once = lambda: model.energy_and_forces(numbers, positions)  # noqa: E731
    start = time.perf_counter()
    once()
    first, seconds = time.perf_counter() - start, []
    for _ in range(60):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return spread(seconds, 1e6, "_us") | {"first_call_s": first}
