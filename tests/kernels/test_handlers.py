"""What launches kernels that may start early, as XLA and CUDA's driver see it: by frames and functions made here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from jaxff.kernels import frames
from jaxff.kernels.cuda import registry

STREAM, CONTEXT, LOADED, ERROR = 0x1111, 0x2222, 0x3333, 0x4444
BLOCKS, THREADS, SHARED, INTEGERS = 7, 128, 2048, (5, -6)


class Fakes:
    """XLA and the driver: words at addresses, and what was asked of them."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.alive: list[Any] = []
        self.status = 0

    def at(self, *words: int) -> int:
        array = np.array(words, np.int64)
        self.alive.append(array)
        return int(array.ctypes.data)

    def function(self, run: Any, count: int) -> int:
        made = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * count)(run)
        self.alive.append(made)
        return ctypes.cast(made, ctypes.c_void_p).value or 0

    def frame(self, key: int, arrays: Sequence[int], results: Sequence[int], extension: int = 0) -> int:
        """An XLA_FFI_CallFrame: an attribute, so many buffers."""
        ins, outs = (self.at(*[self.at(0, 0, 0, data, 0, 0) for data in group]) for group in (arrays, results))
        attributes = self.at(self.at(0, self.at(key)))
        arguments = 40, 0, len(arrays), 0, ins, 40, 0, len(results), 0, outs, 40, 0, 1, 0, 0, attributes
        return self.at(168, extension, self.api(), CONTEXT, 0, *arguments, 0)

    def api(self) -> int:
        def stream(args: int) -> int:
            asked = words(args, 4)
            self.asked.append(("stream", asked[2]))
            asked[3] = STREAM
            return 0

        def error(args: int) -> int:
            asked = words(args, 4)
            self.asked.append(("error", (ctypes.string_at(int(asked[2])).decode(), int(asked[3]))))
            return ERROR

        functions = [0] * 5
        functions[0], functions[4] = self.function(error, 1), self.function(stream, 1)
        return self.at(88, 0, 24, 0, 3, 0, *functions)


def words(address: int, count: int) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(ctypes.c_int64)), (count,))


@pytest.fixture(name="fakes")
def _fakes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    fakes = Fakes()

    def launch(config: int, kernel: int, places: int, extra: int) -> int:
        c = words(config, 7)
        values = [int(words(place, 1)[0]) for place in words(places, 5)]
        attribute = words(int(c[5]), 2).tolist() if c[6] == 1 else None
        fakes.asked.append(("launch", (c.tolist()[:5], attribute, kernel, extra, values)))
        return fakes.status

    launcher = fakes.function(launch, 4)
    monkeypatch.setattr(registry, "_launcher", lambda: launcher)
    monkeypatch.setattr(registry, "_load", lambda name, code, shared: LOADED)
    monkeypatch.setattr(registry, "_entries", {})
    registry.register()
    registry._publish()
    yield fakes
    monkeypatch.undo()
    registry._publish()


def key_of(integers: tuple[int, ...] = INTEGERS, blocks: int = BLOCKS, together: bool = False) -> int:
    return registry.add("kernel", b"code", blocks, THREADS, SHARED, together, integers, 2, 1)


def call(frame: int) -> int:
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(frames.registered[registry.NAME].address)(frame)


def test_a_kernel_is_launched(fakes: Fakes) -> None:
    """On XLA's stream, with the call's blocks; its arguments are arrays, integers and results, in this order."""
    assert call(fakes.frame(key_of(), (0xA0, 0xB0), (0xC0,))) == 0
    (_, context), (_, (config, attribute, kernel, extra, values)) = fakes.asked
    assert context == CONTEXT
    assert config == [BLOCKS | 1 << 32, 1 | THREADS << 32, 1 | 1 << 32, SHARED, STREAM]
    assert attribute == [6, 1]
    assert (kernel, extra) == (LOADED, 0)
    assert np.array(values[2:4], np.int32).tolist() == list(INTEGERS)
    assert [values[0], values[1], values[4]] == [0xA0, 0xB0, 0xC0]


def test_blocks_run_together(fakes: Fakes) -> None:
    """A cooperative launch, where the kernel asks for it."""
    assert call(fakes.frame(key_of(together=True), (0xA0, 0xB0), (0xC0,))) == 0
    assert fakes.asked[-1][1][1] == [2, 1]


def test_each_call_has_its_entry(fakes: Fakes) -> None:
    """Of many, more than a table first has room for; the same call has the same key, others have others."""
    tables = len(registry._tables)
    keys = [key_of(integers=(k, 0), blocks=k + 1) for k in range(300)]
    assert keys == [key_of(integers=(k, 0), blocks=k + 1) for k in range(300)]
    assert len(set(keys)) == 300
    assert len(registry._tables) < tables + 10  # it grows by doubling
    for k in (0, 17, 299):
        fakes.asked.clear()
        assert call(fakes.frame(keys[k], (1, 2), (3,))) == 0
        assert fakes.asked[1][1][0][0] == (k + 1) | 1 << 32


def test_an_unknown_kernel_is_an_error(fakes: Fakes) -> None:
    key_of()
    assert call(fakes.frame(12345, (1, 2), (3,))) == ERROR
    (what, (text, code)) = fakes.asked[-1]
    assert (what, code) == ("error", 13)
    assert "not in this process" in text


def test_a_failed_launch_is_an_error(fakes: Fakes) -> None:
    fakes.status = 700
    assert call(fakes.frame(key_of(), (1, 2), (3,))) == ERROR
    assert "could not be started" in fakes.asked[-1][1][0]


def test_xla_learns_that_kernels_can_be_captured(fakes: Fakes) -> None:
    """An inquiry starts nothing; it has the version that XLA has itself."""
    key_of()
    metadata = fakes.at(0, 0, 0, 0, 0, 0)
    extension = fakes.at(32, 1, 0, metadata)
    assert call(fakes.frame(0, (), (), extension)) == 0
    assert words(metadata, 5).tolist()[3:] == [3, 1]
    assert not fakes.asked
