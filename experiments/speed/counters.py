"""Kernels of one energy-and-forces evaluation by Nsight Compute: time, bytes that pass L2, share of issue slots.

    python experiments/speed/counters.py painn:10648 student:10648 -o OUT.json

Rows are an architecture and atoms. Each is evaluated in a process of its own under `ncu`, which must be in PATH and
allowed to read the GPU's counters, without CUDA graphs; caches and clocks are left as they are. Random weights at
128/3/20, float32. Without a GPU: `--read LOG.csv`, with one row, shows what `ncu --csv --page raw` wrote before.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from results import check_output, device, refuse, stamp, what_went_wrong, write
from rows import problem, sized

METRICS = {  # of a kernel: name here, Nsight Compute's, factor
    "us": ("gpu__time_duration.sum", 1e-3),
    "MB_through_L2": ("lts__t_bytes.sum", 1e-6),
    "issue_slots_percent": ("sm__inst_issued.avg.pct_of_peak_sustained_elapsed", 1.0),
}
AS_THEY_ARE = ("--clock-control", "none", "--cache-control", "none")
OPTIONS = (*AS_THEY_ARE, "--profile-from-start", "off", "--csv", "--page", "raw")
ENVIRONMENT = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.3"}
WARM_UP = 3
TIMEOUT = 200.0  # s


def evaluate(architecture: str, atoms: int) -> None:
    """One evaluation that the profiler sees, after some that it doesn't."""
    p = problem(atoms)
    function = jax.jit(jax.value_and_grad(p.energy(architecture, "fused")))
    for _ in range(WARM_UP):
        jax.block_until_ready(function(p.positions, p.pairs))
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuProfilerStart()
    jax.block_until_ready(function(p.positions, p.pairs))
    driver.cuProfilerStop()


def kernels(log: Path) -> list[dict[str, Any]]:
    """The kernels in a log of Nsight Compute, in their order. ValueError where it has none."""
    rows = list(csv.reader(x for x in log.read_text(encoding="utf-8").splitlines() if x.startswith('"')))
    if len(rows) < 3:
        raise ValueError(f"expected kernels in {log.name}, received none")
    names, _, *found = rows  # the second has units
    made = []
    for values in found:
        of = dict(zip(names, values, strict=True))
        numbers = {key: float(of[name].replace(",", "")) * factor for key, (name, factor) in METRICS.items()}
        made.append({"kernel": of["Kernel Name"], "blocks": int(of["Grid Size"].strip("()").split(",")[0])} | numbers)
    return made


def profiled(row: str) -> list[dict[str, Any]]:
    """The kernels of a row, measured in another process. ValueError with that one's last words where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        log, metrics = Path(folder) / "log.csv", ",".join(name for name, _ in METRICS.values())
        command = ["ncu", *OPTIONS, "--metrics", metrics, "--log-file", str(log), sys.executable, __file__, row]
        try:
            done = subprocess.run(
                [*command, "--evaluate"],
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                env=os.environ | ENVIRONMENT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ValueError(f"{row} was not done after {TIMEOUT:.0f} s") from None
        if done.returncode or not log.exists():
            raise ValueError(f"{row} failed: {what_went_wrong(done.stderr or done.stdout)}")
        return kernels(log)


def show(row: str, found: Sequence[dict[str, Any]]) -> None:
    """The kernels, and their sum."""
    print(f"{row}: {sum(x['us'] for x in found):.0f} us in {len(found)} kernels")
    for x in found:
        numbers = f"{x['us']:8.1f} us {x['MB_through_L2']:8.1f} MB {x['issue_slots_percent']:5.1f} %"
        print(f"    {numbers}  {x['kernel']} ({x['blocks']} blocks)", flush=True)


def main() -> None:
    """The kernels of each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", help="architecture:atoms")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--read", type=Path, help="a log of ncu's, of one row")
    parser.add_argument("--evaluate", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = sized(args.rows)
    if args.evaluate:
        evaluate(*rows[args.rows[0]])
        return
    if args.output is not None:
        check_output(args.output)
    if args.read is not None and len(rows) > 1:
        refuse(f"expected one row beside --read, received {len(rows)}")
    if args.read is None and shutil.which("ncu") is None:
        refuse("ncu, Nsight Compute's command, was not found in PATH")
    measured_here = args.output is not None and args.read is None  # a log doesn't tell of which device it is
    report: dict[str, Any] = (stamp(device(own_process=False)[1]) if measured_here else {}) | {"kernels": {}}
    for row in rows:
        try:
            report["kernels"][row] = profiled(row) if args.read is None else kernels(args.read)
        except (OSError, ValueError, KeyError) as error:
            refuse(str(error))
        show(row, report["kernels"][row])
        if args.output is not None:
            write(args.output, report)


if __name__ == "__main__":
    main()
