"""How far does the energy move when a molecule is turned, or its atoms are numbered otherwise? In float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from evaluate.common import Bar, Context

ROTATION = Bar("spread of the energy over rotations, float64", "eV", 1e-10, 1e-12)
PERMUTATION = Bar("spread of the energy over permutations, float64", "eV", 1e-10, 1e-12)
MOLECULES, TRIES = 10, 20


def measure(context: Context) -> dict[str, Any]:
    """Largest spread (max - min) over minima of drug.h5; with the rounding of the energy itself beside it."""
    frames = context.frames("drug")
    frames = frames.select(np.unique(np.linspace(0, len(frames) - 1, MOLECULES).astype(int)))
    rng = np.random.default_rng(0)
    rows = {}
    for frame in frames:
        turned = [frame.positions @ r.T for r in Rotation.random(TRIES, random_state=0).as_matrix()]
        orders = [rng.permutation(len(frame.numbers)) for _ in range(TRIES)]
        rows[frame.molecule] = {
            "rotation_eV": float(np.ptp([context.double.energy(frame.numbers, r) for r in turned])),
            "permutation_eV": float(
                np.ptp([context.double.energy(frame.numbers[o], frame.positions[o]) for o in orders])
            ),
            "rounding_eV": float(np.spacing(abs(context.double.energy(frame.numbers, frame.positions)))),
        }
    on = f"{len(rows)} unseen molecules, {TRIES} each"
    worst = {key: max(row[key] for row in rows.values()) for key in ("rotation_eV", "permutation_eV")}
    return {
        "headline": [ROTATION.row(worst["rotation_eV"], on), PERMUTATION.row(worst["permutation_eV"], on)],
        "molecules": rows,
    }
