"""The message kernels on the CPU, as JAX sees them: foreign functions that Numba compiled (jaxff.kernels.compiled)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numba
from jaxtyping import Array, Float

from jaxff.kernels import compiled
from jaxff.kernels.message import Geometry, Sources


def why_not() -> str | None:
    """Why these kernels can't be compiled here, or None."""
    off = getattr(numba.config, "DISABLE_JIT", False)
    return "Numba's compiler is switched off (NUMBA_DISABLE_JIT)" if off else None


def message(
    sources: Sources, table: Float[Array, "T 4 CF"], geometry: Geometry
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message."""

    def run(sources: Sources, table: Array, geometry: Geometry) -> Any:
        n, f = sources.a.shape
        return _call("jaxff_message", ((n, f), (n, 3 * f)), *geometry, table, *_with_dummies(sources))

    ds, dv = _also_batched(run, outputs=2)(sources, table, geometry)
    return ds, dv


def message_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Float[Array, "T 4 CF"],
    geometry: Geometry,
) -> tuple[Sources, Float[Array, "4 E"]]:
    """As jaxff.kernels.message.message_transpose."""

    def run(inputs: tuple[Sources, Any], table: Array, geometry: Geometry) -> Any:
        sources, cotangents = inputs
        n, f = sources.a.shape
        b, y = (0 if x is None else n for x in sources[1:])
        shapes = (n, f), (b, f), (y, 3 * f), (geometry.senders.shape[0], 4)
        arrays = (*geometry, table, *cotangents, *_with_dummies(sources))
        return _call("jaxff_message_transpose", shapes, *arrays)

    a_bar, b_bar, y_bar, pair_bars = _also_batched(run, outputs=4)((sources, cotangents), table, geometry)
    bars = Sources(a_bar, None if sources.b is None else b_bar, None if sources.y is None else y_bar)
    return bars, pair_bars.T


def _call(name: str, shapes: tuple[tuple[int, ...], ...], *arrays: Array) -> tuple[Array, ...]:
    compiled.register()
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return tuple(jax.ffi.ffi_call(name, results)(*arrays))


def _with_dummies(sources: Sources) -> list[Array]:
    """Absent sources as arrays without rows."""
    f = sources.a.shape[1]
    widths = (f, f, 3 * f)
    return [jnp.zeros((0, w), jnp.float32) if x is None else x for x, w in zip(sources, widths, strict=True)]


def _also_batched(run: Callable[..., Any], outputs: int) -> Callable[..., Any]:
    """run(sources, table, geometry), rows of atoms or pairs; under vmap, a batch of systems is one larger system."""
    either = jax.custom_batching.custom_vmap(run)

    @either.def_vmap
    def _(size: int, batched: Any, sources: Any, table: Array, geometry: Geometry) -> Any:
        sources, geometry = (
            jax.tree.map(lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), *pair)
            for pair in ((sources, batched[0]), (geometry, batched[2]))
        )
        if batched[1]:  # other tables: other models, one after the other
            results = jax.lax.map(lambda args: either(*args), (sources, table, geometry))
            return results, (True,) * outputs
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), sources)
        senders, places = geometry
        n = jax.tree.leaves(sources)[0].shape[1]
        senders = (senders + n * jnp.arange(size, dtype=senders.dtype)[:, None]).reshape(-1)
        joined = Geometry(senders, jnp.moveaxis(places, 0, 1).reshape(places.shape[1], -1))
        results = tuple(x.reshape(size, -1, x.shape[-1]) for x in either(rows, table, joined))
        return results, (True,) * outputs

    return either
