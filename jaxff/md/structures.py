"""Structures to start from: any file that ASE reads, or a built-in name."""

from __future__ import annotations

import difflib
import sqlite3
import struct
import zipfile
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from ase import Atoms

from jaxff.errors import StructureError
from jaxff.system import closest_pair
from jaxff.units import atomic_masses, chemical_symbols

CLOSEST = 0.1  # Å: two atoms nearer than this lie at one place

# what ASE's readers have been seen to raise on files that are broken or of another kind
_READING_ERRORS = (
    OSError,  # ase.io.extxyz.XYZError among them
    ValueError,
    LookupError,
    NameError,  # a variable that a reader never came to set
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    RuntimeError,  # NotImplementedError, RecursionError among them
    SyntaxError,
    StopIteration,
    EOFError,
    ImportError,
    sqlite3.Error,
    struct.error,
    zipfile.BadZipFile,
)

_COMMON_NAMES = {
    "acetaldehyde": "CH3CHO",
    "acetamide": "CH3CONH2",
    "acetic_acid": "CH3COOH",
    "acetone": "CH3COCH3",
    "acetonitrile": "CH3CN",
    "acetylene": "C2H2",
    "ammonia": "NH3",
    "benzene": "C6H6",
    "carbon_dioxide": "CO2",
    "dimethyl_ether": "CH3OCH3",
    "dimethyl_sulfoxide": "C2H6SO",
    "ethane": "C2H6",
    "ethanol": "CH3CH2OH",
    "ethylene": "C2H4",
    "formaldehyde": "H2CO",
    "formic_acid": "HCOOH",
    "furan": "C4H4O",
    "methane": "CH4",
    "methanol": "CH3OH",
    "propane": "C3H8",
    "pyridine": "C5H5N",
    "pyrrole": "C4H4NH",
    "thiophene": "C4H4S",
    "water": "H2O",
}


def read_structure(path: str | Path, index: int = 0) -> Atoms:
    """Frame `index` of a file in any format that ASE reads. Raises StructureError with the file's name."""
    import ase.io
    from ase.io.formats import UnknownFileTypeError

    source = Path(path)
    if not source.exists():
        raise StructureError(f"{source}: no such file")
    try:
        atoms = ase.io.read(str(source), index=index, do_not_split_by_at_sign=True)
    except UnknownFileTypeError:
        raise StructureError(f"{source}: not a structure file of a format that ASE knows") from None
    except Exception as error:
        if not _is_of_the_reader(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        wanted = "" if index == 0 else f" (frame {index} was asked for)"
        raise StructureError(f"{source}: ASE can't read a structure from it{wanted}: {reason}") from None
    if not isinstance(atoms, Atoms) or len(atoms) == 0:
        raise StructureError(f"{source}: expected at least one atom, received none")
    return atoms


@cache
def builtin_names() -> dict[str, str]:
    """Name -> where it comes from, of every built-in molecule."""
    from ase.collections import g2

    names = {_stem(entry.name): "jaxff" for entry in _folder().iterdir() if entry.name.endswith(".xyz")}
    names |= {name: f"ase g2 ({formula})" for name, formula in _COMMON_NAMES.items()}
    names |= dict.fromkeys(g2.names, "ase g2")
    order = {"jaxff": 0, "ase g2": 2}
    return dict(sorted(names.items(), key=lambda item: (order.get(item[1], 1), item[0].lower())))


def builtin_molecule(name: str) -> Atoms:
    """A molecule by its name: a common one ('ethanol', 'aspirin') or one of ASE's g2 set ('CH3CH2OH').

    Raises StructureError, with the nearest names, for a name that isn't there.
    """
    import ase.io
    from ase.build import molecule

    names = builtin_names()
    spelt = {_key(n): n for n in names}
    known = name if name in names else spelt.get(_key(name))
    if known is None:
        near = difflib.get_close_matches(_key(name), spelt, n=3, cutoff=0.6)
        hint = f", did you mean {' or '.join(spelt[n] for n in near)}?" if near else ""
        raise StructureError(f"no built-in molecule '{name}'{hint} (`jaxff molecules` lists them)")
    if names[known] == "jaxff":
        with (_folder() / f"{known}.xyz").open("r", encoding="utf-8") as file:
            atoms = ase.io.read(file, format="extxyz")
        assert isinstance(atoms, Atoms)
        return atoms
    return molecule(_COMMON_NAMES.get(known, known))


def check_start(atoms: Atoms) -> None:
    """Refuse what can't be simulated although its energy is defined.

    Raises StructureError: two atoms closer than 0.1 Å, a mass that isn't positive, constraints.
    """
    if atoms.constraints:
        kinds = sorted({type(constraint).__name__ for constraint in atoms.constraints})
        raise StructureError(f"expected no constraints, received {', '.join(kinds)}: jaxff.md moves every atom")
    masses = atoms.get_masses()
    bad = np.flatnonzero(~(masses > 0.0) | ~np.isfinite(masses))
    if bad.size:
        raise StructureError(f"expected positive masses (amu), received {masses[bad[0]]} for atom {bad[0]}")
    distance, i, j = closest_pair(atoms.positions)
    if distance < CLOSEST:
        a, b = (f"{chemical_symbols[atoms.numbers[k]]} (atom {k})" for k in (i, j))
        raise StructureError(
            f"two atoms at one place: {a} and {b} are {distance:.3g} Å apart, expected at least {CLOSEST} Å"
        )


def has_own_masses(atoms: Atoms) -> bool:
    """Whether any mass differs from the element's standard one (an isotope)."""
    return not np.allclose(atoms.get_masses(), atomic_masses[atoms.numbers], rtol=0.0, atol=1e-9)


def _folder():  # type: ignore[no-untyped-def]  # importlib's Traversable moved between Python versions
    return files("jaxff") / "data" / "molecules"


def _is_of_the_reader(error: Exception) -> bool:
    # some of ASE's readers raise classes of their own, some a bare Exception
    own = type(error).__module__.partition(".")[0] == "ase" or type(error) is Exception
    return own or isinstance(error, _READING_ERRORS)


def _key(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _stem(name: str) -> str:
    return name.removesuffix(".xyz")
