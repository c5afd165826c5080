"""What a run tells: errors, metrics.csv row by row, the learning curve as a picture, the record in a model file."""

from __future__ import annotations

import csv
import datetime
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxff.files import atomic_write
from jaxff.train.config import LossConfig, TrainConfig
from jaxff.train.dataset import SPLITS, Dataset
from jaxff.units import chemical_symbols
from jaxff.versions import versions_with

COLUMNS = (
    "step",
    "epoch",
    "learning_rate",
    "loss",
    "energy_mae_meV_per_atom",
    "force_mae_meV_per_A",
    "valid_loss",
    "valid_energy_mae_meV_per_atom",
    "valid_energy_rmse_meV_per_atom",
    "valid_force_mae_meV_per_A",
    "valid_force_rmse_meV_per_A",
    "gradient_norm",
    "skipped",
    "frames_per_s",
    "elapsed_s",
)
Row = dict[str, Any]


class Metrics:
    """The rows of metrics.csv, appended as they come; rows after `step` of a run that is resumed are taken out."""

    def __init__(self, path: Path, step: int | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        if step is not None and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                # a row that a kill cut has no last column
                rows = [row for row in csv.DictReader(file) if set(row) == set(COLUMNS) and row[COLUMNS[-1]]]
            self.rows = [row for row in rows if _is_number(row["step"]) and int(row["step"]) <= step]
        with atomic_write(path) as temporary:
            temporary.write_text(_lines([dict(zip(COLUMNS, COLUMNS, strict=True)), *self.rows]), encoding="utf-8")

    def append(self, row: Row) -> None:
        """One row; numbers are written in full."""
        row = {name: _text(value) for name, value in row.items()}
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_lines([row]))

    def column(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of the rows that have one."""
        rows = [(float(row["step"]), float(row[name])) for row in self.rows if row.get(name)]
        return tuple(np.array(rows).reshape(-1, 2).T)  # type: ignore[return-value]


def _is_number(text: str | None) -> bool:
    return text is not None and text.isdigit()


def _text(value: Any) -> str:
    return "" if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)


def _lines(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n").writerows(rows)
    return text.getvalue()


def plot_curve(path: Path, metrics: Metrics, title: str) -> None:
    """Loss and errors over the steps, log axes (PNG), written at once."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 7.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = (
        ("loss", "loss", "valid_loss"),
        ("energy MAE (meV/atom)", "energy_mae_meV_per_atom", "valid_energy_mae_meV_per_atom"),
        ("force MAE (meV/Å)", "force_mae_meV_per_A", "valid_force_mae_meV_per_A"),
    )
    figure.suptitle(title)
    all_axes = figure.subplots(3, 1, sharex=True)
    for axes, (label, training, validation) in zip(all_axes, panels, strict=True):
        steps, values = metrics.column(training)
        axes.plot(steps, values, color="#999999", linewidth=0.8, label="training")
        steps, values = metrics.column(validation)
        axes.plot(steps, values, color="#d55e00", linewidth=1.5, marker=".", markersize=4, label="validation (EMA)")
        axes.set_ylabel(label)
        if any(np.any(line.get_ydata() > 0) for line in axes.get_lines()):
            axes.set_yscale("log")
        axes.grid(color="#dddddd", linewidth=0.6, which="both")
    if metrics.rows:
        all_axes[-1].set_xscale("log")
    all_axes[0].legend(frameon=False, fontsize="small")
    all_axes[-1].set_xlabel("step")
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")


def errors_of(sums: Mapping[str, Any], loss: LossConfig) -> dict[str, Any]:
    """Loss, MAE and RMSE (meV/atom, meV/Å) and force MAE by element, from sums over frames (jaxff.train.loss)."""
    value = loss.energy.weight * sums["energy_loss"] / sums["frames"]
    value += loss.force.weight * sums["force_loss"] / sums["components"]
    if loss.angular_weight > 0 and sums["directions"] > 0:
        value += loss.angular_weight * sums["angular_loss"] / sums["directions"]
    present = np.flatnonzero(sums["element_components"])
    elements = {
        chemical_symbols[z]: float(1e3 * sums["element_absolute"][z] / sums["element_components"][z]) for z in present
    }
    return {
        "loss": float(value),
        "frames": int(sums["frames"]),
        "energy_mae_meV_per_atom": float(1e3 * sums["energy_absolute"] / sums["frames"]),
        "energy_rmse_meV_per_atom": float(1e3 * np.sqrt(sums["energy_squared"] / sums["frames"])),
        "force_mae_meV_per_A": float(1e3 * sums["force_absolute"] / sums["components"]),
        "force_rmse_meV_per_A": float(1e3 * np.sqrt(sums["force_squared"] / sums["components"])),
        "force_mae_by_element_meV_per_A": elements,
    }


def training_record(config: TrainConfig, dataset: Dataset, step: int, errors: dict[str, Any] | None) -> dict[str, Any]:
    """What a model file says of its training; of the data's paths, the names. errors: of the last validation."""
    settings = config.model_dump(mode="json", exclude={"model"})
    for part in SPLITS:
        settings["data"][part] = settings["data"][part] and [Path(source).name for source in settings["data"][part]]
    return {
        "step": step,
        "of_steps": config.run.steps,
        "data_sha256": dataset.checksum,
        "data": dataset.counts(),
        "validation": errors,
        "config": settings,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """Versions of what made the numbers."""
    return versions_with("jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")
