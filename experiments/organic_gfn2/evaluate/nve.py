"""Is the energy conserved? Float32, 0.5 fs, molecules warmed to 300 K first; the drift is a straight line's slope."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from dynamics import Dynamics

from evaluate.common import Bar, Context, draws, figure, save_figure
from jaxff.potential import Potential
from jaxff.train.frames import Frames

DRIFT = Bar("NVE drift, float32, 0.5 fs, mean absolute", "meV/atom/ps", 0.01, 0.001)
MOLECULES, GROUPS, KELVIN, TIMESTEP, EVERY = 10, 5, 300.0, 0.5, 100


def measure(context: Context) -> dict[str, Any]:
    """Drift of each molecule, with its statistical error; nve.png. options: nve_ps (20), equilibration_ps (2),
    nve_molecules (10), nve_atoms (the largest molecule; no limit).
    """
    frames = context.frames("drug")
    frames = frames.select(frames.num_atoms <= context.options.get("nve_atoms", np.inf))
    count = context.options.get("nve_molecules", MOLECULES)
    frames = frames.select(np.unique(np.linspace(0, len(frames) - 1, count).astype(int)))
    frames = frames.select(np.argsort(frames.num_atoms, kind="stable"))
    potential = without_references(context.single)
    blocks = max(4, round(context.options.get("nve_ps", 20.0) * 1000 / TIMESTEP / EVERY))
    warming = max(1, round(context.options.get("equilibration_ps", 2.0) * 1000 / TIMESTEP))
    totals = []
    for rows in np.array_split(np.arange(len(frames)), min(GROUPS, len(frames))):
        totals.append(_totals(potential, frames.select(rows), warming, blocks))
        context.tell(f"nve: {rows[-1] + 1} of {len(frames)} molecules")
    energy = 1e3 * np.concatenate(totals, axis=1) / frames.num_atoms  # meV/atom, [blocks, molecules]
    ps = np.arange(1, blocks + 1) * EVERY * TIMESTEP / 1000
    lines = [np.polyfit(ps, row, 1, cov=True) for row in energy.T]
    slopes = np.array([line[0][0] for line in lines])
    errors = np.sqrt([line[1][0, 0] for line in lines])
    sizes = frames.num_atoms
    on = f"{len(frames)} unseen molecules of {sizes.min()} to {sizes.max()} atoms, {ps[-1]:g} ps each, from 300 K"
    thin = slice(None, None, max(1, blocks // 100))
    result = {
        "headline": [DRIFT.row(float(np.abs(slopes).mean()), on)],
        "molecules": {
            frame.molecule: {
                "atoms": len(frame.numbers),
                "drift_meV_per_atom_per_ps": float(slope),
                "standard_error": float(error),
                "fluctuation_meV_per_atom": float(spread),
            }
            for frame, slope, error, spread in zip(frames, slopes, errors, energy.std(axis=0), strict=True)
        },
        "ps": ps[thin].round(6).tolist(),
        "change_meV_per_atom": (energy - energy[0])[thin].T.round(5).tolist(),
    }
    draw(context, result)
    return result


def _totals(potential: Potential, frames: Frames, warming: int, blocks: int) -> np.ndarray:
    """Total energies after each block of steps, [blocks, B] eV, of molecules of like size."""
    numbers = [frame.numbers for frame in frames]
    warm = Dynamics(potential, numbers, TIMESTEP, 0.01)
    state = warm.start([frame.positions for frame in frames], KELVIN, seed=0)
    state = warm.run(state, KELVIN, warming)
    free = Dynamics(potential, numbers, TIMESTEP, 0.0)
    totals = []
    for _ in range(blocks):
        state = free.run(state, KELVIN, EVERY)
        totals.append(np.asarray(state.energies, np.float64) + free.kinetic(state))
    return np.array(totals)


@draws
def draw(context: Context, result: dict[str, Any]) -> None:
    """nve.png of a result."""
    made, axes = figure()
    for row in result["change_meV_per_atom"]:
        axes[0, 0].plot(result["ps"], row, lw=0.7)
    axes[0, 0].set(xlabel="time / ps", ylabel="change of the total energy / (meV/atom)")
    save_figure(context, made, "nve")


def without_references(potential: Potential) -> Potential:
    """The same forces, energies without the elements' constants: float32 has more digits left for what changes."""
    if "reference" not in potential.params:
        return potential
    params = dict(potential.params) | {"reference": jax.tree.map(np.zeros_like, potential.params["reference"])}
    return Potential(params, potential.config, potential.dtype, potential.engine, filters=potential.filters)
