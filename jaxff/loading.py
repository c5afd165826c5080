"""One way to a potential, from whatever the user has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxff.checkpoint import load_checkpoint
from jaxff.convert import read_student
from jaxff.errors import CheckpointError, ConfigError
from jaxff.potential import Potential


def load_potential(path: str | Path | Potential, dtype: Any = None, engine: str = "auto") -> Potential:
    """A potential from a file: jaxff's own (.safetensors), or a PyTorch checkpoint of the student in any layout.

    dtype: "float32" (the default) or "float64"; engine: "auto" or "xla". A PyTorch checkpoint is converted in memory,
    quickly and silently, without a certificate. A Potential is returned as it is; a dtype that differs from its own
    raises ConfigError. Raises CheckpointError where the file can't be used.
    """
    if isinstance(path, Potential):
        if dtype is not None and dtype != path.dtype:
            raise ConfigError(f"expected dtype {path.dtype}, which this potential has, received {dtype!r}")
        return path
    if not Path(path).exists():
        raise CheckpointError(f"{path}: no such file")
    wanted = "float32" if dtype is None else dtype
    if Path(path).suffix.lower() == ".safetensors":
        checkpoint = load_checkpoint(path)
        return Potential(checkpoint.params, checkpoint.config, wanted, engine, checkpoint.certificate)
    params, config, _ = read_student(path)
    return Potential(params, config, wanted, engine)
