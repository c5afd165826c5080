"""CUDA kernels in JAX: compiled by NVRTC, which comes with JAX's CUDA packages, launched by jaxlib's custom call."""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import zlib
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array


class Kernel(NamedTuple):
    """A kernel: its name in the source, what is defined for the source, threads a block, bytes of shared memory."""

    name: str
    source: str
    defines: tuple[tuple[str, int], ...]
    threads: int
    shared: int


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
        from jaxlib import gpu_triton

        nvrtc()
        capability = gpu_triton.get_compute_capability(0)
    except (ImportError, AttributeError) as error:
        return str(error)
    return None if capability >= 80 else f"they need compute capability 8.0, and this GPU has {capability / 10}"


def _lower(
    ctx: Any, *arrays: Any, kernel: Kernel, integers: Any, results: Any, blocks: int, in_place: tuple[int, ...]
) -> Any:
    from jaxlib import gpu_triton

    capability = gpu_triton.get_compute_capability(0)
    compiled = gpu_triton.TritonKernel(
        kernel.name, kernel.threads // 32, 1, kernel.shared, compile_ptx(kernel, capability), "", capability
    )
    array = gpu_triton.create_array_parameter(0, 16)
    parameters = [
        *[array] * len(arrays),
        *(gpu_triton.create_scalar_parameter(x, "i32") for x in integers),
        *[array] * len(results),
    ]
    launched = gpu_triton.TritonKernelCall(compiled, blocks, 1, 1, parameters)
    config: Any = zlib.compress(launched.to_proto(kernel.name, b""))
    rule = jax.ffi.ffi_lowering(
        "triton_kernel_call_ffi", operand_output_aliases={array: k for k, array in enumerate(in_place)}
    )
    return rule(ctx, *arrays, opaque=config)


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


@functools.cache
def compile_ptx(kernel: Kernel, capability: int) -> str:
    """PTX for GPUs of this compute capability (90: 9.0). RuntimeError with the compiler's words if it fails."""
    library, program = nvrtc(), ctypes.c_void_p()
    options = [f"-arch=compute_{capability}", "-std=c++17", *(f"-D{name}={value}" for name, value in kernel.defines)]
    encoded = (ctypes.c_char_p * len(options))(*(x.encode() for x in options))
    _check(library.nvrtcCreateProgram(ctypes.byref(program), kernel.source.encode(), b"jaxff.cu", 0, None, None))
    try:
        failed = library.nvrtcCompileProgram(program, len(options), encoded)
        if failed:
            raise RuntimeError(f"NVRTC could not compile {kernel.name}: {_text(library, program, 'ProgramLog')}")
        return _text(library, program, "PTX")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: Any, program: Any, what: str) -> str:
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.value.decode()


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC returned error {status}")
