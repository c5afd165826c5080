"""Foreign functions that Numba compiles, as XLA calls them: what it hands over is read in words of 8 bytes.

The structures are those of xla/ffi/api/c_api.h. What is compiled here calls no Python.
"""

from __future__ import annotations

import threading

import jax
from numba import cfunc, njit, types
from numba.extending import intrinsic

ARGS, RETS = 9, 14  # of XLA_FFI_CallFrame
API, CONTEXT = 2, 3  # likewise
DATA, DIMS = 3, 5  # of XLA_FFI_Buffer
_EXTENSION = 1  # of XLA_FFI_CallFrame
_METADATA, _METADATA_EXTENSION = 3, 1  # of XLA_FFI_Metadata_Extension: a place, and its type
_VERSION_OF_API, _VERSION_OF_METADATA, _TRAITS = 4, 3, 8  # major and minor version in one word; half a word


def _can_cache():
    """Whether Numba finds a folder for what it compiles; without one (a home that can't be written to) it refuses."""
    try:
        njit(cache=True)(_can_cache)
    except RuntimeError:
        return False
    return True


CACHE = _can_cache()
registered: dict = {}  # by name; what XLA calls must not be collected
_lock = threading.Lock()


def register(name, handler, platform):
    """Compile a handler (or read Numba's cache) and make it known to XLA by name, once, whichever thread asks."""
    with _lock:
        if name not in registered:
            made = cfunc(types.int64(types.int64), cache=CACHE)(handler)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(made.ctypes), platform=platform)
            registered[name] = made


def _pointer_to(element):
    """An intrinsic that takes an address as a pointer to elements of this type."""

    @intrinsic
    def pointer(typing, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


words, integers, floats = _pointer_to(types.int64), _pointer_to(types.int32), _pointer_to(types.float32)


@njit(cache=CACHE)
def is_inquiry(frame, traits):
    """Whether XLA asks only which version of the interface this is, and for traits: it is told its own, and these."""
    extension = words(frame)[_EXTENSION]
    if extension == 0 or integers(extension)[2] != _METADATA_EXTENSION:
        return False
    metadata = words(extension)[_METADATA]
    words(metadata)[_VERSION_OF_METADATA] = words(words(frame)[API])[_VERSION_OF_API]
    integers(metadata)[_TRAITS] = traits
    return True


@njit(cache=CACHE)
def buffer(frame, group, k):
    """The k-th argument or result: the address of its data, and its dimensions."""
    found = words(words(words(frame)[group])[k])
    return found[DATA], words(found[DIMS])
