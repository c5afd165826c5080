"""jaxff's file: what goes in comes out, and what doesn't belong is refused by name."""

import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from jaxff.checkpoint import flatten, load_checkpoint, save_checkpoint, unflatten
from jaxff.config import PainnConfig
from jaxff.convert.names import to_tree
from jaxff.errors import CheckpointError, ConfigError
from jaxff.files import atomic_write
from jaxff.loading import load_potential
from jaxff.models import init_params
from jaxff.potential import Potential
from tests.torch_student import SMALL, random_tensors, write_student

PARAMS = to_tree(random_tensors())
METADATA = {"format": "jaxff", "format_version": "1", "config": SMALL.model_dump_json(), "certificate": "null"}


def tensors() -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in flatten(PARAMS)}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_round_trip(tmp_path: Path, dtype: type) -> None:
    params = to_tree(random_tensors(dtype=dtype))
    certificate = {"check": {"passed": True}, "text": "Å"}
    save_checkpoint(tmp_path / "x.safetensors", params, SMALL, certificate)
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.config == SMALL
    assert checkpoint.certificate == certificate
    loaded = dict(flatten(checkpoint.params))
    for name, value in flatten(params):
        assert loaded[name].dtype == dtype
        np.testing.assert_array_equal(loaded[name], value)


def test_transposed_views_keep_their_values(tmp_path: Path) -> None:
    leaves = {name: value.T.copy().T if value.ndim == 2 else value for name, value in tensors().items()}
    save_checkpoint(tmp_path / "x.safetensors", unflatten(leaves), SMALL)
    for name, value in flatten(load_checkpoint(tmp_path / "x.safetensors").params):
        np.testing.assert_array_equal(value, leaves[name])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened(tmp_path: Path, dtype: type) -> None:
    leaves = {name: value.astype(dtype) for name, value in tensors().items()}
    save_checkpoint(tmp_path / "x.safetensors", unflatten(leaves), SMALL)
    for name, value in flatten(load_checkpoint(tmp_path / "x.safetensors").params):
        assert value.dtype == np.float32
        np.testing.assert_array_equal(value, leaves[name].astype(np.float32))


def test_painn(tmp_path: Path) -> None:
    config = PainnConfig(hidden_dim=8, num_interactions=2, num_rbf=5, max_z=9, elements=(1, 8), repulsion="zbl")
    params = init_params(config, jax.random.key(0))
    save_checkpoint(tmp_path / "x.safetensors", params, config)
    checkpoint = load_checkpoint(tmp_path / "x.safetensors")
    assert checkpoint.config == config
    for (name, value), (other, expected) in zip(
        sorted(flatten(checkpoint.params)), sorted(flatten(params)), strict=True
    ):
        assert name == other
        np.testing.assert_array_equal(value, np.asarray(expected))


def test_refusals_when_loading(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    name = "interaction_1.filter.dense_0.kernel"
    good = tensors()
    cases = [
        ({key: value for key, value in good.items() if key != name}, METADATA, f"{name} is missing"),
        ({**good, name: good[name][:-1]}, METADATA, f"{name}: expected shape"),
        ({**good, name: good[name] * np.float32(np.nan)}, METADATA, f"{name} holds NaN"),
        ({**good, "extra": good[name]}, METADATA, "extra is one too many"),
        ({**good, name: good[name].astype(np.int32)}, METADATA, f"{name}: expected float32"),
        (good, None, "without jaxff's configuration"),
        (good, {**METADATA, "format_version": "2"}, "format version"),
        (good, {**METADATA, "config": "{"}, "JSON"),
        (good, {**METADATA, "config": json.dumps({"architecture": "student", "hiden_dim": 3})}, "hidden_dim"),
        (good, {**METADATA, "certificate": "[1]"}, "certificate"),
    ]
    for leaves, metadata, words in cases:
        path.write_bytes(save(leaves, metadata))
        with pytest.raises(CheckpointError, match=r"x\.safetensors") as caught:
            load_checkpoint(path)
        assert words in str(caught.value)
    data = save(good, METADATA)
    for length in (0, 4, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"x\.safetensors"):
            load_checkpoint(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path / "absent.safetensors")
    with pytest.raises(CheckpointError, match="y"):
        load_checkpoint(tmp_path)


def test_refused_when_saving_nothing_written(tmp_path: Path) -> None:
    leaves = tensors()
    leaves["radial.widths"][0] = np.inf
    with pytest.raises(CheckpointError, match=r"radial\.widths holds NaN or infinity"):
        save_checkpoint(tmp_path / "x.safetensors", unflatten(leaves), SMALL)
    assert list(tmp_path.iterdir()) == []


def test_atomic_write(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    target.chmod(0o640)

    def fail() -> None:
        with atomic_write(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    with pytest.raises(FileNotFoundError, match="does not exist"), atomic_write(tmp_path / "absent" / "x"):
        pass
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path):
        pass


def test_load_potential(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.safetensors", PARAMS, SMALL, {"date": "today"})
    own = load_potential(tmp_path / "x.safetensors", dtype="float64")
    assert own.certificate == {"date": "today"}
    direct = load_potential(str(write_student(tmp_path / "x.pt")), dtype="float64")
    assert direct.certificate is None
    water = [8, 1, 1], [[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]]
    assert own.energy(*water) == direct.energy(*water)
    assert load_potential(tmp_path / "x.pt").dtype == np.float32
    assert isinstance(own, Potential)
    with pytest.raises(ConfigError, match="float16"):
        load_potential(tmp_path / "x.pt", dtype="float16")
    with pytest.raises(ConfigError, match="engine"):
        load_potential(tmp_path / "x.pt", engine="abacus")
    with pytest.raises(CheckpointError, match="no such file"):
        load_potential(tmp_path / "absent.pt")
