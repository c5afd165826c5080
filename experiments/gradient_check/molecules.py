"""Random drug-like structures: RDKit conformers of known drugs, each atom displaced by Gaussian noise."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

LIST = Path(__file__).with_name("molecules.csv")
NOISE = 0.05  # Å, standard deviation of each coordinate


class Structure(NamedTuple):
    """One molecule in space: atomic numbers [N] and positions [N, 3] in Å."""

    name: str
    numbers: Int[np.ndarray, " N"]
    positions: Float[np.ndarray, "N 3"]


def read_list(path: Path = LIST) -> list[dict[str, str]]:
    """The rows of the list of drugs: name, smiles, formula."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def conformer(smiles: str, seed: int) -> tuple[Int[np.ndarray, " N"], Float[np.ndarray, "N 3"]]:
    """Atomic numbers and positions (Å) of one ETKDGv3 conformer, hydrogens included."""
    from rdkit import Chem
    from rdkit.Chem.rdDistGeom import EmbedMolecule, ETKDGv3

    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    settings: Any = ETKDGv3()
    settings.randomSeed = seed
    if EmbedMolecule(molecule, settings) < 0:
        settings.useRandomCoords = True
        if EmbedMolecule(molecule, settings) < 0:
            raise ValueError(f"expected a conformer of {smiles}, RDKit found none")
    numbers = np.array([atom.GetAtomicNum() for atom in molecule.GetAtoms()], dtype=np.int32)
    return numbers, molecule.GetConformer().GetPositions()


def structure(index: int, seed: int = 0, noise: float = NOISE) -> Structure:
    """Structure number `index` of the study with this seed; it depends on nothing else."""
    rows = read_list()
    row = rows[index % len(rows)]
    rng = np.random.default_rng([seed, index])
    numbers, positions = conformer(row["smiles"], int(rng.integers(1, 2**31 - 1)))
    return Structure(row["name"], numbers, positions + rng.normal(0.0, noise, positions.shape))
