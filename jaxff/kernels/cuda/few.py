"""Messages over all pairs of few small molecules, as jaxff.kernels.message has them, with its tables: few.cu."""

from __future__ import annotations

import functools
from typing import Any

from jaxtyping import Array, Float

from jaxff.kernels.cuda import launch
from jaxff.kernels.cuda.engine import multiprocessors, with_stand_ins
from jaxff.kernels.cuda.molecules import MOST_SHARED
from jaxff.kernels.message import Geometry, Sources

THREADS = {"few_message": 1024, "few_transpose": 896}  # as many as have registers enough
WIDTHS = 16, 8  # channels of a block
PARTS = 4  # threads that share an atom's channel, at most


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
    before: Float[Array, "G 4 E"] | None,
) -> tuple[Sources, Float[Array, "G 4 E"]]:
    """As jaxff.kernels.message.message_transpose, likewise; pair gradients by groups of channels, added to `before`."""
    a, b, y, bars = _transpose(sources, cotangents, table, geometry, before, True)
    return Sources(a, b if b.size else None, y if y.size else None), bars


def first_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Float[Array, "T 4 C"],
    geometry: Geometry,
    before: Float[Array, "G 4 E"] | None,
) -> Float[Array, "G 4 E"]:
    """The pair gradients of `message_transpose` alone."""
    return _transpose(sources, cotangents, table, geometry, before, False)[3]


def _transpose(
    sources: Sources, cotangents: tuple[Array, Array], table: Array, geometry: Geometry, before: Any, sums: bool
) -> list[Array]:
    """ā, b̄ and ȳ, without rows where there are none, and the pair gradients; zeros of pairs that don't count."""
    n, f = sources.a.shape
    kernel, molecules, groups = _kernel("few_transpose", sources, geometry, sums, before is not None)
    arrays = (geometry.places, table, *cotangents, *with_stand_ins(sources), sources.a if before is None else before)
    rows = [n * (sums and x is not None) for x in sources]
    shapes = (rows[0], f), (rows[1], f), (rows[2], 3 * f), (groups, 4, geometry.places.shape[1])
    return launch.call(kernel, arrays, (molecules,), shapes, molecules * groups)


def _kernel(
    name: str, sources: Sources, geometry: Geometry, sums: bool = True, adds: bool = False
) -> tuple[launch.Kernel, int, int]:
    """The kernel, how many molecules, how many groups of channels."""
    n, f = sources.a.shape
    slots = geometry.places.shape[1] // n
    has_b, has_y = sources.b is not None, sources.y is not None
    made = [_of_size(name, f, slots, width, has_b, has_y, sums, adds) for width in WIDTHS]
    busy = [2 * (n // slots) * (f // width) > multiprocessors() for width in WIDTHS]
    first = busy[0] and made[0].shared <= MOST_SHARED
    return made[0 if first else 1], n // slots, f // WIDTHS[0 if first else 1]


@functools.cache
def _of_size(
    name: str, f: int, slots: int, width: int, has_b: bool, has_y: bool, sums: bool, adds: bool
) -> launch.Kernel:
    transposed, sent, filters = name == "few_transpose", 1 + has_b + 3 * has_y, 2 + has_y
    rows, pairs, threads = (sent + 4 * transposed) | 1, slots * (slots - 1) // 2, THREADS[name]
    parts = min(PARTS, threads // width // slots)
    shares = (parts - 1) * slots * (4 + transposed)
    shared = 4 * ((slots * rows + pairs * (filters | 1) + shares) * width + 4 * pairs)
    defines = (
        *(("THREADS", threads), ("F", f), ("M", slots), ("WIDTH", width), ("HAS_B", int(has_b)), ("HAS_Y", int(has_y))),
        *(("PARTS", parts), ("TRANSPOSE", int(transposed)), ("SUMS", int(sums)), ("ADDS", int(adds))),
    )
    return launch.Kernel(name, launch.read("device.cu", "few.cu"), defines, threads, shared)
