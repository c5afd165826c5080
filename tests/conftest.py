"""Every test runs with float64 at hand and without silent dtype promotion."""

from pathlib import Path

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
