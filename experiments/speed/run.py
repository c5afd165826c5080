"""Speed of both architectures and all engines: NVE steps, batches, one large system; on a GPU or a CPU.

    python experiments/speed/run.py -o experiments/speed/results/h200.json [--seconds 100] [--only nve-21 ...]

Random weights at 128/3/20, float32. Rows are written as they are measured; rows that no longer fit into --seconds
are left out. On a machine without a GPU the CPU rows run, against the PyTorch student where PyTorch is installed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree

import jaxff
from jaxff import interop, models
from jaxff.config import PainnConfig, StudentConfig
from jaxff.neighbors import slot_pairs
from jaxff.potential import Potential
from jaxff.system import Pairs
from jaxff.units import fs

CONFIGS = {"student": StudentConfig(), "painn": PainnConfig()}
ENGINES = {  # name: (engine, filters)
    "fused": ("fused", "table"),
    "xla-table": ("xla", "table"),
    "xla-exact": ("xla", "exact"),
    "autodiff": ("xla", "exact"),
}
GPU_ROWS = [
    "nve-21:student:fused",
    *[f"batch-{b}:student:fused" for b in (16, 4096)],
    "large:student:fused",
    *[f"nve-21:painn:{e}" for e in ("fused", "xla-exact", "xla-table")],
    "nve-64:student:fused",
    *[f"nve-21:student:{e}" for e in ("autodiff", "xla-exact", "xla-table")],
    "large:painn:fused",
    "large:student:autodiff",
    "large:student:xla-table",
    *[f"batch-16:student:{e}" for e in ("xla-exact", "xla-table")],
    "batch-16:painn:fused",
    "batch-16:painn:xla-exact",
    "large:painn:xla-table",
    "nve-64:painn:fused",
    *[f"nve-64:student:{e}" for e in ("autodiff", "xla-exact")],
    "nve-21:painn:autodiff",
]
CPU_ROWS = [f"call-{n}:student:{e}" for n in (3, 9, 21, 30, 60) for e in ("torch", "xla-exact", "xla-table")]
_POTENTIALS: dict[tuple[str, str], Potential] = {}


def potential(architecture: str, engine: str) -> Potential:
    """A potential with random weights, made once."""
    key = architecture, engine
    if key not in _POTENTIALS:
        config = CONFIGS[architecture]
        chosen, filters = ENGINES[engine]
        params = models.init_params(config, jax.random.key(0))
        _POTENTIALS[key] = Potential(params, config, engine=chosen, filters=filters)
    return _POTENTIALS[key]


def energies_function(architecture: str, engine: str) -> Callable[..., jax.Array]:
    """Atomic energies of traced vectors: the potential's, or plain functions for autodiff."""
    model = potential(architecture, engine)
    if engine != "autodiff":
        return model.atomic_energies_of_vectors
    config = model.config

    def plain(numbers: Any, vectors: Any, pairs: Pairs) -> jax.Array:
        return models.reference_atomic_energies(
            model.params, config, numbers, vectors, model._within_cutoff(vectors, pairs)
        )

    return plain


def structure(num_atoms: int) -> tuple[np.ndarray, np.ndarray]:
    """Random H, C, N, O at about 0.24 atoms/Å³ in a cube, none closer than 1.1 Å."""
    rng = np.random.default_rng(0)
    side, positions = 1.6 * num_atoms ** (1 / 3) + 0.3, np.zeros((0, 3))
    while len(positions) < num_atoms:
        trial = rng.uniform(0, side, 3)
        if np.all(np.linalg.norm(positions - trial, axis=1) > 1.1):
            positions = np.vstack([positions, trial])
    return rng.choice([1, 6, 7, 8], num_atoms).astype(np.int32), positions


def timed(function: Callable[..., Any], *args: Any, calls: int = 7) -> tuple[dict[str, float], tuple[Any, Any]]:
    """Seconds of a compiled call: median, extremes, compile time; temporaries in MB; its first and last result."""
    start = time.perf_counter()
    compiled = function.lower(*args).compile()  # type: ignore[attr-defined]
    compile_time = time.perf_counter() - start
    first = last = jax.block_until_ready(compiled(*args))
    seconds = []
    for _ in range(calls):
        start = time.perf_counter()
        last = jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
    memory = compiled.memory_analysis()
    return {
        "median": float(np.median(seconds)),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "compile_s": compile_time,
        "temporaries_MB": 0.0 if memory is None else memory.temp_size_in_bytes / 1e6,
    }, (first, last)


