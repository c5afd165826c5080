"""The certificate: what was converted, and how well the result agrees with independent implementations."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from jaxff.config import StudentConfig
from jaxff.convert.defects import measure_defects
from jaxff.convert.names import config_shapes, to_tree
from jaxff.convert.reference import reference_energy_and_forces
from jaxff.convert.structures import Structure, check_structures
from jaxff.convert.torch_reference import torch_energy_and_forces, torch_is_installed, torch_student
from jaxff.errors import CheckpointError
from jaxff.potential import Potential

Result = tuple[float, np.ndarray]
# (absolute, relative to |E|) in eV, and absolute in eV/Å (relative to forces beyond 1 eV/Å)
TOLERANCE = {"float64": ((1e-10, 1e-12), 1e-9), "float32": ((1e-3, 1e-6), 1e-4)}


def certify(
    source: str | Path,
    tensors: Mapping[str, np.ndarray],
    config: StudentConfig,
    layout: str,
    notes: list[str],
) -> dict[str, Any]:
    """Plain JSON: hashes, layout, notes, the check, the measured defects, versions, date. Takes some seconds.

    Raises CheckpointError where float64 results leave the tolerance: such numbers can't be trusted.
    """
    double = Potential(to_tree(tensors), config, dtype="float64")
    single = Potential(to_tree(tensors), config, dtype="float32")
    return {
        "source": {
            "file": Path(source).name,
            "sha256": file_hash(source),
            "bytes": Path(source).stat().st_size,
            "layout": layout,
        },
        "tensors_sha256": tensors_hash(tensors, config),
        "notes": list(notes),
        "check": _trusted(source, _check(tensors, config, {"float64": double, "float32": single})),
        "defects": measure_defects(double, config.cutoff, config.max_z),
        "versions": _versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensors_hash(tensors: Mapping[str, np.ndarray], config: StudentConfig) -> str:
    """SHA-256 over name, dtype, shape and little-endian bytes of each tensor, in the class's own order.

    The same weights have the same hash in whatever layout they came.
    """
    digest = hashlib.sha256()
    for name in config_shapes(config):
        array = np.asarray(tensors[name])
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}\n".encode())
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _check(
    tensors: Mapping[str, np.ndarray], config: StudentConfig, potentials: Mapping[str, Potential]
) -> dict[str, Any]:
    structures = check_structures(config.cutoff, config.max_z)
    references: dict[str, dict[str, Result]] = {
        "numpy": {name: reference_energy_and_forces(tensors, config, *s) for name, s in structures.items()}
    }
    if torch_is_installed():
        model = torch_student(config, tensors)
        references["pytorch"] = {name: torch_energy_and_forces(model, *s) for name, s in structures.items()}
    compared: dict[str, Any] = {}
    for dtype, potential in potentials.items():
        results = _evaluate(potential.energy_and_forces, structures)
        compared[dtype] = {name: _compare(results, reference, dtype) for name, reference in references.items()}
    passed = all(entry["passed"] for entries in compared.values() for entry in entries.values())
    return {"structures": list(structures), "passed": passed, "pytorch": "pytorch" in references, **compared}


def _trusted(source: str | Path, check: dict[str, Any]) -> dict[str, Any]:
    for name, errors in check["float64"].items():
        if not errors["passed"]:
            raise CheckpointError(
                f"{source}: the converted model disagrees with the independent {name} implementation by"
                f" {errors['largest_dE_eV']:.1e} eV and {errors['largest_dF_eV_per_A']:.1e} eV/Å in float64;"
                " nothing was written"
            )
    return check


def _evaluate(evaluate: Callable[..., Result], structures: Mapping[str, Structure]) -> dict[str, Result]:
    return {name: evaluate(*structure) for name, structure in structures.items()}


def _compare(results: Mapping[str, Result], reference: Mapping[str, Result], dtype: str) -> dict[str, Any]:
    """Largest |dE| (eV) and |dF| (eV/Å), and whether all are within the tolerance."""
    (absolute, relative), force = TOLERANCE[dtype]
    largest_energy = largest_force = 0.0
    good = True
    for name, (energy, forces) in reference.items():
        dE = abs(results[name][0] - energy)
        dF = float(np.abs(results[name][1] - forces).max())
        good = good and dE <= absolute + relative * abs(energy)
        good = good and dF <= force * max(1.0, float(np.abs(forces).max()))
        largest_energy, largest_force = max(largest_energy, dE), max(largest_force, dF)
    return {"largest_dE_eV": float(largest_energy), "largest_dF_eV_per_A": largest_force, "passed": bool(good)}


def _versions() -> dict[str, str | None]:
    names = ("jaxff", "jax", "numpy") + (("torch",) if torch_is_installed() else ())
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    if versions["jaxff"] is None:
        import jaxff

        versions["jaxff"] = jaxff.__version__
    return versions
