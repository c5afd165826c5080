"""The log of a simulation, one line a frame (CSV), and the series that its report needs."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxff.md.trajectory import Frames

HEADER = "step,time_fs,potential_eV,kinetic_eV,total_eV,temperature_K\n"


def log_lines(frames: Frames) -> str:
    """One CSV line a frame, under HEADER's names."""
    return "".join(
        f"{step},{time:.6f},{potential:.10f},{kinetic:.10f},{potential + kinetic:.10f},{temperature:.4f}\n"
        for step, time, potential, kinetic, temperature in zip(
            frames.step, frames.time_fs, frames.potential, frames.kinetic, frames.temperature, strict=True
        )
    )


class Series:
    """Energies and temperature of all frames so far, kept for the report."""

    def __init__(self) -> None:
        self._columns: list[Float[np.ndarray, "T 4"]] = []

    def append(self, frames: Frames) -> None:
        """Keep the scalars of these frames."""
        self._columns.append(np.stack([frames.time_fs, frames.potential, frames.kinetic, frames.temperature], axis=1))

    @property
    def time_fs(self) -> Float[np.ndarray, " T"]:
        return self._column(0)

    @property
    def potential(self) -> Float[np.ndarray, " T"]:
        return self._column(1)

    @property
    def kinetic(self) -> Float[np.ndarray, " T"]:
        return self._column(2)

    @property
    def total(self) -> Float[np.ndarray, " T"]:
        return self._column(1) + self._column(2)

    @property
    def temperature(self) -> Float[np.ndarray, " T"]:
        return self._column(3)

    def _column(self, index: int) -> Float[np.ndarray, " T"]:
        return np.concatenate([rows[:, index] for rows in self._columns]) if self._columns else np.zeros(0)
