"""The filters of all interactions as tables in the distance: piecewise cubics with a stated error.

Filters depend on the distance alone, so one curve of 3F values for each interaction replaces the network that made
them. On each of T equal intervals over [0, cutoff] stands the cubic that has value and slope of the exact filter at
both ends (Hermite), so the table and its slope are continuous, and forces from it are the gradient of its energy.
Tables are made in float64, whatever they are used in; coefficients are stored, because value differences would
cancel in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxff import models
from jaxff.config import PainnConfig, StudentConfig
from jaxff.devices import on_the_cpu
from jaxff.errors import ConfigError
from jaxff.models.parameters import Params

INTERVALS = 4096
# where the error of a Hermite cubic's value, and of its slope, is largest within an interval
_VALUE_WORST, _SLOPE_WORST = 0.5, (1 - 1 / math.sqrt(3)) / 2
_CHUNK = 1024


@dataclass(frozen=True)
class FilterError:
    """Largest difference between tables and exact filters over all channels, interactions and intervals.

    value: of a filter (no unit); slope: of its derivative by the distance (1/Å); scale: the largest filter.
    """

    value: float
    slope: float
    scale: float
    intervals: int

    def __str__(self) -> str:
        return (
            f"{self.intervals} intervals, value within {self.value:.1e}, slope within {self.slope:.1e} /Å"
            f" (largest filter {self.scale:.2g})"
        )


def tabulate(
    params: Params, config: StudentConfig | PainnConfig, intervals: int = INTERVALS
) -> tuple[Params, FilterError]:
    """The parameter tree with tables in place of filter networks (NumPy float64), and what that changes.

    intervals: T of each table, at least 2. The result serves every function of jaxff.models in place of `params`.
    Raises ConfigError for fewer intervals.
    """
    if intervals < 2:
        raise ConfigError(f"expected at least 2 table intervals, received {intervals}")
    with jax.enable_x64(True), on_the_cpu():
        exact = _exact_filters(models.cast(params, np.dtype("float64")), config)
        knots = np.linspace(0.0, config.cutoff, intervals + 1)
        curves = exact(knots)
        tables = [_hermite(value, slope, config.cutoff / intervals) for value, slope in curves]
        error = _measure(exact, tables, config.cutoff)
    tree = {k: v for k, v in jax.tree.map(np.asarray, params).items() if k != "radial"}
    for i, table in enumerate(tables):
        tree[f"interaction_{i}"] = tree[f"interaction_{i}"] | {"filter": {"coefficients": table}}
    return tree, error


Curves = list[tuple[Float[np.ndarray, "E 3F"], Float[np.ndarray, "E 3F"]]]


def _exact_filters(params: Params, config: StudentConfig | PainnConfig) -> Callable[[np.ndarray], Curves]:
    """Values and slopes of the exact filters, in float64, in chunks of one shape."""

    @jax.jit
    def curves(d: Float[Array, "E"]) -> list[tuple[Array, Array]]:
        values, slopes = jax.jvp(lambda x: models.filters_reference(params, config, x), (d,), (jnp.ones_like(d),))
        return list(zip(values, slopes, strict=True))

    def chunked(d: Float[np.ndarray, "E"]) -> Curves:
        padded = np.pad(d, (0, -len(d) % _CHUNK), mode="edge").reshape(-1, _CHUNK)
        parts = [jax.tree.map(np.asarray, curves(chunk)) for chunk in padded]
        joined = jax.tree.map(lambda *columns: np.concatenate(columns)[: len(d)], *parts)
        return [(value, slope) for value, slope in joined]

    return chunked


def _hermite(
    value: Float[np.ndarray, "T+1 C"], slope: Float[np.ndarray, "T+1 C"], spacing: float
) -> Float[np.ndarray, "T 4 C"]:
    """Coefficients of t^0..t^3 of the cubic through both ends: with Δ = f1 - f0 and g = h f',

    [f0, g0, 3Δ - 2 g0 - g1, g0 + g1 - 2Δ].
    """
    delta, g = np.diff(value, axis=0), spacing * slope
    table = np.empty((len(delta), 4, delta.shape[1]))
    table[:, 0], table[:, 1] = value[:-1], g[:-1]
    table[:, 2], table[:, 3] = 3 * delta - 2 * g[:-1] - g[1:], g[:-1] + g[1:] - 2 * delta
    return table


def _measure(exact: Callable[[np.ndarray], Curves], tables: list[np.ndarray], cutoff: float) -> FilterError:
    spacing = cutoff / len(tables[0])
    errors = []
    for place, what in ((_VALUE_WORST, 0), (_SLOPE_WORST, 1)):
        # the cubic's value, and its slope, at one place t of every interval
        weights = (place ** np.arange(4.0), np.array([0, 1, 2 * place, 3 * place**2]) / spacing)[what]
        curves = exact((np.arange(len(tables[0])) + place) * spacing)
        pairs = zip(tables, curves, strict=True)
        errors.append(max(float(np.max(np.abs(weights @ table - curve[what]))) for table, curve in pairs))
    scale = max(float(np.max(np.abs(table[:, 0]))) for table in tables)
    return FilterError(errors[0], errors[1], scale, len(tables[0]))
