"""What a run tells: metrics.csv row by row, the learning curve as a picture, the summary."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxff.files import atomic_write
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


def versions() -> dict[str, str]:
    """Versions of what made the numbers."""
    return versions_with("jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")
