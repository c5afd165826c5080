"""The message kernels on the CPU: compiled by Numba, called by XLA through its foreign function interface.

Sums and symbols are those of `jaxff.kernels.message`. The list is symmetric, so each filter is read from the table once
and serves both directions of its pair; pairs that don't count are skipped. One thread, one order: the same bits in
every run. Nothing here calls Python. Shapes: places [6, E], table [T, 4, CF], a, b, p [N, F], y, q [N, 3F], pair_bars
[E, 4]; b and y have no rows where there are none.
"""

from __future__ import annotations

import functools

import numpy as np
from numba import carray, njit

from jaxff.kernels import frames
from jaxff.kernels.frames import ARGS, CACHE, RETS, buffer, floats, integers, is_inquiry

# sums may be reordered and products fused; NaN stays NaN
_compiled = functools.partial(njit, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy", cache=CACHE)


# --- the kernels; i < j, so that u is that of the pair that i receives, and j's is its negative ---


@_compiled
def _value(row, channel, t):
    return row[0, channel] + t * (row[1, channel] + t * (row[2, channel] + t * row[3, channel]))


@_compiled
def _slope(row, channel, t):
    return row[1, channel] + t * (np.float32(2) * row[2, channel] + np.float32(3) * t * row[3, channel])


def _message(has_b):
    """The kernel with or without b, as a constant: XLA puts an array without rows anywhere, and as long as loops could

    write to it, 1 of 100 calls summed in another order (the same values, other last bits).
    """

    @_compiled
    def kernel(senders, places, table, a, b, y, ds, dv):
        n, f = a.shape
        slots = senders.shape[0] // n
        has_y = y.shape[0] > 0
        ds[:] = 0
        dv[:] = 0
        for i in range(n):  # two loops: with i = e // slots LLVM vectorises nothing
            for slot in range(slots):
                e = i * slots + slot
                j = senders[e]
                if places[1, e] == 0 or j < i:
                    continue
                t, row = places[0, e], table[np.int64(places[5, e])]
                ux, uy, uz = places[2, e], places[3, e], places[4, e]
                for k in range(f):
                    wa = _value(row, k, t)
                    ds[i, k] += wa * a[j, k]
                    ds[j, k] += wa * a[i, k]
                for k in range(f):
                    wi = wj = _value(row, f + k, t)
                    if has_b:
                        wi, wj = wi * b[j, k], wj * b[i, k]
                    dv[i, k] += ux * wi
                    dv[i, f + k] += uy * wi
                    dv[i, 2 * f + k] += uz * wi
                    dv[j, k] -= ux * wj
                    dv[j, f + k] -= uy * wj
                    dv[j, 2 * f + k] -= uz * wj
                if has_y:
                    for k in range(f):
                        wc = _value(row, 2 * f + k, t)
                        dv[i, k] += wc * y[j, k]
                        dv[i, f + k] += wc * y[j, f + k]
                        dv[i, 2 * f + k] += wc * y[j, 2 * f + k]
                        dv[j, k] += wc * y[i, k]
                        dv[j, f + k] += wc * y[i, f + k]
                        dv[j, 2 * f + k] += wc * y[i, 2 * f + k]

    return kernel


def _message_transpose(has_b):
    """Likewise."""

    @_compiled
    def kernel(senders, places, table, p, q, a, b, y, a_bar, b_bar, y_bar, pair_bars):
        n, f = a.shape
        slots = senders.shape[0] // n
        has_y = y.shape[0] > 0
        a_bar[:] = 0
        b_bar[:] = 0
        y_bar[:] = 0
        pair_bars[:] = 0
        for i in range(n):  # two loops: with i = e // slots LLVM vectorises nothing
            for slot in range(slots):
                e = i * slots + slot
                j = senders[e]
                if places[1, e] == 0 or j < i:
                    continue
                t, row = places[0, e], table[np.int64(places[5, e])]
                ux, uy, uz = places[2, e], places[3, e], places[4, e]
                d = dx = dy = dz = np.float32(0)
                for k in range(f):
                    wa = _value(row, k, t)
                    a_bar[i, k] += wa * p[j, k]
                    a_bar[j, k] += wa * p[i, k]
                    d += (a[j, k] * p[i, k] + a[i, k] * p[j, k]) * _slope(row, k, t)
                for k in range(f):
                    wb = _value(row, f + k, t)
                    qx, qy, qz = q[i, k], q[i, f + k], q[i, 2 * f + k]
                    rx, ry, rz = q[j, k], q[j, f + k], q[j, 2 * f + k]
                    if has_b:
                        b_bar[i, k] -= wb * (ux * rx + uy * ry + uz * rz)
                        b_bar[j, k] += wb * (ux * qx + uy * qy + uz * qz)
                        qx, qy, qz = b[j, k] * qx, b[j, k] * qy, b[j, k] * qz
                        rx, ry, rz = b[i, k] * rx, b[i, k] * ry, b[i, k] * rz
                    d += (ux * (qx - rx) + uy * (qy - ry) + uz * (qz - rz)) * _slope(row, f + k, t)
                    dx += wb * (qx - rx)
                    dy += wb * (qy - ry)
                    dz += wb * (qz - rz)
                if has_y:
                    for k in range(f):
                        wc = _value(row, 2 * f + k, t)
                        qx, qy, qz = q[i, k], q[i, f + k], q[i, 2 * f + k]
                        rx, ry, rz = q[j, k], q[j, f + k], q[j, 2 * f + k]
                        at_i = y[j, k] * qx + y[j, f + k] * qy + y[j, 2 * f + k] * qz
                        at_j = y[i, k] * rx + y[i, f + k] * ry + y[i, 2 * f + k] * rz
                        d += (at_i + at_j) * _slope(row, 2 * f + k, t)
                        y_bar[i, k] += wc * rx
                        y_bar[i, f + k] += wc * ry
                        y_bar[i, 2 * f + k] += wc * rz
                        y_bar[j, k] += wc * qx
                        y_bar[j, f + k] += wc * qy
                        y_bar[j, 2 * f + k] += wc * qz
                pair_bars[e, 0], pair_bars[e, 1], pair_bars[e, 2], pair_bars[e, 3] = d, dx, dy, dz
                for reverse in range(j * slots, (j + 1) * slots):
                    if senders[reverse] == i and places[1, reverse] != 0:
                        pair_bars[reverse, 0] = d
                        pair_bars[reverse, 1], pair_bars[reverse, 2], pair_bars[reverse, 3] = -dx, -dy, -dz
                        break

    return kernel


_MESSAGE, _MESSAGE_WITH_B = _message(False), _message(True)
_TRANSPOSE, _TRANSPOSE_WITH_B = _message_transpose(False), _message_transpose(True)


# --- as XLA calls them ---


@_compiled
def _indices(frame, k):
    data, dims = buffer(frame, ARGS, k)
    return carray(integers(data), (dims[0],))


@_compiled
def _matrix(frame, group, k):
    data, dims = buffer(frame, group, k)
    return carray(floats(data), (dims[0], dims[1]))


@_compiled
def _inputs(frame):
    """Geometry and table: the first three arguments of both kernels."""
    data, dims = buffer(frame, ARGS, 2)
    table = carray(floats(data), (dims[0], dims[1], dims[2]))
    return _indices(frame, 0), _matrix(frame, ARGS, 1), table


def _on_message(frame):
    if not is_inquiry(frame, 0):
        senders, places, table = _inputs(frame)
        a, b, y = _matrix(frame, ARGS, 3), _matrix(frame, ARGS, 4), _matrix(frame, ARGS, 5)
        ds, dv = _matrix(frame, RETS, 0), _matrix(frame, RETS, 1)
        if b.shape[0] > 0:
            _MESSAGE_WITH_B(senders, places, table, a, b, y, ds, dv)
        else:
            _MESSAGE(senders, places, table, a, b, y, ds, dv)
    return 0


def _on_message_transpose(frame):
    if not is_inquiry(frame, 0):
        senders, places, table = _inputs(frame)
        p, q = _matrix(frame, ARGS, 3), _matrix(frame, ARGS, 4)
        a, b, y = _matrix(frame, ARGS, 5), _matrix(frame, ARGS, 6), _matrix(frame, ARGS, 7)
        a_bar, b_bar, y_bar = _matrix(frame, RETS, 0), _matrix(frame, RETS, 1), _matrix(frame, RETS, 2)
        pair_bars = _matrix(frame, RETS, 3)
        if b.shape[0] > 0:
            _TRANSPOSE_WITH_B(senders, places, table, p, q, a, b, y, a_bar, b_bar, y_bar, pair_bars)
        else:
            _TRANSPOSE(senders, places, table, p, q, a, b, y, a_bar, b_bar, y_bar, pair_bars)
    return 0


def register() -> None:
    """Make both kernels known to XLA by name."""
    frames.register("jaxff_message", _on_message, "cpu")
    frames.register("jaxff_message_transpose", _on_message_transpose, "cpu")
