"""Damaged files of any kind: an import, or a CheckpointError, and never anything else."""

from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxff.config import StudentConfig
from jaxff.convert import read_student
from jaxff.convert.torch_writer import torch_archive
from jaxff.errors import CheckpointError
from tests.torch_student import SMALL, random_tensors, rezip, torch_state, unzip

TINY = SMALL.model_copy(update={"hidden_dim": 4, "num_interactions": 1, "max_z": 8})
KEEP = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@cache
def archive(config: StudentConfig) -> bytes:
    return torch_archive(random_tensors(config), config)


def attempt(path: Path) -> bool:
    try:
        read_student(path)
    except CheckpointError as error:
        assert path.name in str(error)  # noqa: PT017
        return False
    return True


def flipped(data: bytes, changes: list[tuple[float, int]]) -> bytes:
    copy = bytearray(data)
    for place, value in changes:
        copy[int(place * len(copy))] = value
    return bytes(copy)


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4)


@KEEP
@given(CHANGES)
def test_bytes_of_the_file(tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(flipped(archive(TINY), changes))
    attempt(path)


@KEEP
@given(CHANGES)
def test_bytes_of_the_pickle(tmp_path: Path, changes: list[tuple[float, int]]) -> None:
    members = unzip(archive(TINY))
    members["archive/data.pkl"] = flipped(members["archive/data.pkl"], changes)
    attempt(rezip(tmp_path / "x.pt", members))


@KEEP
@given(st.binary(max_size=200))
def test_any_bytes(tmp_path: Path, data: bytes) -> None:
    for head in (b"", b"\x80\x02", b"PK\x03\x04"):
        (tmp_path / "x.pt").write_bytes(head + data)
        assert not attempt(tmp_path / "x.pt")


def test_truncated_zip(tmp_path: Path) -> None:
    data = archive(TINY)
    for length in [*range(0, len(data), max(1, len(data) // 100)), len(data) - 1, len(data) - 2]:
        (tmp_path / "x.pt").write_bytes(data[:length])
        assert not attempt(tmp_path / "x.pt"), length


@pytest.mark.parametrize("damage", ["truncated", "changed"])
def test_legacy(tmp_path: Path, damage: str) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "x.pt"
    torch.save(torch_state(random_tensors(TINY)), path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    assert attempt(path)
    for place in [*range(0, len(data), max(1, len(data) // 200)), len(data) - 1]:
        path.write_bytes(data[:place] if damage == "truncated" else flipped(data, [(place / len(data), 0xFF)]))
        imported = attempt(path)
        assert not (imported and damage == "truncated"), place
