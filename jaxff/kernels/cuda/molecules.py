"""Messages over all pairs of small molecules, as jaxff.kernels.message has them, with its tables: molecules.cu."""

from __future__ import annotations

import functools
from typing import NamedTuple

from jaxtyping import Array, Float

from jaxff.kernels.cuda import launch
from jaxff.kernels.cuda.engine import with_stand_ins
from jaxff.kernels.message import Geometry, Sources, total


class Plan(NamedTuple):
    """Warps of a block and channels of a lane, at most; for how many threads of a multiprocessor registers must do."""

    warps: int
    lane: int
    threads: int


class Launched(NamedTuple):
    """A kernel, for how many molecules, in how many blocks."""

    kernel: launch.Kernel
    molecules: int
    blocks: int


# the fastest for 4,096 x 21 atoms
PLANS = {"molecule_message": Plan(16, 1, 1152), "molecule_transpose": Plan(24, 2, 768)}
MOST_SHARED = 99 * 1024  # of a block, on every GPU from compute capability 8.0
MOST_BLOCKS = 16  # of a multiprocessor, likewise


def message(
    sources: Sources, table: Float[Array, "T 4 C"], geometry: Geometry
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message, for pairs e = (receiver e // M, sender e % M) of each molecule of M atoms."""
    return run_message(_kernel("molecule_message", sources, geometry), sources, table, geometry)


def run_message(
    launched: Launched, sources: Sources, table: Float[Array, "T 4 C"], geometry: Geometry
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """`message` by a kernel for it."""
    n, f = sources.a.shape
    arrays = (geometry.places, table, *with_stand_ins(sources))
    ds, dv = launch.call(launched.kernel, arrays, (launched.molecules,), ((n, f), (n, 3 * f)), launched.blocks)
    return ds, dv


def message_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Float[Array, "T 4 C"],
    geometry: Geometry,
) -> tuple[Sources, Float[Array, "4 E"]]:
    """As jaxff.kernels.message.message_transpose, likewise; anything for pairs that don't count."""
    n, f = sources.a.shape
    has_b, has_y = sources.b is not None, sources.y is not None
    kernel, molecules, blocks = _kernel("molecule_transpose", sources, geometry)
    arrays = (geometry.places, table, *cotangents, *with_stand_ins(sources))
    groups = blocks // molecules
    shapes = (n, f), (n * has_b, f), (n * has_y, 3 * f), (groups, 4, geometry.places.shape[1])
    a, b, y, bars = launch.call(kernel, arrays, (molecules,), shapes, blocks)
    return Sources(a, b if has_b else None, y if has_y else None), total(list(bars))


def _kernel(name: str, sources: Sources, geometry: Geometry) -> Launched:
    n, f = sources.a.shape
    slots = geometry.places.shape[1] // n
    kernel = _of_size(name, f, slots, PLANS[name], sources.b is not None, sources.y is not None)
    return Launched(kernel, n // slots, n // slots * -(-f // (32 * dict(kernel.defines)["LANE"])))


@functools.cache
def _of_size(name: str, f: int, slots: int, plan: Plan, has_b: bool, has_y: bool) -> launch.Kernel:
    own, sent, back = -(-slots // plan.warps), 1 + has_b + 3 * has_y, name == "molecule_transpose"
    threads = 32 * -(-slots // own)
    resident = max(1, min(MOST_BLOCKS, plan.threads // threads))
    rows = 2 * sent + 4 if back else sent + 4
    lane, shared = next(
        (lane, size)
        for lane in range(plan.lane, 0, -1)
        if (size := 4 * slots * (5 * slots + rows * 32 * lane)) <= MOST_SHARED or lane == 1
    )
    defines = (
        *(("F", f), ("M", slots), ("OWN", own), ("LANE", lane), ("RESIDENT", resident)),
        *(("HAS_B", int(has_b)), ("HAS_Y", int(has_y)), ("TRANSPOSE", int(back))),
    )
    return launch.Kernel(name, launch.read("device.cu", "molecules.cu"), defines, threads, shared)
