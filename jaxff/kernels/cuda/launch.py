"""CUDA kernels in JAX: compiled by NVRTC, which comes with JAX's CUDA packages, launched by jaxlib's custom call.

Kernels that may start before those before them have ended, which jaxlib can't ask for, are launched by our own
(jaxff.kernels.cuda.handlers).
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.resources import files
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array

from jaxff.kernels.cuda.kept import kept

HOPPER = 90  # the compute capability from which a kernel may start before those before it have ended

Form = Literal["PTX", "CUBIN"]


class Kernel(NamedTuple):
    """A kernel: its name in the source, what is defined for the source, threads a block, bytes of shared memory.

    early: whether it may start before those before it have ended, as it waits for them itself (`ready` in device.cu).
    together: whether all its blocks run at once, as they wait for each other.
    exact: whether it takes what GPUs of later compute capabilities may not have (`registers` in device.cu).
    """

    name: str
    source: str
    defines: tuple[tuple[str, int], ...]
    threads: int
    shared: int
    early: bool = False
    together: bool = False
    exact: bool = False


Emulator = Callable[..., Sequence[Any]]
emulator: Emulator | None = None  # runs kernels where no GPU is: emulator(kernel, arrays, integers, results, blocks)


def read(*names: str) -> str:
    """Sources of this package, joined."""
    return "\n".join((files(__package__) / name).read_text() for name in names)


def call(
    kernel: Kernel,
    arrays: Sequence[Array],
    integers: Sequence[int],
    results: Sequence[tuple[int, ...]],
    blocks: int,
    in_place: Sequence[int] = (),
) -> list[Array]:
    """The results (float32, of these shapes) of kernel(*arrays, *integers, *results), in `blocks` blocks.

    in_place: the arrays whose memory the results have, in their order, if not memory of their own.
    """
    shapes = [jax.ShapeDtypeStruct(shape, "float32") for shape in results]
    if emulator is not None:
        options = {"integers": tuple(integers), "results": shapes, "blocks": blocks, "in_place": tuple(in_place)}
        run = functools.partial(emulator, kernel, **options)
        return list(jax.pure_callback(lambda *arrays: run(arrays=arrays), shapes, *arrays))
    if jax.default_backend() == "gpu":
        _compiling(kernel)  # while others are traced
    return _call.bind(
        *arrays,
        kernel=kernel,
        integers=tuple(integers),
        results=tuple(map(tuple, results)),
        blocks=blocks,
        in_place=tuple(in_place),
    )


_call = Primitive("jaxff_cuda")
_call.multiple_results = True
_call.def_impl(lambda *arrays, **params: jax.jit(functools.partial(_call.bind, **params))(*arrays))


@_call.def_abstract_eval
def _(*arrays: Any, results: tuple[tuple[int, ...], ...], **params: Any) -> list[ShapedArray]:
    return [ShapedArray(shape, "float32") for shape in results]


def why_not() -> str | None:
    """Why CUDA kernels can't be compiled or launched here, or None."""
    try:
        nvrtc()
        capability = _capability()
    except (ImportError, AttributeError) as error:
        return str(error)
    return None if capability >= 80 else f"they need compute capability 8.0, and this GPU has {capability / 10}"


def _lower(
    ctx: Any, *arrays: Any, kernel: Kernel, integers: Any, results: Any, blocks: int, in_place: tuple[int, ...]
) -> Any:
    code, aliases = _compiling(kernel).result(), {array: k for k, array in enumerate(in_place)}
    if _is_launched_here(kernel):
        from jaxff.kernels.cuda import registry

        launched = blocks, kernel.threads, kernel.shared, kernel.together
        key = registry.add(kernel.name, code, *launched, integers, len(arrays), len(results))
        rule = jax.ffi.ffi_lowering(registry.NAME, operand_output_aliases=aliases)
        return rule(ctx, *arrays, key=np.int64(key))
    from jaxlib import gpu_triton

    sizes = kernel.threads // 32, 1, kernel.shared
    image = gpu_triton.TritonKernel(kernel.name, *sizes, code.decode(), "", _capability())
    array = gpu_triton.create_array_parameter(0, 16)
    parameters = [
        *[array] * len(arrays),
        *(gpu_triton.create_scalar_parameter(x, "i32") for x in integers),
        *[array] * len(results),
    ]
    launched = gpu_triton.TritonKernelCall(image, blocks, 1, 1, parameters)
    config: Any = zlib.compress(launched.to_proto(kernel.name, b""))
    rule = jax.ffi.ffi_lowering("triton_kernel_call_ffi", operand_output_aliases=aliases)
    return rule(ctx, *arrays, opaque=config)


