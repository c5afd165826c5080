"""Filters as sums of few functions of the distance, as CUDA kernels take them: W(t) = Σ_k B_k(t) C_k, with cubics B_k.

W are cubic in each interval of a table (jaxff.tabulate), and so are sums of them. The B_k are those along which values
and slopes vary most, by singular values: of all distances, or of bins of them, where 14 do.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt32

from jaxff.kernels.cuda.matrices import apart, as_first, halves, of_lanes, power_of_two, unequal

HIGH = 256.0  # times 64: as high as functions of first.cu are, which pass through halves
PIECES, MOST_PIECES = (4, 8, 16, 32, 64), 2**15  # of an interval, with a quadratic each; of all
RANKS = range(2, 65, 2)  # of first.cu: as many as fill sectors of 32 bytes
VALUES, SLOPES = 1e-7, 1e-6  # of the largest filter, and of the largest slope: what few functions may leave out
IN_BINS = 5e-7, 5e-6  # likewise, with what products of halves leave out
BINS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)  # that would cover all distances without overlap
FUNCTIONS, PRECISE = 14, 9  # in a bin, and how many of them count to more than a half
SLOTS = 16  # of a product of tensor cores, as message.cu has them; after FUNCTIONS come halves of the last precise one
MOST_INTERVALS = 0x7FFF  # of arrange.cu


class Curves(NamedTuple):
    """Values and slopes of filters over all intervals, each divided by its largest."""

    values: Float[np.ndarray, "T C"]
    slopes: Float[np.ndarray, "T C"]


def _heights(table: Float[np.ndarray, "T 4 C"]) -> list[float]:
    return [float(np.max(np.abs(table[:, power]))) or 1.0 for power in (0, 1)]


def _curves(table: Float[np.ndarray, "T 4 C"]) -> Curves:
    return Curves(*(table[:, power] / height for power, height in enumerate(_heights(table))))


def _directions(curves: Curves, rows: slice) -> Float[np.ndarray, "C C"]:
    """Those of most variance of values and slopes over some intervals, by importance."""
    thinned = np.concatenate([x[rows] for x in curves])
    if len(thinned) > 2 * thinned.shape[1]:  # a rotation of the rows takes half as long as what it saves
        thinned = np.asarray(np.linalg.qr(thinned, mode="r"))
    return np.linalg.svd(thinned, full_matrices=False)[2].T


def _left(curves: Curves, directions: Float[np.ndarray, "C K"]) -> bool:
    """Whether what these directions leave of values and slopes is less than float32 rounds."""
    left = (np.max(np.abs(x - x @ directions @ directions.T)) for x in curves)
    return all(x <= allowed for x, allowed in zip(left, (VALUES, SLOPES), strict=True))


def _scaled(basis: Float[np.ndarray, "T 4 K"]) -> tuple[Float[np.ndarray, "T 4 K"], Float[np.ndarray, "K"]]:
    """The functions at most 64 high, and what undoes that."""
    height = np.max(np.abs(basis[:, 0]), axis=0) / 64
    height = np.where(height > 0, height, 1)
    return basis / height, height


class Binned(NamedTuple):
    """W(t) = Σ_k B_k(t) C_k in each bin of T intervals: cubics of all B, and C."""

    basis: Float[np.ndarray, "bins T 4 K"]
    weights: Float[np.ndarray, "bins K C"]


class Reduced(NamedTuple):
    """A table's curves, and along the directions that matter anywhere: little is left to do for each bin."""

    table: Float[np.ndarray, "T 4 C"]
    ways: Float[np.ndarray, "C R"]
    few: Curves


