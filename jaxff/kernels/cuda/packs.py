"""Messages over all pairs of many small molecules, as jaxff.kernels.message has them: packs.cu."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels.cuda import engine, launch
from jaxff.kernels.cuda.filters import few_functions
from jaxff.kernels.cuda.matrices import halves, power_of_two
from jaxff.kernels.message import Geometry, Sources
from jaxff.models.parameters import Params

WIDTHS = (32, 64, 96, 128)  # of features: two warps or more, of 16 channels
RANKS = (16, 21, 32)  # functions of the distance that make all filters
TILE = 16  # atoms, and functions, of a product
CARRIERS = 4  # warps
BUFFERS = (8, 6, 4)  # units in shared memory, as many as fit; fewer only where nothing else does
SHARES = 6  # of them with pair gradients there, at most
LEAVES_L1 = 195 * 1024  # 60 of an H200's 256 kB; more leaves 28, as shared memory comes in a few sizes
UNITS_OF_BLOCK = 8  # whose functions a block makes: a warp those of 16 pairs and of their reverses
BACK = {"pack_message": False, "pack_transpose": True}


def prepare(tree: Params, config: StudentConfig | PainnConfig) -> list[dict[str, Any]] | None:
    """Each interaction's filters as the kernels take them (NumPy), or None if the model doesn't fit them.

    tree: as jaxff.kernels.chain.prepare makes it.
    """
    tables = [np.asarray(tree[f"interaction_{i}"]["table"], np.float64) for i in range(config.num_interactions)]
    if config.hidden_dim not in WIDTHS:
        return None
    return _filters(tables)


def _filters(tables: Sequence[Float[np.ndarray, "T 4 C"]]) -> list[dict[str, Any]] | None:
    """All with the same functions, which are made once for all messages."""
    each = [few for table in tables if (few := few_functions(table, RANKS)) is not None]
    if len(each) < len(tables):
        return None
    # along directions of equal length, so that what matters little to a table does so to all
    lengths = [np.linalg.norm(weights, axis=1) for _, weights in each]
    heights = [np.max(np.abs(basis[:, 0] * length)) for (basis, _), length in zip(each, lengths, strict=True)]
    scaled = [x[0] * (length / height) for x, length, height in zip(each, lengths, heights, strict=True)]
    few = few_functions(np.concatenate(scaled, axis=2), RANKS)
    if few is None:
        return None
    basis, joint = few
    ends = np.cumsum([len(length) for length in lengths])[:-1]
    weights = [
        of @ (x[1] * (height / np.where(length > 0, length, 1))[:, None])
        for of, x, length, height in zip(np.split(joint, ends, axis=1), each, lengths, heights, strict=True)
    ]
    return [_of_interaction(basis, x) for x in weights]


def _of_interaction(basis: Float[np.ndarray, "T 4 K"], weights: Float[np.ndarray, "K C"]) -> dict[str, Any]:
    if len(weights) % 2:  # they are made two at once
        basis, weights = np.pad(basis, ((0, 0), (0, 0), (0, 1))), np.pad(weights, ((0, 1), (0, 0)))
    # of an interval the powers of two functions side by side; after the last one zeros
    pairs = basis.reshape(len(basis), 4, -1, 2).transpose(0, 2, 1, 3).reshape(len(basis), -1, 2, 4)
    matrix, factor = halves(weights) if len(weights) % TILE == 0 else _with_rest(weights)
    slope = power_of_two(float(np.max(np.abs(basis[:, 1]))), 64.0)
    return {
        "basis": np.pad(pairs, ((0, 1), (0, 0), (0, 0), (0, 0))).astype(np.float32),
        "matrices": matrix,
        "scales": np.asarray([factor, slope, 1 / slope], np.float32),
    }


def _with_rest(weights: Float[np.ndarray, "22 C"]) -> tuple[UInt32[np.ndarray, "C/16 2 2 32 4"], float]:
    """As `halves`, for 21 functions and a zero: those after 16 with all of their three products in one step.

    packs.cu has high, high and low halves there of what is multiplied by high, low and high ones.
    """
    factor = power_of_two(float(np.max(np.abs(weights))), 256.0)
    scaled = np.asarray(weights, np.float64) * factor
    high = scaled[16:].astype(np.float16)
    low = (scaled[16:] - high).astype(np.float16)
    rest = high[:4], low[:4], high[:4], high[4:5], low[4:5], high[4:]
    matrix, more = halves(np.concatenate([scaled[:16], *rest]))  # of halves, whose own halves are they and zeros
    return matrix, more / factor


def serves(tree: Params, size: int) -> bool:
    """Whether the kernels take molecules of so many atoms here, of a model that they fit."""
    f, functions = tree["embedding"]["table"].shape[1], max(2 * x["basis"].shape[1] for x in tree["packs"])
    return size > 1 and None not in [_fitting(name, f, size, functions, True, True) for name in BACK]


class Arranged(NamedTuple):
    """A Geometry, and functions of the distance of all pairs."""

    senders: Any
    places: Float[Array, "6 E"]
    made: Float[Array, "U W"]


def arranged(geometry: Geometry, num_atoms: int, filters: Any) -> Arranged:
    """What messages need of the pairs, with the filters of any interaction as `prepare` makes them."""
    size = geometry.places.shape[1] // num_atoms
    made = _functions(filters, geometry, size, num_atoms // size, _blocks(num_atoms // size))
    return Arranged(*geometry, made)


def message(sources: Sources, filters: Any, geometry: Arranged) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message, for pairs e = (receiver e // M, sender e % M) of each molecule of M atoms."""
    n, f = sources.a.shape
    ds, dv = _call("pack_message", sources, filters, geometry, [], ((n, f), (n, 3 * f)))
    return ds, dv


