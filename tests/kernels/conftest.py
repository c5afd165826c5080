"""Interpreted kernels are long programs: XLA optimises them for longer than they then run."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly: None) -> None:
    pass
