"""What NVRTC compiled is kept: the same bytes for the same key, and no file is needed."""

from pathlib import Path

import pytest

from jaxff.kernels.cuda.kept import kept


def test_made_once_and_again_if_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXFF_CACHE_DIR", str(tmp_path / "deep" / "cache"))
    made: list[str] = []

    def get(key: str) -> bytes:
        return kept((key, 90), lambda: made.append(key) or f"code of {key}".encode())  # type: ignore[func-returns-value]

    assert [get(key) for key in ("a", "b", "a")] == [b"code of a", b"code of b", b"code of a"]
    assert made == ["a", "b"]
    files = list((tmp_path / "deep" / "cache").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert get("a") == b"code of a"
    assert made == ["a", "b", "a"]


@pytest.mark.parametrize("folder", ["", "/proc/nowhere"])
def test_without_a_folder(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXFF_CACHE_DIR", folder)
    assert [kept("key", lambda: b"code") for _ in range(2)] == [b"code"] * 2
