"""Filters from tables (jaxff.tabulate) in place of the networks that they were made from, for any architecture.

A tabulated parameter tree has interaction_<l>.filter = {coefficients: [T, 4, 3F]} and none of what made the filters.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from jaxtyping import Array, Float

from jaxff.models.parameters import Params
from jaxff.ops.table import interpolate_bwd, interpolate_fwd, interpolate_reference

Filters = list[Float[Array, "E 3F"]]


def is_tabulated(params: Params) -> bool:
    """Whether the filters of a parameter tree are tables."""
    return "coefficients" in params["interaction_0"]["filter"]


def filters_reference(params: Params, config: Any, d: Float[Array, "E"]) -> Filters:
    """The filters of all interactions, by the plain primal."""
    return [interpolate_reference(d, table, config.cutoff) for table in _tables(params, config)]


def filters_fwd(params: Params, config: Any, d: Float[Array, "E"]) -> tuple[Filters, list[Any]]:
    """The filters of all interactions with what `filters_bwd` needs."""
    pairs = [interpolate_fwd(d, table, config.cutoff) for table in _tables(params, config)]
    return [filters for filters, _ in pairs], [residuals for _, residuals in pairs]


def filters_bwd(config: Any, residuals: list[Any], filters_bar: Filters) -> tuple[Float[Array, "E"], Params, Params]:
    """d̄ = Σ_l Σ_c W̄ dW/dd, the filters' part of each interaction's tree, and of the tree itself (nothing)."""
    results = [interpolate_bwd(config.cutoff, r, bar) for r, bar in zip(residuals, filters_bar, strict=True)]
    trees = {f"interaction_{i}": {"coefficients": table} for i, (_, table) in enumerate(results)}
    return functools.reduce(operator.add, [d_bar for d_bar, _ in results]), trees, {}


def _tables(params: Params, config: Any) -> list[Float[Array, "T 4 3F"]]:
    return [params[f"interaction_{i}"]["filter"]["coefficients"] for i in range(config.num_interactions)]
