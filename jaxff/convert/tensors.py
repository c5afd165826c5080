"""NumPy arrays from the tensors of an archive."""

from __future__ import annotations

import numpy as np

from jaxff.convert.archive import Archive
from jaxff.convert.records import FLOAT_DTYPES, ITEM_SIZE, Tensor
from jaxff.errors import CheckpointError

# a stride of 0 repeats memory; a view larger than its storage is a bomb, unless it is small
MAX_REPEATED = 65_536


def read_tensor(path: str, archive: Archive, name: str, tensor: Tensor) -> np.ndarray:
    """`tensor` as an own array, float32 or float64; half precision is widened exactly. Raises CheckpointError."""
    if tensor.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{path}: tensor {name}: expected floating-point numbers, received {tensor.dtype}")
    item = ITEM_SIZE[tensor.dtype]
    data = archive.storage(tensor.storage)
    storage_item = ITEM_SIZE[tensor.storage.dtype]
    if len(data) < (tensor.storage.offset + tensor.storage.numel) * storage_item:
        raise CheckpointError(f"{path}: tensor {name}: damaged or truncated: its storage is incomplete")
    base = tensor.storage.offset * storage_item
    available = tensor.storage.numel * storage_item // item
    # of an untyped storage, the view may start anywhere; of a typed one, elements have its size
    if storage_item != item and tensor.storage.dtype != "bytes":
        raise CheckpointError(f"{path}: tensor {name}: its dtype {tensor.dtype} disagrees with its storage")
    _check_view(path, name, tensor, available)
    if tensor.numel == 0:
        return np.zeros(tensor.shape, np.float32 if item < 8 else np.float64)
    order = ">" if archive.big_endian else "<"
    flat = np.frombuffer(data, np.dtype(order + FLOAT_DTYPES[tensor.dtype]), count=available, offset=base)
    view = np.lib.stride_tricks.as_strided(
        flat[tensor.offset :], tensor.shape, [stride * item for stride in tensor.strides], writeable=False
    )
    return _widened(view, tensor.dtype)


def _check_view(path: str, name: str, tensor: Tensor, available: int) -> None:
    if tensor.numel > max(available, MAX_REPEATED):
        raise CheckpointError(
            f"{path}: tensor {name}: expands beyond reason: shape {list(tensor.shape)}"
            f" of a storage with {available} elements"
        )
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if tensor.numel and last >= available:
        raise CheckpointError(
            f"{path}: tensor {name}: damaged: shape {list(tensor.shape)} at offset {tensor.offset}"
            f" exceeds its storage of {available} elements"
        )


def _widened(view: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # the upper half of a float32
        return (view.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.ascontiguousarray(view, np.float64 if dtype == "float64" else np.float32).reshape(view.shape).copy()
