"""Ctrl-C as a question that a simulation asks between two blocks."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def until_ctrl_c(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; `note` is told what happens then.

    A second Ctrl-C raises KeyboardInterrupt at once. For the main thread only, as all signal handlers.
    """
    pressed: list[int] = []

    def handle(number: int, _: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)
        note("finishing this block of steps (Ctrl-C again: leave at once)")

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, previous)
