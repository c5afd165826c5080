"""Ways to compute a training step with less than float32, as patches of the ops while a step is traced.

jaxff has none of them as an option: this is the trial of whether it should.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib import import_module
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.lax import DotAlgorithmPreset
from jaxtyping import Array

from jaxff.models import painn
from jaxff.system import Pairs

# jaxff.ops names functions like the modules that hold them
message, mlp, update = (import_module(f"jaxff.ops.{name}") for name in ("message", "mlp", "update"))

MANTISSA = {DotAlgorithmPreset.TF32_TF32_F32: 10, DotAlgorithmPreset.BF16_BF16_F32: 7}  # bits


class WidePairs(Pairs):
    """Pairs whose sums are taken in float32."""

    def sum_at_receivers(self, x: Array) -> Array:
        """As Pairs."""
        return super().sum_at_receivers(x.astype(jnp.float32))

    def sum_at_senders(self, x: Array) -> Array:
        """As Pairs."""
        return super().sum_at_senders(x.astype(jnp.float32))


def _wide(pairs: Pairs) -> WidePairs:
    return WidePairs(**{field.name: getattr(pairs, field.name) for field in fields(pairs)})


def _message_fwd(x: Array, v: Array, filters: Array, directions: Array, pairs: Pairs) -> Any:
    """gated_message_fwd of gates, vectors and filters in bfloat16; directions, products with them and sums are wide."""
    low = (t.astype(jnp.bfloat16) for t in (x, v, filters))
    return message.gated_message_fwd(*low, directions, _wide(pairs))


def _message_bwd(residuals: Any, cotangents: Any) -> Any:
    """gated_message_bwd with the cotangent of the filters in bfloat16, as the filters."""
    x_bar, v_bar, filters_bar, u_bar, _ = message.gated_message_bwd(residuals, cotangents)
    return x_bar, v_bar, filters_bar.astype(jnp.bfloat16), u_bar, None


def _products(algorithm: DotAlgorithmPreset) -> Callable[[Array, Array], Array]:
    def matmul(x: Array, kernel: Array) -> Array:
        """x kernel, from float32 to float32, by `algorithm`; its derivatives inherit it."""
        x, kernel = x.astype(jnp.float32), kernel.astype(jnp.float32)
        if jax.default_backend() == "cpu":  # has no such products: rounded operands, for tests
            x, kernel = (jax.lax.reduce_precision(t, 8, MANTISSA[algorithm]) for t in (x, kernel))
            return jnp.matmul(x, kernel, precision=jax.lax.Precision.HIGHEST)
        return jnp.matmul(x, kernel, precision=algorithm)

    return matmul


@contextlib.contextmanager
def patched(algorithm: DotAlgorithmPreset | None, narrow_messages: bool = False) -> Iterator[None]:
    """While it lasts, jaxff's ops are traced with this algorithm for products, and bfloat16 in messages."""
    jax.clear_caches()  # traces of the ops as they were
    with contextlib.ExitStack() as stack:
        if algorithm is not None:
            for module in (mlp, update, painn):
                stack.enter_context(mock.patch.object(module, "matmul", _products(algorithm)))
        if narrow_messages:
            stack.enter_context(mock.patch.object(painn, "gated_message_fwd", _message_fwd))
            stack.enter_context(mock.patch.object(painn, "gated_message_bwd", _message_bwd))
        yield
    jax.clear_caches()


VARIANTS: dict[str, tuple[DotAlgorithmPreset | None, bool]] = {
    "float32": (None, False),
    "tf32 products": (DotAlgorithmPreset.TF32_TF32_F32, False),
    "bf16 products": (DotAlgorithmPreset.BF16_BF16_F32, False),
    "bf16 products and messages": (DotAlgorithmPreset.BF16_BF16_F32, True),
}
