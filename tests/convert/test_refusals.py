"""Bad files: one clear line that names file and tensor, nothing written, nothing run."""

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from jaxff.convert import convert, read_student
from jaxff.convert.torch_writer import torch_archive
from jaxff.errors import CheckpointError
from tests.torch_student import (
    SMALL,
    legacy_of_pickle,
    random_tensors,
    rezip,
    torch_state,
    unzip,
    with_entry,
    write_student,
    zip_of_pickle,
)

MIXING = "interactions.1.update.mixing_matrix"


def refused(path: Path, *words: str) -> str:
    target = path.with_name("out.safetensors")
    with pytest.raises(CheckpointError) as caught:
        convert(path, target)
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    for word in words:
        assert word in message
    assert not target.exists()
    assert sorted(path.parent.glob(".*")) == []
    return message


@pytest.mark.parametrize("name", list(random_tensors()))
def test_missing_tensor(tmp_path: Path, name: str) -> None:
    tensors = random_tensors()
    del tensors[name]
    refused(write_student(tmp_path / "x.pt", tensors), name, "missing")


@pytest.mark.parametrize("name", list(random_tensors()))
def test_wrong_shape(tmp_path: Path, name: str) -> None:
    tensors = random_tensors()
    if name == "embedding.weight":
        tensors[name] = tensors[name][:, :-1]  # the number of rows is free
    else:
        tensors[name] = np.concatenate([tensors[name], tensors[name][:1]])
    refused(write_student(tmp_path / "x.pt", tensors), name, "expected shape")


def test_extra_tensors(tmp_path: Path) -> None:
    for name in ("extra", "energy_head.6.bias", "interactions.0.update.other", "embedding.weight2"):
        tensors = {**random_tensors(), name: np.zeros(3, np.float32)}
        refused(write_student(tmp_path / "x.pt", tensors), name, "one too many")
        prefixed = {f"model.{key}": value for key, value in random_tensors().items()}
        refused(write_student(tmp_path / "x.pt", {**prefixed, name: tensors[name]}), name, "one too many")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_not_finite(tmp_path: Path, value: float, dtype: type) -> None:
    tensors = random_tensors(dtype=dtype)
    tensors[MIXING][2, 1] = value
    refused(write_student(tmp_path / "x.pt", tensors), MIXING, "[2, 1]", "finite")


def test_width_of_zero(tmp_path: Path) -> None:
    """It would make every energy NaN."""
    tensors = random_tensors()
    tensors["rbf.widths"][3] = 0.0
    refused(write_student(tmp_path / "x.pt", tensors), "rbf.widths", "0")


