"""A journal of labels: one file that only grows, so that a kill at any moment loses at most the label being written."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxff.errors import DataError

_MAGIC = b"jaxff labels 1\n"
_HEAD = struct.Struct("<II")  # length and CRC-32 of what follows
_ENERGY = struct.Struct("<d")
_KEY = 32


class Label(NamedTuple):
    """Energy (eV) and forces (float32, [n, 3] eV/Å) of a structure."""

    energy: float
    forces: Float[np.ndarray, "n 3"]


Outcome = Label | str  # a label, or why there is none


class Journal:
    """Outcomes by key (32 bytes); the last one of a key counts. For one process at a time.

    header: what the labels are of; opening a journal of another header raises DataError, as does one in use.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.outcomes: dict[bytes, Outcome] = {}
        self._file: BinaryIO = self._locked()
        try:
            self._recover(dict(header))
        except BaseException:
            self._file.close()
            raise

    def append(self, key: bytes, outcome: Outcome) -> None:
        """Records an outcome; once this returns, a kill doesn't lose it."""
        if isinstance(outcome, str):
            payload = key + b"F" + outcome.encode()
        else:
            forces = np.ascontiguousarray(outcome.forces, dtype="<f4")
            payload = key + b"L" + _ENERGY.pack(outcome.energy) + forces.tobytes()
        self._write(payload)
        self.outcomes[key] = outcome

    def remove(self) -> None:
        """Deletes the file; the journal is closed."""
        self.path.unlink()
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def _locked(self) -> BinaryIO:
        """The file, open and locked; opened again where another run removed it in between."""
        while True:
            file: BinaryIO = open(self.path, "a+b")  # noqa: SIM115  (closed by __exit__)
            try:
                _lock(file, self.path)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                        return file
            except BaseException:
                file.close()
                raise
            file.close()

    def _recover(self, header: dict[str, Any]) -> None:
        self._file.seek(0)
        data = self._file.read()
        if not data.startswith(_MAGIC[: len(data)]):
            raise DataError(f"{self.path}: expected a journal of `jaxff label`, received another file")
        records, whole = _records(data)
        if not records:  # new, or killed within its first line
            self._file.truncate(0)
            self._file.write(_MAGIC)
            self._write(json.dumps(header, sort_keys=True).encode())
            return
        found = json.loads(records[0])
        check_header(self.path, found, header)
        for payload in records[1:]:
            key, kind, rest = payload[:_KEY], payload[_KEY : _KEY + 1], payload[_KEY + 1 :]
            if kind == b"F":
                self.outcomes[key] = rest.decode()
            else:
                forces = np.frombuffer(rest, "<f4", offset=_ENERGY.size).reshape(-1, 3)
                self.outcomes[key] = Label(_ENERGY.unpack_from(rest)[0], forces)
        self._file.truncate(whole)

    def _write(self, payload: bytes) -> None:
        # one write: appended whole, or torn, which the CRC tells
        self._file.write(_HEAD.pack(len(payload), zlib.crc32(payload)) + payload)
        self._file.flush()


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{path}: in use by another run of `jaxff label`") from None


def check_header(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises DataError where labels in `path` are of another teacher, or of other versions of its libraries."""
    for key, value in wanted.items():
        if found.get(key) != value:
            raise DataError(
                f"{path}: its labels are of {key} {found.get(key)}, and {value} is asked for; "
                f"choose another output, or move this file away"
            )


def _records(data: bytes) -> tuple[list[bytes], int]:
    """Payloads of the whole records, and where they end."""
    records, at = [], len(_MAGIC)
    while at + _HEAD.size <= len(data):
        length, crc = _HEAD.unpack_from(data, at)
        payload = data[at + _HEAD.size : at + _HEAD.size + length]
        if len(payload) != length or zlib.crc32(payload) != crc:
            break
        records.append(payload)
        at += _HEAD.size + length
    return records, at
