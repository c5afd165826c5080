"""What the constants of the PaiNN kernels cost: NVE steps with each, parity against float64, time of each kernel.

    python experiments/speed/tune.py -o OUT.json --seconds 100 [--variants 8,8 16,8]

Variants are pairs that a program takes at once and warps of a program (jaxff.kernels.painn).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import run
from breakdown import kernels
from rows import CONFIGS, nve
from systems import structure

from jaxff import models
from jaxff.kernels import painn
from jaxff.potential import Potential


def parity(atoms: int) -> dict[str, float]:
    """Largest |dF| of the fused engine against float64, eV/Å."""
    numbers, positions = structure(atoms)
    params = models.init_params(CONFIGS["painn"], jax.random.key(0))
    with jax.enable_x64(True):
        exact = Potential(params, CONFIGS["painn"], engine="xla", dtype="float64", filters="exact")
        expected = exact.energy_and_forces(numbers, positions)[1]
    fused = Potential(params, CONFIGS["painn"], engine="fused", filters="table")
    actual = fused.energy_and_forces(numbers, positions)[1]
    return {"max_dF": float(np.abs(actual - expected).max()), "max_F": float(np.abs(expected).max())}


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
        record(f"nve-21:painn:{variant}", lambda: nve("painn", "fused", 21))
        if variant == args.variants[0]:
            record("parity-21", lambda: parity(21))
        jax.clear_caches()
    painn.SLOTS, painn.WARPS = (int(x) for x in args.variants[0].split(","))
    record("kernels-21", lambda: kernels("painn", "fused", 21))
    for row in args.rows:
        record(row, lambda row=row: run.measure(row))


if __name__ == "__main__":
    main()