def nve(architecture: str, engine: str, atoms: int, batch: int = 0) -> dict[str, Any]:
    """jax-md's NVE step in a compiled loop; microseconds for a step and molecule; twice the same bits?"""
    from jax_md import simulate, space

    numbers, positions = structure(atoms)
    displacement, shift = space.free()
    energy = interop.jax_md.energy(potential(architecture, engine), numbers, displacement)
    if engine == "autodiff":
        pairs, energies = interop.jax_md._all_pairs(atoms), energies_function(architecture, engine)

        def energy(R: jax.Array, **_: Any) -> jax.Array:
            vectors = (R[None] - R[:, None]).reshape(-1, 3)
            return energies(jnp.asarray(numbers), vectors, pairs).sum()

    init, step = simulate.nve(energy, shift, 0.01 * fs)
    steps = 20 if batch > 100 else 400

    def block(state: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, s: step(s), state)

    def start(key: jax.Array) -> Any:
        return init(key, jnp.asarray(positions, jnp.float32), 1e-4, mass=12.0)

    if batch:
        start, block = jax.vmap(start), jax.vmap(block)
    key = jax.random.split(jax.random.key(0), batch) if batch else jax.random.key(0)
    state = jax.jit(start)(key)
    times, (first, again) = timed(jax.jit(block), state, calls=5)
    scale = 1e6 / steps / max(batch, 1)
    row = {f"{k}_us": times.pop(k) * scale for k in ("median", "fastest", "slowest")}
    same = bool(jnp.array_equal(first.position, again.position))
    return row | times | {"finite": bool(jnp.isfinite(first.position).all()), "same_bits": same}


def large(architecture: str, engine: str, atoms: int = 10648) -> dict[str, Any]:
    """Energy and forces of one periodic system at 0.1 atoms/Å³, fixed list of vectors; microseconds an atom."""
    rng = np.random.default_rng(0)
    side, m = (atoms / 0.1) ** (1 / 3), round(atoms ** (1 / 3))
    grid = np.stack(np.meshgrid(*[np.arange(m)] * 3, indexing="ij"), -1).reshape(-1, 3) * (side / m)
    r = (grid + rng.normal(scale=0.15, size=grid.shape)) % side
    half = cKDTree(r, boxsize=side).query_pairs(5.0, output_type="ndarray")
    senders, receivers = np.concatenate([half, half[:, ::-1]]).T
    order = np.lexsort((senders, receivers))
    senders, receivers = senders[order], receivers[order]
    slots = int(np.bincount(receivers).max())
    vectors, pairs = slot_pairs(r, senders, receivers, atoms, slots)
    vectors -= side * np.round(vectors / side)
    numbers = jnp.asarray(rng.choice([1, 6, 7, 8], atoms).astype(np.int32))
    energies = energies_function(architecture, engine)
    antisymmetric = potential(architecture, engine).gradients_are_antisymmetric(pairs)

    def evaluate(vectors: jax.Array) -> Any:
        total, g = jax.value_and_grad(lambda v: energies(numbers, v, pairs).sum())(vectors)
        return total, jaxff.ops.accumulate_forces(g, pairs, antisymmetric=antisymmetric)

    times, ((_, first), (_, forces)) = timed(jax.jit(evaluate), jnp.asarray(vectors, jnp.float32))
    row = {f"{k}_us_per_atom": times.pop(k) * 1e6 / atoms for k in ("median", "fastest", "slowest")}
    return (
        row
        | times
        | {
            "finite": bool(jnp.isfinite(forces).all()),
            "same_bits": bool((first == forces).all()),
            "slots": slots,
            "atoms": atoms,
        }
    )


def call(engine: str, atoms: int) -> dict[str, Any]:
    """energy_and_forces as a user calls it, or the PyTorch student; microseconds a call."""
    numbers, positions = structure(atoms)
    if engine == "torch":
        from jaxff.convert.torch_reference import torch_energy_and_forces, torch_student

        model = torch_student(CONFIGS["student"])
        once = lambda: torch_energy_and_forces(model, numbers, positions)  # noqa: E731
    else:
        model = potential("student", engine)
        once = lambda: model.energy_and_forces(numbers, positions)  # noqa: E731
    start = time.perf_counter()
    once()
    first, seconds = time.perf_counter() - start, []
    for _ in range(60):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return {
        "median_us": np.median(seconds) * 1e6,
        "fastest_us": min(seconds) * 1e6,
        "slowest_us": max(seconds) * 1e6,
        "first_call_s": first,
    }


def measure(name: str) -> dict[str, Any]:
    """One row, by its name what:architecture:engine."""
    what, architecture, engine = name.split(":")
    kind, _, number = what.partition("-")
    if kind == "large":
        return large(architecture, engine)
    if kind == "call":
        return call(engine, int(number))
    return nve(architecture, engine, 21, int(number)) if kind == "batch" else nve(architecture, engine, int(number))


def main() -> None:
    """Measure the rows that fit into the time, writing the file after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--only", nargs="*", default=None, help="rows whose names begin so")
    args = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    report: dict[str, Any] = {
        "device": device.device_kind if gpu else platform.processor() or platform.machine(),
        "versions": {"jaxff": jaxff.__version__, "jax": jax.__version__, "python": platform.python_version()},
        "rows": {},
    }
    begin = time.perf_counter()
    for name in GPU_ROWS if gpu else CPU_ROWS:
        chosen = args.only is None or any(name.startswith(x) for x in args.only)
        if not chosen or time.perf_counter() - begin > args.seconds:
            continue
        row = measure(name)
        report["rows"][name] = row
        print(name, {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
