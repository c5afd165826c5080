"""Interpreted kernels are long programs: XLA optimises them for longer than they then run."""

import pytest

from tests.kernels import GPU


@pytest.fixture(scope="module", autouse=True)
def quickly(request: pytest.FixtureRequest) -> None:
    if not GPU:
        request.getfixturevalue("compile_quickly")
