"""Bytes that a run needs again and again, in any order, and that memory should not hold."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxff.errors import DataError


class Scratch:
    """A file that only grows, on the disk of `folder` (None: where the system keeps such), without a name: it is gone
    with its last reference, and with the process, however that ends. Threads may read at once.

    It is read, not mapped into memory: a page that was touched would count as the process's own, a wait for the disk
    would hold all threads, and a disk's failure would end the process instead of raising OSError.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.size = 0
        try:
            file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  (closed with the last reference)
        except OSError as error:
            raise DataError(f"{folder or tempfile.gettempdir()}: can't be written to ({error.strerror})") from None
        weakref.finalize(self, file.close)
        self._file, self._where = file.fileno(), folder or tempfile.gettempdir()

    def append(self, data: np.ndarray) -> None:
        """Adds the bytes of an array. Raises DataError where the disk is full."""
        rest = data.reshape(-1).view(np.uint8).data
        while rest.nbytes:
            try:
                written = os.write(self._file, rest)
            except OSError as error:
                raise DataError(
                    f"{self._where}: the frames can't be kept there while they are used, {self.size / 1e9:.3g} GB of"
                    f" them were written ({error.strerror})"
                ) from None
            rest, self.size = rest[written:], self.size + written

    def read(self, start: int, targets: Sequence[memoryview]) -> None:
        """Fills buffers of bytes, one after the other, with what stands at `start`."""
        wanted = sum(target.nbytes for target in targets)
        received = os.preadv(self._file, targets, start)
        if received != wanted:
            raise OSError(f"expected {wanted} bytes at {start} of a temporary file, received {received}")
