"""Teachers: what gives a structure its energy and forces. tblite's xTB methods, jaxff's own models, ASE's calculators.

A teacher is named by a spec, so that another process or another day can make the same one:
`tblite:METHOD`, `jaxff:MODEL`, `ase:module.Class`, the first and the last with options: `?key=value&key=value`.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from jaxff.errors import ConfigError, JaxffError, LabelError
from jaxff.system import check_structure
from jaxff.versions import installed

Label = tuple[float, Float[np.ndarray, "N 3"]]
Evaluate = Callable[[np.ndarray, np.ndarray], Label]

TBLITE_METHODS = ("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB")


@dataclass(frozen=True)
class Teacher:
    """Energy (eV) and forces (float64, [N, 3] eV/Å) of numbers [N] and positions [N, 3] Å, by calling it.

    A call raises StructureError for a structure that can't be one, LabelError where the teacher fails.
    """

    spec: str  # what make_teacher makes it from
    identity: str  # the spec, and a hash of the model's file where there is one: equal identities, equal labels
    versions: dict[str, str]  # of the libraries that compute
    evaluate: Evaluate

    def __call__(self, numbers: Any, positions: Any) -> Label:
        z, r = check_structure(numbers, positions)
        try:
            energy, forces = self.evaluate(z, r)
        except JaxffError:
            raise
        except Exception as error:
            raise LabelError(f"{self.spec}: {' '.join(str(error).split()) or type(error).__name__}") from error
        forces = np.asarray(forces, dtype=np.float64)
        if forces.shape != r.shape:
            raise LabelError(f"{self.spec}: expected forces of shape {list(r.shape)}, received {list(forces.shape)}")
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            raise LabelError(f"{self.spec}: gave NaN or infinity")
        return float(energy), forces


def make_teacher(spec: str) -> Teacher:
    """The teacher of a spec. Raises ConfigError for one that isn't known, or whose library is missing.

    tblite:METHOD  GFN2-xTB, GFN1-xTB, IPEA1-xTB; neutral molecules with an even number of electrons, others raise
                   StructureError; options: tblite's own (accuracy, max-iter, temperature, ...)
    jaxff:MODEL    a model's file or name, in float64
    ase:module.Class  any ASE calculator; options go to the class
    """
    kind, _, rest = spec.partition(":")
    makers = {"tblite": _tblite, "jaxff": _jaxff, "ase": _ase}
    if kind not in makers or not rest:
        raise ConfigError(
            f"expected a teacher 'tblite:METHOD', 'jaxff:MODEL' or 'ase:module.Class?key=value', received {spec!r}"
        )
    return makers[kind](spec, rest)


def _tblite(spec: str, rest: str) -> Teacher:
    method, options = _options(spec, rest)
    if method not in TBLITE_METHODS:
        raise ConfigError(f"teacher {spec}: expected one of {', '.join(TBLITE_METHODS)}, received {method!r}")
    interface = _library(spec, "tblite.interface", "tblite")
    from jaxff.units import Bohr, Hartree

    def calculator(numbers: Int[np.ndarray, "N"], positions: Float[np.ndarray, "N 3"]) -> Any:
        made = interface.Calculator(method, numbers, positions / Bohr, charge=0.0)
        made.set("verbosity", 0)
        for key, value in options.items():
            made.set(key, value)
        return made

    def evaluate(numbers: Int[np.ndarray, "N"], positions: Float[np.ndarray, "N 3"]) -> Label:
        check_structure(numbers, positions, closed_shell=True)  # tblite would take a radical for a doublet, silently
        # a new calculator for each structure: a label must not depend on the one before it
        result = calculator(numbers, positions).singlepoint()
        return result["energy"] * Hartree, -result["gradient"] * (Hartree / Bohr)

    try:
        calculator(np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.74]]))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"teacher {spec}: {error}") from None
    return Teacher(spec, spec, installed("tblite"), evaluate)


def _jaxff(spec: str, rest: str) -> Teacher:
    from jaxff import __version__, pretrained
    from jaxff.loading import load_potential

    potential = load_potential(rest, dtype="float64")
    path = pretrained.model_path(rest) if pretrained.is_name(rest) else Path(rest)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Teacher(
        spec,
        f"jaxff:{digest}",
        {"jaxff": __version__} | installed("jax"),
        potential.energy_and_forces,
    )


def _ase(spec: str, rest: str) -> Teacher:
    from ase import Atoms

    path, options = _options(spec, rest)
    module, _, name = path.rpartition(".")
    if not module:
        raise ConfigError(f"teacher {spec}: expected 'ase:module.Class', for example 'ase:ase.calculators.emt.EMT'")
    home = _library(spec, module, module.partition(".")[0])
    if not hasattr(home, name):
        raise ConfigError(f"teacher {spec}: the module {module} has no class {name}")
    try:
        calculator = getattr(home, name)(**options)
    except Exception as error:
        raise ConfigError(f"teacher {spec}: {name} can't be made with {options}: {error}") from error

    def evaluate(numbers: Int[np.ndarray, "N"], positions: Float[np.ndarray, "N 3"]) -> Label:
        atoms = Atoms(numbers=numbers, positions=positions, calculator=calculator)
        forces = atoms.get_forces()  # first: with them, calculators have the energy, too
        return atoms.get_potential_energy(), forces

    return Teacher(spec, spec, installed("ase", module.partition(".")[0]), evaluate)


def _options(spec: str, rest: str) -> tuple[str, dict[str, Any]]:
    """What stands before '?', and the options after it: Python literals where they are, else strings."""
    name, _, query = rest.partition("?")
    options: dict[str, Any] = {}
    for item in filter(None, query.split("&")):
        key, equals, text = item.partition("=")
        if not key or not equals:
            raise ConfigError(f"teacher {spec}: expected options 'key=value&key=value', received {item!r}")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return name, options


def _library(spec: str, module: str, package: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # a module that is imported may raise anything
        raise ConfigError(
            f"teacher {spec}: expected the Python module {module}, which can't be imported ({error}); "
            f"`pip install {package}` may provide it"
        ) from error
