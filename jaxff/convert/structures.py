"""Built-in structures for the certificate: small, of the student's elements, none of them symmetric."""

from __future__ import annotations

from importlib.resources import as_file, files

import numpy as np

Structure = tuple[np.ndarray, np.ndarray]  # numbers [N], positions [N, 3] Å
_THIOPHOSPHORYL_CHLORIDE = (
    [15, 16, 17, 17, 17],
    [[0.0, 0.0, 0.0], [0.0, 0.0, 1.89], [1.86, 0.0, -0.75], [-0.93, 1.61, -0.75], [-0.93, -1.61, -0.75]],
)
_WATER_DIMER = (
    [8, 1, 1, 8, 1, 1],
    [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0], [2.91, 0.05, 0.1], [3.3, -0.4, 0.85], [3.2, -0.4, -0.7]],
)


def check_structures(cutoff: float, max_z: int) -> dict[str, Structure]:
    """Name -> structure: what energies and forces are compared on. Only those with atomic numbers up to `max_z`."""
    structures = {
        "water": ase_molecule("H2O"),
        "ethanol": ase_molecule("CH3CH2OH"),
        "thiophosphoryl chloride": _arrays(_THIOPHOSPHORYL_CHLORIDE),
        "water dimer": _arrays(_WATER_DIMER),
        "methane": ase_molecule("CH4"),
        "hydrogen near the cutoff": _arrays(([1, 1], [[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]]), 0.999 * cutoff),
        "hydrogen atom": _arrays(([1], [[0.0, 0.0, 0.0]])),
    }
    rng = np.random.default_rng(0)
    # exact symmetry would put |v| on its cone, where forces are rounding noise
    shaken = {
        name: (z, r + rng.normal(scale=0.05, size=r.shape) if len(z) > 2 else r) for name, (z, r) in structures.items()
    }
    return {name: (z, r) for name, (z, r) in shaken.items() if z.max() <= max_z}


def rotation_structures(max_z: int) -> dict[str, Structure]:
    """Name -> structure: what is rotated to measure the spread of the energy."""
    from ase.io import read

    with as_file(files("jaxff") / "data" / "molecules" / "aspirin.xyz") as path:
        atoms = read(path)
    if isinstance(atoms, list):  # never: one frame was asked for
        raise TypeError("expected one structure")
    structures = {
        "water": ase_molecule("H2O"),
        "ethanol": ase_molecule("CH3CH2OH"),
        "aspirin": (atoms.numbers.copy(), atoms.positions.copy()),
    }
    return {name: (z, r) for name, (z, r) in structures.items() if z.max() <= max_z}


def ase_molecule(name: str) -> Structure:
    """A molecule of ase.build by its name."""
    from ase.build import molecule

    atoms = molecule(name)
    return atoms.numbers.copy(), atoms.positions.copy()


def _arrays(structure: tuple[list[int], list[list[float]]], scale: float = 1.0) -> Structure:
    return np.array(structure[0]), scale * np.array(structure[1])
