"""Messages over all pairs of few small molecules, as jaxff.kernels.message has them, with its tables: few.cu."""

from __future__ import annotations

import functools

from jaxtyping import Array, Float

from jaxff.kernels.cuda import engine, launch
from jaxff.kernels.cuda.molecules import MOST_SHARED, Launched, run_message
from jaxff.kernels.message import Geometry, Sources

THREADS = {"few_message": 1024, "few_transpose": 896}  # as many as have registers enough
WIDTHS = 16, 8  # channels of a block
PARTS = 4  # threads that share an atom's channel, at most


def message(
    sources: Sources, table: Float[Array, "T 4 C"], geometry: Geometry
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message, for pairs e = (receiver e // M, sender e % M) of each molecule of M atoms."""
    return run_message(_kernel("few_message", sources, geometry), sources, table, geometry)


def message_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Float[Array, "T 4 C"],
    geometry: Geometry,
    before: Float[Array, "G 4 E"] | None,
    sums: bool = True,
) -> tuple[Sources, Float[Array, "G 4 E"]]:
    """As jaxff.kernels.message.message_transpose, likewise; pair gradients by groups of channels, added to `before`.

    They are zeros for pairs that don't count. sums: whether cotangents of the sources are wanted, or have no rows.
    """
    n, f = sources.a.shape
    kernel, molecules, blocks = _kernel("few_transpose", sources, geometry, sums, before)
    added_to = sources.a if before is None else before  # or another array, which the kernel doesn't read
    arrays = (geometry.places, table, *cotangents, *engine.with_stand_ins(sources), added_to)
    rows = [n * (sums and x is not None) for x in sources]
    shapes = (rows[0], f), (rows[1], f), (rows[2], 3 * f), (blocks // molecules, 4, geometry.places.shape[1])
    a, b, y, bars = launch.call(kernel, arrays, (molecules,), shapes, blocks)
    return Sources(a, b if b.size else None, y if y.size else None), bars


def _kernel(
    name: str, sources: Sources, geometry: Geometry, sums: bool = True, before: Array | None = None
) -> Launched:
    """With as many channels a block as `before`, or as fit, if those blocks keep half of the multiprocessors busy."""
    n, f = sources.a.shape
    slots = geometry.places.shape[1] // n
    molecules, of = n // slots, (sources.b is not None, sources.y is not None, sums, before is not None)
    wide, narrow = (
        Launched(_of_size(name, f, slots, width, *of), molecules, molecules * f // width) for width in WIDTHS
    )
    fit = 2 * wide.blocks > engine.multiprocessors() and wide.kernel.shared <= MOST_SHARED
    if before is not None:
        fit = len(before) == f // WIDTHS[0]
    return wide if fit else narrow


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
    return launch.Kernel(name, launch.read("device.cu", "few.cu"), defines, threads, shared, early=True)
