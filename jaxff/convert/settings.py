"""The student's configuration: dimensions from the tensors, the cutoff from the file's configuration.

Without a usable configuration the cutoff is the last radial centre (centres are linspace(0, cutoff, K)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from jaxff.config import StudentConfig
from jaxff.errors import CheckpointError

MAX_CUTOFF = 100.0  # Å


def choose_config(
    name: str,
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    found: Sequence[Mapping[str, Any]],
) -> tuple[StudentConfig, list[str]]:
    """The configuration, and notes on what was overruled. Raises CheckpointError."""
    rows, F = shapes["embedding.weight"]
    true: dict[str, Any] = {
        "hidden_dim": F,
        "num_interactions": sum(key.endswith(".mixing_matrix") for key in shapes),
        "num_rbf": shapes["rbf.centers"][0],
        "max_z": rows - 1,
    }
    stated = found[0] if found else {}
    notes = [
        f"the file's configuration says {key} {_shown(stated[key])}, the tensors have {value}: the tensors are right"
        for key, value in true.items()
        if key in stated and stated[key] != value
    ]
    cutoff, more = _cutoff(name, tensors["rbf.centers"], stated, trusted=not notes)
    try:
        return StudentConfig(cutoff=cutoff, **true), notes + more
    except ValidationError as error:
        item = error.errors()[0]
        key = ".".join(str(part) for part in item["loc"]) or "shapes"
        raise CheckpointError(f"{name}: its tensors make no student: {key}: {item['msg']}") from None


def _cutoff(name: str, centers: np.ndarray, stated: Mapping[str, Any], trusted: bool) -> tuple[float, list[str]]:
    last = shortest(centers[-1])
    value = stated.get("cutoff")
    usable = isinstance(value, int | float) and not isinstance(value, bool) and _sane(value)
    if not usable:
        if not _sane(last):
            raise CheckpointError(
                f"{name}: no cutoff: none in the file's configuration, and the last radial centre is {last} Å"
            )
        why = "no cutoff in the file" if value is None else f"the file's cutoff {_shown(value)} makes no sense"
        return last, [f"{why}: taken from the last radial centre, {last:g} Å"]
    assert value is not None
    cutoff = float(value)
    if math.isclose(cutoff, last, rel_tol=1e-3):
        return cutoff, []
    if not trusted and _sane(last) and _untouched(centers):
        return last, [
            f"the file's cutoff {cutoff:g} Å comes from the overruled configuration: {last:g} Å from the centres"
        ]
    return cutoff, [f"the last radial centre is {last:g} Å, the file's cutoff {cutoff:g} Å is used"]


def shortest(value: np.floating[Any]) -> float:
    """The decimal number that a float32 or float64 stands for: 5.2, not 5.199999809."""
    return float(str(value))


def _sane(value: float) -> bool:
    return math.isfinite(value) and 0.0 < value <= MAX_CUTOFF


def _untouched(centers: np.ndarray) -> bool:
    """Whether the centres still are linspace(0, last, K)."""
    last = float(centers[-1])
    return bool(np.allclose(centers, np.linspace(0.0, last, len(centers)), rtol=0.0, atol=2e-3 * abs(last)))


def _shown(value: Any) -> str:
    if isinstance(value, bool | int | float | None):
        return str(value)[:40]
    return repr(value[:40]) if isinstance(value, str) else f"of type {type(value).__name__}"
