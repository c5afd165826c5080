"""Relaxed small molecules: bond lengths and angles at the model's minimum against those at the teacher's."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float, Int

from evaluate.common import Bar, Context, bonds, relaxed
from jaxff.interop.ase import JaxffCalculator

BONDS = Bar("relaxed bond lengths, mean absolute error", "Å", 0.01, 0.005)
ANGLES = Bar("relaxed bond angles, mean absolute error", "°", 1.0, 0.5)
FMAX = 1e-3  # eV/Å


def measure(context: Context) -> dict[str, Any]:
    """Errors on small.h5; each molecule is relaxed from the teacher's minimum."""
    frames = context.frames("small")
    calculator = JaxffCalculator(context.double)
    rows, lengths, angles = {}, [], []
    for frame in frames:
        found, converged = relaxed(calculator, frame.numbers, frame.positions, FMAX)
        pairs = bonds(frame.numbers, frame.positions)
        triples = bonded_triples(pairs)
        d = np.abs(bond_lengths(found, pairs) - bond_lengths(frame.positions, pairs))
        a = np.abs(bond_angles(found, triples) - bond_angles(frame.positions, triples))
        lengths.append(d)
        angles.append(a)
        rows[frame.molecule] = {
            "converged": converged,
            "bonds_mae_A": float(d.mean()),
            "bonds_max_A": float(d.max()),
            "angles_mae_deg": float(a.mean()) if a.size else None,
            "angles_max_deg": float(a.max()) if a.size else None,
        }
    d, a = np.concatenate(lengths), np.concatenate(angles)
    on = f"{len(frames)} unseen small molecules"
    return {
        "headline": [
            BONDS.row(float(d.mean()), f"{d.size} bonds of {on}"),
            ANGLES.row(float(a.mean()) if a.size else None, f"{a.size} angles of {on}"),
        ],
        "bonds_max_A": float(d.max()),
        "angles_max_deg": float(a.max()) if a.size else None,
        "not_converged": [name for name, row in rows.items() if not row["converged"]],
        "molecules": rows,
    }


def bonded_triples(pairs: Int[np.ndarray, "K 2"]) -> Int[np.ndarray, "T 3"]:
    """(i, j, k) with bonds i-j and j-k, i < k."""
    neighbours: dict[int, list[int]] = {}
    for i, j in pairs.tolist():
        neighbours.setdefault(i, []).append(j)
        neighbours.setdefault(j, []).append(i)
    triples = [(i, j, k) for j, around in neighbours.items() for i in around for k in around if i < k]
    return np.array(triples, int).reshape(-1, 3)


def bond_lengths(r: Float[np.ndarray, "N 3"], pairs: Int[np.ndarray, "K 2"]) -> Float[np.ndarray, "K"]:
    """Å."""
    return np.linalg.norm(r[pairs[:, 0]] - r[pairs[:, 1]], axis=1)


def bond_angles(r: Float[np.ndarray, "N 3"], triples: Int[np.ndarray, "T 3"]) -> Float[np.ndarray, "T"]:
    """Degrees."""
    a, b = r[triples[:, 0]] - r[triples[:, 1]], r[triples[:, 2]] - r[triples[:, 1]]
    sine, cosine = np.linalg.norm(np.cross(a, b), axis=1), (a * b).sum(axis=1)
    return np.degrees(np.arctan2(sine, cosine))
