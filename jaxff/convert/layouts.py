"""The student in a checkpoint of any layout: its tensors, recognised by structure, and its configuration.

A prefix is whatever stands before names of the student's form. Shapes decide the architecture; a configuration
in the file gives the cutoff, and is overruled, with a note, where it contradicts the shapes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxff.config import StudentConfig
from jaxff.convert.archive import Archive
from jaxff.convert.names import MAX_INTERACTIONS, STUDENT_NAME, student_shapes
from jaxff.convert.records import Record, Tensor, printable
from jaxff.convert.search import Leaf, Mapped, configurations, is_leaf, leaf, mappings, nested
from jaxff.convert.settings import choose_config
from jaxff.convert.tensors import read_tensor
from jaxff.errors import CheckpointError

MAX_MODELS = 16  # that are compared
_PREFERRED = ("model_state_dict", "state_dict", "model")
_GROUPS = ("embedding", "rbf", "interactions", "energy_head")


@dataclass(frozen=True)
class Student:
    """What a file holds: tensors by PyTorch's names, the configuration, the layout in words, and notes."""

    tensors: dict[str, np.ndarray]
    config: StudentConfig
    layout: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Candidate:
    """One set of student names: where it lies, the prefix before the names, and all tensors beside them."""

    path: tuple[str, ...]
    prefix: str
    leaves: Mapping[str, Leaf]  # without the prefix
    beside: tuple[str, ...]  # tensors of the same mapping that aren't under the prefix
    module: bool

    @property
    def place(self) -> str:
        return printable(".".join(self.path)) or "the file's root"

    @property
    def shown(self) -> str:
        return printable(self.prefix)

    @property
    def rank(self) -> int:
        if not self.path:
            return 0
        return _PREFERRED.index(self.path[-1]) if self.path[-1] in _PREFERRED else len(_PREFERRED)


def find_student(name: str, archive: Archive) -> Student:
    """The student in `archive`; `name` (the file's) stands in errors. Raises CheckpointError."""
    found = list(mappings(name, archive.root))
    candidates = _candidates(name, archive, found)
    if not candidates:
        raise CheckpointError(f"{name}: {_nothing_found(archive, found)}")
    chosen, notes = _choose(name, archive, candidates)
    shapes = _check(name, chosen)
    tensors = {key: _read(name, archive, chosen.shown + key, chosen.leaves[key]) for key in shapes}
    if not tensors["rbf.widths"].all():
        raise CheckpointError(f"{name}: tensor {chosen.shown}rbf.widths holds 0; expected widths other than zero")
    config, more = choose_config(name, tensors, shapes, configurations(found))
    foreign = list(archive.machine.foreign)
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        notes.append(f"objects of other modules were ignored: {shown}")
    dtypes = sorted({value.dtype if isinstance(value, Tensor) else value.dtype.name for value in _arrays(chosen)})
    halves = [dtype for dtype in dtypes if dtype in ("float16", "bfloat16")]
    if halves:
        notes.append(f"{' and '.join(halves)} tensors were widened to float32")
    return Student(tensors, config, _layout(archive, chosen, dtypes), notes + more)


def _layout(archive: Archive, chosen: _Candidate, dtypes: list[str]) -> str:
    container = "TorchScript archive" if archive.torchscript else f"torch.save, {archive.kind} format"
    kind = "module object" if chosen.module else "state dict"
    prefix = f", prefix '{chosen.shown}'" if chosen.prefix else ""
    return f"{container}: {kind} at {chosen.place}{prefix}, {' and '.join(dtypes)}"


def _candidates(name: str, archive: Archive, found: list[Mapped]) -> list[_Candidate]:
    candidates = []
    for mapped in found:
        leaves = {key: value for key, value in mapped.values.items() if is_leaf(value)}
        candidates += _split(mapped.path, {key: leaf(value) for key, value in leaves.items()}, mapped.module)
    if not candidates:
        candidates = _split((), nested(name, archive.root), False, scattered=True)
    return candidates


def _split(
    path: tuple[str, ...], leaves: Mapping[str, Leaf], module: bool, scattered: bool = False
) -> list[_Candidate]:
    """The sets of student names among `leaves`, by prefix."""
    prefixes: dict[str, set[str]] = {}
    for key in leaves:
        match = STUDENT_NAME.fullmatch(key)
        if match:
            prefixes.setdefault(match["prefix"], set()).add(match["name"].partition(".")[0])
    candidates = []
    likely = [prefix for prefix, groups in prefixes.items() if len(groups) >= 2]
    for prefix in likely[:MAX_MODELS]:
        own = {key.removeprefix(prefix): value for key, value in leaves.items() if key.startswith(prefix)}
        beside = () if scattered else tuple(key for key in leaves if not key.startswith(prefix))
        candidates.append(_Candidate(path, prefix, own, beside, module))
    return candidates