def message_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    filters: Any,
    geometry: Arranged,
) -> tuple[Sources, Float[Array, "4 E"]]:
    """As jaxff.kernels.message.message_transpose, likewise; anything for pairs that don't count."""
    n, f = sources.a.shape
    has_b, has_y = sources.b is not None, sources.y is not None
    shapes = (n, f), (n * has_b, f), (n * has_y, 3 * f), (4, geometry.places.shape[1])
    a, b, y, bars = _call("pack_transpose", sources, filters, geometry, cotangents, shapes)
    return Sources(a, b if has_b else None, y if has_y else None), bars


def _call(
    name: str,
    sources: Sources,
    filters: Any,
    geometry: Arranged,
    heard: Sequence[Array],
    shapes: Sequence[tuple[int, ...]],
) -> list[Array]:
    n, f = sources.a.shape
    size, functions = geometry.places.shape[1] // n, 2 * filters["basis"].shape[1]
    kernel = _fitting(name, f, size, functions, sources.b is not None, sources.y is not None)
    assert kernel is not None  # `serves` says so
    arrays = (geometry.made, filters["matrices"], filters["scales"], *heard, *engine.with_stand_ins(sources))
    return launch.call(kernel, arrays, (n // size,), shapes, _blocks(n // size))


def _blocks(molecules: int) -> int:
    return min(molecules, engine.multiprocessors())


def _functions(filters: Any, geometry: Geometry, size: int, molecules: int, parts: int) -> Float[Array, "U W"]:
    """Functions of all pairs, for so many blocks of a message. XLA makes equal ones once."""
    functions, half = 2 * filters["basis"].shape[1], size // 2
    units = parts * -(-(-(-molecules // parts) * size) // TILE) * half
    arrays = geometry.places, filters["basis"], filters["scales"]
    integers, shapes = (molecules, len(filters["basis"]) - 1, parts), [(2 * units, _made(functions))]
    return launch.call(_making(size, functions), arrays, integers, shapes, -(-units // UNITS_OF_BLOCK))[0]


def _making(size: int, functions: int) -> launch.Kernel:
    defines, shared = (("M", size), ("K", functions), ("FUNCTIONS", 1)), 4 * UNITS_OF_BLOCK * _made(functions)
    return launch.Kernel("pack_functions", launch.read("device.cu", "packs.cu"), defines, 32 * UNITS_OF_BLOCK, shared)


def _made(functions: int) -> int:
    """Words of as many pairs as a product takes: values, directions, slopes."""
    return 2 * _set(functions) + 4 * TILE


def _set(functions: int) -> int:
    return TILE * 8 * {16: 2, 22: 3, 32: 4}[functions]


@functools.cache
def _fitting(name: str, f: int, size: int, functions: int, has_b: bool, has_y: bool) -> launch.Kernel | None:
    """The kernel with as many molecules and units in shared memory as fit, or None if a tile's molecules don't."""
    together, most = _together(size), launch.most_shared()
    plans = [*itertools.product((together + 1, together), BUFFERS)]
    for shared, plan in [
        *((min(LEAVES_L1, most), plan) for plan in plans),
        *((most, x) for x in (*plans, (together, 2))),
    ]:
        kernel = _of_slots(name, *plan, f, size, functions, has_b, has_y)
        if kernel.shared <= shared:
            return kernel
    return None


def _together(size: int) -> int:
    """Molecules that a tile has atoms of, at most."""
    return (TILE - 2 + size) // size + 1


def _of_slots(
    name: str, slots: int, buffers: int, f: int, size: int, functions: int, has_b: bool, has_y: bool
) -> launch.Kernel:
    back, warps, together = BACK[name], f // TILE, _together(size)
    shares = min(SHARES, buffers)
    rows, unit = 4 if back else 1 + has_b + 3 * has_y, _made(functions) + (not back) * 4 * TILE
    shared = slots * (4 * size * (rows * f + 16) + 8) + buffers * (4 * unit + 2 * 8) + shares * 8
    shared += back * (shares * warps * 64 * 16 + together * size**2 * 16)
    defines = (
        *(("F", f), ("M", size), ("K", functions), ("SLOTS", slots), ("BUFFERS", buffers), ("SHARES", shares)),
        *(("HAS_B", int(has_b)), ("HAS_Y", int(has_y)), ("TRANSPOSE", int(back)), ("FUNCTIONS", 0)),
    )
    source = launch.read("device.cu", "packs.cu")
    return launch.Kernel(name, source, defines, 32 * (warps + CARRIERS), shared, exact=True)
