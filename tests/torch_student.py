"""Fresh random students: tensors by PyTorch's names, and archives of them, with and without PyTorch."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxff.config import StudentConfig
from jaxff.convert.names import config_shapes
from jaxff.convert.torch_reference import torch_student
from jaxff.convert.torch_writer import torch_archive

SMALL = StudentConfig(hidden_dim=8, num_interactions=2, num_rbf=6, cutoff=4.5, max_z=20)


def random_tensors(config: StudentConfig = SMALL, seed: int = 0, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Random weights of the size that PyTorch would draw; centres and widths as the class makes them."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in config_shapes(config).items():
        scale = 1.0 if name == "embedding.weight" else 1.0 / np.sqrt(shape[-1])
        tensors[name] = np.asarray(rng.uniform(-scale, scale, shape), dtype)
    tensors["rbf.centers"] = np.linspace(0.0, config.cutoff, config.num_rbf).astype(dtype)
    tensors["rbf.widths"] = np.full(config.num_rbf, config.cutoff / config.num_rbf, dtype)
    return tensors


def same_tensors(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether all names, dtypes, shapes and bits agree."""
    return list(one) == list(other) and all(
        x.dtype == other[name].dtype and x.shape == other[name].shape and x.tobytes() == other[name].tobytes()
        for name, x in one.items()
    )


def write_student(path: Path, tensors: dict[str, np.ndarray] | None = None, config: StudentConfig = SMALL) -> Path:
    """The class's own save layout, by jaxff's writer."""
    path.write_bytes(torch_archive(random_tensors(config) if tensors is None else tensors, config))
    return path


def unzip(data: bytes) -> dict[str, bytes]:
    """An archive's members by name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rezip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """An archive of these members."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def zip_of_pickle(path: Path, body: bytes) -> Path:
    """A zip archive as torch.save makes it, with this pickle."""
    return rezip(path, {"archive/data.pkl": body, "archive/version": b"3\n"})


def legacy_of_pickle(path: Path, body: bytes) -> Path:
    """The old format with this pickle, and no storage."""
    head = [pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join([*head, body, pickle.dumps([], 2)]))
    return path


def with_entry(path: Path, key: str, value: bytes) -> Path:
    """A good checkpoint with one more entry at its root; `value` is pickle code that pushes an object."""
    members = unzip(torch_archive(random_tensors(), SMALL))
    body = members["archive/data.pkl"]
    text = key.encode()
    entry = b"X" + struct.pack("<I", len(text)) + text + value
    members["archive/data.pkl"] = body.removesuffix(b"u.") + entry + b"u."
    return rezip(path, members)


def torch_state(tensors: dict[str, np.ndarray], prefix: str = "") -> dict[str, Any]:
    """A state dict of torch tensors."""
    import torch

    return {prefix + name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}


def torch_module(config: StudentConfig = SMALL, tensors: dict[str, np.ndarray] | None = None) -> Any:
    """The class in float32 with these weights."""
    model = torch_student(config, random_tensors(config) if tensors is None else tensors)
    return model.float().eval()
