"""Frames of a simulation, and the extended XYZ file that they go to as it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from ase import Atoms
from jaxtyping import Float, Int

from jaxff.files import atomic_write
from jaxff.md.structures import has_own_masses


@dataclass(frozen=True)
class Frames:
    """T recorded frames. Å, eV, eV/Å, fs, K; momenta in amu Å / ASE time, as ase.Atoms holds them."""

    step: Int[np.ndarray, " T"]
    time_fs: Float[np.ndarray, " T"]
    positions: Float[np.ndarray, "T N 3"]
    momenta: Float[np.ndarray, "T N 3"]
    forces: Float[np.ndarray, "T N 3"]
    potential: Float[np.ndarray, " T"]
    kinetic: Float[np.ndarray, " T"]
    temperature: Float[np.ndarray, " T"]

    @property
    def total(self) -> Float[np.ndarray, " T"]:
        """Potential and kinetic energy, eV."""
        return self.potential + self.kinetic

    def __len__(self) -> int:
        return len(self.step)

    def first(self, count: int) -> Frames:
        """The first `count` frames."""
        return Frames(**{name: getattr(self, name)[:count] for name in self.__dataclass_fields__})


class AppendedFile:
    """A file that grows by whole records, each in one system call: a run that is killed leaves whole ones.

    But for the last one, rarely: a SIGKILL within the call itself ends the write at a page of the file (4 kB).
    """

    def __init__(self, path: Path, header: str = "") -> None:
        self._file = path.open("wb", buffering=0)
        self.append(header)

    def append(self, text: str) -> None:
        """Write one record."""
        view = memoryview(text.encode())
        while view:  # a raw file may take less than all of it
            view = view[self._file.write(view) :]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class FrameFormatter:
    """Frames as extended XYZ that ASE reads back: energy, forces, momenta (so velocities), step and time."""

    def __init__(self, atoms: Atoms) -> None:
        symbols = atoms.get_chemical_symbols()
        columns = "species:S:1:pos:R:3:momenta:R:3:forces:R:3"
        tail = [""] * len(atoms)
        if has_own_masses(atoms):
            columns += ":masses:R:1"
            tail = [f" {mass:.8f}" for mass in atoms.get_masses()]
        numbers = " ".join(["%16.10f"] * 9)
        self._rows = "".join(f"{symbol:2s} {numbers}{end}\n" for symbol, end in zip(symbols, tail, strict=True))
        self._count = len(atoms)
        self._columns = columns

    def frames(self, frames: Frames) -> Iterator[str]:
        """The text of each frame."""
        table = np.concatenate([frames.positions, frames.momenta, frames.forces], axis=-1).astype(np.float64)
        for t in range(len(frames)):
            head = (
                f"Properties={self._columns} step={frames.step[t]} time_fs={frames.time_fs[t]:.6f}"
                f" energy={frames.potential[t]:.10f} kinetic_energy={frames.kinetic[t]:.10f}"
                f' temperature_K={frames.temperature[t]:.6f} pbc="F F F"'
            )
            yield f"{self._count}\n{head}\n" + self._rows % tuple(table[t].ravel())


def write_evaluated(path: Path, atoms: Atoms, energy: float, forces: Float[np.ndarray, "N 3"]) -> None:
    """One structure with its energy (eV) and forces (eV/Å), as extended XYZ, whole or not at all."""
    import ase.io
    from ase.calculators.singlepoint import SinglePointCalculator

    evaluated = Atoms(numbers=atoms.numbers, positions=atoms.positions)
    evaluated.calc = SinglePointCalculator(evaluated, energy=energy, forces=np.asarray(forces, np.float64))
    with atomic_write(path) as temporary:
        ase.io.write(temporary, evaluated, format="extxyz")
