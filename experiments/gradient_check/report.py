"""Table, bars and picture of the study."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from measure import Sample

mpl.use("Agg")
import matplotlib.pyplot as plt

# what has to hold, in eV/Å; correlations have to exceed theirs
BARS = {
    "f64_max": 1e-11,
    "f32_mean": 1e-6,
    "differences_max": 1e-7,
    "net_force_max": 1e-10,
    "pearson_f64": 0.9999,
    "pearson_f32": 0.9999,
}
FLOOR = 1e-18  # where the histogram puts exact agreement


def joined(samples: list[Sample], name: str) -> Float[np.ndarray, " C"]:
    """One column of all samples, end to end."""
    return np.concatenate([getattr(sample, name) for sample in samples])


def against_differences(samples: list[Sample]) -> Float[np.ndarray, " C"]:
    """Explicit forces minus central differences, where these were taken (eV/Å)."""
    return np.concatenate([s.explicit64[s.coordinates] - s.differences for s in samples])


def summarize(samples: list[Sample]) -> dict[str, float]:
    """The figures of one model; forces in eV/Å, energies in eV."""
    e64, a64 = joined(samples, "explicit64"), joined(samples, "autodiff64")
    e32, a32 = joined(samples, "explicit32"), joined(samples, "autodiff32")
    figures: dict[str, float] = {"structures": len(samples), "force_components": len(e64)}
    figures["force_rms"] = float(np.sqrt(np.mean(e64**2)))
    errors = {
        "f64": e64 - a64,
        "f32": e32 - a32,
        "f32_to_f64": e32 - a64,
        "differences": against_differences(samples),
    }
    for name, error in errors.items():
        figures[f"{name}_max"] = float(np.abs(error).max())
        figures[f"{name}_mean"] = float(np.abs(error).mean())
    figures["differenced_components"] = len(errors["differences"])
    figures["pearson_f64"] = float(np.corrcoef(e64, a64)[0, 1])
    figures["pearson_f32"] = float(np.corrcoef(e32, a32)[0, 1])
    figures["net_force_max"] = max(s.net_force for s in samples)
    figures["energy_max"] = max(s.energy_error for s in samples)
    return figures


def missed(figures: dict[str, float]) -> list[str]:
    """The bars that do not hold, in words. NaN never holds."""
    lines = []
    for name, bar in BARS.items():
        value = figures[name]
        holds = value > bar if name.startswith("pearson") else value <= bar
        if not holds or math.isnan(value):
            lines.append(f"{name} is {value:.3g}, expected {'>' if name.startswith('pearson') else '<='} {bar:g}")
    return lines


def write_table(path: Path, rows: dict[str, dict[str, float]]) -> None:
    """One line for each model."""
    with path.open("w", encoding="utf-8", newline="") as file:
        names = list(next(iter(rows.values())))
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", *names])
        for model, figures in rows.items():
            writer.writerow([model, *(_digits(name, figures[name]) for name in names)])


def _digits(name: str, value: float) -> Any:
    if isinstance(value, int):
        return value
    return f"{value:.12f}" if name.startswith("pearson") else f"{value:.3e}"


def draw(path: Path, samples: dict[str, list[Sample]]) -> None:
    """For each model: explicit against autodiff forces, and how their differences are distributed."""
    figure, axes = plt.subplots(len(samples), 2, figsize=(9.5, 3.9 * len(samples)), squeeze=False, layout="constrained")
    for (left, right), (model, measured) in zip(axes, samples.items(), strict=True):
        _scatter(left, model, measured)
        _histogram(right, measured)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _scatter(axes: Axes, model: str, samples: list[Sample]) -> None:
    autodiff, explicit = joined(samples, "autodiff64"), joined(samples, "explicit32")
    limit = 1.05 * np.abs(autodiff).max()
    axes.plot([-limit, limit], [-limit, limit], color="0.75", linewidth=1, zorder=0)
    axes.plot(autodiff, explicit, ".", markersize=2, color="tab:blue", rasterized=True)
    axes.set(
        title=f"{model}, {len(samples)} structures",
        xlabel="force by jax.grad of the reference, f64 (eV/Å)",
        ylabel="force by explicit rules, f32 (eV/Å)",
        xlim=(-limit, limit),
        ylim=(-limit, limit),
        aspect="equal",
    )


def _histogram(axes: Axes, samples: list[Sample]) -> None:
    curves = {
        "f64, explicit - autodiff": joined(samples, "explicit64") - joined(samples, "autodiff64"),
        "f64, explicit - differences": against_differences(samples),
        "f32, explicit - autodiff": joined(samples, "explicit32") - joined(samples, "autodiff32"),
    }
    bins = np.logspace(math.log10(FLOOR), -3, 91).tolist()
    for label, error in curves.items():
        shares = np.full(len(error), 1.0 / len(error))
        axes.hist(
            np.maximum(np.abs(error), FLOOR),
            bins,
            weights=shares,
            histtype="stepfilled",
            alpha=0.55,
            label=label,
        )
    axes.set(
        xscale="log",
        xlabel=f"|ΔF| (eV/Å; exact agreement at {FLOOR:g})",
        ylabel="share of the components",
    )
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=1.0)
