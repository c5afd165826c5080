"""What the constants of the programs for few atoms cost: NVE steps with each, parity against float64, kernels' times.

    python experiments/speed/tune.py -o OUT.json --seconds 100 [--variants 4,32,4,3 8,32,2,3]
    python experiments/speed/tune.py -o OUT.json --seconds 200 --limits [size-1500 ...]

Variants: programs of an atom, pairs that one takes at once, its warps, tiles asked for ahead (jaxff.kernels.programs).
Limits: up to how many atoms programs serve a molecule, and phases are cut: NVE steps of sizes between by either way.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import run
from breakdown import kernels
from results import check_output, check_prefixes, device, stamp, write
from rows import CONFIGS, nve, potential
from sizes import size
from systems import structure

import jaxff.kernels
from jaxff.kernels import programs
from jaxff.potential import Potential

LIMITS = {"FEW_ATOMS": ((96, 128), (128, 64)), "CUT_ATOMS": ((1500, 2000), (1024, 2048))}  # sizes, values


def choose(variant: str) -> None:
    """Take the constants of a variant from here on."""
    jaxff.kernels.PARTS, programs.SLOTS, programs.WARPS, programs.AHEAD = (int(x) for x in variant.split(","))
    jax.clear_caches()


def limit(name: str, atoms: int) -> None:
    """Take this limit from here on, and each other as it is."""
    for other, (_, values) in LIMITS.items():
        setattr(jaxff.kernels, other, atoms if other == name else values[0])
    jax.clear_caches()


class OfLimit(NamedTuple):
    """A row: NVE steps of a size with this value of a limit."""

    name: str
    value: int
    architecture: str
    atoms: int

    def __str__(self) -> str:
        return f"size-{self.atoms}:{self.architecture}:{self.name}={self.value}"


def rows_of_limits() -> list[OfLimit]:
    """Sizes between, with each value of each limit."""
    return [
        OfLimit(name, value, architecture, atoms)
        for name, (sizes, values) in LIMITS.items()
        for atoms, value, architecture in product(sizes, values, CONFIGS)
    ]


def parity(architecture: str, atoms: int) -> dict[str, float]:
    """Largest |dF| of the fused engine against float64, eV/Å."""
    numbers, positions = structure(atoms)
    fused = potential(architecture, "fused")
    exact = Potential(fused.params, fused.config, engine="xla", dtype="float64", filters="exact")
    expected = exact.energy_and_forces(numbers, positions)[1]
    actual = fused.energy_and_forces(numbers, positions)[1]
    return {"max_dF": float(np.abs(actual - expected).max()), "max_F": float(np.abs(expected).max())}


def main() -> None:
    """Measure what fits into the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--variants", nargs="*", default=["4,32,4,3", "4,32,2,3", "4,16,4,3", "8,32,4,3"])
    parser.add_argument("--rows", nargs="*", default=["batch-16:painn:fused", "large:painn:fused"])
    parser.add_argument("--limits", nargs="*", help="these alone; rows by the beginning of their names")
    args = parser.parse_args()
    of_limits = rows_of_limits()
    check_prefixes(args.limits or [], [str(row) for row in of_limits])
    check_output(args.output)
    warnings.simplefilter("ignore")
    begin, rows = time.perf_counter(), dict[str, Any]()
    report = stamp(device()[1]) | {"rows": rows}

    def record(name: str, measure: Any) -> None:
        if time.perf_counter() - begin > args.seconds:
            return
        try:
            rows[name] = measure()
        except Exception as error:  # noqa: BLE001 - a variant that doesn't compile says so, and the next is measured
            rows[name] = str(error)[:600]
        print(round(time.perf_counter() - begin, 1), name, rows[name], flush=True)
        write(args.output, report)

    if args.limits is not None:
        for row in [row for row in of_limits if str(row).startswith(tuple(args.limits) or "")]:
            limit(row.name, row.value)
            record(str(row), partial(size, row.architecture, "fused", row.atoms))
        return
    for variant in args.variants:
        choose(variant)
        for architecture in CONFIGS:
            record(f"nve-21:{architecture}:{variant}", lambda a=architecture: nve(a, "fused", 21))
            if variant == args.variants[0]:
                record(f"parity-21:{architecture}", lambda a=architecture: parity(a, 21))
    choose(args.variants[0])
    for architecture in CONFIGS:
        record(f"kernels-21:{architecture}", lambda a=architecture: kernels(a, "fused", 21))
    for row in args.rows:
        record(row, lambda row=row: run.measure(row))


if __name__ == "__main__":
    main()
