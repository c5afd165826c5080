from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms

from jaxff.errors import StructureError
from jaxff.md.structures import builtin_molecule, builtin_names, check_start, read_structure


def test_reads_a_frame_of_any_format(tmp_path: Path) -> None:
    frames = [molecule("H2O"), molecule("CH4")]
    import ase.io

    ase.io.write(tmp_path / "two.xyz", frames, format="extxyz")
    ase.io.write(tmp_path / "a@1.json", frames[1])
    assert str(read_structure(tmp_path / "two.xyz").symbols) == "OH2"
    assert len(read_structure(tmp_path / "two.xyz", index=-1)) == 5
    assert len(read_structure(tmp_path / "a@1.json")) == 5


BROKEN = {
    "empty.xyz": b"",
    "noise.xyz": b"hello\nthere\n",
    "short.xyz": b"3\n\nH 0 0 0\n",
    "letters.xyz": b"1\n\nH a b c\n",
    "element.xyz": b"1\n\nQq 0 0 0\n",
    "binary.xyz": bytes(range(256)),
    "unknown.abc": b"what is this",
    "broken.json": b"{",
    "empty.json": b"{}",
    "broken.cif": b"data_x\n_cell_length_a what\n",
    "broken.pdb": b"ATOM      1  N   MET A   1      xx.xxx  13.104   2.657\n",
    "broken.traj": b"- of Ulmxxxxxxxxxxxxxxxxxxx",
    "POSCAR": b"x\n1\n0 0\n",
    "broken.gen": b"x",
    "broken.xml": b"<a>",
    "none.xyz": b"0\n\n",
    "broken.mol": b"x",
    "broken.db": b"SQLite format 3\x00",
    "GEOMETRY.OUT": b"1 2 3\n4 5 6\n",  # UnboundLocalError
    "OUTCAR": b"1 2 3\n4 5 6\n",  # ase.io.ParseError
    "inp": b"1 2 3\n4 5 6\n",
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.filterwarnings("ignore")
def test_a_file_that_holds_no_structure_is_one_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(StructureError, match=name):
        read_structure(path)


def test_missing_file_folder_and_frame(tmp_path: Path) -> None:
    with pytest.raises(StructureError, match="no such file"):
        read_structure(tmp_path / "nothing.xyz")
    with pytest.raises(StructureError):
        read_structure(tmp_path)
    (tmp_path / "one.xyz").write_text("1\n\nH 0 0 0\n")
    with pytest.raises(StructureError, match="frame 5"):
        read_structure(tmp_path / "one.xyz", index=5)


def test_every_builtin_name_gives_a_molecule() -> None:
    for name in builtin_names():
        atoms = builtin_molecule(name)
        assert len(atoms) >= 1
        check_start(atoms)


@pytest.mark.parametrize(
    ("name", "formula"),
    [("ethanol", "C2H6O"), ("Aspirin", "C9H8O4"), ("CH3CH2OH", "C2H6O"), ("acetic acid", "C2H4O2"), ("CO", "CO")],
)
def test_builtin_names_are_forgiving(name: str, formula: str) -> None:
    assert builtin_molecule(name).get_chemical_formula() == formula


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(StructureError, match=r"'asprin'.*did you mean aspirin"):
        builtin_molecule("asprin")
    with pytest.raises(StructureError, match="no built-in molecule"):
        builtin_molecule("qqqqqqqqqqqqq")


def test_the_shipped_geometries_are_sound() -> None:
    for name, source in builtin_names().items():
        if source == "jaxff":
            atoms = builtin_molecule(name)
            distances = atoms.get_all_distances() + 9.0 * np.eye(len(atoms))
            assert 0.9 < distances.min() < 1.2
            assert distances.min(axis=1).max() < 1.6
            assert not atoms.pbc.any()


def test_what_can_not_start() -> None:
    check_start(Atoms("H"))
    check_start(Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.1001]]))
    with pytest.raises(StructureError, match=r"C \(atom 1\) and O \(atom 2\) are 0.05 Å apart"):
        check_start(Atoms("HCO", positions=[[3, 0, 0], [0, 0, 0], [0, 0, 0.05]]))
    with pytest.raises(StructureError, match="mass"):
        check_start(Atoms("H2", positions=[[0, 0, 0], [0, 0, 1]], masses=[1.0, 0.0]))
    with pytest.raises(StructureError, match="FixAtoms"):
        check_start(Atoms("H", constraint=FixAtoms([0])))
