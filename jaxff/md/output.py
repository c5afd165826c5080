"""The folder that a simulation leaves behind."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from jaxff.errors import SimulationError
from jaxff.files import atomic_write


@dataclass(frozen=True)
class Output:
    """Paths of a run's files."""

    folder: Path

    @property
    def trajectory(self) -> Path:
        return self.folder / "trajectory.xyz"

    @property
    def log(self) -> Path:
        return self.folder / "log.csv"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def summary(self) -> Path:
        return self.folder / "summary.json"

    @property
    def picture(self) -> Path:
        return self.folder / "energy.png"

    def check(self, overwrite: bool) -> None:
        """Raises SimulationError where a run would be lost, or the folder is a file."""
        found = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not found.is_dir():
            raise SimulationError(f"{self.folder}: expected a folder for the output, but {found} is a file")
        if not os.access(found, os.W_OK):
            raise SimulationError(f"{self.folder}: expected a folder that can be written to, but {found} can't")
        taken = [path.name for path in self._files() if path.exists()]
        if taken and not overwrite:
            raise SimulationError(
                f"{self.folder}: already holds a run ({', '.join(taken)}): name another folder or pass --overwrite"
            )

    def prepare(self, config: str) -> None:
        """Make the folder, remove the files of a run that may be overwritten, write the configuration."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._files():
                path.unlink(missing_ok=True)
            self.write(self.config, config)
        except OSError as error:
            raise SimulationError(f"{self.folder}: can't be written to ({error.strerror})") from None

    def write(self, path: Path, text: str) -> None:
        """A whole file at once."""
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def _files(self) -> tuple[Path, ...]:
        return self.trajectory, self.log, self.config, self.summary, self.picture
