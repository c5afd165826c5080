"""Every layout of a good checkpoint imports to the same bits."""

import copy
import pathlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxff import convert
from jaxff.checkpoint import flatten
from jaxff.convert import read_student
from jaxff.convert.archive import open_archive
from jaxff.convert.layouts import Student, find_student
from jaxff.errors import CheckpointError
from tests.torch_student import (
    SMALL,
    random_tensors,
    rezip,
    same_tensors,
    torch_module,
    torch_state,
    unzip,
    write_student,
)

CONFIG = SMALL.model_dump(include={"hidden_dim", "num_interactions", "num_rbf", "cutoff", "max_z"})


def read(path: pathlib.Path) -> Student:
    return find_student(str(path), open_archive(path))


def test_own_writer_without_torch(tmp_path: pathlib.Path) -> None:
    for dtype in (np.float32, np.float64):
        tensors = random_tensors(dtype=dtype)
        student = read(write_student(tmp_path / "own.pt", tensors))
        assert same_tensors(student.tensors, tensors)
        assert student.config == SMALL
        assert student.notes == []


def test_deflated_and_without_top_folder(tmp_path: pathlib.Path) -> None:
    members = unzip(write_student(tmp_path / "own.pt").read_bytes())
    flat = {name.removeprefix("archive/"): content for name, content in members.items()}
    for case in (members, flat):
        student = read(rezip(tmp_path / "again.pt", case, compression=8))
        assert same_tensors(student.tensors, random_tensors())


def test_big_endian(tmp_path: pathlib.Path) -> None:
    members = unzip(write_student(tmp_path / "own.pt").read_bytes())
    for name in members:
        if "/data/" in name:
            members[name] = np.frombuffer(members[name], "<f4").astype(">f4").tobytes()
    members["archive/byteorder"] = b"big"
    assert same_tensors(read(rezip(tmp_path / "big.pt", members)).tensors, random_tensors())


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "_orig_mod.", "module._orig_mod.model.", "any/thing:"])
@pytest.mark.parametrize("legacy", [False, True])
def test_prefixes(tmp_path: pathlib.Path, prefix: str, legacy: bool) -> None:
    torch = pytest.importorskip("torch")
    state = torch_state(random_tensors(), prefix)
    path = tmp_path / "x.pt"
    torch.save({"model_state_dict": state, "config": CONFIG}, path, _use_new_zipfile_serialization=not legacy)
    student = read(path)
    assert same_tensors(student.tensors, random_tensors())
    assert student.config == SMALL
    assert student.notes == []


