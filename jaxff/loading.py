"""One way to a potential, from whatever the user has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxff.checkpoint import load_checkpoint
from jaxff.convert import read_student
from jaxff.errors import CheckpointError
from jaxff.potential import Potential


def load_potential(path: str | Path, dtype: Any = "float32", engine: str = "auto", filters: str = "auto") -> Potential:
    """A potential from a file: jaxff's own (.safetensors), or a PyTorch checkpoint of the student in any layout.

    dtype: "float32" or "float64"; engine, filters: as in Potential. A PyTorch checkpoint is converted in memory,
    quickly and silently, without a certificate. Raises CheckpointError where the file can't be used.
    """
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such file")
    if Path(path).suffix.lower() == ".safetensors":
        checkpoint = load_checkpoint(path)
        return Potential(checkpoint.params, checkpoint.config, dtype, engine, checkpoint.certificate, filters)
    params, config, _ = read_student(path)
    return Potential(params, config, dtype, engine, filters=filters)
