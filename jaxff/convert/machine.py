"""A pickle interpreter that builds inert records only: nothing is imported, nothing is called.

pickletools splits the bytes into opcodes; this machine keeps the stack. What REDUCE and its kin would call is
looked up in jaxff.convert.builders, a closed table of constructors of plain data; every other callable yields a
Record of its name and arguments.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from typing import Any

from jaxff.convert.allowlist import resolve
from jaxff.convert.builders import BUILDERS, ENTRY_COST, plain_key
from jaxff.convert.records import Global, Record, Tensor, printable
from jaxff.errors import CheckpointError

MAX_OPCODES = 4_000_000
MAX_COPIED = 256 * 2**20  # bytes that a pickle may ask to copy
_MARK = Global("jaxff", "mark")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(
    {
        "INT",
        "BININT",
        "BININT1",
        "BININT2",
        "LONG",
        "LONG1",
        "LONG4",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "FLOAT",
        "BINFLOAT",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
    }
)
PersistentLoad = Callable[[Any], Any]


class Machine:
    """Runs one pickle. `notes` collects the names of classes that were left inert."""

    def __init__(self, path: str, persistent_load: PersistentLoad | None = None):
        self.path = path
        self.persistent_load = persistent_load
        self.foreign: dict[str, None] = {}
        self._copied = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def spend(self, size: int) -> None:
        """Accounts for `size` bytes that the pickle wants copied."""
        self._copied += size
        if self._copied > MAX_COPIED:
            raise CheckpointError(f"{self.path}: its pickle expands beyond reason")

    def fault(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged: its pickle {text}")

    def load(self, stream: io.BytesIO) -> Any:
        """The object of the pickle at the stream's position; leaves the stream behind it. Raises CheckpointError."""
        self._stack, self._marks, self._memo = [], [], {}
        try:
            for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
                if count > MAX_OPCODES:
                    raise CheckpointError(f"{self.path}: its pickle has more than {MAX_OPCODES} opcodes")
                if opcode.name == "STOP":
                    return self._pop()
                self._step(opcode.name, arg)
        except CheckpointError:
            raise
        except (ValueError, OverflowError, MemoryError) as error:
            raise self.fault(f"can't be read ({type(error).__name__})") from None
        raise self.fault("has no end")

    def _step(self, name: str, arg: Any) -> None:
        if name in _VALUES:
            self._stack.append(arg)
        elif name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _ACTIONS:
            _ACTIONS[name](self, arg)
        else:
            raise self.fault(f"uses the opcode {name}, which no checkpoint needs")

    def _pop(self) -> Any:
        if not self._stack or (self._marks and self._marks[-1] >= len(self._stack)):
            raise self.fault("takes from an empty stack")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._stack.append(value)
        return value

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise self.fault("lacks a mark")
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _proto(self, version: int) -> None:
        if not 0 <= version <= 5:
            raise self.fault(f"has protocol {version}; expected 0 to 5")

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _discard(self, _: Any) -> None:
        if self._marks and self._marks[-1] == len(self._stack):
            self._marks.pop()
        else:
            self._pop()

    def _discard_to_mark(self, _: Any) -> None:
        self._pop_to_mark()

    def _put(self, index: int | None) -> None:
        self._memo[len(self._memo) if index is None else index] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            raise self.fault(f"recalls entry {index}, which it never stored")
        self._stack.append(self._memo[index])

    def _tuple(self, size: int) -> None:
        items = [self._pop() for _ in range(size)]
        self._stack.append(tuple(reversed(items)))

    def _push_dict(self, items: list[Any]) -> None:
        self._stack.append({})
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        values = target.items if isinstance(target, Record) else target
        if not isinstance(values, dict) or len(items) % 2:
            raise self.fault("sets items of something that has none")
        for key, value in zip(items[::2], items[1::2], strict=True):
            values[plain_key(key)] = value

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        values = target.elements if isinstance(target, Record) else target
        if not isinstance(values, list):
            raise self.fault("appends to something that isn't a list")
        values.extend(items)

    def _global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.fault("refers to a class by something that isn't its name")
        found, known = resolve(self.path, module, name)
        if not known:
            self.foreign[printable(found.full_name)] = None
        self._stack.append(found)

    def _global_line(self, arg: str) -> None:
        module, _, name = arg.partition(" ")
        self._global(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._global(module, name)

    def _call(self, function: Any, args: Any) -> None:
        if not isinstance(function, (Global, Record)) or not isinstance(args, tuple):
            raise self.fault("calls something that can't be called")
        if isinstance(function, Record):
            self._stack.append(Record(function.kind, args))
            return
        build = BUILDERS.get(function.full_name)
        self._stack.append(Record(function, args) if build is None else build(self, function, args))

    def _reduce(self, _: Any) -> None:
        args, function = self._pop(), self._pop()
        self._call(function, args)

    def _new_with_keywords(self, _: Any) -> None:
        keywords, args, kind = self._pop(), self._pop(), self._pop()
        if not isinstance(kind, Global) or not isinstance(args, tuple) or not isinstance(keywords, dict):
            raise self.fault("makes an object of something that isn't a class")
        self.spend(ENTRY_COST * len(keywords))
        self._stack.append(Record(kind, args, dict(keywords)))

    def _inst(self, arg: str) -> None:
        args = tuple(self._pop_to_mark())
        self._global_line(arg)
        self._call(self._pop(), args)

    def _obj(self, _: Any) -> None:
        items = self._pop_to_mark()
        if not items:
            raise self.fault("makes an object without a class")
        self._call(items[0], tuple(items[1:]))

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Record):
            parts = state if isinstance(state, tuple) else (state,)
            self.spend(sum(ENTRY_COST * len(part) for part in parts[:2] if isinstance(part, dict)))
            target.build(state)
        elif not isinstance(target, dict | list | Tensor):  # whose attributes don't matter
            raise self.fault("sets the state of something that has none")

    def _persistent(self, _: Any) -> None:
        if self.persistent_load is None:
            raise self.fault("refers to a storage outside an archive")
        self._stack.append(self.persistent_load(self._pop()))


