"""Units and element data, all from ASE. jaxff's units are eV, Å, amu; times are given in fs.

The time unit that makes eV, Å and amu consistent is Å (amu/eV)^(1/2), about 10.18 fs: multiply a time in fs
by `fs` to get it. Temperatures enter as kB T in eV.
"""

from ase.data import atomic_masses, chemical_symbols, covalent_radii
from ase.units import Bohr, Hartree, fs, kB, kcal, kJ, mol, nm

__all__ = [
    "Bohr",
    "Hartree",
    "atomic_masses",
    "chemical_symbols",
    "covalent_radii",
    "fs",
    "kB",
    "kJ",
    "kcal",
    "mol",
    "nm",
]
