"""The constructors that the pickle machine knows: tensors, and plain data. All else stays a Record."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from jaxff.convert.records import DTYPE_ALIASES, ITEM_SIZE, STORAGE_DTYPE, Global, Opaque, Record, Storage, Tensor
from jaxff.errors import CheckpointError

MAX_DIMENSIONS = 16
MAX_SIZE = 2**62
ENTRY_COST = 100  # bytes, about what an entry of a dict takes
_PLAIN_TYPES = (str, bytes, bool, float, type(None))


class _Faulty(Protocol):
    def fault(self, text: str) -> CheckpointError: ...
    def spend(self, size: int) -> None: ...


Builder = Callable[[Any, Global, tuple[Any, ...]], Any]


def plain_key(key: Any) -> Any:
    """`key` where hashing it is quick, else a placeholder."""
    if isinstance(key, bool | str | bytes | float | None):
        return key
    if isinstance(key, int):
        return key if abs(key) < 2**60 else Opaque()
    if isinstance(key, tuple) and len(key) <= 8 and all(isinstance(k, _PLAIN_TYPES) for k in key):
        return key
    return Opaque()


def storage_of(machine: _Faulty, pid: Any) -> Any:
    """What torch's persistent identifier stands for: a Storage, or the class that a 'module' entry wraps."""
    if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
        return pid[1]
    if not (isinstance(pid, tuple) and len(pid) in (5, 6) and pid[0] == "storage"):
        raise machine.fault("refers to something outside that isn't a storage")
    kind, key, numel = pid[1], pid[2], pid[4]
    dtype = STORAGE_DTYPE.get(kind.name) if isinstance(kind, Global) and kind.module.startswith("torch") else None
    if dtype is None or not isinstance(key, str) or not _is_size(numel):
        raise machine.fault("refers to a storage without a usable type, key or size")
    view = pid[5] if len(pid) == 6 else None
    if view is None:
        return Storage(key, dtype, numel)
    if not (isinstance(view, tuple) and len(view) == 3 and _is_size(view[1]) and _is_size(view[2])):
        raise machine.fault("refers to a storage's view without a usable size")
    return Storage(key, dtype, view[2], view[1])


def dtype_name(value: Any) -> str | None:
    """The name of a torch dtype that the pickle refers to."""
    if not (isinstance(value, Global) and value.module == "torch"):
        return None
    name = DTYPE_ALIASES.get(value.name, value.name)
    return name if name in ITEM_SIZE else None


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_SIZE


