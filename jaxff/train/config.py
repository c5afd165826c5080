"""Settings of a training run, from configs/train_organic.yaml or Python alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from jaxff.config import ModelConfig, PainnConfig, Settings, parse_settings, read_yaml
from jaxff.train.data import Units

# by a resumed run: how long, on what machine, how often it is looked at, and the data, whose change it sees itself
_MAY_CHANGE = {
    *("data.train", "data.valid", "data.test", "data.allow_overlap", "data.max_force", "data.on_bad"),
    *("run.steps", "run.devices", "run.log_every", "run.validate_every", "run.early_stop", "run.checkpoint_minutes"),
}


class DataConfig(Settings):
    """Which frames, and how they are split."""

    train: tuple[str, ...] = Field(min_length=1, description="files, folders or globs: .h5, .xyz, .extxyz, .db")
    valid: tuple[str, ...] | None = Field(default=None, description="null: split off by molecule")
    test: tuple[str, ...] | None = Field(
        default=None, description="null: split off by molecule (none if valid is given)"
    )
    fractions: tuple[float, float, float] = Field(
        default=(0.9, 0.05, 0.05), description="of molecules: train, valid, test"
    )
    split_seed: int = Field(default=0, ge=0, description="of the hash that splits molecules")
    allow_overlap: bool = Field(
        default=False, description="whether a molecule may be in two of the files named for train, valid and test"
    )
    max_frames: int | None = Field(default=None, ge=1, description="a random subset of all frames, for quick tries")
    units: Units = Field(default_factory=Units, description="of the files: energy, length")
    max_force: float = Field(default=100.0, gt=0.0, description="eV/Å; frames with larger force components are bad")
    on_bad: Literal["refuse", "drop"] = Field(default="refuse", description="what happens to bad frames")

    @field_validator("train", "valid", "test", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fractions_add_up(self) -> DataConfig:
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6 or self.fractions[0] == 0:
            raise ValueError(f"fractions must be positive and add up to 1, received {self.fractions}")
        return self


class LossTerm(Settings):
    """One term: weight times the mean of a function of the errors."""

    kind: Literal["mse", "mae", "huber"] = Field(default="huber", description="huber: x²/(2δ) below δ, |x| - δ/2 above")
    weight: float = Field(default=1.0, ge=0.0)
    delta: float = Field(default=0.01, gt=0.0, description="δ of huber, in the unit of the error")


class LossConfig(Settings):
    """energy: errors per atom, eV; force: components, eV/Å; angular: 1 - cos between force vectors."""

    energy: LossTerm = LossTerm(weight=10.0, delta=0.001)
    force: LossTerm = LossTerm()
    angular_weight: float = Field(default=0.0, ge=0.0, description="of the mean of 1 - cos(F, F_label)")
    angular_min_force: float = Field(default=0.05, gt=0.0, description="eV/Å; smaller labels have no direction")


class OptimizerConfig(Settings):
    """AdamW with clipping, and the moving average of the parameters that is validated and exported."""

    learning_rate: float = Field(default=1e-3, gt=0.0, description="the largest")
    weight_decay: float = Field(default=1e-4, ge=0.0, description="on kernels only")
    beta1: float = Field(default=0.9, ge=0.0, lt=1.0)
    beta2: float = Field(default=0.999, ge=0.0, lt=1.0)
    clip_norm: float | None = Field(default=1.0, gt=0.0, description="largest norm of the gradient; null: no clipping")
    ema_decay: float = Field(default=0.999, ge=0.0, lt=1.0, description="at step t: min(this, (1 + t)/(10 + t))")


class ScheduleConfig(Settings):
    """The learning rate over the steps."""

    kind: Literal["cosine", "plateau", "constant"] = "cosine"
    warmup_steps: int = Field(default=1000, ge=0)
    final_learning_rate: float = Field(
        default=1e-6, ge=0.0, description="cosine: at the last step; plateau: the smallest"
    )
    factor: float = Field(default=0.5, gt=0.0, lt=1.0, description="plateau: multiplies the rate")
    patience: int = Field(default=5, ge=1, description="plateau: validations without a better one")


class RunConfig(Settings):
    """How long, how often, on what."""

    steps: int = Field(default=100_000, ge=1)
    batch_size: int = Field(default=64, ge=1, description="frames in a batch, for each device")
    padding: float = Field(default=1.1, ge=1.0, le=4.0, description="room of a batch over the mean, atoms and pairs")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of first parameters and of the order of frames")
    dtype: Literal["float32", "float64"] = "float32"
    devices: int | None = Field(default=None, ge=1, description="null: all of the default backend")
    log_every: int = Field(default=100, ge=1, description="steps between two rows of metrics.csv")
    validate_every: int = Field(default=2000, ge=1, description="steps")
    validation_frames: int = Field(default=2000, ge=1, description="a fixed subset")
    early_stop: int | None = Field(default=None, ge=1, description="validations without a better one; null: never")
    checkpoint_minutes: float = Field(default=5.0, gt=0.0)


class TrainConfig(Settings):
    """A training run. `model` is ignored where parameters come from a file (--init)."""

    model: ModelConfig = PainnConfig.model_validate({})
    data: DataConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    run: RunConfig = RunConfig()


def load_train_config(path: str | Path, steps: int | None = None) -> TrainConfig:
    """Settings from a YAML file; `steps` replaces run.steps.

    Raises ConfigError: the file can't be read or isn't YAML, or a key is unknown or out of range.
    """
    data = read_yaml(path)
    if steps is not None:
        run = data.get("run") or {}
        data["run"] = {**run, "steps": steps} if isinstance(run, Mapping) else run
    return parse_settings(TrainConfig, data, str(path))


def dump_train_config(config: TrainConfig) -> str:
    """The settings as YAML that `load_train_config` reads."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, default_flow_style=None)
    return f"# Settings of this run; `jaxff train THIS_FILE` repeats it.\n{text}"


def resume_conflicts(before: Mapping[str, Any], now: TrainConfig) -> tuple[list[str], list[str]]:
    """What differs from the settings of a checkpoint: what makes another curve, and what is merely to be noted."""
    fatal: list[str] = []
    notes: list[str] = []
    then = parse_settings(TrainConfig, before, "the checkpoint's settings")  # what it doesn't know has its default
    old, new = _flat(then.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in sorted(old.keys() | new.keys()):
        was, is_ = old.get(key), new.get(key)
        if was != is_:
            (notes if key in _MAY_CHANGE else fatal).append(f"{key}: {was!r} before, {is_!r} now")
    return fatal, notes


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= _flat(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
