"""Energy and forces, beside GFN2-xTB itself (tblite, one core) on the same molecules, in one run, turn by turn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from dynamics import Dynamics

from evaluate.common import Context
from jaxff.errors import ConfigError
from jaxff.train.teachers import make_teacher

MOLECULES, ROUNDS, BATCH, STEPS = 6, 7, 64, 50


def measure(context: Context) -> dict[str, Any]:
    """Milliseconds for a single call on molecules of many sizes, and a step of dynamics of many at once.

    Without tblite (as on a bare GPU machine), the model's times alone. options: speed_molecules (6), rounds (7),
    steps (50), batch (64).
    """
    frames = context.frames("drug")
    order = np.argsort(frames.num_atoms, kind="stable")
    count = context.options.get("speed_molecules", MOLECULES)
    frames = frames.select(order[np.unique(np.linspace(0, len(order) - 1, count).astype(int))])
    try:
        teacher: Any = make_teacher("tblite:GFN2-xTB")
    except ConfigError:
        teacher = None
    rows = {}
    for frame in frames:
        z, r = frame.numbers, frame.positions
        calls: dict[str, Callable[[], Any]] = {"model_ms": lambda z=z, r=r: context.single.energy_and_forces(z, r)}
        if teacher is not None:
            calls["gfn2_ms"] = lambda z=z, r=r: teacher(z, r)
        row = _turn_by_turn(calls, context.options.get("rounds", ROUNDS))
        row |= _dynamics(context, z, r)
        if teacher is not None:
            row["gfn2_over_model"] = row["gfn2_ms"] / row["model_ms"]
            row["gfn2_over_dynamics"] = row["gfn2_ms"] / row["dynamics_ms"]
        rows[frame.molecule] = {"atoms": len(z)} | row
    batch = context.options.get("batch", BATCH)
    on = f"{len(rows)} molecules of {frames.num_atoms.min()} to {frames.num_atoms.max()} atoms"
    device = jax.devices()[0]
    where = "" if device.platform == "cpu" else f", on one {device.device_kind}"
    headline = [
        {"what": what + where, "value": float(np.median([row[key] for row in rows.values()])), "unit": "x", "on": on}
        for what, key in (
            ("speed over GFN2-xTB, one call", "gfn2_over_model"),
            (f"speed over GFN2-xTB, dynamics of {batch} at once, a molecule", "gfn2_over_dynamics"),
        )
        if teacher is not None
    ]
    machine = {"cpus": os.cpu_count(), "omp_num_threads": os.environ.get("OMP_NUM_THREADS")}
    return {"headline": headline, "batch": batch, **machine, "molecules": rows}


def _turn_by_turn(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: 1e3 * float(np.median(row)) for name, row in times.items()}


def _dynamics(context: Context, z: np.ndarray, r: np.ndarray) -> dict[str, float]:
    """Milliseconds for a step and molecule, of `batch` copies at once."""
    batch, steps = context.options.get("batch", BATCH), context.options.get("steps", STEPS)
    dynamics = Dynamics(context.single, [z] * batch, 0.5, 0.0)
    state = dynamics.run(dynamics.start([r] * batch, 300.0, 0), 300.0, steps)
    jax.block_until_ready(state.positions)
    begin = time.perf_counter()
    jax.block_until_ready(dynamics.run(state, 300.0, steps).positions)
    return {"dynamics_ms": 1e3 * (time.perf_counter() - begin) / steps / batch}
