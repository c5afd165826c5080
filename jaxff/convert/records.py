"""What a pickle becomes here: inert records. None of them can do anything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np


def printable(text: str, limit: int = 120) -> str:
    """`text` from a file, fit for one line of a message."""
    return "".join(c if c.isprintable() else "?" for c in text[:limit])


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Global:
    """A name that the pickle asked for; never imported."""

    module: str
    name: str

    @property
    def full_name(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True, repr=False)
class Record:
    """An object of a class that isn't plain data: what its constructor got, and what was put into it."""

    kind: Global
    args: tuple[Any, ...] = ()
    attributes: dict[Any, Any] = field(default_factory=dict)
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)
    state: Any = None

    def build(self, state: Any) -> None:
        """Takes a BUILD's state: a dict of attributes, a pair of such, or anything else as it is."""
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if all(part is None or isinstance(part, dict) for part in parts):
            for part in parts:
                self.attributes.update(part or {})
        else:
            self.state = state


class Opaque:
    """Stands for a dict key that isn't plain data (hashing a nested tuple can take for ever)."""

    __slots__ = ()


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Storage:
    """A tensor's memory: its key in the archive, its type ('float32', ..., 'bytes'), and its elements there."""

    key: str
    dtype: str
    numel: int
    offset: int = 0


@dataclass(frozen=True, eq=False, slots=True, repr=False)
class Tensor:
    """A strided view of a storage; offset and strides count elements."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


# torch's dtypes, and their size in bytes
ITEM_SIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
    "uint16": 2, "uint32": 4, "uint64": 8, "complex64": 8, "complex128": 16, "complex32": 4,
    "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1, "bits8": 1, "bits16": 2,
    "float8_e4m3fn": 1, "float8_e5m2": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "float8_e8m0fnu": 1,
    "bytes": 1,
}  # fmt: skip

STORAGE_DTYPE = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16",
    "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool", "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
    "UntypedStorage": "bytes", "TypedStorage": "bytes", "_UntypedStorage": "bytes", "_TypedStorage": "bytes",
}  # fmt: skip

# the dtypes that a weight may have; bfloat16 is widened by hand
FLOAT_DTYPES = {"float64": "f8", "float32": "f4", "float16": "f2", "bfloat16": "u2"}

DTYPE_ALIASES = {"double": "float64", "float": "float32", "half": "float16", "long": "int64", "int": "int32"}

Array = np.ndarray
