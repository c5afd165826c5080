"""Every test runs with float64 at hand and without silent dtype promotion."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# before NumPy begins: pytest's workers share the cores, and threads of BLAS that wait for each other cost up to half
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")

STUDENT = Path(__file__).parents[2] / "shared" / "student"


@pytest.fixture(scope="session")
def student_dir() -> Path:
    """The real student weights and reference numbers, where they are at hand."""
    if not (STUDENT / "parity_public.npz").exists():
        pytest.skip("the real student weights are not at hand")
    return STUDENT


@pytest.fixture
def compilations() -> Iterator[Callable[[], int]]:
    """How many programs XLA has compiled since the test began."""
    count = 0

    def listen(event: str, duration: float, **kwargs: object) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield lambda: count
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def compile_quickly() -> Iterator[None]:
    """XLA without most of its optimisations, in processes that are started, too.

    For modules whose programs take longer to compile than to run and whose numbers do not hang on how.
    """
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(name.upper(), "1")
        yield
    jax.config.update(name, before)


@pytest.fixture
def cuda_kernels_run_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On a GPU where one is, or on the CPU by the emulator."""
    from jaxff.kernels.cuda import launch, one
    from tests.kernels import GPU, emulator

    if not GPU:
        if emulator.COMPILER is None:
            pytest.skip("no GPU, and no C++ compiler to run CUDA kernels on a CPU with")
        monkeypatch.setattr(launch, "emulator", emulator.run)
    one._arranged.cache_clear()  # of other sizes of GPUs
    yield
    one._arranged.cache_clear()
    jax.clear_caches()
