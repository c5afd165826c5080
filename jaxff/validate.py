"""Tests that a user can run on any model: forces against central differences of the energy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxff import neighbors
from jaxff.errors import ConfigError
from jaxff.potential import Potential


@dataclass(frozen=True)
class ForceErrors:
    """Forces against central differences: errors in eV/Å, and relative to the norm of the differences.

    num_coordinates were compared; num_skipped were not, because a pair crosses the cutoff within the step there.
    """

    max_absolute: float
    mean_absolute: float
    relative: float
    num_coordinates: int
    num_skipped: int

    def __str__(self) -> str:
        return (
            f"{self.num_coordinates} force components: largest error {self.max_absolute:.2e} eV/Å,"
            f" mean {self.mean_absolute:.2e} eV/Å, relative {self.relative:.2e}; {self.num_skipped} skipped"
        )


def finite_difference_errors(
    potential: Potential,
    numbers: Any,
    positions: Any,
    step: float = 1e-4,
    coordinates: Iterable[int] | None = None,
) -> ForceErrors:
    """Compare the forces of a potential with five-point central differences of its energy.

    -dE/dx = (E(x+2h) - 8 E(x+h) + 8 E(x-h) - E(x-2h)) / 12h, exact to h⁴ (Abramowitz and Stegun, 25.3.6).
    numbers: [N]; positions: [N, 3] Å; step h in Å; coordinates: which of the 3N to compare, all by default.
    A float64 potential is needed: float32 energies are too coarse, and raise ConfigError.
    """
    if potential.dtype != np.float64:
        raise ConfigError(f"expected a float64 potential, received {potential.dtype}: differences need its digits")
    if not step > 0:
        raise ConfigError(f"expected a positive step in Å, received {step}")
    z, r = potential.check(numbers, positions)
    forces = potential.energy_and_forces(z, r)[1].reshape(-1)
    chosen = list(range(r.size)) if coordinates is None else list(coordinates)
    differences = {c: _difference(potential, z, r, c, step) for c in chosen}
    kept = {c: f for c, f in differences.items() if f is not None}
    expected = np.array(list(kept.values()))
    errors = np.abs(forces[list(kept)] - expected)
    return ForceErrors(
        max_absolute=float(errors.max(initial=0.0)),
        mean_absolute=float(errors.mean()) if kept else 0.0,
        relative=float(np.linalg.norm(errors) / max(np.linalg.norm(expected), np.finfo(float).tiny)),
        num_coordinates=len(kept),
        num_skipped=len(chosen) - len(kept),
    )


def _difference(
    potential: Potential, z: np.ndarray, r: Float[np.ndarray, "N 3"], coordinate: int, step: float
) -> float | None:
    """The force component by differences, None where the pairs change within the step."""
    total = 0.0
    here = _pairs(potential, r)
    for steps, weight in ((2, 1.0), (1, -8.0), (-1, 8.0), (-2, -1.0)):
        moved = r.copy()
        moved.reshape(-1)[coordinate] += steps * step
        if _pairs(potential, moved) != here:
            return None
        total += weight * potential.energy(z, moved)
    return total / (12 * step)


def _pairs(potential: Potential, r: Float[np.ndarray, "N 3"]) -> bytes:
    return np.stack(neighbors.neighbor_pairs(r, potential.config.cutoff)).tobytes()
