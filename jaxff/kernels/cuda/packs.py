"""Messages over all pairs of many small molecules, as jaxff.kernels.message has them: packs.cu."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Array, Float

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels.cuda import engine, launch
from jaxff.kernels.cuda.matrices import halves, power_of_two
from jaxff.kernels.cuda.molecules import Launched
from jaxff.kernels.message import Geometry, Sources
from jaxff.models.parameters import Params

WIDTHS = (32, 64, 96, 128)  # of features: two warps or more, of 16 channels
RANKS = (16, 24, 32)  # functions of the distance that make all filters
ATOMS = 64  # of a block, at most
GROUPS = {"pack_message": 2, "pack_transpose": 1}  # of warps, each of which takes
TILE = 16  # atoms at once
BUFFERS = 4  # of shared memory for functions of their pairs


def prepare(tree: Params, config: StudentConfig | PainnConfig) -> list[dict[str, Any]] | None:
    """Each interaction's filters as the kernels take them (NumPy), or None if the model doesn't fit them.

    tree: as jaxff.kernels.chain.prepare makes it.
    """
    tables = [np.asarray(tree[f"interaction_{i}"]["table"], np.float64) for i in range(config.num_interactions)]
    if config.hidden_dim not in WIDTHS:
        return None
    made = [_filters(table) for table in tables]
    return None if None in made else made  # type: ignore[return-value]


def _filters(table: Float[np.ndarray, "T 4 C"]) -> dict[str, Any] | None:
    few = engine.few_functions(table, RANKS)
    if few is None:
        return None
    basis, weights = few
    # of an interval two powers of two functions side by side; after the last one zeros
    pairs = basis.reshape(len(basis), 2, 2, -1, 2).transpose(0, 1, 3, 2, 4).reshape(len(basis), 2, -1, 4)
    matrix, factor = halves(np.pad(weights, ((0, -len(weights) % 16), (0, 0))))
    slope = power_of_two(float(np.max(np.abs(basis[:, 1]))), 64.0)
    return {
        "basis": np.pad(pairs, ((0, 1), (0, 0), (0, 0), (0, 0))).astype(np.float32),
        "matrices": matrix,
        "scales": np.asarray([factor, slope, 1 / slope], np.float32),
    }


def serves(tree: Params, size: int) -> bool:
    """Whether the kernels take molecules of so many atoms here, of a model that they fit."""
    f, functions = tree["embedding"]["table"].shape[1], max(2 * x["basis"].shape[2] for x in tree["packs"])
    return size > 1 and all(_fitting(name, f, size, functions, True, True) for name in GROUPS)


def message(sources: Sources, filters: Any, geometry: Geometry) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message, for pairs e = (receiver e // M, sender e % M) of each molecule of M atoms."""
    n, f = sources.a.shape
    launched = _launched("pack_message", sources, filters, geometry)
    arrays = (geometry.places, *_taken(filters), *engine.with_stand_ins(sources))
    ds, dv = _call(launched, arrays, filters, ((n, f), (n, 3 * f)))
    return ds, dv


def message_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    filters: Any,
    geometry: Geometry,
) -> tuple[Sources, Float[Array, "4 E"]]:
    """As jaxff.kernels.message.message_transpose, likewise; anything for pairs that don't count."""
    n, f = sources.a.shape
    has_b, has_y = sources.b is not None, sources.y is not None
    launched = _launched("pack_transpose", sources, filters, geometry)
    arrays = (geometry.places, *_taken(filters), *cotangents, *engine.with_stand_ins(sources))
    shapes = (n, f), (n * has_b, f), (n * has_y, 3 * f), (4, geometry.places.shape[1])
    a, b, y, bars = _call(launched, arrays, filters, shapes)
    return Sources(a, b if has_b else None, y if has_y else None), bars


def _taken(filters: Any) -> list[Array]:
    return [filters[name] for name in engine.FILTERS]


def _call(launched: Launched, arrays: Sequence[Array], filters: Any, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
    integers = launched.molecules, len(filters["basis"]) - 1
    return launch.call(launched.kernel, arrays, integers, shapes, launched.blocks)


def _launched(name: str, sources: Sources, filters: Any, geometry: Geometry) -> Launched:
    """The kernel with the pack that is done first."""
    n, f = sources.a.shape
    size = geometry.places.shape[1] // n
    fitting = _fitting(name, f, size, 2 * filters["basis"].shape[2], sources.b is not None, sources.y is not None)
    made = [(Launched(kernel, n // size, -(-n // size // pack)), pack) for pack, kernel in fitting.items()]
    return min(made, key=lambda x: -(-x[0].blocks // engine.multiprocessors()) * _turns(name, x[1] * size))[0]


def _fitting(name: str, f: int, size: int, functions: int, has_b: bool, has_y: bool) -> dict[int, launch.Kernel]:
    """Kernels for so many molecules a block that fit into its shared memory."""
    made = {pack: _of_pack(name, pack, f, size, functions, has_b, has_y) for pack in range(1, ATOMS // size + 1)}
    return {pack: kernel for pack, kernel in made.items() if kernel.shared <= launch.most_shared()}


def _turns(name: str, atoms: int) -> int:
    """Tiles that a group of warps takes, one after the other."""
    return -(-atoms // (TILE * GROUPS[name]))


@functools.cache
def _of_pack(name: str, pack: int, f: int, size: int, functions: int, has_b: bool, has_y: bool) -> launch.Kernel:
    back, atoms, groups = name == "pack_transpose", pack * size, GROUPS[name]
    rows, stride = 4 if back else 1 + has_b + 3 * has_y, 20 if functions > 24 else 12
    units = groups * _turns(name, atoms) * (size // 2 * 2)
    shared = 4 * rows * atoms * (f + 16) + units * TILE * (16 + 4) + BUFFERS * groups * 8
    shared += 4 * BUFFERS * (groups * (1 + back) * 2 * TILE * stride + back * TILE * 4 * (f // 16))
    defines = (
        *(("F", f), ("M", size), ("PACK", pack), ("K", functions)),
        *(("HAS_B", int(has_b)), ("HAS_Y", int(has_y)), ("TRANSPOSE", int(back))),
    )
    return launch.Kernel(name, launch.read("device.cu", "packs.cu"), defines, 2 * f * groups, shared)
