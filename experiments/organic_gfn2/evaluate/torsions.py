"""Torsion profiles of drug fragments: both methods' energies on the teacher's relaxed scans."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.units import kcal, mol

from evaluate.common import Bar, Context, draws, figure, save_figure

TORSIONS = Bar("torsion profiles, mean absolute error", "kcal/mol", 0.5, 0.2)


def measure(context: Context) -> dict[str, Any]:
    """Errors on torsions.h5, each profile relative to its own minimum; torsions.png."""
    frames, angles = context.frames_and_table("torsions")
    rows, profiles = {}, {}
    for name in dict.fromkeys(frames.molecules):
        scan = frames.select(frames.molecules == name)
        model = np.array([context.double.energy(frame.numbers, frame.positions) for frame in scan])
        teacher, model = (np.asarray(e - e.min()) / (kcal / mol) for e in (scan.energies, model))
        error = np.abs(model - teacher)
        rows[name] = {
            "mae_kcal_per_mol": float(error.mean()),
            "max_kcal_per_mol": float(error.max()),
            "barrier_teacher": float(teacher.max()),
            "barrier_model": float(model.max()),
            "points": len(scan),
        }
        profiles[name] = angles[frames.molecules == name], teacher, model
    _plot(context, profiles, rows)
    value = float(np.mean([row["mae_kcal_per_mol"] for row in rows.values()]))
    return {
        "headline": [TORSIONS.row(value, f"{len(rows)} unseen fragments, {len(frames)} points")],
        "worst": max(rows, key=lambda name: rows[name]["mae_kcal_per_mol"]),
        "fragments": rows,
    }


@draws
def _plot(context: Context, profiles: dict[str, Any], rows: dict[str, Any]) -> None:
    columns = min(5, len(profiles))
    made, axes = figure(columns, -(-len(profiles) // columns), 2.4, 1.9)
    for axis in axes.ravel()[len(profiles) :]:
        axis.set_axis_off()
    for axis, (name, (angles, teacher, model)) in zip(axes.ravel(), profiles.items(), strict=False):
        axis.plot(angles, teacher, "k-", lw=1, label="GFN2-xTB")
        axis.plot(angles, model, "C1.-", lw=0.8, ms=4, label="model")
        axis.set_title(f"{name}: {rows[name]['mae_kcal_per_mol']:.2f}", fontsize=7)
        axis.tick_params(labelsize=6)
        axis.set_xticks([-180, -90, 0, 90, 180])
    axes[0, 0].legend(fontsize=6)
    made.supxlabel("dihedral / °", fontsize=8)
    made.supylabel("energy / (kcal/mol)", fontsize=8)
    save_figure(context, made, "torsions")
