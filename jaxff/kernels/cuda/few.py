"""Messages over all pairs of few small molecules, as jaxff.kernels.message has them, with its tables: few.cu."""

from __future__ import annotations

import functools

from jaxtyping import Array, Float

from jaxff.kernels.cuda import launch
from jaxff.kernels.cuda.engine import multiprocessors, with_stand_ins
from jaxff.kernels.cuda.molecules import MOST_SHARED
from jaxff.kernels.message import Geometry, Sources, total

THREADS = 512  # of few.cu
WIDTHS = 16, 8  # channels of a block


def message(
    sources: Sources, table: Float[Array, "T 4 C"], geometry: Geometry
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message, for pairs e = (receiver e // M, sender e % M) of each molecule of M atoms."""
    n, f = sources.a.shape
    kernel, molecules, groups = _kernel("few_message", sources, geometry)
    arrays = (geometry.places, table, *with_stand_ins(sources))
    ds, dv = launch.call(kernel, arrays, (molecules,), ((n, f), (n, 3 * f)), molecules * groups)
    return ds, dv


def message_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Float[Array, "T 4 C"],
    geometry: Geometry,
) -> tuple[Sources, Float[Array, "4 E"]]:
    """As jaxff.kernels.message.message_transpose, likewise; zeros for pairs that don't count."""
    a, b, y, bars = _transpose(sources, cotangents, table, geometry, True)
    return Sources(a, b if b.size else None, y if y.size else None), bars


def first_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Float[Array, "T 4 C"],
    geometry: Geometry,
) -> Float[Array, "4 E"]:
    """The pair gradients of `message_transpose` alone."""
    return _transpose(sources, cotangents, table, geometry, False)[3]


def _transpose(
    sources: Sources, cotangents: tuple[Array, Array], table: Array, geometry: Geometry, sums: bool
) -> tuple[Array, Array, Array, Array]:
    """ā, b̄ and ȳ, without rows where there are none, and the pair gradients."""
    n, f = sources.a.shape
    kernel, molecules, groups = _kernel("few_transpose", sources, geometry, sums)
    arrays = (geometry.places, table, *cotangents, *with_stand_ins(sources))
    rows = [n * (sums and x is not None) for x in sources]
    shapes = (rows[0], f), (rows[1], f), (rows[2], 3 * f), (groups, 4, geometry.places.shape[1])
    a, b, y, bars = launch.call(kernel, arrays, (molecules,), shapes, molecules * groups)
    return a, b, y, total(list(bars))


def _kernel(name: str, sources: Sources, geometry: Geometry, sums: bool = True) -> tuple[launch.Kernel, int, int]:
    """The kernel, how many molecules, how many groups of channels."""
    n, f = sources.a.shape
    slots = geometry.places.shape[1] // n
    has_b, has_y = sources.b is not None, sources.y is not None
    made = [_of_size(name, f, slots, width, has_b, has_y, sums) for width in WIDTHS]
    busy = [2 * (n // slots) * (f // width) > multiprocessors() for width in WIDTHS]
    first = busy[0] and made[0].shared <= MOST_SHARED
    return made[0 if first else 1], n // slots, f // WIDTHS[0 if first else 1]


@functools.cache
def _of_size(name: str, f: int, slots: int, width: int, has_b: bool, has_y: bool, sums: bool) -> launch.Kernel:
    transposed, sent, filters = name == "few_transpose", 1 + has_b + 3 * has_y, 2 + has_y
    rows, pairs = (sent + 4 * transposed) | 1, slots * (slots - 1) // 2
    shared = 4 * (slots * rows * width + pairs * ((filters | 1) * width + 4))
    defines = (
        *(("F", f), ("M", slots), ("WIDTH", width), ("HAS_B", int(has_b)), ("HAS_Y", int(has_y))),
        *(("TRANSPOSE", int(transposed)), ("SUMS", int(sums))),
    )
    return launch.Kernel(name, launch.read("device.cu", "few.cu"), defines, THREADS, shared)