_ACTIONS: dict[str, Callable[[Machine, Any], None]] = {
    "PROTO": Machine._proto,
    "FRAME": lambda machine, _: None,
    "MARK": Machine._mark,
    "POP": Machine._discard,
    "POP_MARK": Machine._discard_to_mark,
    "DUP": lambda machine, _: machine._stack.append(machine._top()),
    "PUT": Machine._put,
    "BINPUT": Machine._put,
    "LONG_BINPUT": Machine._put,
    "MEMOIZE": Machine._put,
    "GET": Machine._get,
    "BINGET": Machine._get,
    "LONG_BINGET": Machine._get,
    "EMPTY_TUPLE": lambda machine, _: machine._tuple(0),
    "TUPLE1": lambda machine, _: machine._tuple(1),
    "TUPLE2": lambda machine, _: machine._tuple(2),
    "TUPLE3": lambda machine, _: machine._tuple(3),
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._pop_to_mark())),
    "EMPTY_LIST": lambda machine, _: machine._stack.append([]),
    "LIST": lambda machine, _: machine._stack.append(machine._pop_to_mark()),
    "APPEND": lambda machine, _: machine._append([machine._pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "EMPTY_DICT": lambda machine, _: machine._stack.append({}),
    "DICT": lambda machine, _: machine._push_dict(machine._pop_to_mark()),
    "SETITEM": lambda machine, _: machine._set_items([machine._pop(), machine._pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_to_mark()),
    # a set is a list here: its elements are never hashed
    "EMPTY_SET": lambda machine, _: machine._stack.append([]),
    "ADDITEMS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "FROZENSET": lambda machine, _: machine._stack.append(machine._pop_to_mark()),
    "GLOBAL": Machine._global_line,
    "STACK_GLOBAL": Machine._stack_global,
    "REDUCE": Machine._reduce,
    "NEWOBJ": Machine._reduce,
    "NEWOBJ_EX": Machine._new_with_keywords,
    "INST": Machine._inst,
    "OBJ": Machine._obj,
    "BUILD": Machine._build,
    "BINPERSID": Machine._persistent,
}