def test_not_floating(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for convert_to in ("long", "bool", "cfloat"):
        state = torch_state(random_tensors())
        state[MIXING] = getattr(state[MIXING], convert_to)()
        torch.save(state, tmp_path / "x.pt")
        refused(tmp_path / "x.pt", MIXING, "floating-point")
    state[MIXING] = torch.eye(3).to_sparse()
    torch.save(state, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", MIXING, "dense")


def test_names_from_the_file_stay_on_one_line(tmp_path: Path) -> None:
    tensors = {f"a\nb\x1b[2J.{key}": value for key, value in random_tensors().items()}
    del tensors["a\nb\x1b[2J.rbf.widths"]
    message = refused(write_student(tmp_path / "x.pt", tensors), "a?b?[2J.rbf.widths", "missing")
    assert message.isprintable()


def test_two_models(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    one, other = torch_state(random_tensors()), torch_state(random_tensors(seed=1))
    torch.save({"a": one, "b": other}, tmp_path / "x.pt")
    refused(tmp_path / "x.pt", "more than one model")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    contents = {
        b"": "empty",
        b"hello, world\n": "not a checkpoint",
        b"\x89HDF\r\n\x1a\n": "HDF5",
        b"\x80\x02": "damaged",
        b"PK\x03\x04": "truncated",
        pickle.dumps({"a": 1}): "magic number",
        bytes(range(256)) * 8: "not a checkpoint",
        b"\0" * 257 + b"ustar\0": "tar",
    }
    for content, word in contents.items():
        path.write_bytes(content)
        refused(path, word)
    refused(rezip(path, {"readme.txt": b"hello"}), "data.pkl")
    refused(rezip(path, {"a/data.pkl": b"N.", "b/data.pkl": b"N."}), "data.pkl")
    refused(zip_of_pickle(path, pickle.dumps({"epoch": 3}, 2)), "without any tensor")
    refused(legacy_of_pickle(path, pickle.dumps([1, 2], 2)), "without any tensor")
    with pytest.raises(CheckpointError, match="no such file"):
        convert(tmp_path / "absent.pt", tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="folder"):
        convert(tmp_path, tmp_path / "out.safetensors")


def test_another_model(tmp_path: Path) -> None:
    path = write_student(tmp_path / "x.pt", {"encoder.weight": np.zeros((2, 2), np.float32)})
    refused(path, "holds no student")


def test_damaged_member(tmp_path: Path) -> None:
    data = bytearray(torch_archive(random_tensors(), SMALL))
    position = bytes(data).index(random_tensors()["embedding.weight"].tobytes())
    data[position + 5] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    refused(tmp_path / "x.pt", "damaged")
    members = unzip(torch_archive(random_tensors(), SMALL))
    members["archive/data/3"] = members["archive/data/3"][:-4]
    refused(rezip(tmp_path / "x.pt", members), "incomplete")
    del members["archive/data/3"]
    refused(rezip(tmp_path / "x.pt", members), "data/3", "missing")


def test_duplicate_member(tmp_path: Path) -> None:
    path = write_student(tmp_path / "x.pt")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"N.")
    refused(path, "one name")


def test_zip_bomb(tmp_path: Path) -> None:
    members = unzip(torch_archive(random_tensors(), SMALL))
    members["archive/data/99"] = b"\0" * 60_000_000
    path = rezip(tmp_path / "x.pt", members, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 200_000
    refused(path, "beyond reason")


@pytest.mark.parametrize("shape", [(2**40,), (1 << 20, 1 << 20), (2**61, 2**61)])
def test_repeated_memory(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A view with strides of 0 that would take terabytes."""
    body = unzip(torch_archive(random_tensors(), SMALL))["archive/data.pkl"]
    name = b"rbf.widths"
    start = body.index(name)
    old = b"(K\x06t(K\x01t"  # shape (6,), strides (1,)
    long = b"".join(b"\x8a\x09" + size.to_bytes(9, "little") for size in shape)
    new = b"(" + long + b"t(" + b"K\x00" * len(shape) + b"t"
    members = unzip(torch_archive(random_tensors(), SMALL))
    members["archive/data.pkl"] = body[:start] + body[start:].replace(old, new, 1)
    refused(rezip(tmp_path / "x.pt", members), "rbf.widths")


def test_view_beyond_its_storage(tmp_path: Path) -> None:
    members = unzip(torch_archive(random_tensors(), SMALL))
    body = members["archive/data.pkl"]
    start = body.index(b"rbf.widths")
    members["archive/data.pkl"] = body[:start] + body[start:].replace(b"QK\x00(", b"QK\x01(", 1)
    refused(rezip(tmp_path / "x.pt", members), "rbf.widths", "exceeds")


def billion_laughs() -> bytes:
    """t = (t, t), sixty times over: small in memory, endless to hash, print or walk."""
    return b")" + b"2\x86" * 60


PICKLE_BOMBS: dict[str, Callable[[], bytes]] = {
    "nested tuples as a value": billion_laughs,
    "nested tuples as a key": lambda: b"}" + billion_laughs() + b"Ns",
    "deep lists": lambda: b"](" * 30_000 + b"l" * 30_000,
    "dict that holds itself": lambda: b"}q\x00K\x01h\x00s",
    "copies of a long list": lambda: b"(" + b"N" * 100_000 + b"lq\x00" + b"cbuiltins\nset\nh\x00\x85R0" * 3000,
    "bytearray of a petabyte": lambda: b"cbuiltins\nbytearray\n\x8a\x07" + (10**15).to_bytes(7, "little") + b"\x85R",
    "long integer": lambda: b"\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01",
    "bytes without end": lambda: b"\x8e" + struct.pack("<Q", 2**62) + b"abc",
    "text without end": lambda: b"\x8d" + struct.pack("<Q", 2**40) + b"abc",
    "memo at the end of the world": lambda: b"Nr\xff\xff\xff\xff",
    "colliding keys": lambda: (
        b"}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(3000)) + b"u"
    ),
    "pairs copied": lambda: (
        b"(" + b"(NNt" * 50_000 + b"lq\x000" + b"ccollections\nOrderedDict\nh\x00\x85R0" * 2000 + b"N"
    ),
    "encoded again and again": lambda: (
        b"X" + struct.pack("<I", 2_000_000) + b"a" * 2_000_000 + b"q\x000"
        + b"c_codecs\nencode\n(h\x00X\x06\x00\x00\x00latin1tR0" * 2000 + b"N"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PICKLE_BOMBS))
def test_pickle_bombs_end_soon(tmp_path: Path, name: str) -> None:
    """They import, or are refused, but take neither time nor memory."""
    path = with_entry(tmp_path / "x.pt", "bomb", PICKLE_BOMBS[name]())
    try:
        read_student(path)
    except CheckpointError as error:
        assert path.name in str(error)  # noqa: PT017


def test_destination(tmp_path: Path) -> None:
    source = write_student(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        convert(source, tmp_path / "absent" / "out.safetensors")
    with pytest.raises(CheckpointError, match="another file"):
        convert(source, source)
    with pytest.raises(CheckpointError, match="expected the name"):
        convert(source, tmp_path / "out.pt")
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    convert(source, target, certify=False)
    assert target.stat().st_size > 1000
    with pytest.raises(CheckpointError, match=r"received a \.safetensors"):
        convert(target, tmp_path / "again.safetensors")
