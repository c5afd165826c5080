"""Explicit rules against jax.grad of the plain reference against central differences, on random drug-like structures.

python experiments/gradient_check/run.py [--molecules 1000] [--model CHECKPOINT ...]
Writes results/summary.json, results/table.csv and results/scatter.png; exit code 1 if a bar is missed.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import typer
from measure import STEP, Sample, Study
from molecules import NOISE, Structure, structure
from report import BARS, draw, missed, summarize, write_table
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxff.config import PainnConfig, StudentConfig, parse_model_config
from jaxff.loading import load_potential
from jaxff.models import init_params

RESULTS = Path(__file__).with_name("results")
SIZE = {"hidden_dim": 128, "num_interactions": 3, "num_rbf": 20}
SHOWN = {
    "f64_max": "f64 max",
    "f32_mean": "f32 mean",
    "f32_max": "f32 max",
    "pearson_f32": "1 - Pearson",
    "differences_max": "differences",
    "net_force_max": "net force",
}


def random_study(config: StudentConfig | PainnConfig, seed: int) -> Study:
    """A model with random weights; biases and mixing matrices are random too, so that every term counts."""
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(seed)))
    rng = np.random.default_rng(seed)
    small = [x.ndim == 1 or x.shape == (3, 3) for x in leaves]
    noisy = [
        np.asarray(x, np.float64) + (0.02 * rng.standard_normal(x.shape) if tweak else 0.0)
        for x, tweak in zip(leaves, small, strict=True)
    ]
    return Study.of(jax.tree.unflatten(tree, noisy), config)


def studies(models: list[Path], seed: int) -> dict[str, Study]:
    """Random models of both architectures at full size, and the checkpoints that were given."""
    chosen = {
        f"random {kind}": random_study(parse_model_config({"architecture": kind} | SIZE), seed)
        for kind in ("student", "painn")
    }
    for path in models:
        potential = load_potential(path, dtype="float64")
        chosen[path.stem] = Study.of(potential.params, potential.config)
    return chosen


def measure_all(name: str, study: Study, structures: list[Structure], coordinates: int, seed: int) -> list[Sample]:
    """Every structure with one model, under a progress bar."""
    study.reserve(structures)
    rng = np.random.default_rng(seed)
    return [study.measure(s, coordinates, rng) for s in track(structures, description=f"{name:>16}", transient=True)]


def show(rows: dict[str, dict[str, float]]) -> None:
    """The table on the terminal, eV/Å."""
    table = Table(title="explicit rules against autodiff and differences (eV/Å)")
    table.add_column("model")
    for label in SHOWN.values():
        table.add_column(label, justify="right")
    for model, figures in rows.items():
        shown = [1.0 - figures[n] if "pearson" in n else figures[n] for n in SHOWN]
        table.add_row(model, *(f"{value:.1e}" for value in shown))
    Console().print(table)


def main(
    molecules: Annotated[int, typer.Option(min=1, help="number of random structures")] = 1000,
    model: Annotated[list[Path] | None, typer.Option(exists=True, help="a checkpoint; may be repeated")] = None,
    coordinates: Annotated[int, typer.Option(min=1, help="differenced coordinates of each structure")] = 3,
    seed: Annotated[int, typer.Option(help="of structures, weights and coordinates")] = 0,
    output: Annotated[Path, typer.Option(help="folder of the results")] = RESULTS,
) -> None:
    """Repeat the study."""
    jax.config.update("jax_enable_x64", True)
    chosen = studies(model or [], seed)
    structures = [
        structure(i, seed) for i in track(range(molecules), description=f"{'conformers':>16}", transient=True)
    ]
    samples = {name: measure_all(name, study, structures, coordinates, seed) for name, study in chosen.items()}
    rows = {name: summarize(measured) for name, measured in samples.items()}
    output.mkdir(parents=True, exist_ok=True)
    write_table(output / "table.csv", rows)
    draw(output / "scatter.png", samples)
    problems = {name: missed(figures) for name, figures in rows.items()}
    summary = {
        "models": rows,
        "bars": BARS,
        "missed": {name: lines for name, lines in problems.items() if lines},
        "molecules": molecules,
        "atoms": int(sum(len(s.numbers) for s in structures)),
        "largest": max(len(s.numbers) for s in structures),
        "elements": sorted({int(z) for s in structures for z in s.numbers}),
        "noise_angstrom": NOISE,
        "difference_step_angstrom": STEP,
        "seed": seed,
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "numpy", "rdkit")},
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    show(rows)
    for name, lines in problems.items():
        for line in lines:
            typer.echo(f"{name}: {line}", err=True)
    raise typer.Exit(1 if any(problems.values()) else 0)


if __name__ == "__main__":
    typer.run(main)
