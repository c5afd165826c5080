"""Convert, certify, write back: the whole road."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxff.convert as converter
from jaxff.checkpoint import Checkpoint, flatten, load_checkpoint, save_checkpoint
from jaxff.config import PainnConfig, StudentConfig
from jaxff.convert import convert, inspect_source, read_student, to_torch
from jaxff.convert.archive import open_archive
from jaxff.convert.certificate import file_hash
from jaxff.convert.defects import cutoff_jumps, describe_defects, measure_defects, rotation_spread
from jaxff.convert.layouts import find_student
from jaxff.convert.names import from_tree, to_tree
from jaxff.errors import CheckpointError
from jaxff.models import init_params, param_shapes
from jaxff.potential import Potential
from tests.torch_student import SMALL, random_tensors, same_tensors, write_student


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint]:
    folder = tmp_path_factory.mktemp("converted")
    write_student(folder / "best_model.pt")
    return folder, convert(folder / "best_model.pt", folder / "student.safetensors")


def test_certificate(converted: tuple[Path, Checkpoint]) -> None:
    folder, returned = converted
    checkpoint = load_checkpoint(folder / "student.safetensors")
    certificate = checkpoint.certificate
    assert certificate is not None
    assert certificate == returned.certificate == json.loads(json.dumps(certificate))
    assert certificate["source"]["file"] == "best_model.pt"
    assert certificate["source"]["sha256"] == file_hash(folder / "best_model.pt")
    assert str(folder) not in json.dumps(certificate)
    check = certificate["check"]
    assert check["passed"]
    assert len(check["structures"]) == 7
    for reference in ["numpy"] + ["pytorch"] * check["pytorch"]:
        assert check["float64"][reference]["largest_dE_eV"] <= 1e-10
        assert check["float64"][reference]["largest_dF_eV_per_A"] <= 1e-9
        assert check["float32"][reference]["largest_dF_eV_per_A"] <= 1e-4
    assert same_tensors(from_tree(checkpoint.params, SMALL), random_tensors())


def test_defects_are_described(converted: tuple[Path, Checkpoint]) -> None:
    _, checkpoint = converted
    sentences = describe_defects(checkpoint.certificate)
    assert any("depends on the orientation" in sentence for sentence in sentences)
    assert any("crosses the cutoff of 4.5 Å" in sentence for sentence in sentences)
    assert describe_defects(None) == describe_defects({"defects": None}) == []


def test_check_notices_wrong_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two independent implementations are compared: a slip in one shows, and no file is left behind."""
    import jaxff.convert.certificate as module

    def slipped(tensors: dict[str, np.ndarray]) -> dict:
        changed = {**tensors, "energy_head.4.bias": tensors["energy_head.4.bias"] + np.float32(1e-3)}
        return to_tree(changed)

    monkeypatch.setattr(module, "to_tree", slipped)
    monkeypatch.setattr(module, "torch_is_installed", lambda: False)
    monkeypatch.setattr(module, "measure_defects", lambda *_: {})
    with pytest.raises(CheckpointError, match="disagrees with the independent numpy implementation"):
        convert(write_student(tmp_path / "x.pt"), tmp_path / "y.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def test_a_sound_model_has_no_defect_worth_a_word() -> None:
    import jax

    config = PainnConfig(hidden_dim=8, num_interactions=1, num_rbf=6, cutoff=4.0, max_z=20)
    potential = Potential(init_params(config, jax.random.key(0)), config, dtype="float64")
    measured = measure_defects(potential, config.cutoff, config.max_z)
    assert max(item["energy_eV"] for item in measured["rotation_spread"].values()) < 1e-9
    assert measured["largest_cutoff_jump_eV"] < 1e-5
    said = " ".join(describe_defects({"defects": measured}))
    assert "orientation" not in said
    assert "cutoff" not in said


def test_real_defects(student_dir: Path) -> None:
    params, config, _ = read_student(student_dir / "original.pt")
    potential = Potential(params, config, dtype="float64")
    with np.load(student_dir / "parity_public.npz") as data:
        first = int(np.flatnonzero(data["natoms"] == 9)[0])
        atoms = slice(data["offset"][first], data["offset"][first + 1])
        spread, force = rotation_spread(potential, data["numbers"][atoms], data["positions"][atoms])
    assert 0.01 < spread < 1.0
    assert 0.05 < force < 5.0
    jumps = [abs(jump) for jump in cutoff_jumps(potential, config.cutoff).values()]
    # student-model.md: 0.12 to 1.9 eV for isolated diatomics
    assert 0.10 < min(jumps) < 0.15
    assert 1.8 < max(jumps) < 2.0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip_is_exact(tmp_path: Path, dtype: type) -> None:
    for config in (SMALL, StudentConfig(hidden_dim=4, num_interactions=1, num_rbf=1, cutoff=6.25, max_z=118)):
        tensors = random_tensors(config, dtype=dtype)
        source = write_student(tmp_path / "x.pt", tensors, config)
        convert(source, tmp_path / "x.safetensors", certify=False)
        to_torch(tmp_path / "x.safetensors", tmp_path / "y.pt")
        assert (tmp_path / "y.pt").read_bytes() == source.read_bytes()


def test_round_trip_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.torch_student import torch_module

    model = torch_module()
    config = SMALL.model_dump(include={"hidden_dim", "num_interactions", "num_rbf", "cutoff", "max_z"})
    count = sum(parameter.numel() for parameter in model.parameters())
    saved = {
        "model_state_dict": model.state_dict(),
        "config": {**config, "use_torch_cluster": True},
        "num_parameters": count,
    }
    torch.save(saved, tmp_path / "x.pt")
    convert(tmp_path / "x.pt", tmp_path / "x.safetensors", certify=False)
    convert(tmp_path / "x.safetensors", tmp_path / "y.pt", to_torch=True)
    loaded = torch.load(tmp_path / "y.pt", weights_only=True)
    assert list(loaded) == list(saved)
    assert loaded["config"] == saved["config"]
    assert loaded["num_parameters"] == count
    state = loaded["model_state_dict"]
    assert list(state) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)
    model.load_state_dict(state)


