"""Does NVE conserve the energy? The published student on ethanol, and the order of the error of a painn model.

python experiments/nve/run.py --model original.pt      writes results/<device>.json
python experiments/nve/run.py                          painn only (seeded random weights)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxff
from jaxff import models
from jaxff.config import PainnConfig
from jaxff.md import MDConfig, builtin_molecule, run
from jaxff.potential import Potential

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="checkpoint of the published student")
    parser.add_argument("--output", type=Path, help="result file")
    options = parser.parse_args()
    results: dict[str, Any] = {"painn": order_of_the_error()}
    if options.model:
        results["student"] = {dtype: student_on_ethanol(options.model, dtype) for dtype in ("float64", "float32")}
    device = jax.devices()[0].device_kind.replace(" ", "_").lower()
    target = options.output or HERE / "results" / f"{device}.json"
    target.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(results, indent=2))


def student_on_ethanol(path: Path, dtype: str) -> dict[str, Any]:
    """1 ps at 0.5 fs from the relaxed molecule at 300 K: the summary of `jaxff md`, and the drift in all."""
    config = MDConfig(steps=2000, relax=True, dtype=dtype)
    summary = simulate(jaxff.load_potential(path, dtype=dtype), config)
    drift = summary["conservation"]["drift_meV_per_atom_per_ps"] * summary["atoms"] * summary["time_ps"]
    return {"total_drift_meV": drift, **summary}


def order_of_the_error() -> dict[str, Any]:
    """Spread of the total energy (meV) of ethanol over 100 fs, at 1, 0.5 and 0.25 fs: it should fall by 4."""
    config = PainnConfig(num_rbf=20)
    params = models.init_params(config, jax.random.key(0))
    potential = Potential(params, config, dtype="float64")
    steps = {1.0: 100, 0.5: 200, 0.25: 400}
    spread = {}
    for timestep, count in steps.items():
        settings = MDConfig(timestep_fs=timestep, steps=count, record_every=1, relax=True, dtype="float64")
        with tempfile.TemporaryDirectory() as folder:
            run(potential, builtin_molecule("ethanol"), settings, Path(folder) / "run")
            log = np.genfromtxt(Path(folder) / "run" / "log.csv", delimiter=",", names=True)
        at_fs = np.isclose(log["time_fs"] % 1.0, 0.0)  # the same times in all three
        spread[f"{timestep:g} fs"] = float(np.std(log["total_eV"][at_fs]) * 1e3)
    values = list(spread.values())
    return {"energy_spread_meV": spread, "ratios": [values[0] / values[1], values[1] / values[2]]}


def simulate(potential: Potential, config: MDConfig) -> dict[str, Any]:
    """The summary of one run of ethanol."""
    with tempfile.TemporaryDirectory() as folder:
        summary = run(potential, builtin_molecule("ethanol"), config, Path(folder) / "run")
    return summary.model_dump(mode="json")


if __name__ == "__main__":
    main()
