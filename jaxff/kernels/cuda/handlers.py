"""How XLA launches CUDA kernels that may start before those before them have ended: a foreign function for Numba.

It asks CUDA's driver for what jaxlib's launcher can't ask (programmatic dependent launch). Structures are in words, as
in jaxff.kernels.frames. A call carries a key of 8 bytes. What belongs to it, an entry, is found by a table of this
process: HEADER words, then as many pairs of a key and the entry's address as a power of 2, places by the key. The
symbol `SYMBOL` is a word with the table's address.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from jaxff.kernels.frames import API, ARGS, CACHE, CONTEXT, RETS, buffer, integers, is_inquiry, words

SYMBOL = "jaxff_cuda_table"
MASK, LAUNCH, UNKNOWN, FAILED, HEADER = range(5)  # pairs minus 1, cuLaunchKernelEx, texts of errors
HANDLE, BLOCKS, THREADS, SHARED, ARRAYS, COUNT, INTEGERS, RESULTS, ATTRIBUTE, ENTRY = range(10)

_ATTRIBUTES = 20  # of XLA_FFI_CallFrame
_ERROR_CREATE, _STREAM_GET = 6, 10  # of XLA_FFI_Api
_INTERNAL = 13  # XLA_FFI_Error_Code
_COMPATIBLE = 1  # XLA_FFI_HANDLER_TRAITS_COMMAND_BUFFER_COMPATIBLE
COOPERATIVE, PROGRAMMATIC_SERIALIZATION = 2, 6  # CUlaunchAttributeID


@intrinsic
def _table(typing):
    """Its address."""

    def generate(context, builder, signature, args):
        module, word = builder.module, ir.IntType(64)
        place = module.globals[SYMBOL] if SYMBOL in module.globals else ir.GlobalVariable(module, word, SYMBOL)
        return builder.load(place)

    return types.int64(), generate


@intrinsic
def _stack(typing, count):
    """The address of so many words that last as long as the function that asks for them."""

    def generate(context, builder, signature, args):
        return builder.ptrtoint(builder.alloca(ir.IntType(64), size=args[0]), ir.IntType(64))

    return types.int64(types.int64), generate


@intrinsic
def _call(typing, address, args):
    """A C function of words at an address."""

    def generate(context, builder, signature, values):
        word = ir.IntType(64)
        words = [builder.extract_value(values[1], k) for k in range(len(args))]
        function = ir.FunctionType(word, [word] * len(words)).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), words)

    return types.int64(types.int64, args), generate


@njit(cache=CACHE)
def _entry(frame):
    """Of this call's key, or 0."""
    key = words(words(words(words(frame)[_ATTRIBUTES])[0])[1])[0]
    table = _table()
    mask = words(table)[MASK]
    k = key & mask
    while True:
        pair = table + 8 * (HEADER + 2 * k)
        if words(pair)[1] == 0 or words(pair)[0] == key:
            return words(pair)[1]
        k = (k + 1) & mask


@njit(cache=CACHE)
def _error(frame, text):
    """An XLA_FFI_Error."""
    asked = _stack(4)
    a = words(asked)
    a[0], a[1], a[2], a[3] = 32, 0, words(_table())[text], _INTERNAL
    return _call(words(words(frame)[API])[_ERROR_CREATE], (asked,))


def execute(frame):
    """Start the kernel: its arguments are arrays, integers and results, in this order."""
    if is_inquiry(frame, _COMPATIBLE):
        return 0
    entry = _entry(frame)
    if entry == 0:
        return _error(frame, UNKNOWN)
    e = words(entry)
    arrays, count, results = e[ARRAYS], e[COUNT], e[RESULTS]
    values, places = _stack(arrays + count + results), _stack(arrays + count + results)
    for k in range(arrays + count + results):
        if k < arrays:
            value = buffer(frame, ARGS, k)[0]
        elif k < arrays + count:
            value = integers(e[INTEGERS])[k - arrays]
        else:
            value = buffer(frame, RETS, k - arrays - count)[0]
        words(values)[k], words(places)[k] = value, values + 8 * k
    asked, attribute, config = _stack(4), _stack(9), _stack(7)
    a = words(asked)
    a[0], a[1], a[2], a[3] = 32, 0, words(frame)[CONTEXT], 0
    failed = _call(words(words(frame)[API])[_STREAM_GET], (asked,))
    if failed != 0:
        return failed
    for k in range(9):
        words(attribute)[k] = 0
    words(attribute)[0], words(attribute)[1] = e[ATTRIBUTE], 1  # a CUlaunchAttribute
    c = words(config)  # a CUlaunchConfig
    c[0], c[1], c[2] = e[BLOCKS] | 1 << 32, 1 | e[THREADS] << 32, 1 | 1 << 32
    c[3], c[4], c[5], c[6] = e[SHARED], a[3], attribute, 1
    status = _call(words(_table())[LAUNCH], (config, e[HANDLE], places, 0)) & 0xFFFFFFFF
    return _error(frame, FAILED) if status != 0 else 0