def test_real_round_trip(student_dir: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    source = student_dir / "tiny.pt"
    convert(source, tmp_path / "x.safetensors", certify=False)
    to_torch(tmp_path / "x.safetensors", tmp_path / "y.pt")
    one, other = (torch.load(path, weights_only=True) for path in (source, tmp_path / "y.pt"))
    assert one["config"] == other["config"]
    assert one["num_parameters"] == other["num_parameters"]
    assert list(one["model_state_dict"]) == list(other["model_state_dict"])
    for name, tensor in one["model_state_dict"].items():
        assert torch.equal(tensor, other["model_state_dict"][name])


def test_to_torch_refuses(tmp_path: Path) -> None:
    import jax

    config = PainnConfig(hidden_dim=8, num_interactions=1, num_rbf=6, max_z=10)
    save_checkpoint(tmp_path / "painn.safetensors", init_params(config, jax.random.key(0)), config)
    with pytest.raises(CheckpointError, match=r"only the student can be written.*painn"):
        to_torch(tmp_path / "painn.safetensors", tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        to_torch(write_student(tmp_path / "x.pt"), tmp_path / "y.pt")
    assert not (tmp_path / "y.pt").exists()


def test_trees_match_the_models() -> None:
    expected = {name: leaf.shape for name, leaf in flatten(param_shapes(SMALL))}
    tree = to_tree(random_tensors())
    assert {name: leaf.shape for name, leaf in flatten(tree)} == expected
    assert same_tensors(from_tree(tree, SMALL), random_tensors())


def test_inspect_source(tmp_path: Path, converted: tuple[Path, Checkpoint]) -> None:
    report = inspect_source(write_student(tmp_path / "x.pt"))
    assert json.loads(json.dumps(report)) == report
    assert report["architecture"] == "student"
    assert report["config"]["hidden_dim"] == 8
    assert report["elements"].startswith("1 to 20")
    assert converted[1].certificate is not None
    assert report["tensors_sha256"] == converted[1].certificate["tensors_sha256"]


def test_the_package_can_be_called(tmp_path: Path) -> None:
    source = write_student(tmp_path / "x.pt")
    checkpoint = converter(source, tmp_path / "y.safetensors", certify=False)  # type: ignore[operator]
    assert checkpoint.config == find_student("x.pt", open_archive(source)).config
