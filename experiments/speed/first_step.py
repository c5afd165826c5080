"""Seconds until a new molecule has made its first step, as `jaxff md` makes it, in a process of its own.

    python experiments/speed/first_step.py painn fused 21      prints one line of JSON

`measure_row` runs it three times: without a cache, with an empty persistent compilation cache, and with a warm one.
"""

from __future__ import annotations

import time

BEGIN = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from typing import Any  # noqa: E402

from children import measure_in_child  # noqa: E402
from systems import structure  # noqa: E402

NEXT = 4  # atoms more in the second molecule


def measure_row(architecture: str, engine: str, atoms: int) -> dict[str, Any]:
    """`measure` in fresh processes: "cold", "filling" a cache, "warm"; or {"error": ...}."""
    row: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cached = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        uncached = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        for name, env in (("cold", uncached), ("filling", cached), ("warm", cached)):
            row[name] = measure_in_child("first_step.py", architecture, engine, atoms, env=env)
            if "error" in row[name]:
                return {"error": f"{name}: {row[name]['error']}"}
    return row | {"atoms": atoms}


def measure(architecture: str, engine: str, atoms: int) -> dict[str, float]:
    """Seconds: imports since the start, the model with its tables, the first step, that of a second molecule."""
    from rows import potential

    import_s = time.perf_counter() - BEGIN
    start = time.perf_counter()
    model = potential(architecture, engine)
    model_s = time.perf_counter() - start
    first_s, first_compile_s = first_step(model, atoms)
    next_s, next_compile_s = first_step(model, atoms + NEXT)
    return {
        "import_s": import_s,
        "model_s": model_s,
        "first_step_s": first_s,
        "compile_s": first_compile_s,
        "next_molecule_s": next_s,
        "next_compile_s": next_compile_s,
    }


def first_step(model: Any, atoms: int) -> tuple[float, float]:
    """Seconds until the first step is done, and those of them in which the step was compiled."""
    from ase import Atoms

    from jaxff.md.config import MDConfig
    from jaxff.md.simulate import Simulation

    numbers, positions = structure(atoms)
    molecule = Atoms(numbers=numbers, positions=positions)
    start = time.perf_counter()
    config = MDConfig(steps=1, record_every=1, timestep_fs=0.01)
    simulation = Simulation(model, molecule, 0 * positions, config)
    simulation.first_frame()
    for _ in simulation.run(1):
        pass
    return time.perf_counter() - start, simulation.compile_seconds


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