def _is_launched_here(kernel: Kernel) -> bool:
    """Whether a kernel is launched by jaxff.kernels.cuda.handlers, which Numba compiles."""
    return kernel.together or (kernel.early and can_run_together())


def can_run_together() -> bool:
    """Whether kernels can be launched so that all blocks run at once, and copies come without threads."""
    if emulator is not None:
        return True
    return jax.default_backend() == "gpu" and _capability() >= HOPPER and importlib.util.find_spec("numba") is not None


@functools.cache
def most_shared() -> int:
    """Bytes of shared memory that a block may have; without a GPU or Numba, those of all from capability 8.0 on."""
    if jax.default_backend() != "gpu" or importlib.util.find_spec("numba") is None:
        return 99 * 1024
    from jaxff.kernels.cuda import registry

    return registry.most_shared()


def _capability() -> int:
    """This GPU's compute capability, 90 for 9.0."""
    from jaxlib import gpu_triton

    return int(gpu_triton.get_compute_capability(0))


mlir.register_lowering(_call, _lower, platform="cuda")


# --- NVRTC ---


@functools.cache
def nvrtc() -> Any:
    """The library. ImportError where it is missing."""
    found = [path for pattern in _places() for path in sorted(glob.glob(pattern), reverse=True)]
    for path in [*found, "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"]:
        try:
            return ctypes.CDLL(path)
        except OSError:
            continue
    raise ImportError("NVRTC, CUDA's compiler as a library, was not found; pip install 'jax[cuda13]' brings it")


def _places() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    packages = list(spec.submodule_search_locations or []) if spec else []
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    return [f"{p}/*/lib/libnvrtc.so.*[0-9]" for p in packages] + [f"{h}/lib64/libnvrtc.so" for h in homes]


def _compiling(kernel: Kernel) -> Future[bytes]:
    """What it becomes for this GPU: a CUBIN if it is launched here, or PTX. It is compiled once, in the background."""
    with _lock:
        if kernel not in _asked:
            form: Form = "CUBIN" if _is_launched_here(kernel) else "PTX"
            _asked[kernel] = _workers().submit(compiled, kernel, _capability(), form)
        return _asked[kernel]


_asked: dict[Kernel, Future[bytes]] = {}
_lock = threading.Lock()


@functools.cache
def _workers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "jaxff-nvrtc")


def compiled(kernel: Kernel, capability: int, form: Form) -> bytes:
    """For GPUs of this compute capability (90: 9.0), or kept. RuntimeError with the compiler's words if it fails."""
    target = "sm" if form == "CUBIN" else "compute"
    exactly = "a" if kernel.exact and capability == HOPPER else ""
    architecture = f"-arch={target}_{capability}{exactly}"
    options = [architecture, "-std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines)]
    key = _version(), form, kernel.source, *options
    return kept(key, lambda: _compile(kernel, options, form))


def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _compile(kernel: Kernel, options: Sequence[str], form: Form) -> bytes:
    library, program = nvrtc(), ctypes.c_void_p()
    encoded = (ctypes.c_char_p * len(options))(*(x.encode() for x in options))
    _check(library.nvrtcCreateProgram(ctypes.byref(program), kernel.source.encode(), b"jaxff.cu", 0, None, None))
    try:
        failed = library.nvrtcCompileProgram(program, len(options), encoded)
        if failed:
            words = _text(library, program, "ProgramLog").decode()
            raise RuntimeError(f"NVRTC could not compile {kernel.name}: {words}")
        return _text(library, program, form)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: Any, program: Any, what: str) -> bytes:
    """A result, without the zero that ends a text."""
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw if what == "CUBIN" else buffer.value


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC returned error {status}")