def layouts() -> dict[str, object]:
    torch = pytest.importorskip("torch")
    state = torch_state(random_tensors())
    tree: dict = {}
    for name, tensor in state.items():
        *parents, last = name.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = tensor
    optimizer = torch.optim.AdamW([torch.nn.Parameter(t.clone()) for t in state.values()])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    trainer = {"epoch": 3, "optimizer_state_dict": optimizer.state_dict(), "best": np.float64(0.5)}
    paths = {"checkpoint_dir": pathlib.PosixPath("checkpoints"), "when": np.arange(3), "set": {1, 2}}
    ema = {name: tensor + 1 for name, tensor in state.items()}
    return {
        "bare": state,
        "state_dict": {"state_dict": state},
        "model": {"model": state},
        "other key": {"weights of the student": state},
        "deep": {"results": [{"best": {"state": state}}]},
        "pair": (state, {"config": CONFIG}),
        "nested": {"model": tree},
        "nested bare": tree,
        "trainer": {**trainer, "model_state_dict": state, "config": {"trainer": paths, "max_epochs": 10}},
        "module": torch_module(),
        "module under a key": {"model": torch_module(), "epoch": 1},
        "wrapped module": torch.nn.ModuleDict({"inner": torch_module()}),
        "two equal copies": {"a": state, "b": dict(state)},
        "with averaged weights": {"model_state_dict": state, "ema_state_dict": ema},
        "parameters": {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
        "numpy": {name: tensor.numpy() for name, tensor in state.items()},
        "strided": {name: strided(tensor) for name, tensor in state.items()},
        "one storage": dict(zip(state, one_storage(list(state.values())), strict=True)),
    }


def strided(tensor: Any) -> Any:
    import torch

    wide = torch.zeros((*tensor.shape, 2))
    wide[..., 1] = tensor
    return wide[..., 1]


def one_storage(tensors: list[Any]) -> list[Any]:
    import torch

    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    sizes = [tensor.numel() for tensor in tensors]
    return [part.reshape(t.shape) for part, t in zip(torch.split(flat, sizes), tensors, strict=True)]


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("legacy", [False, True])
def test_layouts(tmp_path: pathlib.Path, legacy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    import sys

    # the class is made within a function: give pickle a place to find it
    from jaxff.convert.torch_reference import student_class

    module = SimpleNamespace()
    for kind in [student_class(), *(type(m) for m in torch_module().modules())]:
        if kind.__module__.startswith("jaxff"):
            kind.__qualname__ = kind.__name__
            kind.__module__ = "student_of_somebody"
    for kind in {type(m) for m in torch_module().modules()}:
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "student_of_somebody", module)
    for name, content in layouts().items():
        path = tmp_path / "x.pt"
        torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        student = read(path)
        assert same_tensors(student.tensors, random_tensors()), name
        assert student.config.cutoff == SMALL.cutoff, name
        if name == "module":
            assert any("student_of_somebody.StudentForceField" in note for note in student.notes)
            assert not any("cutoff" in note for note in student.notes)
        if name == "with averaged weights":
            assert student.notes[0] == "another model at ema_state_dict was ignored"


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double"])
@pytest.mark.parametrize("legacy", [False, True])
def test_precisions(tmp_path: pathlib.Path, kind: str, legacy: bool) -> None:
    torch = pytest.importorskip("torch")
    state = {name: getattr(tensor, kind)() for name, tensor in torch_state(random_tensors()).items()}
    torch.save(state, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    student = read(tmp_path / "x.pt")
    wide = torch.float64 if kind == "double" else torch.float32
    assert same_tensors(student.tensors, {name: tensor.to(wide).numpy() for name, tensor in state.items()})
    assert any("widened" in note for note in student.notes) == (kind != "double")


@pytest.mark.filterwarnings("ignore")
def test_torchscript(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch_module()
    args = (torch.tensor([8, 1, 1]), torch.randn(3, 3))
    traced = torch.jit.trace(model, args, check_trace=False)
    traced.save(str(tmp_path / "traced.pt"))
    student = read(tmp_path / "traced.pt")
    assert same_tensors(student.tensors, random_tensors())
    assert student.layout.startswith("TorchScript archive")
    torch.jit.freeze(traced).save(str(tmp_path / "frozen.pt"))
    with pytest.raises(CheckpointError, match=r"frozen\.pt: a frozen TorchScript archive"):
        read(tmp_path / "frozen.pt")


def test_other_ways_of_torch_save(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    state = torch_state(random_tensors())
    for protocol in (2, 3, 4, 5):
        torch.save({"model_state_dict": state, "config": CONFIG}, tmp_path / "x.pt", pickle_protocol=protocol)
        assert same_tensors(read(tmp_path / "x.pt").tensors, random_tensors())
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert same_tensors(read(tmp_path / "x.pt").tensors, random_tensors())


def test_configuration_is_overruled_by_shapes(tmp_path: pathlib.Path) -> None:
    torch = pytest.importorskip("torch")
    state = torch_state(random_tensors())

    def config_of(**changes: object) -> Student:
        torch.save({"model_state_dict": state, "config": {**CONFIG, **changes}}, tmp_path / "x.pt")
        return read(tmp_path / "x.pt")

    wrong = config_of(hidden_dim=128, num_interactions=3, max_z="many")
    assert wrong.config == SMALL
    assert len(wrong.notes) == 3
    assert "says hidden_dim 128, the tensors have 8" in wrong.notes[0]
    # a consistent configuration is right about the cutoff, and the difference is told
    other = config_of(cutoff=5.25)
    assert other.config.cutoff == 5.25
    assert other.notes == ["the last radial centre is 4.5 Å, the file's cutoff 5.25 Å is used"]
    # one that the shapes overrule isn't
    both = config_of(cutoff=5.0, hidden_dim=128)
    assert both.config.cutoff == 4.5
    for nonsense in (float("nan"), -1.0, 0, True, "five", None, 1e9):
        student = config_of(cutoff=nonsense)
        assert student.config == SMALL
        assert "taken from the last radial centre" in student.notes[0]


def test_cutoff_without_configuration_is_the_number_that_was_meant(tmp_path: pathlib.Path) -> None:
    config = SMALL.model_copy(update={"cutoff": 5.2})
    path = write_student(tmp_path / "x.pt", random_tensors(config), config)
    members = unzip(path.read_bytes())
    members["archive/data.pkl"] = members["archive/data.pkl"].replace(b"cutoff", b"cutofg")
    student = read(rezip(path, members))
    assert student.config.cutoff == 5.2  # float32: 5.199999809


def test_real_layouts_are_one_model(student_dir: pathlib.Path) -> None:
    expected = read(student_dir / "ultra_tiny.pt")
    files = sorted((student_dir / "layouts").glob("*.pt"))
    assert len(files) >= 6
    for path in files:
        student = read(path)
        assert same_tensors(student.tensors, expected.tensors), path.name
        assert student.config == expected.config


def test_default_embedding_of_119_rows(tmp_path: pathlib.Path) -> None:
    config = SMALL.model_copy(update={"max_z": 118})
    params, found, _ = read_student(write_student(tmp_path / "x.pt", random_tensors(config), config))
    assert found.max_z == 118
    assert dict(flatten(params))["embedding.table"].shape == (119, 8)


def test_convert_is_a_function_and_a_module(tmp_path: pathlib.Path) -> None:
    assert callable(convert)
    assert copy.copy(convert.read_student) is read_student