def _choose(name: str, archive: Archive, candidates: list[_Candidate]) -> tuple[_Candidate, list[str]]:
    full = [c for c in candidates if len({key.partition(".")[0] for key in c.leaves} & set(_GROUPS)) == 4]
    ranked = sorted(full or candidates, key=lambda c: c.rank)
    best = ranked[0]
    others = [c for c in ranked[1:] if not _same(name, archive, best, c)]
    rivals = [c for c in others if c.rank == best.rank]
    if rivals:
        raise CheckpointError(
            f"{name}: holds more than one model, at {best.place} (prefix '{best.shown}')"
            f" and at {rivals[0].place} (prefix '{rivals[0].shown}'); expected one"
        )
    notes = [f"another model at {c.place} was ignored" for c in others]
    return best, notes


def _same(name: str, archive: Archive, one: _Candidate, other: _Candidate) -> bool:
    if one.leaves.keys() != other.leaves.keys():
        return False
    for key, value in one.leaves.items():
        if _shape(value) != _shape(other.leaves[key]):
            return False
    pairs = ((_read(name, archive, k, v), _read(name, archive, k, other.leaves[k])) for k, v in one.leaves.items())
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def _check(name: str, chosen: _Candidate) -> dict[str, tuple[int, ...]]:
    """The expected shapes; raises CheckpointError where a tensor is missing, too many, or of another shape."""
    shapes = student_shapes(*_dimensions(name, chosen))
    for key, shape in shapes.items():
        if key not in chosen.leaves:
            raise CheckpointError(f"{name}: tensor {chosen.shown}{key} of shape {list(shape)} is missing")
        value = chosen.leaves[key]
        if isinstance(value, Record):
            raise CheckpointError(
                f"{name}: tensor {chosen.shown}{key}: expected a dense tensor, received {value.kind.name}"
            )
        if _shape(value) != shape:
            raise CheckpointError(
                f"{name}: tensor {chosen.shown}{key}: expected shape {list(shape)}, received {list(_shape(value))}"
            )
    extra = [chosen.prefix + key for key in chosen.leaves if key not in shapes] + list(chosen.beside)
    if extra:
        more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
        raise CheckpointError(f"{name}: tensor {printable(extra[0])}{more} is one too many for the student")
    return shapes


def _dimensions(name: str, chosen: _Candidate) -> tuple[int, int, int, int]:
    """(rows, F, K, L): each as most tensors have it, so that the one that disagrees can be named."""
    shapes = {key: _shape(value) for key, value in chosen.leaves.items()}
    indices = {int(key.split(".")[1]) for key in shapes if STUDENT_NAME.fullmatch(key) and key.startswith("inter")}
    L = max(indices, default=-1) + 1
    if not 1 <= L <= MAX_INTERACTIONS:
        raise CheckpointError(f"{name}: tensor {chosen.shown}interactions.0.message.rbf_to_scalar.0.weight is missing")
    F: Counter[int] = Counter()
    K: Counter[int] = Counter()
    for i in range(L):
        filters, updates = f"interactions.{i}.message.rbf_to_scalar", f"interactions.{i}.update.update_mlp"
        for key in (f"{filters}.0.weight", f"{filters}.0.bias", f"{updates}.0.weight", f"{updates}.0.bias"):
            F.update(shapes.get(key, ())[:1])
        K.update(shapes.get(f"{filters}.0.weight", ())[1:2])
    F.update(shapes.get("embedding.weight", ())[1:2])
    F.update(shapes.get("energy_head.0.weight", ())[1:2])
    for key in ("rbf.centers", "rbf.widths"):
        K.update(shapes.get(key, ())[:1])
    if not F or not K:
        raise CheckpointError(f"{name}: tensor {chosen.shown}rbf.centers is missing")
    rows = shapes.get("embedding.weight", (0,))[:1]
    return (rows or (0,))[0], F.most_common(1)[0][0], K.most_common(1)[0][0], L


def _read(name: str, archive: Archive, key: str, value: Leaf) -> np.ndarray:
    if isinstance(value, Tensor):
        array = read_tensor(name, archive, key, value)
    elif isinstance(value, np.ndarray) and value.dtype.kind == "f":
        array = value.astype(np.float64 if value.dtype.itemsize == 8 else np.float32)
    else:
        kind = value.kind.name if isinstance(value, Record) else value.dtype
        raise CheckpointError(f"{name}: tensor {key}: expected floating-point numbers, received {kind}")
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        index = bad[0].tolist()
        raise CheckpointError(f"{name}: tensor {key} holds {array[tuple(index)]} at {index}; expected finite numbers")
    return array


def _nothing_found(archive: Archive, found: list[Mapped]) -> str:
    count = sum(is_leaf(value) for mapped in found for value in mapped.values.values())
    if archive.torchscript and count == 0:
        return (
            "a frozen TorchScript archive: its weights are constants of the program and can't be imported;"
            " expected a traced archive or a checkpoint of torch.save"
        )
    if count == 0:
        return "a file of torch.save without any tensor; expected the student's state dict"
    return (
        f"holds no student: none of its {count} tensors belongs to a set of names such as"
        " embedding.weight, rbf.centers, interactions.0.update.mixing_matrix, energy_head.0.weight"
    )


def _arrays(chosen: _Candidate) -> list[Tensor | np.ndarray]:
    return [value for value in chosen.leaves.values() if not isinstance(value, Record)]


def _shape(value: Leaf) -> tuple[int, ...]:
    return () if isinstance(value, Record) else tuple(value.shape)