def _sizes(machine: _Faulty, values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > MAX_DIMENSIONS or not all(map(_is_size, values)):
        raise machine.fault("holds a tensor whose shape or strides make no sense")
    return tuple(values)


def _tensor(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    """_rebuild_tensor(storage, offset, size, stride), _v2 with more behind, _v3 with the dtype at 6."""
    if len(args) < 4 or not isinstance(args[0], Storage) or not _is_size(args[1]):
        raise machine.fault("holds a tensor without a storage")
    shape, strides = _sizes(machine, args[2]), _sizes(machine, args[3])
    dtype: str | None = args[0].dtype
    if function.name.endswith("_v3"):
        dtype = dtype_name(args[6]) if len(args) > 6 else None
    if len(shape) != len(strides) or dtype is None:
        raise machine.fault("holds a tensor whose shape, strides or dtype make no sense")
    return Tensor(args[0], dtype, args[1], shape, strides)


def _parameter(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    if not args:
        raise machine.fault("holds a parameter without data")
    return args[0]


def _from_type(machine: Any, function: Global, args: tuple[Any, ...]) -> Any:
    """_rebuild_from_type_v2(function, type, args, state): a tensor that carries attributes."""
    if len(args) >= 3 and isinstance(args[0], Global) and isinstance(args[2], tuple):
        build = _TENSOR_BUILDERS.get(args[0].full_name)
        if build is not None:
            return build(machine, args[0], args[2])
    return Record(function, args)


def _ordered_dict(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    """dict() and OrderedDict(), of nothing, of a dict, or of pairs."""
    source = args[0] if args else {}
    if isinstance(source, dict):
        return source
    if not isinstance(source, list | tuple):
        return {}
    machine.spend(ENTRY_COST * len(source))
    pairs = [pair for pair in source if isinstance(pair, list | tuple) and len(pair) == 2]
    if len(pairs) != len(source):
        raise machine.fault("makes a dictionary of something that isn't pairs")
    return {plain_key(key): value for key, value in pairs}


def _default_dict(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    return _ordered_dict(machine, function, args[1:])


def _list(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    """A list of a list or tuple; nothing is copied, as a repeated copy would cost memory without bound."""
    if args and isinstance(args[0], list):
        return args[0]
    machine.spend(ENTRY_COST * (len(args[0]) if args and isinstance(args[0], tuple) else 1))
    return list(args[0]) if args and isinstance(args[0], tuple) else []


def _tuple(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    return args[0] if args and isinstance(args[0], list | tuple) else ()


def _number(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    """int, float, bool of a number or a short text; else a Record."""
    kind = {"int": int, "float": float, "bool": bool}[function.name]
    if len(args) != 1 or not isinstance(args[0], bool | int | float | str) or len(str(args[0])[:101]) > 100:
        return Record(function, args)
    return kind(args[0])


def _text(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    return args[0] if len(args) == 1 and isinstance(args[0], str) else Record(function, args)


def _path(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    short = all(isinstance(part, str) for part in args) and sum(map(len, args)) < 4096
    return "/".join(args) if short else Record(function, args)


def _encode(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    """_codecs.encode(text, 'latin1'): how protocol 2 writes bytes."""
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
        machine.spend(len(args[0]))
        return args[0].encode("latin-1")
    raise machine.fault("encodes bytes in another way than protocol 2 does")


def _numpy_scalar(machine: _Faulty, function: Global, args: tuple[Any, ...]) -> Any:
    """numpy.core.multiarray.scalar(dtype, bytes) as a Python number; of other dtypes, a Record."""
    dtype = numpy_dtype(args[0]) if args else None
    if dtype is None or len(args) != 2 or not isinstance(args[1], bytes) or len(args[1]) != dtype.itemsize:
        return Record(function, args)
    return np.frombuffer(args[1], dtype)[0].item()


def numpy_dtype(record: Any) -> np.dtype | None:
    """The dtype of a record numpy.dtype('f8', ...), where it is one of plain numbers."""
    if not (isinstance(record, Record) and record.kind.full_name == "numpy.dtype" and record.args):
        return None
    code = record.args[0]
    if code not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
        return None
    state = record.state
    order = state[1] if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|") else "<"
    return np.dtype(f"{order if order != '|' else ''}{code}")


def numpy_array(record: Any) -> np.ndarray | None:
    """The array of a record numpy._reconstruct(...) with its state, where its bytes are all there."""
    if not (isinstance(record, Record) and record.kind.full_name.endswith(".multiarray._reconstruct")):
        return None
    state = record.state
    if not (isinstance(state, tuple) and len(state) == 5):
        return None
    _, shape, dtype_record, fortran, data = state
    dtype = numpy_dtype(dtype_record)
    if dtype is None or not isinstance(data, bytes) or not isinstance(shape, tuple) or len(shape) > MAX_DIMENSIONS:
        return None
    if not all(map(_is_size, shape)) or math.prod(shape) * dtype.itemsize != len(data):
        return None
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


_TENSOR_BUILDERS: dict[str, Builder] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
}
BUILDERS: dict[str, Builder] = {
    **_TENSOR_BUILDERS,
    "torch._tensor._rebuild_from_type": _from_type,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.nn.parameter.Parameter": _parameter,
    "torch.Size": _tuple,
    "collections.OrderedDict": _ordered_dict,
    "builtins.dict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    "builtins.list": _list,
    "builtins.set": _list,
    "builtins.frozenset": _list,
    "builtins.tuple": _tuple,
    "builtins.int": _number,
    "builtins.float": _number,
    "builtins.bool": _number,
    "builtins.str": _text,
    "_codecs.encode": _encode,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    **{
        f"{module}.{kind}": _path
        for module in ("pathlib", "pathlib._local")
        for kind in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
}
