"""Checkpoints of a run with Orbax: the state's arrays, and beside them what the host must know; and model files."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxff.checkpoint import save_checkpoint
from jaxff.config import PainnConfig, StudentConfig
from jaxff.errors import TrainingError
from jaxff.models.parameters import Params
from jaxff.train.batches import Position
from jaxff.train.step import State

KEEP = 2


@dataclass
class Course:
    """What the host keeps of a run between its steps; all of it goes into checkpoints."""

    position: Position = field(default_factory=Position)
    elapsed_s: float = 0.0
    best_loss: float | None = None
    best_step: int | None = None
    best_errors: dict[str, Any] | None = None
    errors: dict[str, Any] | None = None  # of the last validation
    validations_since_best: int = 0
    validations_since_cut: int = 0  # of the learning rate

    def dump(self) -> dict[str, Any]:
        """Plain JSON."""
        return self.__dict__ | {"position": list(self.position)}

    @staticmethod
    def load(data: dict[str, Any]) -> Course:
        """The inverse of `dump`."""
        return Course(**(data | {"position": Position(*data["position"])}))


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says besides the arrays of its state."""

    config: dict[str, Any]
    data_sha256: str
    training_frames: int
    references: list[float] | None  # eV, by atomic number
    course: Course
    init: str | None = None  # the model that the run started from
    frozen: dict[str, dict[str, list[float]]] | None = None  # parameters that aren't trained; None: an older checkpoint

    @property
    def frozen_params(self) -> Params:
        """The parameters that aren't trained, float64."""
        return {
            name: {leaf: np.array(values, np.float64) for leaf, values in leaves.items()}
            for name, leaves in (self.frozen or {}).items()
        }

    def dump(self) -> dict[str, Any]:
        """Plain JSON."""
        return self.__dict__ | {"course": self.course.dump()}

    @staticmethod
    def load(data: dict[str, Any]) -> Saved:
        """The inverse of `dump`."""
        return Saved(**(data | {"course": Course.load(data["course"])}))


def plain(frozen: Params) -> dict[str, dict[str, list[float]]]:
    """Parameters as `Saved.frozen` holds them; the references stand for themselves there."""
    return {
        name: {leaf: np.asarray(values, np.float64).tolist() for leaf, values in leaves.items()}
        for name, leaves in frozen.items()
        if name != "reference"
    }


class Saver:
    """The checkpoints in a folder; the last two are kept. A context manager."""

    def __init__(self, folder: Path) -> None:
        import orbax.checkpoint as ocp

        self._ocp = ocp
        options = ocp.CheckpointManagerOptions(max_to_keep=KEEP, enable_async_checkpointing=False, create=True)
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, host: Saved) -> None:
        """Write both, unless there is a checkpoint of this step."""
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        composite = args.Composite(state=args.StandardSave(_flat(state)), host=args.JsonSave(host.dump()))
        self._manager.save(step, args=composite, force=True)
        self._manager.wait_until_finished()

    def read_host(self, step: int) -> Saved:
        """The host's part of a checkpoint. Raises TrainingError."""
        args = self._ocp.args
        return Saved.load(self._restore(step, host=args.JsonRestore())["host"])

    def read_state(self, step: int, like: State) -> State:
        """The state of a checkpoint, as NumPy arrays of the shapes of `like`. Raises TrainingError."""
        args = self._ocp.args
        target = _flat(like)
        found = self._restore(step, state=args.StandardRestore(target))["state"]
        for name, leaf in target.items():
            if np.shape(found[name]) != leaf.shape or found[name].dtype != leaf.dtype:
                raise TrainingError(
                    f"{self.folder}: {name}: expected {leaf.dtype}{list(leaf.shape)},"
                    f" received {found[name].dtype}{list(np.shape(found[name]))}"
                )
        return jax.tree.unflatten(jax.tree.structure(like), [np.array(found[name]) for name in target])

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise TrainingError(
                f"{self.folder}: checkpoint {step} can't be read ({error}); without its folder, the one before is used"
            ) from None


def read_latest(folder: Path) -> Saved | None:
    """What the newest checkpoint in a folder says; None where there is none. Raises TrainingError."""
    with Saver(folder) as saver:
        return None if saver.latest is None else saver.read_host(saver.latest)


def export(
    path: Path, params: Params, references: np.ndarray | None, config: PainnConfig | StudentConfig, record: Any
) -> None:
    """Parameters as a model file, the references (eV, float64) in their place, with a record of its training."""
    params = jax.tree.map(np.asarray, params)
    if references is not None:
        params["reference"] = {"energies": references}
    save_checkpoint(path, params, config, {"training": record})


def _flat(state: State) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}
