"""A step of training takes long to compile; the tests take few of them."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly: None) -> None:
    pass
