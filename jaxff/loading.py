"""One way to a potential, from whatever the user has."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

from jaxff import pretrained
from jaxff.checkpoint import load_checkpoint
from jaxff.convert import read_student
from jaxff.errors import CheckpointError
from jaxff.potential import Potential

MODEL_SUFFIXES = (".safetensors", ".pt", ".pth", ".ckpt")


def load_potential(
    path: str | Path = pretrained.DEFAULT, dtype: Any = "float32", engine: str = "auto", filters: str = "auto"
) -> Potential:
    """A potential by the name of a pretrained model, or from a file.

    path: "organic" (the default), "organic-small" (`jaxff models` lists them); or a file: jaxff's own (.safetensors),
    or a PyTorch checkpoint of the student in any layout, which is converted in memory, quickly and silently, without a
    certificate. A pretrained name goes first: write ./organic for a file that is called so.
    dtype: "float32" or "float64"; engine, filters: as in Potential. Raises CheckpointError where there is no such
    model, or the file can't be used.
    """
    if pretrained.is_name(path):
        path = pretrained.model_path(str(path))
    elif not Path(path).exists():
        known = ", ".join(pretrained.names()) or "none"
        raise CheckpointError(f"{path}: no such file, and no pretrained model of this name (there are: {known})")
    if Path(path).suffix.lower() == ".safetensors":
        checkpoint = load_checkpoint(path)
        return Potential(checkpoint.params, checkpoint.config, dtype, engine, checkpoint.certificate, filters)
    params, config, _ = read_student(path)
    return Potential(params, config, dtype, engine, filters=filters)


def is_model(path: str | Path) -> bool:
    """Whether `path` means a model, and not a structure: a pretrained name, a model's suffix, or a PyTorch archive."""
    if pretrained.is_name(path) or Path(path).suffix.lower() in MODEL_SUFFIXES:
        return True
    try:
        with zipfile.ZipFile(path) as archive:
            return any(Path(name).name == "data.pkl" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
