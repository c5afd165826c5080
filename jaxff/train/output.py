"""The files of a training run, and whether a folder may take them."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from jaxff.errors import TrainingError
from jaxff.files import atomic_write


@dataclass(frozen=True)
class Output:
    """Paths of a run's files."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        files = {
            "config": "config.yaml",
            "metrics": "metrics.csv",
            "curve": "curve.png",
            "summary": "summary.json",
            "split": "split.csv",
            "best": "best.safetensors",
            "last": "last.safetensors",
            "checkpoints": "checkpoints",
        }
        if name not in files:
            raise AttributeError(name)
        return self.folder / files[name]

    def write(self, path: Path, text: str) -> None:
        """A whole file at once."""
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def make(self) -> None:
        """The folder. Raises TrainingError where it can't be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(f"{self.folder}: can't be written to ({error.strerror})") from None
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise TrainingError(f"{self.folder}: can't be written to (no permission)")

    @property
    def has_checkpoints(self) -> bool:
        """Whether a run can go on here."""
        return self.checkpoints.is_dir() and any(self.checkpoints.iterdir())

    @property
    def may_resume(self) -> bool:
        """Whether --resume means this folder: a run to go on with, or no models that a new one would replace."""
        return self.has_checkpoints or not (self.best.exists() or self.last.exists())

    def old_run(self, overwrite: bool) -> list[Path]:
        """What an earlier run left, if it may be replaced. Raises TrainingError."""
        taken = [path for path in (self.metrics, self.best, self.last, self.summary) if path.exists()]
        if self.has_checkpoints:
            taken.append(self.checkpoints)
        if taken and not overwrite:
            names = ", ".join(path.name for path in taken)
            way = "--overwrite (there is no checkpoint to resume from)"
            way = "--resume or --overwrite" if self.has_checkpoints else way
            raise TrainingError(f"{self.folder}: already holds a run ({names}): name another folder, or pass {way}")
        return taken


def remove(path: Path) -> None:
    """A file, or a folder with all in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
