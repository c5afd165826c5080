"""Rows against size: an NVE step from 3 to 97,336 atoms; energy alone beside forces; the hand-written rule beside grad.

Everything runs in a compiled loop of dependent evaluations, as dynamics do, so that starting a program is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from rows import TIMESTEP, nve, prepared, problem, spread, timed
from systems import OPEN_LIMIT

TINY = 1e-30  # moves no position: less than half of its last bit
CALLS = 5


def steps_for(atoms: int) -> int:
    """Turns of the loop: some 50 to 200 ms of a GPU, about a second of a CPU."""
    most, work = (400, 400_000) if jax.default_backend() == "gpu" else (40, 1_000)
    return max(2, min(most, work // atoms))


def size(architecture: str, engine: str, atoms: int) -> dict[str, Any]:
    """An NVE step: all pairs of a molecule as the nve rows have it; in a periodic box with a fixed list above 128."""
    steps = steps_for(atoms)
    if atoms <= OPEN_LIMIT:
        return nve(architecture, engine, atoms, steps=steps) | {"atoms": atoms, "steps": steps}
    p = problem(atoms)
    block, state = nve_block(architecture, engine, atoms, steps)
    times, (first, again) = timed(block, state, p.pairs, calls=CALLS)
    row = {f"{k}_us": times.pop(k) * 1e6 / steps for k in ("median", "fastest", "slowest")}
    checks = {
        "finite": bool(jnp.isfinite(first.force).all()),
        "same_bits": bool(jnp.array_equal(first.position, again.position)),
    }
    return row | times | checks | {"atoms": atoms, "steps": steps, "places": len(p.pairs.mask)}


def nve_block(architecture: str, engine: str, atoms: int, steps: int) -> tuple[Callable[..., Any], Any]:
    """block(state, pairs) -> state after `steps` steps over a fixed list, to be compiled; and atoms at rest."""
    from jax_md import simulate

    p = problem(atoms)
    energy = p.energy(architecture, engine)

    @jax.jit
    def block(state: Any, pairs: Any) -> Any:
        _, step = simulate.nve(lambda R, **_: energy(R, pairs), p.shift, TIMESTEP)
        return jax.lax.fori_loop(0, steps, lambda _, s: step(s), state)

    still = jnp.zeros_like(p.positions)
    mass = jnp.full((atoms, 1), 12.0, jnp.float32)
    return block, simulate.NVEState(position=p.positions, momentum=still, force=still, mass=mass)


def energy(architecture: str, engine: str, atoms: int) -> dict[str, Any]:
    """Energy alone, and energy with forces: microseconds of an evaluation, temporaries, and the ratios of both."""
    function = problem(atoms).energy(architecture, engine)
    row = race({"energy": function, "energy_and_forces": jax.value_and_grad(function)}, atoms)
    return row | _ratios(row["energy_and_forces"], row["energy"]) | {"atoms": atoms}


def vjp(architecture: str, engine: str, atoms: int) -> dict[str, Any]:
    """Energy and forces by the hand-written rules, and by jax.grad of the plain equations from the same positions."""
    functions = {
        "explicit": jax.value_and_grad(problem(atoms).energy(architecture, engine)),
        "autodiff": jax.value_and_grad(problem(atoms).energy(architecture, "autodiff")),
    }
    row = race(functions, atoms)
    return row | _ratios(row["autodiff"], row["explicit"]) | {"atoms": atoms}


def race(functions: dict[str, Callable[..., Any]], atoms: int) -> dict[str, Any]:
    """Microseconds of f(R, pairs) for each function, by turns."""
    p, steps = problem(atoms), steps_for(atoms)
    runs, facts = {}, {}
    for name, function in functions.items():
        compiled, facts[name] = prepared(jax.jit(partial(_repeated, function, steps)), p.positions, p.pairs)
        runs[name] = partial(compiled, p.positions, p.pairs)
        jax.block_until_ready(runs[name]())
    seconds = by_turns(runs, CALLS)
    return {name: spread(seconds[name], 1e6 / steps, "_us") | facts[name] for name in functions}


def by_turns(runs: Mapping[str, Callable[[], Any]], calls: int) -> dict[str, list[float]]:
    """Seconds of so many calls of each, one after the other and again."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(calls):
        for name, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _repeated(function: Callable[..., Any], steps: int, R: jax.Array, pairs: Any) -> jax.Array:
    """f(R, pairs) again and again, each from the last one's R + TINY Σ results."""

    def turn(_: Any, R: jax.Array) -> jax.Array:
        return R + TINY * sum(jax.tree.leaves(function(R, pairs)))

    return jax.lax.fori_loop(0, steps, turn, R)


def _ratios(more: dict[str, float], less: dict[str, float]) -> dict[str, float | None]:
    memory = less["temporaries_MB"]
    return {
        "time_ratio": more["median_us"] / less["median_us"],
        "memory_ratio": more["temporaries_MB"] / memory if memory else None,
    }
