"""Writes the built-in molecules again (needs RDKit)."""

from pathlib import Path

import numpy as np
from rdkit import Chem
from rdkit.Chem import AllChem

SMILES = {
    "alanine_dipeptide": "CC(=O)N[C@@H](C)C(=O)NC",
    "aspirin": "CC(=O)Oc1ccccc1C(=O)O",
    "caffeine": "Cn1cnc2c1c(=O)n(C)c(=O)n2C",
    "carbamazepine": "NC(=O)N1c2ccccc2C=Cc2ccccc12",
    "ibuprofen": "CC(C)Cc1ccc(cc1)[C@H](C)C(=O)O",
    "lidocaine": "CCN(CC)CC(=O)Nc1c(C)cccc1C",
    "nicotine": "CN1CCC[C@H]1c1cccnc1",
    "paracetamol": "CC(=O)Nc1ccc(O)cc1",
}
SEED = 2024
FOLDER = Path(__file__).parents[2] / "jaxff" / "data" / "molecules"


def main() -> None:
    for name, smiles in SMILES.items():
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        settings = AllChem.ETKDGv3()
        settings.randomSeed = SEED
        if AllChem.EmbedMolecule(molecule, settings) != 0:
            raise SystemExit(f"{name}: no conformer found")
        while AllChem.MMFFOptimizeMolecule(molecule, maxIters=2000) == 1:
            pass
        positions = molecule.GetConformer().GetPositions()
        positions = positions - positions.mean(axis=0)
        lines = [str(len(positions)), f'Properties=species:S:1:pos:R:3 name={name} smiles="{smiles}" pbc="F F F"']
        for atom, row in zip(molecule.GetAtoms(), np.asarray(positions), strict=True):
            lines.append(f"{atom.GetSymbol():2s} " + " ".join(f"{x:12.6f}" for x in row))
        (FOLDER / f"{name}.xyz").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
