"""What is trained here: the frames, the model and its settings, batches of the shape that `organic` had."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxff import models
from jaxff.loading import load_potential
from jaxff.models.parameters import Params
from jaxff.train.batches import Packer, Shape, Store, make_store
from jaxff.train.config import TrainConfig, load_train_config
from jaxff.train.frames import Frames
from jaxff.train.hdf5 import read_hdf5
from jaxff.train.references import fit_references, remainders

ROOT = Path(__file__).parents[2]
ORGANIC = ROOT / "experiments" / "organic_gfn2"
FILES = ("frames_300K", "frames_mixed", "torsions", "drug", "small")
VALIDATION = 8  # every so many-th molecule


@dataclass(frozen=True)
class Workload:
    """Labelled frames and the settings of a run. `shape` is one device's batch."""

    config: TrainConfig
    frames: Frames
    shape: Shape
    train: Int[np.ndarray, "a"]
    valid: Int[np.ndarray, "b"]

    def store(self, dtype: Any = np.float32, references: Float[np.ndarray, "Z"] | None = None) -> Store:
        """The frames, ready to be packed, labelled with what `references` (None: fitted) leave of the energies."""
        model = self.config.model
        if references is None:
            references = fit_references(self.frames, model.max_z, chosen=self.train)
        return make_store(self.frames, remainders(self.frames, references), model.cutoff, dtype)

    def random(self, seed: int = 0) -> Params:
        """First parameters."""
        return jax.tree.map(np.asarray, models.init_params(self.config.model, jax.random.key(seed)))

    def packer(self, store: Store, devices: int = 1, share: int = 1) -> Packer:
        """Batches for `devices`, each as large as `share` of the usual ones."""
        return Packer(store, Shape(*(share * size for size in self.shape)), devices)


def trained() -> tuple[Params, Float[np.ndarray, "Z"]]:
    """Parameters of the model that ships, without its references of the elements; and these, in float64."""
    potential = load_potential("organic", dtype="float64", engine="xla")
    tree = jax.tree.map(lambda x: np.asarray(x, np.float32), potential.params)
    energies = np.asarray(potential.params["reference"]["energies"], np.float64)
    return {**tree, "reference": jax.tree.map(np.zeros_like, tree["reference"])}, energies


def organic(steps: int, warmup: int = 100, model: dict[str, Any] | None = None, shape: Shape | None = None) -> Workload:
    """configs/train_organic.yaml on the held-out molecules of experiments/organic_gfn2, which have GFN2-xTB's labels.

    steps, warmup: of the cosine. model, shape: other settings and batches than those of `organic`, for tests.
    """
    config = load_train_config(ROOT / "configs" / "train_organic.yaml")
    updates: dict[str, Any] = {
        "schedule": config.schedule.model_copy(update={"warmup_steps": warmup}),
        "run": config.run.model_copy(update={"steps": steps}),
        "optimizer": config.optimizer.model_copy(update={"ema_decay": 0.99}),
        "model": config.model.model_copy(update=model or {}),
    }
    config = config.model_copy(update=updates)
    frames = joined([read_hdf5(ORGANIC / "reference" / f"{name}.h5").frames for name in FILES])
    names = sorted(set(frames.molecules))
    held = np.isin(frames.molecules, names[::VALIDATION])
    if shape is None:
        summary = json.loads((ORGANIC / "results/training/organic/summary.json").read_text(encoding="utf-8"))
        shape = Shape(**summary["batch"])
    return Workload(config, frames, shape, np.flatnonzero(~held), np.flatnonzero(held))


def joined(parts: list[Frames]) -> Frames:
    """Several sets of frames as one."""
    splits = np.concatenate([[0], np.cumsum(np.concatenate([part.num_atoms for part in parts]))])
    arrays = [
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("numbers", "positions", "energies", "forces", "molecules")
    ]
    numbers, positions, energies, forces, molecules = arrays
    return Frames(numbers, positions, energies, forces, splits.astype(np.int64), molecules)
