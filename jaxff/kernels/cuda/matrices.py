"""Matrices as the tensor cores take them: sums of two halves (22 bits), in the order in which a warp reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt32


def power_of_two(largest: float, wanted: float) -> float:
    """The power of 2 that brings `largest` to between half of `wanted` and `wanted`; 1 for 0."""
    return 2.0 ** np.floor(np.log2(wanted / largest)) if largest > 0 else 1.0


def apart(matrix: np.ndarray, largest: float) -> tuple[np.ndarray, np.ndarray, float]:
    """A matrix times the power of 2 that suits a number `largest`, as halves and what those leave; that power."""
    factor = power_of_two(largest, 256.0)
    scaled = np.asarray(matrix, np.float64) * factor
    high = scaled.astype(np.float16)
    return high, (scaled - high).astype(np.float16), factor


def halves(
    matrix: Float[np.ndarray, "K C"], largest: float | None = None
) -> tuple[UInt32[np.ndarray, "C/16 K/16 2 32 4"], float]:
    """The matrix times a power of 2 as halves, and the inverse of that power; it suits the largest number or another.

    For 16 columns, 16 rows and each of two tiles of 8 columns a lane reads four words: two of the numbers, two of what
    they leave. Lane 4 g + t has rows 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of column g of a tile (mma.m16n8k16); column g of
    tile j is column 4 (g // 2) + 2 j + g % 2 of the 16, so that a lane's four products lie side by side.
    """
    high, low, factor = apart(matrix, float(np.max(np.abs(matrix), initial=0)) if largest is None else largest)
    return of_lanes(high, low), 1 / factor


def of_lanes(high: np.ndarray, low: np.ndarray) -> UInt32[np.ndarray, "C/16 K/16 2 32 4"]:
    """Two matrices of halves [K, C] in that order, the second where what numbers leave is."""
    rows, columns = high.shape
    lane, tile = np.arange(32), np.arange(2)[:, None]
    g, t = lane // 4, lane % 4
    column = 4 * (g // 2) + 2 * tile + g % 2  # [2, 32]
    row = np.stack([2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9], axis=-1)  # [32, 4]
    blocks = [
        x.reshape(rows // 16, 16, columns // 16, 16)[:, row[None], :, column[..., None]].transpose(4, 3, 0, 1, 2)
        for x in (high, low)
    ]
    joined = np.concatenate(blocks, axis=-1)
    return np.ascontiguousarray(joined).view(np.uint32)


def by_columns(matrix: Float[np.ndarray, "K C"], largest: float) -> tuple[UInt32[np.ndarray, "C/8 K/16 32 4"], float]:
    """As `halves`, for 8 columns and 16 rows at once, with the power of 2 that suits a number `largest`.

    Lane 4 g + t has its rows of column g.
    """
    rows, columns = matrix.shape
    high, low, factor = apart(matrix, largest)
    parts = [x.reshape(rows // 16, 2, 4, 2, columns // 8, 8).transpose(4, 0, 5, 2, 1, 3) for x in (high, low)]
    joined = np.stack(parts, axis=-3)  # [C/8, K/16, g, t, number or left, rows up to 7 or from 8 on, 2]
    return np.ascontiguousarray(joined).view(np.uint32).reshape(columns // 8, rows // 16, 32, 4), 1 / factor


def as_first(words: UInt32[np.ndarray, "... 2 32 4"]) -> UInt32[np.ndarray, "... 2 2 16 4"]:
    """Of `halves` of 16 rows, what mma takes as its first operand, for each tile the numbers and what they leave.

    Lane 4 g + t of each half warp has columns 4 g + 2 tile and the one after it as rows g and g + 8.
    """
    lead = words.shape[:-3]
    parts = words.reshape(*lead, 2, 4, 2, 4, 2, 2)  # tile, g, one or the next, t, [numbers, left], rows 2 t or 2 t + 8
    k = len(lead)
    moved = parts.transpose(*range(k), *(k + axis for axis in (0, 4, 1, 3, 5, 2)))
    return np.ascontiguousarray(moved).reshape(*lead, 2, 2, 16, 4)


def unequal(factors: Sequence[float]) -> Float[np.ndarray, "C"]:
    """They, and a zero: XLA would make an array of equal numbers anew in every step."""
    return np.asarray([*factors, 0], np.float32)
