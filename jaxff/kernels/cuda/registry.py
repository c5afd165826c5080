"""CUDA kernels for jaxff.kernels.cuda.handlers: loaded into this process, and known by a key."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import threading
from collections.abc import Sequence
from typing import Any

import llvmlite.binding
import numpy as np
from numpy.typing import NDArray

from jaxff.kernels import frames
from jaxff.kernels.cuda import handlers

NAME = "jaxff_cuda"  # of the foreign function
_MAX_DYNAMIC_SHARED = 8  # CUfunction_attribute
_MOST_SHARED = 97  # CUdevice_attribute

_lock = threading.Lock()
_alive: list[Any] = []  # what entries point to, and they
_tables: list[NDArray[np.int64]] = []  # the last one is it; another thread may still read those before
_entries: dict[int, int] = {}  # addresses by key


def add(
    name: str,
    code: bytes,
    blocks: int,
    threads: int,
    shared: int,
    together: bool,
    integers: Sequence[int],
    arrays: int,
    results: int,
) -> int:
    """The key of calls of a kernel of this name in `code`, a CUBIN, with these integers and so many arrays and results.

    together: whether all blocks run at once; otherwise the kernel may start before those before it have ended.
    RuntimeError if it can't be loaded.
    """
    register()
    sizes = (blocks, threads, shared, together, arrays, results, *integers)
    digest = hashlib.sha256(repr((name, sizes)).encode() + code).digest()
    key = int.from_bytes(digest[:8], "little", signed=True)
    with _lock:
        if key not in _entries:
            numbers, entry = np.array([*integers, 0], np.int32), np.zeros(handlers.ENTRY, np.int64)
            entry[handlers.HANDLE], entry[handlers.INTEGERS] = _load(name, code, shared), numbers.ctypes.data
            entry[handlers.BLOCKS], entry[handlers.THREADS], entry[handlers.SHARED] = blocks, threads, shared
            entry[handlers.ATTRIBUTE] = handlers.COOPERATIVE if together else handlers.PROGRAMMATIC_SERIALIZATION
            entry[handlers.ARRAYS], entry[handlers.COUNT], entry[handlers.RESULTS] = arrays, len(integers), results
            _alive.extend((numbers, entry))
            _entries[key] = int(entry.ctypes.data)
            if 2 * len(_entries) > _tables[-1][handlers.MASK]:
                _publish()
            else:
                _put(_tables[-1], key)
    return key


def register() -> None:
    """Make the handler known to XLA."""
    with _lock:
        if not _tables:
            llvmlite.binding.add_symbol(handlers.SYMBOL, _symbol().ctypes.data)
            _publish()
    frames.register(NAME, handlers.execute, "CUDA")


def _publish() -> None:
    """A table of all entries, with room for as many more, in place of the one before."""
    pairs = 64
    while pairs < 4 * len(_entries):
        pairs *= 2
    table = np.zeros(handlers.HEADER + 2 * pairs, np.int64)
    table[handlers.MASK] = pairs - 1
    table[handlers.UNKNOWN], table[handlers.FAILED] = map(ctypes.addressof, _texts())
    for key in _entries:
        _put(table, key)
    _tables.append(table)
    _symbol()[0] = table.ctypes.data


def _put(table: NDArray[np.int64], key: int) -> None:
    """An entry at its key, which another thread may look for meanwhile: its address comes last."""
    mask = int(table[handlers.MASK])
    k = key & mask
    while table[handlers.HEADER + 2 * k + 1]:
        k = k + 1 & mask
    table[handlers.LAUNCH] = _launcher()
    table[handlers.HEADER + 2 * k] = key
    table[handlers.HEADER + 2 * k + 1] = _entries[key]


@functools.cache
def _symbol() -> NDArray[np.int64]:
    """The word that handlers find by a symbol."""
    return np.zeros(1, np.int64)


@functools.cache
def _texts() -> tuple[Any, ...]:
    return tuple(
        ctypes.create_string_buffer(text.encode())
        for text in (
            "a CUDA kernel of jaxff is not in this process: expected a function that was lowered here, received an "
            "executable from elsewhere",
            "a CUDA kernel of jaxff could not be started",
        )
    )


# --- CUDA's driver ---


@functools.cache
def _driver() -> Any:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(f"CUDA's driver was not found: {error}") from None
    _check(library.cuInit(0), "cuInit")
    return library


def most_shared() -> int:
    """Bytes of shared memory that a block may have on every GPU here."""
    count, size, sizes = ctypes.c_int(), ctypes.c_int(), []
    _check(_driver().cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    for device in range(count.value):
        _check(_driver().cuDeviceGetAttribute(ctypes.byref(size), _MOST_SHARED, device), "cuDeviceGetAttribute")
        sizes.append(size.value)
    return min(sizes)


def _launcher() -> int:
    """The address of cuLaunchKernelEx."""
    return ctypes.cast(_driver().cuLaunchKernelEx, ctypes.c_void_p).value or 0


@functools.cache
def _load(name: str, code: bytes, shared: int) -> int:
    """A handle of the kernel that any device takes."""
    library, kernel, devices = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
    nothing = None, None, 0
    _check(_driver().cuLibraryLoadData(ctypes.byref(library), code, *nothing, *nothing), "cuLibraryLoadData")
    _check(_driver().cuLibraryGetKernel(ctypes.byref(kernel), library, name.encode()), "cuLibraryGetKernel")
    _check(_driver().cuDeviceGetCount(ctypes.byref(devices)), "cuDeviceGetCount")
    for device in range(devices.value):
        status = _driver().cuKernelSetAttribute(_MAX_DYNAMIC_SHARED, shared, kernel, device)
        _check(status, f"cuKernelSetAttribute, for {shared} bytes of shared memory,")
    return kernel.value or 0


def _check(status: int, function: str) -> None:
    if status:
        raise RuntimeError(f"{function} of CUDA's driver returned error {status}")
