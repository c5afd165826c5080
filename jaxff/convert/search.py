"""Walks over the inert objects of a file: its mappings, its tensors, and its configurations."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxff.convert.builders import numpy_array
from jaxff.convert.records import Record, Tensor
from jaxff.errors import CheckpointError

MAX_DEPTH = 40
MAX_NODES = 300_000
CONFIG_KEYS = ("hidden_dim", "num_interactions", "num_rbf", "cutoff", "max_z")
_CONFIG_PLACES = ("config", "model_config", "model", "args", "hparams", "hyper_parameters", "params", "settings")
_CONTAINERS = (dict, list, tuple, Record, Tensor)
Leaf = Tensor | np.ndarray | Record


@dataclass(frozen=True)
class Mapped:
    """A mapping of the file: where it lies, its entries, and whether it is a module's state."""

    path: tuple[str, ...]
    values: Mapping[str, Any]
    module: bool = False


def mappings(name: str, root: Any) -> Iterator[Mapped]:
    """Every mapping below `root`, breadth first, each object once."""
    queue: deque[tuple[tuple[str, ...], Any]] = deque([((), root)])
    seen: set[int] = set()
    nodes = 0
    while queue:
        path, value = queue.popleft()
        if id(value) in seen or len(path) > MAX_DEPTH:
            continue
        seen.add(id(value))
        if is_module(value):
            yield Mapped(path, dict(module_state(name, value)), module=True)
        entries = _entries(value)
        if isinstance(value, dict | Record):
            yield Mapped(path, entries)
        for key, child in entries.items():
            if isinstance(child, _CONTAINERS) and not is_leaf(child) and id(child) not in seen:
                nodes += 1
                if nodes > MAX_NODES:
                    raise CheckpointError(f"{name}: holds more than {MAX_NODES} nested objects")
                queue.append(((*path, key), child))


def is_leaf(value: Any) -> bool:
    """Whether `value` is a tensor or an array."""
    if isinstance(value, Record):
        return value.kind.name in ("_reconstruct",) or value.kind.name.startswith("_rebuild_")
    return isinstance(value, Tensor)


def leaf(value: Any) -> Leaf:
    """A tensor or an array; a kind that can't be read stays a Record."""
    array = numpy_array(value)
    return value if array is None else array


def is_module(value: Any) -> bool:
    """Whether `value` is a pickled torch.nn.Module, or an object of a TorchScript archive."""
    if not isinstance(value, Record):
        return False
    if value.kind.module.split(".")[0] == "__torch__":
        return True
    return all(isinstance(value.attributes.get(key), dict) for key in ("_parameters", "_buffers", "_modules"))


def module_state(name: str, module: Record) -> Iterator[tuple[str, Any]]:
    """(dotted name, tensor) of a module and its submodules, as its state_dict() would give them."""
    stack: list[tuple[str, int, Record]] = [("", 0, module)]
    nodes = 0
    while stack:
        prefix, depth, record = stack.pop()
        nodes += 1
        if nodes > MAX_NODES or depth > MAX_DEPTH:
            raise CheckpointError(f"{name}: its modules nest beyond reason")
        own, children = _module_parts(record)
        for key, value in own.items():
            if isinstance(key, str) and is_leaf(value):
                yield f"{prefix}{key}", value
        for key, child in reversed(list(children.items())):
            if isinstance(key, str) and is_module(child):
                stack.append((f"{prefix}{key}.", depth + 1, child))


def _module_parts(record: Record) -> tuple[Mapping[Any, Any], Mapping[Any, Any]]:
    attributes = record.attributes
    if "_parameters" not in attributes:  # TorchScript: parameters, buffers and submodules are all attributes
        return attributes, attributes
    transient = attributes.get("_non_persistent_buffers_set")
    names = [key for key in transient if isinstance(key, str)] if isinstance(transient, list) else []
    buffers = {key: value for key, value in attributes["_buffers"].items() if key not in names}
    return {**attributes["_parameters"], **buffers}, attributes["_modules"]


def nested(name: str, root: Any) -> dict[str, Leaf]:
    """Every tensor below `root`, by its keys joined with '.'; a tensor in a list has its index as key."""
    found: dict[str, Leaf] = {}
    for mapped in mappings(name, root):
        if not mapped.module:
            for key, value in mapped.values.items():
                if is_leaf(value):
                    found[".".join((*mapped.path, key))] = leaf(value)
    return found


def configurations(found: list[Mapped]) -> list[Mapping[str, Any]]:
    """The mappings that look like a model's configuration, the best first."""
    ranked = []
    for order, mapped in enumerate(found):
        count = sum(_is_number(mapped.values.get(key)) for key in CONFIG_KEYS)
        named = not mapped.path or mapped.path[-1].lower() in _CONFIG_PLACES
        if mapped.module or count == 0 or (count == 1 and not named):
            continue
        ranked.append((-count, order, mapped.values))
    return [values for _, _, values in sorted(ranked, key=lambda item: item[:2])]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _entries(value: Any) -> dict[str, Any]:
    """The entries of a dict, a list or a record by text keys."""
    if isinstance(value, dict):
        return {str(key): child for key, child in value.items() if isinstance(key, str | int)}
    if isinstance(value, list | tuple):
        return {str(i): child for i, child in enumerate(value) if isinstance(child, _CONTAINERS)}
    if isinstance(value, Record):
        merged = {**value.attributes, **value.items}
        entries = {str(key): child for key, child in merged.items() if isinstance(key, str | int)}
        return entries | {"(arguments)": value.args, "(elements)": value.elements}
    return {}
