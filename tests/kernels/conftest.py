"""Interpreted kernels are long programs: XLA optimises them for longer than they then run."""

from collections.abc import Iterator

import jax
import pytest

from jaxff.kernels.cuda import launch, one
from tests.kernels import GPU, emulator


@pytest.fixture(scope="module", autouse=True)
def quickly(request: pytest.FixtureRequest) -> None:
    if not GPU:
        request.getfixturevalue("compile_quickly")


@pytest.fixture
def cuda_kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU where one is, or on the CPU by the emulator."""
    if not GPU:
        if emulator.COMPILER is None:
            pytest.skip("no GPU, and no C++ compiler to run CUDA kernels on a CPU with")
        monkeypatch.setattr(launch, "emulator", emulator.run)
    one._arranged.cache_clear()  # of other sizes of GPUs
    yield
    one._arranged.cache_clear()
    jax.clear_caches()
