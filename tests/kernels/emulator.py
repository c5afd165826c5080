"""CUDA kernels on a CPU: the host's C++ compiler, and tests/kernels/host.h for what a GPU has."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxff.kernels.cuda.launch import Kernel

COMPILER = shutil.which("g++")


FLAGS = ("-O0", "-std=c++17", "-fPIC", "-w")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where libraries are made, with the header compiled: it is half of what most kernels take."""
    assert COMPILER is not None
    folder = tempfile.TemporaryDirectory(prefix="jaxff-cuda-")
    header = shutil.copy(Path(__file__).with_name("host.h"), folder.name)
    subprocess.run([COMPILER, *FLAGS, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return folder


@functools.cache
def _compiled(kernel: Kernel) -> Any:
    assert COMPILER is not None
    folder = Path(_folder().name)
    source, library = folder / f"{abs(hash(kernel))}.cpp", folder / f"{abs(hash(kernel))}.so"
    call = f"run_kernel({kernel.name}, args, blocks, threads, shared, {int(kernel.together)});"
    run = f'extern "C" void run(void** args, int blocks, int threads, int shared) {{ {call} }}'
    defines = [f"#define {name} {value}" for name, value in kernel.defines]  # as options they would spoil the header
    source.write_text("\n".join(['#include "host.h"', *defines, kernel.source, run]))
    command = [COMPILER, *FLAGS, "-shared", str(source), "-o", str(library)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library)).run


def run(
    kernel: Kernel,
    arrays: Sequence[Any],
    integers: Sequence[int],
    results: Sequence[Any],
    blocks: int,
    in_place: Sequence[int] = (),
) -> Any:
    """What the kernel writes; results are NaN before, or what the arrays `in_place` hold."""
    inputs = [np.ascontiguousarray(x) for x in arrays]
    outputs = [np.full(x.shape, np.nan, x.dtype) for x in results]
    for output, k in zip(outputs, in_place, strict=False):
        output[...] = inputs[k]
    values = [
        *(ctypes.c_void_p(x.ctypes.data) for x in inputs),
        *(ctypes.c_int(x) for x in integers),
        *(ctypes.c_void_p(x.ctypes.data) for x in outputs),
    ]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(x) for x in values))
    _compiled(kernel)(pointers, blocks, kernel.threads, kernel.shared)
    return outputs
