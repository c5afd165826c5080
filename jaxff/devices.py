"""Where JAX computes what no speed depends on."""

from __future__ import annotations

import contextlib

import jax


def on_the_cpu() -> contextlib.AbstractContextManager[object]:
    """A context in which JAX computes on the CPU, for which it compiles sooner than for a GPU, where it has both."""
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError:  # of JAX_PLATFORMS=cuda
        return contextlib.nullcontext()
