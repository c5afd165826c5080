"""Make the list of molecules: drug-like ones, everyday chemicals, enumerated fragments; and the held-out list.

    pip download --no-deps -d wheels molsets==0.3.1 chemicals==1.5.2
    python experiments/organic_gfn2/molecules/build.py wheels

Writes train.csv (set, smiles) beside itself. held_out.csv (set, name, smiles) is edited by hand and excluded here, with
all stereoisomers. Sources: MOSES (molsets, MIT), 1.6 million drug-like molecules from ZINC; `chemicals` (MIT), 71,000
chemicals in use; fragments of both at BRICS bonds and all chains and rings of up to three heavy atoms, by RDKit.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import random
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from rdkit import Chem, RDLogger
from rdkit.Chem import BRICS, Descriptors

from jaxff.files import atomic_write

HERE = Path(__file__).parent
ELEMENTS = {"H", "C", "N", "O", "F", "P", "S", "Cl", "Br"}
VALENCES = {"C": 4, "N": 3, "O": 2, "F": 1, "P": 3, "S": 2, "Cl": 1, "Br": 1}
MAX_ATOMS = 60  # hydrogens included
SEED = 20261124


def canonical(smiles: str) -> str | None:
    """Canonical SMILES without stereo of a neutral, closed-shell, connected molecule of our elements, or None."""
    molecule = Chem.MolFromSmiles(smiles)
    if molecule is None or "." in smiles or Chem.GetFormalCharge(molecule) != 0:
        return None
    if Descriptors.NumRadicalElectrons(molecule) or any(a.GetIsotope() for a in molecule.GetAtoms()):
        return None
    if any(a.GetSymbol() not in ELEMENTS for a in molecule.GetAtoms()) or not _charges_touch(molecule):
        return None
    atoms = Chem.AddHs(molecule).GetNumAtoms()
    if not 2 <= atoms <= MAX_ATOMS:
        return None
    return Chem.MolToSmiles(molecule, isomericSmiles=False)


def _charges_touch(molecule: Chem.Mol) -> bool:
    """Formal charges only where neighbours cancel them (nitro, N-oxide, isonitrile, azide): no zwitterions."""
    return all(
        any(n.GetFormalCharge() * a.GetFormalCharge() < 0 for n in a.GetNeighbors())
        for a in molecule.GetAtoms()
        if a.GetFormalCharge()
    )


def heavy(smiles: str) -> int:
    return Chem.MolFromSmiles(smiles).GetNumAtoms()


def unique(smiles: Iterable[str], known: set[str]) -> Iterator[str]:
    """Canonical forms that are not yet in `known`, which grows."""
    for text in smiles:
        form = canonical(text)
        if form is not None and form not in known:
            known.add(form)
            yield form


def enumerated(largest: int = 3) -> Iterator[str]:
    """All chains, branches and rings of up to `largest` heavy atoms at standard valences, as SMILES."""
    bonds = (Chem.BondType.SINGLE, Chem.BondType.DOUBLE, Chem.BondType.TRIPLE)
    layer = []
    for symbol in VALENCES:
        molecule = Chem.RWMol()
        molecule.AddAtom(Chem.Atom(symbol))
        layer.append(molecule)
    for size in range(1, largest + 1):
        seen: dict[str, Chem.RWMol] = {}
        for molecule in layer:
            try:
                Chem.SanitizeMol(molecule)
            except Chem.MolSanitizeException:
                continue
            seen.setdefault(Chem.MolToSmiles(molecule), molecule)
        yield from seen
        if size == 3:
            yield from _closed(seen.values(), bonds)
        layer = [
            grown
            for molecule in seen.values()
            for atom in range(molecule.GetNumAtoms())
            for symbol in VALENCES
            for bond in bonds
            if (grown := _grow(molecule, atom, symbol, bond)) is not None
        ]


def _grow(molecule: Chem.RWMol, atom: int, symbol: str, bond: Chem.BondType) -> Chem.RWMol | None:
    order = int(Chem.Bond.GetBondTypeAsDouble(_bond(bond)))
    if molecule.GetAtomWithIdx(atom).GetTotalNumHs() < order or VALENCES[symbol] < order:
        return None
    grown = Chem.RWMol(molecule)
    new = grown.AddAtom(Chem.Atom(symbol))
    grown.AddBond(atom, new, bond)
    return grown


def _bond(kind: Chem.BondType) -> Chem.Bond:
    pair = Chem.RWMol(Chem.MolFromSmiles("CC"))
    bond = pair.GetBondWithIdx(0)
    bond.SetBondType(kind)
    return bond


def _closed(chains: Iterable[Chem.RWMol], bonds: tuple[Chem.BondType, ...]) -> Iterator[str]:
    """Three-membered rings from chains of three."""
    for chain in chains:
        ends = [a.GetIdx() for a in chain.GetAtoms() if a.GetDegree() == 1]
        if len(ends) == 2 and all(chain.GetAtomWithIdx(i).GetTotalNumHs() > 0 for i in ends):
            ring = Chem.RWMol(chain)
            ring.AddBond(*ends, bonds[0])
            try:
                Chem.SanitizeMol(ring)
            except Chem.MolSanitizeException:
                continue
            yield Chem.MolToSmiles(ring)


def fragments(smiles: Iterable[str]) -> Iterator[str]:
    """BRICS pieces, the cut bonds capped with hydrogen."""
    hydrogen = Chem.MolFromSmiles("[H]")
    for text in smiles:
        for piece in sorted(BRICS.BRICSDecompose(Chem.MolFromSmiles(text))):
            molecule = Chem.MolFromSmiles(piece)
            dummies = Chem.MolFromSmarts("[#0]")
            capped = Chem.ReplaceSubstructs(molecule, dummies, hydrogen, replaceAll=True)[0]
            yield Chem.MolToSmiles(Chem.RemoveHs(capped))


def moses(folder: Path) -> list[str]:
    with zipfile.ZipFile(next(folder.glob("molsets-*.whl"))) as wheel:
        text = gzip.decompress(wheel.read("moses/dataset/data/train.csv.gz")).decode()
    return [row["SMILES"] for row in csv.DictReader(io.StringIO(text))]


def chemicals(folder: Path) -> list[str]:
    with zipfile.ZipFile(next(folder.glob("chemicals-*.whl"))) as wheel:
        text = wheel.read("chemicals/Identifiers/chemical identifiers pubchem large.tsv").decode()
    return [line.split("\t")[4] for line in text.splitlines() if line.count("\t") >= 4]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder with the wheels of molsets and chemicals")
    parser.add_argument("--moses", type=int, default=9000, help="drug-like molecules")
    parser.add_argument("--chemicals", type=int, default=14000, help="chemicals of more than 7 heavy atoms")
    parser.add_argument("--fragments", type=int, default=5000)
    options = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    rng = random.Random(SEED)
    with (HERE / "held_out.csv").open(encoding="utf-8", newline="") as file:
        held_out = {canonical(row["smiles"]) for row in csv.DictReader(file)}
    if None in held_out:
        sys.exit("held_out.csv: a molecule is not neutral, closed-shell and of our elements")
    known = set(held_out)
    rows = [("enumerated", s) for s in unique(enumerated(), known)]
    pool = list(unique(chemicals(options.wheels), known))
    small = [s for s in pool if heavy(s) <= 7]
    large = [s for s in pool if heavy(s) > 7]
    # rarer elements first: they are few, and the model must know them
    rare = [s for s in large if any(e in s for e in ("P", "p", "Br", "F", "Cl", "S", "s"))]
    rng.shuffle(rare)
    rest = sorted(set(large) - set(rare))
    rng.shuffle(rest)
    phosphorus = [s for s in rare if "P" in s or "p" in s.replace("sp", "")]
    others = [s for s in rare if s not in set(phosphorus)]
    half = options.chemicals // 2
    chosen = phosphorus[: half // 3] + others[: half - len(phosphorus[: half // 3])] + rest[:half]
    rows += [("chemical", s) for s in small + chosen]
    drugs = moses(options.wheels)
    rng.shuffle(drugs)
    druglike: list[str] = []
    for form in unique(drugs, known):
        druglike.append(form)
        if len(druglike) == options.moses:
            break
    rows += [("drug", s) for s in druglike]
    pieces = [s for s in unique(fragments(druglike + rare[:6000]), known) if heavy(s) >= 2]
    rng.shuffle(pieces)
    rows += [("fragment", s) for s in pieces[: options.fragments]]
    rng.shuffle(rows)
    with atomic_write(HERE / "train.csv") as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([("set", "smiles"), *rows])
    kinds = sorted({kind for kind, _ in rows})
    print({kind: sum(k == kind for k, _ in rows) for kind in kinds}, "held out", len(held_out))


if __name__ == "__main__":
    main()
