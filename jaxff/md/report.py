"""What a simulation was worth: summary.json and energy.png."""

# ruff: noqa: N815  (units keep their capital letters: temperature_K, meV)

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from jaxff.config import Settings
from jaxff.describe import certificate_hashes, count_parameters
from jaxff.md.log import Series
from jaxff.potential import Potential
from jaxff.versions import versions_with


class EnergyConservation(Settings):
    """Drift and fluctuation of the total energy, per atom."""

    drift_meV_per_atom_per_ps: float
    drift_standard_error: float  # of the fit, as if frames were independent
    fluctuation_rms_meV_per_atom: float  # of what the fitted line leaves
    fluctuation_peak_to_peak_meV_per_atom: float  # of the total energy itself


class Summary(Settings):
    """A finished, interrupted or failed simulation. Everything that summary.json holds."""

    status: Literal["completed", "interrupted", "failed"]
    message: str | None
    formula: str
    atoms: int
    ensemble: str
    steps: int
    steps_completed: int
    frames: int
    timestep_fs: float
    time_ps: float
    seed: int
    temperature_K: float
    temperature_mean_K: float
    temperature_std_K: float
    degrees_of_freedom: int
    energy_start_eV: float
    energy_end_eV: float
    conservation: EnergyConservation | None  # None: too few frames, or a thermostat
    relaxation: dict[str, Any] | None
    steps_per_second: float | None  # None: no block was completed
    ns_per_day: float | None
    compile_seconds: float
    wall_seconds: float
    neighbor_list: bool
    reallocations: int
    dtype: str
    engine: str
    device: str
    model: dict[str, Any]
    known_defects: tuple[str, ...]
    versions: dict[str, str]


def energy_conservation(
    time_fs: Float[np.ndarray, " T"], total: Float[np.ndarray, " T"], atoms: int
) -> EnergyConservation | None:
    """A line fitted to the total energy (eV) over time (fs); None for fewer than three frames."""
    if len(total) < 3:
        return None
    x = (time_fs - time_fs.mean()) * 1e-3
    y = (total - total.mean()) * (1e3 / atoms)
    slope = x @ y / (x @ x)
    residual = y - slope * x
    return EnergyConservation(
        drift_meV_per_atom_per_ps=float(slope),
        drift_standard_error=float(np.sqrt(residual @ residual / (len(x) - 2) / (x @ x))),
        fluctuation_rms_meV_per_atom=float(np.sqrt(np.mean(residual**2))),
        fluctuation_peak_to_peak_meV_per_atom=float(np.ptp(y)),
    )


def versions() -> dict[str, str]:
    """Versions of what made the numbers."""
    return versions_with("jax", "jaxlib", "jax-md", "ase", "numpy")


def plot_energies(path: Path, series: Series, title: str, atoms: int, fit: EnergyConservation | None) -> None:
    """Total energy on its own axis, potential and kinetic below it, against time (PNG)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 5.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True)
    ps = series.time_fs * 1e-3
    total = (series.total - series.total[0]) * (1e3 / atoms)
    top.plot(ps, total, color="#333333", linewidth=1.0, label="total")
    if fit is not None:
        line = total.mean() + fit.drift_meV_per_atom_per_ps * (ps - ps.mean())
        label = f"drift {fit.drift_meV_per_atom_per_ps:+.2g} meV/atom/ps"
        top.plot(ps, line, color="#d55e00", linewidth=1.5, linestyle="--", label=label)
    top.set_ylabel("total - start (meV/atom)")
    figure.suptitle(title)
    potential = series.potential - series.potential.min()
    bottom.plot(ps, potential, color="#0072b2", linewidth=1.0, label="potential - its minimum")
    bottom.plot(ps, series.kinetic, color="#e69f00", linewidth=1.0, label="kinetic")
    bottom.set_ylabel("energy (eV)")
    bottom.set_xlabel("time (ps)")
    for axes in (top, bottom):
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.margins(x=0.01)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, format="png")


def describe_model(potential: Potential) -> dict[str, Any]:
    """Architecture, configuration, number of parameters and the certificate's hashes."""
    return {
        "config": potential.config.model_dump(mode="json"),
        "parameters": count_parameters(potential),
        "certificate": certificate_hashes(potential.certificate),
    }


def outcome(summary: Summary, folder: Path) -> list[tuple[str, str]]:
    """The summary as (name, value) rows for a terminal."""
    rows = [("system", f"{summary.formula}, {summary.atoms} atoms, {summary.dtype} on {summary.device}")]
    if summary.relaxation:
        found = summary.relaxation
        state = "relaxed" if found["converged"] else "NOT CONVERGED"
        rows += [("relaxation", f"{state} in {found['steps']} steps, largest force {found['fmax']:.3g} eV/Å")]
    rows += [("simulated", f"{summary.steps_completed} steps = {summary.time_ps:g} ps ({summary.status})")]
    if summary.steps_per_second and summary.ns_per_day:
        speed = f"{summary.steps_per_second:.0f} steps/s, {summary.ns_per_day:.3g} ns/day"
        rows += [("speed", f"{speed} (and {summary.compile_seconds:.1f} s to compile)")]
    mean, spread = summary.temperature_mean_K, summary.temperature_std_K
    rows += [("temperature", f"{mean:.1f} ± {spread:.1f} K (mean, spread)")]
    if summary.conservation:
        fit = summary.conservation
        drift, error = fit.drift_meV_per_atom_per_ps, fit.drift_standard_error
        rms, span = fit.fluctuation_rms_meV_per_atom, fit.fluctuation_peak_to_peak_meV_per_atom
        rows += [("energy drift", f"{drift:+.3g} ± {error:.1g} meV/atom/ps")]
        rows += [("fluctuation", f"{rms:.3g} meV/atom rms, {span:.3g} peak to peak")]
    return [*rows, ("results", f"{folder}/: trajectory.xyz, log.csv, config.yaml, summary.json, energy.png")]
