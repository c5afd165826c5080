"""Harmonic frequencies of small molecules, each method at its own minimum: the model's by Potential.hessian in f64."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from evaluate.common import Bar, Context, draws, figure, frequencies, relaxed, save_figure
from jaxff.interop.ase import JaxffCalculator

FREQUENCIES = Bar("harmonic frequencies, mean absolute error", "/cm", 30, 15)
FMAX = 2e-4  # eV/Å


def measure(context: Context) -> dict[str, Any]:
    """Errors against frequencies.json, mode by mode in ascending order; frequencies.png."""
    frames = context.frames("small")
    expected = json.loads((context.reference / "frequencies.json").read_text(encoding="utf-8"))
    calculator = JaxffCalculator(context.double)
    rows, teacher, model = {}, [], []
    for frame in frames:
        found, _ = relaxed(calculator, frame.numbers, frame.positions, FMAX)
        waves = frequencies(frame.numbers, found, context.double.hessian(frame.numbers, found))
        reference = np.array(expected[frame.molecule])
        if len(waves) != len(reference):  # linear for one of the two
            count = min(len(waves), len(reference))
            waves, reference = waves[-count:], reference[-count:]
        teacher.append(reference)
        model.append(waves)
        error = np.abs(waves - reference)
        rows[frame.molecule] = {
            "mae_per_cm": float(error.mean()),
            "max_per_cm": float(error.max()),
            "imaginary": int((waves < -1.0).sum()),
        }
    x, y = np.concatenate(teacher), np.concatenate(model)
    _plot(context, x, y)
    on = f"{x.size} modes of {len(frames)} unseen small molecules"
    return {
        "headline": [FREQUENCIES.row(float(np.abs(x - y).mean()), on)],
        "max_per_cm": float(np.abs(x - y).max()),
        "with_imaginary": [name for name, row in rows.items() if row["imaginary"]],
        "molecules": rows,
    }


@draws
def _plot(context: Context, x: np.ndarray, y: np.ndarray) -> None:
    made, axes = figure()
    axes[0, 0].plot([0, 4000], [0, 4000], color="0.6", lw=0.8)
    axes[0, 0].plot(x, y, ".", ms=3)
    axes[0, 0].set(xlabel="GFN2-xTB: wavenumber / (1/cm)", ylabel="model")
    save_figure(context, made, "frequencies")
