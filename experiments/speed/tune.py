"""What the constants of the PaiNN kernels cost: NVE steps with each, parity against float64, time of each kernel.

    python experiments/speed/tune.py -o OUT.json --seconds 100 [--variants 8,8 16,8]

Variants are pairs that a program takes at once and warps of a program (jaxff.kernels.painn).
"""

from __future__ import annotations

import argparse
import collections
import glob
import gzip
import json
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import run

from jaxff import interop, models
from jaxff.kernels import painn
from jaxff.potential import Potential
from jaxff.units import fs


def parity(atoms: int) -> dict[str, float]:
    """Largest |dF| of the fused engine against float64, eV/Å."""
    numbers, positions = run.structure(atoms)
    params = models.init_params(run.CONFIGS["painn"], jax.random.key(0))
    with jax.enable_x64(True):
        exact = Potential(params, run.CONFIGS["painn"], engine="xla", dtype="float64", filters="exact")
        expected = exact.energy_and_forces(numbers, positions)[1]
    fused = Potential(params, run.CONFIGS["painn"], engine="fused", filters="table")
    actual = fused.energy_and_forces(numbers, positions)[1]
    return {"max_dF": float(np.abs(actual - expected).max()), "max_F": float(np.abs(expected).max())}


def kernels(architecture: str, atoms: int, steps: int = 100) -> dict[str, Any]:
    """Microseconds a step of each kernel, by the profiler."""
    from jax_md import simulate, space

    numbers, positions = run.structure(atoms)
    displacement, shift = space.free()
    energy = interop.jax_md.energy(run.potential(architecture, "fused"), numbers, displacement)
    init, step = simulate.nve(energy, shift, 0.01 * fs)
    state = init(jax.random.key(0), jnp.asarray(positions, jnp.float32), 1e-4, mass=12.0)
    block = jax.jit(lambda s: jax.lax.fori_loop(0, steps, lambda _, x: step(x), s))
    jax.block_until_ready(block(state))
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=False):
            jax.block_until_ready(block(state))
        (path,) = glob.glob(folder + "/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    total: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    streams = {
        (e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name" and "Stream" in str(e.get("args", ""))
    }
    for e in events:
        if e.get("ph") == "X" and (e["pid"], e["tid"]) in streams:
            total[e["name"]][0] += e["dur"] / steps
            total[e["name"]][1] += 1 / steps
    return dict(sorted(total.items(), key=lambda x: -x[1][0])[:40])


def main() -> None:
    """Measure what fits into the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--variants", nargs="*", default=["8,8", "16,8", "8,16", "16,16"])
    parser.add_argument("--rows", nargs="*", default=["batch-16:painn:fused", "large:painn:fused"])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    begin, report = time.perf_counter(), {}

    def record(name: str, measure: Any) -> None:
        if time.perf_counter() - begin > args.seconds:
            return
        try:
            report[name] = measure()
        except Exception as error:  # noqa: BLE001 - a variant that doesn't compile says so, and the next is measured
            report[name] = str(error)[:600]
        print(round(time.perf_counter() - begin, 1), name, report[name], flush=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    for variant in args.variants:
        painn.SLOTS, painn.WARPS = (int(x) for x in variant.split(","))
        record(f"nve-21:painn:{variant}", lambda: run.nve("painn", "fused", 21))
        if variant == args.variants[0]:
            record("parity-21", lambda: parity(21))
        jax.clear_caches()
    painn.SLOTS, painn.WARPS = (int(x) for x in args.variants[0].split(","))
    record("kernels-21", lambda: kernels("painn", 21))
    for row in args.rows:
        record(row, lambda row=row: run.measure(row))


if __name__ == "__main__":
    main()
