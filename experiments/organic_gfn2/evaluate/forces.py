"""Forces and relative energies on frames of unseen drug-like molecules at 300 K: errors, by element, parity plots."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from ase.data import chemical_symbols
from jaxtyping import Float

from evaluate.common import Bar, Context, draws, figure, save_figure
from jaxff.potential import Potential
from jaxff.train.frames import Frames

FORCES = Bar("force error, mean absolute", "meV/Å", 40, 20)
ENERGIES = Bar("energy error relative to the molecule's mean, mean absolute", "meV/atom", 1.5, 0.5)


class Predictions(NamedTuple):
    """Energies [B] eV and forces [A, 3] eV/Å of joined frames."""

    energies: Float[np.ndarray, "B"]
    forces: Float[np.ndarray, "A 3"]


def predict(potential: Potential, frames: Frames) -> Predictions:
    """The potential's labels of all frames."""
    results = [potential.energy_and_forces(frame.numbers, frame.positions) for frame in frames]
    return Predictions(
        np.array([energy for energy, _ in results]), np.concatenate([forces for _, forces in results]).astype(float)
    )


def relative(energies: Float[np.ndarray, "B"], frames: Frames) -> Float[np.ndarray, "B"]:
    """Energies less the mean of their molecule's, per atom."""
    _, owner = np.unique(frames.molecules.astype(str), return_inverse=True)
    mean = np.bincount(owner, energies) / np.bincount(owner)
    return (energies - mean[owner]) / frames.num_atoms


def measure(context: Context) -> dict[str, Any]:
    """Errors on frames_300K.h5, forces.png."""
    frames = context.frames("frames_300K")
    predicted = predict(context.single, frames)
    errors = predicted.forces - frames.forces
    energies = [relative(e, frames) * 1e3 for e in (frames.energies, predicted.energies)]
    by_element = {
        chemical_symbols[z]: {
            "atoms": int((frames.numbers == z).sum()),
            "mae_meV_per_A": 1e3 * float(np.abs(errors[frames.numbers == z]).mean()),
        }
        for z in np.unique(frames.numbers)
    }
    on = f"{len(frames)} frames of {len(set(frames.molecules))} unseen drug-like molecules at 300 K"
    _plot(context, frames, predicted, energies, by_element)
    return {
        "headline": [
            FORCES.row(1e3 * float(np.abs(errors).mean()), on),
            ENERGIES.row(float(np.abs(energies[1] - energies[0]).mean()), on),
        ],
        "forces": {
            "rmse_meV_per_A": 1e3 * float(np.sqrt((errors**2).mean())),
            "largest_meV_per_A": 1e3 * float(np.abs(errors).max()),
            "mean_absolute_force_meV_per_A": 1e3 * float(np.abs(frames.forces).mean()),
            "cosine_mean": float(_cosines(predicted.forces, frames.forces).mean()),
        },
        "by_element": by_element,
        "by_molecule_mae_meV_per_A": _by_molecule(errors, frames),
    }


def _by_molecule(errors: np.ndarray, frames: Frames) -> dict[str, float]:
    names = frames.molecules.astype(str)[frames.frame_of_atom]
    return {str(name): 1e3 * float(np.abs(errors[names == name]).mean()) for name in dict.fromkeys(names)}


def _cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    real = sizes > 0
    return (a * b).sum(axis=1)[real] / sizes[real]


@draws
def _plot(context: Context, frames: Frames, predicted: Predictions, energies: list[np.ndarray], elements: Any) -> None:
    made, axes = figure(3)
    for axis, (x, y), unit in zip(
        axes[0],
        ((frames.forces.ravel(), predicted.forces.ravel()), tuple(energies)),
        ("force component / (eV/Å)", "energy relative to the molecule's mean / (meV/atom)"),
        strict=False,
    ):
        bound = 1.05 * max(float(np.abs(x).max()), 1e-9)
        axis.plot([-bound, bound], [-bound, bound], color="0.6", lw=0.8)
        axis.plot(x, y, ".", ms=2, alpha=0.4, rasterized=True)
        axis.set(xlim=(-bound, bound), ylim=(-bound, bound), xlabel=f"GFN2-xTB: {unit}", ylabel="model")
    axes[0, 2].bar(list(elements), [row["mae_meV_per_A"] for row in elements.values()])
    axes[0, 2].set(ylabel="force error, mean absolute / (meV/Å)", xlabel="element")
    save_figure(context, made, "forces")
