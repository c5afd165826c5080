"""Speed of both architectures and all engines, on a GPU or a CPU: the whole table and the picture of it.

    python experiments/speed/run.py -o experiments/speed/results/h200.json [--seconds 100] [--only nve-21 ...]

Random weights at 128/3/20, float32. Rows are named what-number:architecture:engine and written as they are measured;
rows that no longer fit into --seconds are left out, a row that fails says why. PyTorch's rows are made where it is
installed. Against size: size-N (an NVE step), energy-N (energy alone beside energy and forces), vjp-N (hand-written
rules beside jax.grad); compile-N (a new molecule's first step, three processes). breakdown.py has the parts of a step.
"""

from __future__ import annotations

import argparse
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import first_step
import plot
import sizes
from children import measure_in_child
from results import check_output, check_prefixes, device, refuse, rounded, stamp, what_went_wrong, write
from rows import CONFIGS, call, large, nve

from jaxff import kernels
from jaxff.convert.torch_reference import torch_is_installed

SIZES = (21, 10648, 64, 1000, 97336, 3, 256, 32768, 9)  # the most telling first: time may run out
CPU_SIZES = tuple(n for n in SIZES if n <= 1000)
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
    *[f"nve-128:{a}:fused" for a in ("student", "painn")],
    "nve-21:painn:autodiff",
    "batch-4096:painn:fused",
    *[f"batch-256:{a}:{e}" for a in ("student", "painn") for e in ("fused", "xla-table")],
    *[f"batch-16:{a}:autodiff" for a in ("student", "painn")],
    "batch-16:painn:xla-table",
    *[f"compile-21:{row}" for row in ("painn:fused", "student:fused", "painn:xla-exact")],
    *[f"vjp-{n}:{a}:{e}" for e in ("fused", "xla-exact") for a in ("painn", "student") for n in (21, 10648)],
    *[f"energy-{n}:{a}:{e}" for e in ("fused", "xla-table") for a in ("painn", "student") for n in (21, 10648)],
    *[f"size-{n}:student:{e}" for n in SIZES for e in ("torch-graph", "torch")],
    *[f"size-{n}:{a}:{e}" for n in SIZES for a in ("student", "painn") for e in ("fused", "autodiff", "xla-table")],
    *[f"size-{n}:{a}:xla-exact" for n in SIZES for a in ("student", "painn")],
]
CPU_ROWS = [
    *[f"call-{n}:student:{e}" for n in (3, 9, 21, 30, 60) for e in ("torch", "fused", "xla-exact", "xla-table")],
    *[f"call-{n}:painn:{e}" for n in (3, 9, 21, 30, 60) for e in ("fused", "xla-exact")],
    *[f"size-{n}:student:{e}" for e in ("xla-exact", "autodiff", "torch") for n in CPU_SIZES],
    *[f"size-{n}:painn:{e}" for e in ("xla-exact", "autodiff") for n in CPU_SIZES],
    *[f"size-{n}:{a}:fused" for a in ("student", "painn") for n in CPU_SIZES],
    *[f"{what}-{n}:{a}:xla-exact" for what in ("vjp", "energy") for a in ("student", "painn") for n in (21, 1000)],
    "compile-21:painn:xla-exact",
    *[f"large:{a}:fused" for a in ("student", "painn")],
]


def measure(name: str) -> dict[str, Any]:
    """One row, by its name what:architecture:engine."""
    what, architecture, engine = name.split(":")
    kind, _, number = what.partition("-")
    n = int(number or 0)
    if kind == "large":
        return large(architecture, engine)
    if kind == "call":
        return call(architecture, engine, n)
    if kind == "compile":
        return first_step.measure_row(architecture, engine, n)
    if kind == "size" and engine.startswith("torch"):
        return measure_in_child("torch_rows.py", "graph" if engine == "torch-graph" else "eager", n)
    if kind in ("size", "energy", "vjp"):
        return {"size": sizes.size, "energy": sizes.energy, "vjp": sizes.vjp}[kind](architecture, engine, n)
    return nve(architecture, engine, 21, n) if kind == "batch" else nve(architecture, engine, n)


def attempt(name: str) -> dict[str, Any]:
    """`measure`, or {"error": ...}: a row that fails must not take the others down."""
    try:
        return measure(name)
    except Exception as error:  # noqa: BLE001
        reason = what_went_wrong(str(error))
        if reason != "out of memory":
            traceback.print_exc()
        return {"error": reason or type(error).__name__}


def in_child(name: str) -> bool:
    """Whether a row runs in processes of its own. They come first: once JAX runs here, it keeps the GPU's memory."""
    return name.startswith("compile") or (name.startswith("size") and ":torch" in name)


def fused_runs_here() -> bool:
    """Whether the fused engine can be measured on this machine."""
    return kernels.why_not(CONFIGS["student"]) is None


def chosen(gpu: bool, only: list[str] | None, engines: list[str] | None) -> list[str]:
    """The rows of this device in the order that was asked for; before them, those in processes of their own."""
    names = [
        name
        for name in (GPU_ROWS if gpu else CPU_ROWS)
        if (only is None or name.startswith(tuple(only)))
        and (engines is None or name.rpartition(":")[2] in engines)
        and (torch_is_installed() or ":torch" not in name)
        and (gpu or not name.endswith(":fused") or fused_runs_here())
    ]
    asked = [next((i for i, prefix in enumerate(only or []) if name.startswith(prefix)), 0) for name in names]
    order = sorted(range(len(names)), key=lambda k: (not in_child(names[k]), asked[k]))
    return [names[k] for k in order]


def main() -> None:
    """Measure the rows that fit into the time, writing the file after each; then the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="no row begins later than that")
    parser.add_argument("--only", nargs="+", help="rows whose names begin so, in this order")
    parser.add_argument("--engines", nargs="+", help="rows of these engines alone")
    args = parser.parse_args()
    every = [*GPU_ROWS, *CPU_ROWS]
    check_prefixes(args.only or [], every)
    engines = dict.fromkeys(name.rpartition(":")[2] for name in every)
    unknown = next((engine for engine in args.engines or [] if engine not in engines), None)
    if unknown is not None:
        refuse(f"expected engines of {', '.join(engines)}, received {unknown!r}")
    check_output(args.output)
    warnings.simplefilter("ignore", DeprecationWarning)
    begin = time.perf_counter()
    gpu, device_name = device(own_process=not any(map(in_child, chosen(True, args.only, args.engines))))
    names = chosen(gpu, args.only, args.engines)
    if not names:
        refuse(f"no row of {' '.join(args.only or ['the table'])} can be measured on this device ({device_name})")
    report: dict[str, Any] = stamp(device_name) | {"rows": {}}
    for number, name in enumerate(names, 1):
        passed = time.perf_counter() - begin
        if passed > args.seconds:
            print(f"{args.seconds:g} s are over: {len(names) - number + 1} rows are left out", flush=True)
            break
        print(f"[{number}/{len(names)}, {passed:.0f} s] {name}", flush=True)
        report["rows"][name] = row = attempt(name)
        print("   ", rounded(row), flush=True)
        write(args.output, report)
    if any(name.startswith("size") for name in report["rows"]):
        plot.draw_where_possible(plot.draw_sizes, [report], args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
