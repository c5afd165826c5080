"""A training run: frames in, a model file out; it can be stopped at any step and goes on along the same curve."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxff import models
from jaxff.checkpoint import load_checkpoint
from jaxff.config import parse_model_config
from jaxff.errors import ConfigError, TrainingError
from jaxff.loading import load_potential
from jaxff.models.parameters import Params
from jaxff.train.batches import Batch, Packer, Position, Prefetch, Store, Work, batch_shape, stream
from jaxff.train.config import TrainConfig, dump_train_config, resume_conflicts
from jaxff.train.dataset import Dataset, load_dataset
from jaxff.train.output import Output, remove
from jaxff.train.references import fit_references, remainders
from jaxff.train.report import Metrics, Row, errors_of, plot_curve, training_record, versions
from jaxff.train.saving import Course, Saved, Saver, export, plain, read_latest
from jaxff.train.step import State, Steps, split_frozen

Note = Callable[[str], None]
TOO_MANY_SKIPPED = 10  # steps in a row
PLOT_SECONDS = 60.0
REFERENCE_FRAMES = 2000  # that element references are corrected on, where a model is given
SECONDS_BETWEEN_STATUSES = 0.2


@dataclass(frozen=True)
class Status:
    """Told while a run goes on; figures are None until they are known."""

    step: int
    steps: int
    loss: float | None = None
    frames_per_s: float | None = None
    valid_energy_mae: float | None = None  # meV/atom
    valid_force_mae: float | None = None  # meV/Å


@dataclass(frozen=True)
class Result:
    """How a run ended: "completed" (all steps), "early" (no better validation), "stopped" (asked, or out of time)."""

    status: Literal["completed", "early", "stopped"]
    step: int
    summary: dict[str, Any]


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    init: str | Path | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    overwrite: bool = False,
    progress: Callable[[Status], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
    note: Note = lambda _: None,
) -> Result:
    """Train as `config` says; results go into the folder `output` (config.yaml, metrics.csv, curve.png, split.csv,
    best.safetensors, last.safetensors, summary.json, checkpoints/).

    init: a model to start from (a file or a pretrained name), whose configuration replaces config.model; its element
    references are corrected by least squares on what it leaves of the energies. resume: go on with the run in
    `output`, or start it where there is none; `init` is then not read. max_minutes: stop then, with a checkpoint. stop:
    asked at each step. While it runs, the frames lie on the disk of `output` (36 bytes an atom, 4 a pair of atoms), in
    a file without a name, which goes with the process. Raises ConfigError, DataError, CheckpointError; TrainingError
    where the folder is taken, the run to resume has other settings, or ten steps in a row gave a loss or gradient that
    isn't finite.
    """
    started = time.monotonic()
    if max_minutes is not None and not max_minutes >= 0:
        raise ConfigError(f"expected max_minutes of at least 0, received {max_minutes}")
    paths = Output(Path(output))
    resume = resume and paths.may_resume
    old = [] if resume else paths.old_run(overwrite)
    paths.make()
    saved = read_latest(paths.checkpoints) if resume and paths.has_checkpoints else None
    if saved is None:
        params, config = _start_parameters(config, init, note)
    else:
        params, config = _parameters_to_go_on(config, init, saved, paths, note)
        init = saved.init
    dataset = load_dataset(config.data, config.model, note, paths.folder)
    steps = Steps(config.model, config)
    for path in old:  # only now: nothing is lost to a run that can't start
        remove(path)
    with Saver(paths.checkpoints) as saver:
        run = _Run(config, dataset, params, None if init is None else str(init), paths, saver, steps, progress, note)
        if saved is None or saver.latest is None:
            run.begin()
        else:
            run.restore(saver.latest, saved)
        deadline = None if max_minutes is None else started + 60 * max_minutes
        with run.steps.precision():
            return run.go(stop, deadline)


def _start_parameters(config: TrainConfig, init: str | Path | None, note: Note) -> tuple[Params, TrainConfig]:
    if init is None:
        with jax.enable_x64(config.run.dtype == "float64"):
            key = jax.random.key(config.run.seed)
            params = models.init_params(config.model, key, np.dtype(config.run.dtype))
            return jax.tree.map(np.asarray, params), config
    potential = load_potential(init, dtype="float64", engine="xla")
    if potential.config != config.model:
        note(f"the model's settings are those of {init}")
    return jax.tree.map(np.asarray, potential.params), config.model_copy(update={"model": potential.config})


def _parameters_to_go_on(
    config: TrainConfig, init: str | Path | None, saved: Saved, paths: Output, note: Note
) -> tuple[Params, TrainConfig]:
    """Parameters of the right shapes, the frozen ones as the run has them, and the settings. Raises TrainingError."""
    if saved.frozen is None:  # an older checkpoint, which needs --init again
        params, config = _start_parameters(config, init, note)
    else:
        if init is not None and str(init) != saved.init:
            note(f"{init} is not read: the run goes on from its checkpoint")
        if saved.init is not None:  # its settings stood in for config.model, then as now
            model = parse_model_config(saved.config["model"])
            config = config.model_copy(update={"model": model})
        params, config = _start_parameters(config, None, note)
        params |= saved.frozen_params
    fatal, notes = resume_conflicts(saved.config, config)
    if fatal:
        raise TrainingError(
            f"{paths.folder}: can't go on with other settings ({'; '.join(fatal)}): it would be another curve. Set them"
            f" back, or start a new run from its parameters (--init {paths.last}, another folder)"
        )
    for line in notes:
        note(f"changed since the checkpoint: {line}")
    return params, config


class _Run:
    """The parts of a run, and what happens at its events."""

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        params: Params,
        init: str | None,
        paths: Output,
        saver: Saver,
        steps: Steps,
        progress: Callable[[Status], None] | None,
        note: Note,
    ) -> None:
        self.config, self.dataset, self.paths, self.saver = config, dataset, paths, saver
        self.progress, self.note = progress or (lambda _: None), note
        self.steps = steps
        self.params, self.init = params, init
        self.references: np.ndarray | None = None
        if "reference" in params:
            self.references = np.asarray(params["reference"]["energies"], np.float64)
        self.course = Course()
        self.state: State
        self.metrics: Metrics
        self.last_row: Row = {}
        self._recent: deque[tuple[int, list[np.ndarray]]] = deque(maxlen=4 * TOO_MANY_SKIPPED)
        self._valid: list[Batch] | None = None

    # --- start ---

    def begin(self) -> None:
        """A new run."""
        if self.references is not None:
            self.references = self.references + self._reference_correction(self.references)
        trained, _ = split_frozen(self.params)
        self._set_up(self.steps.first_state(trained))
        self.metrics = Metrics(self.paths.metrics)

    def _reference_correction(self, references: np.ndarray) -> np.ndarray:
        """Least squares on what the energies hold beyond `references`, and beyond the model where it was given."""
        frames, train, model = self.dataset.frames, self.dataset.train, self.config.model
        if not np.any(references):
            return fit_references(frames, model.max_z, chosen=train)
        chosen = train[np.sort(np.random.default_rng(0).permutation(len(train))[:REFERENCE_FRAMES])]
        store = self._store(references)
        shape = batch_shape(store, self.config.run.batch_size, 1.1, chosen)
        packer = Packer(store, shape, self.steps.devices)
        trained, frozen = self._on_devices()
        rest = store.energies.astype(np.float64)
        for group in packer.groups(chosen):
            energies = np.asarray(self.steps.energies(trained, frozen, self.steps.put(packer.pack(group))))
            for ids, row in zip(group, energies, strict=True):
                rest[ids] -= row[: len(ids)]
        return fit_references(replace(frames, energies=rest), model.max_z, chosen=chosen)

    def _store(self, references: np.ndarray | None) -> Store:
        """All frames; labels: what `references` leave of their energies."""
        records = self.dataset.frames
        labels = records.energies if references is None else remainders(records, references)
        return Store(records, labels.astype(self.steps.dtype))

    def _on_devices(self) -> tuple[Params, Params]:
        """Trained and frozen parameters; the references are in the labels, not in the model, while it is trained."""
        trained, frozen = split_frozen(self.params)
        if "reference" in frozen:
            frozen = {**frozen, "reference": jax.tree.map(np.zeros_like, frozen["reference"])}
        cast = jax.tree.map(lambda x: np.asarray(x, self.steps.dtype), (trained, frozen))
        return self.steps.replicate(cast)

    def restore(self, step: int, saved: Saved) -> None:
        """The run of a checkpoint."""
        self.references = None if saved.references is None else np.array(saved.references, np.float64)
        self.course = saved.course
        now = self.dataset.checksum, len(self.dataset.train)
        if (saved.data_sha256, saved.training_frames) != now:
            self.note(
                f"the data changed since the checkpoint ({saved.training_frames} training frames before,"
                f" {len(self.dataset.train)} now): going on with a new epoch"
            )
            self.course.position = Position(self.course.position.epoch + 1, 0)
        trained, _ = split_frozen(self.params)
        self._set_up(self.saver.read_state(step, self.steps.first_state(trained)))
        self.metrics = Metrics(self.paths.metrics, step)
        self.note(f"going on at step {step}")

    def _set_up(self, state: State) -> None:
        """Labels and batches, now that the references are known; parameters go to the devices."""
        store = self._store(self.references)
        shape = batch_shape(store, self.config.run.batch_size, self.config.run.padding)
        self.packer = Packer(store, shape, self.steps.devices)
        _, self.frozen = self._on_devices()
        self.state = self.steps.replicate(state)
        self.paths.write(self.paths.config, dump_train_config(self.config))
        rows = "".join(f'"{molecule}",{name}\n' for molecule, name in self.dataset.split_rows())
        self.paths.write(self.paths.split, "molecule,split\n" + rows)

    # --- the run ---

    def go(self, stop: Callable[[], bool], deadline: float | None) -> Result:
        """Steps until all are done, or something ends them."""
        run = self.config.run
        step = int(self.state.step)
        works = stream(self.packer, self.dataset.train, run.seed, self.course.position)
        clock = self._clock = _Clock(self.course.elapsed_s)
        status: Literal["completed", "early", "stopped"] = "completed"
        self.save(step)  # a kill from now on leaves what --resume goes on from
        with Prefetch(works, self.steps.put) as batches:
            while step < run.steps:
                if stop() or (deadline is not None and time.monotonic() > deadline):
                    status = "stopped"
                    break
                work = next(batches)
                self.state = self.steps.train(self.state, self.frozen, work.batch)
                step += 1
                self._passed(step, work)
                if self._events(step) and run.early_stop is not None:
                    status = "early"
                    break
                if clock.due("checkpoint", 60 * run.checkpoint_minutes):
                    self.save(step)
        return self._finish(step, status)

    def _passed(self, step: int, work: Work) -> None:
        self.course.position = work.after
        self._recent.append((step, work.frames))
        self._clock.frames += sum(map(len, work.frames))
        if self._clock.due("status", SECONDS_BETWEEN_STATUSES):
            self._tell(step)

    def _events(self, step: int) -> bool:
        """Log and validate where it is time; whether the run has waited long enough for a better validation."""
        run = self.config.run
        last = step == run.steps
        validate = last or step % run.validate_every == 0
        if not (validate or step % run.log_every == 0):
            return False
        row = self._log(step)
        if validate:
            row |= self._validate(step)
        self.metrics.append(row)
        if validate and (last or self._clock.due("plot", PLOT_SECONDS)):
            self._plot()
        return validate and self.course.validations_since_best >= (run.early_stop or step + 1)

    def _log(self, step: int) -> Row:
        """The means since the last row; waits for the devices."""
        sums, skipped, in_a_row = jax.device_get((self.state.sums, self.state.skipped, self.state.skipped_in_a_row))
        if in_a_row >= TOO_MANY_SKIPPED:
            raise TrainingError(self._diverged(int(in_a_row)))
        self.state = self.state._replace(sums=self.steps.replicate(self.steps.no_sums()))
        steps = sums["steps"] or np.nan
        epoch, taken = self.course.position
        self.course.elapsed_s = self._clock.elapsed
        self.last_row = {
            "step": step,
            "epoch": epoch + taken / len(self.dataset.train),
            "learning_rate": float(sums["rate"]),
            "loss": float(sums["loss"] / steps),
            "energy_mae_meV_per_atom": float(1e3 * sums["energy_absolute"] / (sums["frames"] or np.nan)),
            "force_mae_meV_per_A": float(1e3 * sums["force_absolute"] / (sums["components"] or np.nan)),
            "gradient_norm": float(sums["norm"] / steps),
            "skipped": int(skipped),
            "frames_per_s": self._clock.frames_per_second(),
            "elapsed_s": self.course.elapsed_s,
        }
        return dict(self.last_row)

    def _validate(self, step: int) -> Row:
        """Errors of the averaged parameters on the fixed subset; keeps the best, counts how long ago it was."""
        if self._valid is None:
            valid = self.dataset.valid
            if len(valid) > self.config.run.validation_frames:
                valid = np.random.default_rng(0).permutation(valid)[: self.config.run.validation_frames]
            self._valid = [self.steps.put(batch) for batch in self._batches(np.sort(valid))]
        errors = self.evaluate(self.state.ema, self._valid)
        course, schedule = self.course, self.config.schedule
        course.errors = errors
        if np.isfinite(errors["loss"]) and (course.best_loss is None or errors["loss"] < course.best_loss):
            course.best_loss, course.best_step, course.best_errors = errors["loss"], step, errors
            course.validations_since_best = course.validations_since_cut = 0
            self._export(self.paths.best, step)
        else:
            course.validations_since_best += 1
            course.validations_since_cut += 1
        if schedule.kind == "plateau" and course.validations_since_cut >= schedule.patience:
            course.validations_since_cut = 0
            smallest = schedule.final_learning_rate / self.config.optimizer.learning_rate
            scale = max(float(self.state.rate_scale) * schedule.factor, smallest)
            self.state = self.state._replace(rate_scale=self.steps.replicate(np.asarray(scale, self.steps.dtype)))
        return {
            "valid_loss": errors["loss"],
            "valid_energy_mae_meV_per_atom": errors["energy_mae_meV_per_atom"],
            "valid_energy_rmse_meV_per_atom": errors["energy_rmse_meV_per_atom"],
            "valid_force_mae_meV_per_A": errors["force_mae_meV_per_A"],
            "valid_force_rmse_meV_per_A": errors["force_rmse_meV_per_A"],
        }

    def evaluate(self, params: Params, batches: list[Batch] | Iterator[Batch]) -> dict[str, Any]:
        """Loss, MAE and RMSE (meV/atom, meV/Å) and force MAE by element over batches on the devices."""
        parts = [self.steps.evaluate(params, self.frozen, batch) for batch in batches]
        sums = jax.tree.map(lambda *x: np.sum(np.asarray(x, np.float64), axis=0), *jax.device_get(parts))
        return errors_of(sums, self.config.loss)

    def _batches(self, indices: np.ndarray) -> Iterator[Batch]:
        return (self.packer.pack(group) for group in self.packer.groups(indices))

    # --- what is written ---

    def save(self, step: int) -> None:
        """A checkpoint that `restore` reads."""
        self.course.elapsed_s = self._clock.elapsed
        saved = Saved(
            self.config.model_dump(mode="json"),
            self.dataset.checksum,
            len(self.dataset.train),
            None if self.references is None else self.references.tolist(),
            self.course,
            self.init,
            plain(split_frozen(self.params)[1]),
        )
        self.saver.save(step, jax.device_get(self.state), saved)

    def _export(self, path: Path, step: int) -> None:
        """The averaged parameters as a model file, with a record of how they came about."""
        params = jax.device_get({**self.state.ema, **self.frozen})
        record = training_record(self.config, self.dataset, step, self.course.errors)
        export(path, params, self.references, self.config.model, record)

    def _finish(self, step: int, status: Literal["completed", "early", "stopped"]) -> Result:
        self.save(step)
        if step:
            self._export(self.paths.last, step)
        self._plot()
        test = None
        if status != "stopped" and len(self.dataset.test) and self.paths.best.exists():
            trained, _ = split_frozen(load_checkpoint(self.paths.best).params)
            cast = jax.tree.map(lambda x: np.asarray(x, self.steps.dtype), trained)
            batches = (self.steps.put(batch) for batch in self._batches(self.dataset.test))
            test = self.evaluate(self.steps.replicate(cast), batches)
        summary = self._summary(step, status, test)
        self.paths.write(self.paths.summary, json.dumps(summary, indent=2) + "\n")
        return Result(status, step, summary)

    def _summary(self, step: int, status: str, test: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "status": status,
            "step": step,
            "of_steps": self.config.run.steps,
            "epochs": self.last_row.get("epoch"),
            "elapsed_s": round(self.course.elapsed_s, 1),
            "frames_per_s": self.last_row.get("frames_per_s"),
            "skipped_steps": int(self.state.skipped),
            "best": {"step": self.course.best_step, "validation": self.course.best_errors},
            "test": test,
            "data": self.dataset.counts(),
            "data_sha256": self.dataset.checksum,
            "dropped_frames": len(self.dataset.notes),
            "batch": self.packer.shape._asdict(),
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "model": self.config.model.model_dump(mode="json"),
            "device": f"{self.steps.devices} x {self.steps.mesh.devices.flat[0].device_kind}",
            "versions": versions(),
        }

    def _plot(self) -> None:
        plot_curve(self.paths.curve, self.metrics, f"{len(self.dataset.train):,} frames, {self.paths.folder.name}")

    def _tell(self, step: int) -> None:
        errors = self.course.errors or {}
        self.progress(
            Status(
                step,
                self.config.run.steps,
                self.last_row.get("loss"),
                self.last_row.get("frames_per_s"),
                errors.get("energy_mae_meV_per_atom"),
                errors.get("force_mae_meV_per_A"),
            )
        )

    def _diverged(self, count: int) -> str:
        """Names the frames of the first steps of those in a row, as far back as they are remembered."""
        steps = list(self._recent)[-min(count, len(self._recent)) :]
        molecules: list[str] = []
        for _, groups in steps[:TOO_MANY_SKIPPED]:
            for index in np.concatenate(groups):
                name = f"{index} ({self.dataset.frames.molecules[index]})"
                if name not in molecules:
                    molecules.append(name)
        first, last = steps[0][0], steps[-1][0]
        shown = ", ".join(molecules[:12]) + (", ..." if len(molecules) > 12 else "")
        return (
            f"{count} steps in a row gave a loss or gradient that isn't finite (steps {first} to {last}); their"
            f" frames: {shown}. Lower optimizer.learning_rate, or look at these frames"
        )


class _Clock:
    """Wall time of a run, and what is due when."""

    def __init__(self, before: float) -> None:
        self._before, self._start = before, time.monotonic()
        self._last: dict[str, float] = {}
        self.frames = 0
        self._counted = self._start, 0

    @property
    def elapsed(self) -> float:
        """Seconds of this run, earlier pieces counted in."""
        return self._before + time.monotonic() - self._start

    def due(self, what: str, seconds: float) -> bool:
        """Whether this many seconds went by since the last time it was due, or since the start."""
        now = time.monotonic()
        if now - self._last.get(what, self._start) < seconds:
            return False
        self._last[what] = now
        return True

    def frames_per_second(self) -> float:
        """Since it was last asked."""
        then, frames = self._counted
        now = time.monotonic()
        self._counted = now, self.frames
        return (self.frames - frames) / max(now - then, 1e-9)
