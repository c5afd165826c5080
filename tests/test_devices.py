"""Where JAX computes what no speed depends on."""

import jax
import jax.numpy as jnp
import pytest

from jaxff.devices import on_the_cpu


def test_on_the_cpu() -> None:
    with on_the_cpu():
        (device,) = jnp.zeros(1).devices()
        assert jax.config.jax_default_device is device
    assert device.platform == "cpu"
    assert jax.config.jax_default_device is None


def test_without_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX_PLATFORMS=cuda leaves JAX without one: it computes where it does otherwise."""

    def devices(backend: str) -> list[jax.Device]:
        raise RuntimeError(f"Unknown backend {backend}")

    monkeypatch.setattr(jax, "devices", devices)
    with on_the_cpu():
        assert jnp.zeros(1).sum() == 0
