"""Checkpoints of a run with Orbax: the state's arrays, and beside them what the host must know; and model files."""

from __future__ import annotations

from collections.abc import Mapping
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

    def save(self, step: int, state: State, host: Mapping[str, Any]) -> None:
        """Write both, unless there is a checkpoint of this step."""
        if step in self._manager.all_steps():
            return
        args = self._ocp.args
        composite = args.Composite(state=args.StandardSave(_flat(state)), host=args.JsonSave(dict(host)))
        self._manager.save(step, args=composite, force=True)
        self._manager.wait_until_finished()

    def read_host(self, step: int) -> dict[str, Any]:
        """The host's part of a checkpoint. Raises TrainingError."""
        args = self._ocp.args
        return self._restore(step, host=args.JsonRestore())["host"]

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