def _reduced(table: Float[np.ndarray, "T 4 C"]) -> Reduced:
    curves = _curves(table)
    ways = _directions(curves, slice(None, None, max(1, len(table) // 1024)))[:, :96]
    return Reduced(table, ways, Curves(*(x @ ways for x in curves)))


def _binned(reduced: Reduced, width: int) -> Binned | None:
    """W with FUNCTIONS in each bin of `width` intervals, of which the next begins after `step_between`.

    B_k are cubics where W are, so that slopes remain those of the values. None if their products leave too much.
    """
    table, ways, few = reduced
    step, heights, basis, weights = step_between(width), _heights(table), [], []
    for begin in range(0, max(1, len(table) - width + step), step):
        rows = slice(begin, begin + width)
        here = _directions(few, slice(begin, begin + width, max(1, width // 64)))
        chosen = ways @ here[:, :FUNCTIONS]
        chosen = np.pad(chosen, ((0, 0), (0, FUNCTIONS - chosen.shape[1])))
        functions, height = _scaled(table[rows] @ chosen)
        of_bin = Binned(functions, (chosen * height).T)
        for which, made in enumerate(products(*of_bin)):
            if np.max(np.abs(made - table[rows, which])) > IN_BINS[which] * heights[which]:
                return None
        basis.append(np.pad(functions, ((0, width - len(functions)), (0, 0), (0, 0))))
        weights.append(of_bin.weights)
    return Binned(np.stack(basis), np.stack(weights))


def products(basis: Float[np.ndarray, "T 4 K"], weights: Float[np.ndarray, "K C"]) -> list[Float[np.ndarray, "T C"]]:
    """Values and slopes of B C where intervals begin, as message.cu makes them of a bin's.

    Of halves, C's and what those leave; what halves of B leave counts of the first functions alone, and likewise C's.
    """
    high, low, factor = apart(weights, float(np.max(np.abs(weights))))
    c, of_c, made = high.astype(np.float64), low.astype(np.float64), []
    for power in (0, 1):
        times = power_of_two(float(np.max(np.abs(basis[:, power]))), 64.0)
        b, of_b = (x.astype(np.float64) for x in apart(times * basis[:, power], 256.0)[:2])
        whole = b @ c + of_b[:, :PRECISE] @ c[:PRECISE] + b[:, :PRECISE] @ of_c[:PRECISE]
        made.append(whole / (times * factor))
    return made


def step_between(width: int) -> int:
    """From a bin's beginning to the next one's: pairs of several atoms mostly find one that all are in."""
    return max(1, width // 8)


def width_of(filters: dict[str, Any]) -> int:
    """Intervals of a bin, of what `of_bins` makes: the first row of functions is of none, and zero."""
    return (len(filters["basis"]) - 1) // len(filters["matrices"])


def of_bins(tables: Sequence[Float[np.ndarray, "T 4 C"]]) -> list[dict[str, Any]] | None:
    """Filters as message.cu takes them, of `in_bins`, or None likewise."""
    found = in_bins(tables)
    return None if found is None else [_as_taken(*x) for x in found]


def in_bins(tables: Sequence[Float[np.ndarray, "T 4 C"]]) -> list[Binned] | None:
    """Filters in bins as wide as all allow; None if narrow ones, too, take many functions."""
    if any(len(table) >= MOST_INTERVALS for table in tables):
        return None
    all_reduced = [_reduced(table) for table in tables]
    for bins in BINS:
        made = []
        for reduced in all_reduced:
            binned = _binned(reduced, max(1, len(reduced.table) // bins))
            if binned is None:
                break
            made.append(binned)
        else:
            return made
    return None


def _as_taken(basis: Float[np.ndarray, "bins T 4 K"], weights: Float[np.ndarray, "bins K C"]) -> dict[str, Any]:
    """Binned filters as message.cu takes them: of C, two matrices of halves a bin.

    The first has the functions, and after them what makes the last precise one's product whole, [C, what C leaves]; the
    second, for what makes whole those of the others before it, C and what it leaves.
    """
    (bins, _, columns), rest = weights.shape, PRECISE - 1
    high, low, factor = apart(weights, float(np.max(np.abs(weights))))
    slope = power_of_two(float(np.max(np.abs(basis[:, :, 1]))), 64.0)
    first = np.concatenate([high, high[:, rest : rest + 1], low[:, rest : rest + 1]], axis=1)
    second = np.concatenate([high[:, :rest], low[:, :rest]], axis=1)
    words = of_lanes(*(x.transpose(1, 0, 2).reshape(SLOTS, bins * columns) for x in (first, second)))
    beside = np.arange(FUNCTIONS).reshape(-1, 2).T.reshape(-1)  # two of a word lie behind those of others
    rows = basis[..., beside].transpose(0, 1, 3, 2).reshape(-1, FUNCTIONS, 4)
    return {
        "basis": np.pad(rows, ((1, 0), (0, 0), (0, 0))).astype(np.float32),
        "matrices": as_first(words.reshape(bins, columns // 16, 2, 32, 4)),
        "scales": np.asarray([1 / factor, slope, 1 / slope], np.float32),
    }


def few_functions(
    table: Float[np.ndarray, "T 4 C"], ranks: Sequence[int], samples: int = 1024
) -> tuple[Float[np.ndarray, "T 4 K"], Float[np.ndarray, "K C"]] | None:
    """W(t) = Σ_k B_k(t) C_k everywhere: cubics of all B, and C, for the least of these K that does; or None.

    samples: of how many intervals those are chosen; all are checked.
    """
    curves = _curves(table)
    directions = _directions(curves, slice(None, None, max(1, len(table) // samples)))
    place = bisect.bisect_left(ranks, True, key=lambda rank: _left(curves, directions[:, :rank]))
    if place == len(ranks):
        return None
    enough = ranks[place]
    chosen = directions[:, :enough]
    missing = enough - chosen.shape[1]
    basis, height = _scaled(table @ np.pad(chosen, ((0, 0), (0, missing))))
    return basis, np.pad((chosen * height[: chosen.shape[1]]).T, ((0, missing), (0, 0)))


def of_elements(
    table: Float[np.ndarray, "T 4 2F"], a: Float[np.ndarray, "Z F"], b: Float[np.ndarray, "Z F"] | None
) -> dict[str, Any] | None:
    """The first filters as first.cu takes them: W(t) = Σ_k B_k(t) C_k everywhere, with the fewest functions.

    Values of B `packed` for the message, cubics for its transpose.
    a, b: what elements send, None for ones. Before the first interval all B are zero. None if functions or pieces are
    too many.
    """
    f, few = a.shape[1], few_functions(table, RANKS)
    if few is None or whole_products(few[0].shape[2]) > f:
        return None
    basis, weights = HIGH * few[0], few[1] / HIGH
    each = (packed(basis, pieces) for pieces in PIECES if pieces * len(table) <= MOST_PIECES)
    values = next((x for x in each if x.left(table, weights) <= 2 * VALUES), None)
    if values is None:
        return None
    weights = np.pad(weights, ((0, -len(weights) % 16), (0, 0)))
    sent, there = (a, np.ones((1, f)) if b is None else b), (weights[:, :f], weights[:, f:])
    back = [(x[:, None] * c).transpose(2, 0, 1).reshape(f, -1) for x, c in zip(sent, there, strict=True)]  # [F, Z K]
    matrices, factors = zip(*(halves(x) for x in (*there, *back)), strict=True)
    slope = power_of_two(float(np.max(np.abs(basis[:, 1]))), 64 * HIGH)
    return {
        "sent": [np.asarray(x, np.float32) for x in sent],
        "packed": np.pad(values.words, ((1, 0), (0, 0), (0, 0))),
        "basis": np.pad(basis.transpose(0, 2, 1), ((1, 0), (0, 0), (0, 0))).astype(np.float32),
        "matrices": list(matrices),
        "factors": unequal([*factors, slope, 1 / slope, *values.units, values.pieces]),
    }


class Packed(NamedTuple):
    """Quadratics of functions in pieces of each interval, [c0, c1 and c2] in 64 bits; units of c1 and of c2."""

    words: UInt32[np.ndarray, "PT K 2"]
    units: tuple[float, float]
    pieces: int

    def left(self, table: Float[np.ndarray, "T 4 C"], weights: Float[np.ndarray, "K C"]) -> float:
        """The largest error of filters where pieces begin and end, of the largest filter."""
        c0, c1, c2, c3 = (table[:, None, power] for power in range(4))
        begin = self.words[..., 0].view(np.float32)
        rise = self.units[0] * self.words[..., 1].view(np.int32) + self.units[1] * (self.words[..., 1] << 20).view(
            np.int32
        )
        left = 0.0
        for end in (0, 1):
            x = (np.arange(self.pieces)[:, None] + end) / self.pieces
            exact = (c0 + x * (c1 + x * (c2 + x * c3))).reshape(len(begin), -1)
            left = max(left, float(np.max(np.abs((begin + end * rise) @ weights - exact))))
        return left / _heights(table)[0]


def packed(basis: Float[np.ndarray, "T 4 K"], pieces: int) -> Packed:
    """Values of cubics as quadratics that are as near as 64 bits allow."""
    x = np.arange(pieces)[:, None] / pieces
    c0, c1, c2, c3 = (basis[:, None, power] for power in range(4))
    cubic = c3 / pieces**3  # t³ is about 1.5 t² - 0.5625 t + 0.03125
    value = c0 + x * (c1 + x * (c2 + x * c3)) + cubic / 32
    slope = (c1 + x * (2 * c2 + 3 * x * c3)) / pieces - cubic * 9 / 16
    square = (c2 + 3 * x * c3) / pieces**2 + cubic * 3 / 2
    value, slope, square = (z.reshape(-1, basis.shape[2]) for z in (value, slope, square))
    most = [max(float(np.max(np.abs(z))), 1e-30) for z in (slope, square)]
    units = most[0] / (2**31 - 2**13), most[1] / (2**11 - 1) / 2**20
    last = np.round(square / units[1] / 2**20).astype(np.int64) & 0xFFF
    whole = np.round((slope / units[0] - last) / 2**12).astype(np.int64) * 2**12 + last
    words = np.stack([value.astype(np.float32).view(np.uint32), whole.astype(np.int32).view(np.uint32)], axis=-1)
    return Packed(words, units, pieces)


def whole_products(functions: int) -> int:
    """As many rows as products of matrices take for so many functions."""
    return -(-functions // 16) * 16
