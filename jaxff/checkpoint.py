"""jaxff's own file: one safetensors file with the configuration and the certificate in its metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxff.config import PainnConfig, StudentConfig, parse_model_config
from jaxff.errors import CheckpointError, ConfigError
from jaxff.files import atomic_write

FORMAT = "jaxff"
FORMAT_VERSION = "1"
Params = dict[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """Parameters (nested dict of NumPy arrays, float32 or float64), configuration, certificate."""

    params: Params
    config: StudentConfig | PainnConfig
    certificate: dict[str, Any] | None = None


def save_checkpoint(
    path: str | Path,
    params: Mapping[str, Any],
    config: StudentConfig | PainnConfig,
    certificate: Mapping[str, Any] | None = None,
) -> None:
    """Writes `path` atomically. Half precision is widened to float32, which is exact.

    Raises CheckpointError where a name, a shape or a value doesn't fit `config`, OSError where writing fails.
    """
    from safetensors.numpy import save

    tensors = {name: _storable(str(path), name, value) for name, value in flatten(params)}
    _check(str(path), tensors, config)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.model_dump_json(),
        "certificate": json.dumps(certificate, allow_nan=False),
    }
    data = save(tensors, metadata)
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint in `path`, every name, shape and value checked. Raises CheckpointError."""
    from safetensors import SafetensorError, safe_open

    name = str(path)
    try:
        with safe_open(name, framework="np") as file:
            metadata = file.metadata() or {}
            _check_format(name, metadata)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name}: not a safetensors file that can be read ({error})") from None
    except OSError as error:
        raise CheckpointError(f"{name}: cannot be read ({error.strerror or error})") from None
    config, certificate = _read_metadata(name, metadata)
    _check(name, tensors, config)
    return Checkpoint(unflatten(tensors), config, certificate)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, leaf) of a nested dict; names are the keys joined by '.', in the tree's order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """The nested dict whose `flatten` is `leaves`."""
    tree: Params = {}
    for name, value in leaves.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def _storable(path: str, name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.name in ("float16", "bfloat16"):
        array = array.astype(np.float32)
    if array.dtype not in (np.float32, np.float64):
        raise CheckpointError(f"{path}: tensor {name}: expected float32 or float64, received {array.dtype}")
    # safetensors writes the buffer as it lies in memory: a transposed view must be copied first
    return np.ascontiguousarray(array).reshape(array.shape)


def _check_format(path: str, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT or "config" not in metadata:
        raise CheckpointError(f"{path}: a safetensors file without jaxff's configuration in its metadata")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: expected format version {FORMAT_VERSION}, received {metadata.get('format_version')!r}"
        )


def _read_metadata(path: str, metadata: Mapping[str, str]) -> tuple[StudentConfig | PainnConfig, dict[str, Any] | None]:
    try:
        config = parse_model_config(metadata["config"])
        certificate = json.loads(metadata.get("certificate", "null"))
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata isn't JSON ({error})") from None
    if certificate is not None and not isinstance(certificate, dict):
        raise CheckpointError(f"{path}: expected a certificate that is a JSON object")
    return config, certificate


def _check(path: str, tensors: Mapping[str, np.ndarray], config: StudentConfig | PainnConfig) -> None:
    from jaxff.models import param_shapes

    expected = dict(flatten(param_shapes(config)))
    for name, leaf in expected.items():
        if name not in tensors:
            raise CheckpointError(f"{path}: tensor {name} is missing")
        array = tensors[name]
        if array.shape != tuple(leaf.shape):
            raise CheckpointError(
                f"{path}: tensor {name}: expected shape {list(leaf.shape)}, received {list(array.shape)}"
            )
        if array.dtype not in (np.float32, np.float64):
            raise CheckpointError(f"{path}: tensor {name}: expected float32 or float64, received {array.dtype}")
        if not np.isfinite(array).all():
            raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity")
    extra = sorted(set(tensors) - set(expected))
    if extra:
        raise CheckpointError(f"{path}: tensor {extra[0]} is one too many for the architecture {config.architecture}")
