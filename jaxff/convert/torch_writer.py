"""A checkpoint in the student class's own save layout, written without PyTorch.

{model_state_dict: OrderedDict of tensors, config: {...}, num_parameters: int} as a zip archive: a pickle of
protocol 2, opcode by opcode, and one stored member of raw little-endian numbers for each tensor.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxff.config import StudentConfig

ALIGNMENT = 64  # bytes, where a member's data starts
_TOP = "archive"
_STORAGE = {"float32": "FloatStorage", "float64": "DoubleStorage"}
_MARK, _TUPLE, _REDUCE, _SETITEMS, _EMPTY_TUPLE = b"(", b"t", b"R", b"u", b")"


def torch_archive(tensors: Mapping[str, np.ndarray], config: StudentConfig) -> bytes:
    """The archive's bytes; the same input gives the same bytes. `tensors`: by PyTorch's names, float32 or float64."""
    settings = {
        "hidden_dim": config.hidden_dim,
        "num_interactions": config.num_interactions,
        "num_rbf": config.num_rbf,
        "cutoff": config.cutoff,
        "max_z": config.max_z,
        "use_torch_cluster": True,
    }
    # the class keeps radial centres and widths as buffers, and doesn't count them
    count = sum(array.size for name, array in tensors.items() if not name.startswith("rbf."))
    state = [(_text(name), _tensor(array, str(key))) for key, (name, array) in enumerate(tensors.items())]
    root = _dict(
        [
            (_text("model_state_dict"), _items(_ordered_dict(), state)),
            (_text("config"), _dict((_text(key), _plain(value)) for key, value in settings.items())),
            (_text("num_parameters"), _integer(count)),
        ]
    )
    members = {"data.pkl": b"\x80\x02" + root + b".", ".format_version": b"1", ".storage_alignment": b"64"}
    members["byteorder"] = b"little"
    for key, array in enumerate(tensors.values()):
        members[f"data/{key}"] = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()
    members["version"] = b"3\n"
    return _zip(members)


def _zip(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(f"{_TOP}/{name}", (1980, 1, 1, 0, 0, 0))
            start = buffer.tell() + 30 + len(info.filename) + 4  # local header, name, head of the extra field
            padding = -start % ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(info, content)
    return buffer.getvalue()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _plain(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    return _integer(value) if isinstance(value, int) else b"G" + struct.pack(">d", value)


def _global(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _tuple(items: Iterable[bytes]) -> bytes:
    return _MARK + b"".join(items) + _TUPLE


def _ordered_dict() -> bytes:
    return _global("collections", "OrderedDict") + _EMPTY_TUPLE + _REDUCE


def _items(target: bytes, items: Iterable[tuple[bytes, bytes]]) -> bytes:
    return target + _MARK + b"".join(key + value for key, value in items) + _SETITEMS


def _dict(items: Iterable[tuple[bytes, bytes]]) -> bytes:
    return _items(b"}", items)


def _tensor(array: np.ndarray, key: str) -> bytes:
    """_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    storage = [_text("storage"), _global("torch", _STORAGE[array.dtype.name]), _text(key), _text("cpu")]
    persistent = _tuple([*storage, _integer(array.size)]) + b"Q"
    strides = [math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim)]
    arguments = [persistent, _integer(0), _tuple(map(_integer, array.shape)), _tuple(map(_integer, strides))]
    return _global("torch._utils", "_rebuild_tensor_v2") + _tuple([*arguments, b"\x89", _ordered_dict()]) + _REDUCE
