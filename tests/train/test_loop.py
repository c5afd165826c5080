"""Whole runs, small: they learn, can be killed and go on bit by bit, and say what is wrong."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxff import models
from jaxff.checkpoint import flatten, load_checkpoint, save_checkpoint
from jaxff.cli import app
from jaxff.config import PainnConfig, StudentConfig
from jaxff.errors import CheckpointError, ConfigError, DataError, TrainingError
from jaxff.loading import load_potential
from jaxff.train import loop
from jaxff.train.config import TrainConfig
from jaxff.train.dataset import load_dataset
from jaxff.train.hdf5 import write_hdf5
from jaxff.train.interactive import until_signalled
from jaxff.train.loop import Status, train
from jaxff.train.report import Metrics
from jaxff.train.step import Steps
from tests.train.teacher import ELEMENTS, labelled

ROOT = Path(__file__).parents[2]
STEPS = 210
TIMES = ("frames_per_s", "elapsed_s")


def settings(file: Path, **sections: dict[str, Any]) -> TrainConfig:
    data = {
        "model": {"architecture": "painn", "hidden_dim": 16, "num_interactions": 1, "num_rbf": 8, "cutoff": 3.5}
        | {"max_z": 8},
        "data": {"train": [str(file)], "fractions": [0.6, 0.2, 0.2]},
        "optimizer": {"learning_rate": 0.01, "ema_decay": 0.9},
        "schedule": {"warmup_steps": 10},
        "run": {"steps": STEPS, "batch_size": 8, "log_every": 10, "validate_every": 30, "devices": 1},
    }
    return TrainConfig.model_validate({name: {**data.get(name, {}), **sections.get(name, {})} for name in data})


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curve(folder: Path) -> list[dict[str, str]]:
    """The rows without what depends on the clock."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows(folder)]


def tensors(path: Path) -> dict[str, np.ndarray]:
    return dict(flatten(load_checkpoint(path).params))


@pytest.fixture(scope="module", autouse=True)
def made() -> Iterator[dict[Any, Steps]]:
    """Runs of the same settings compile once."""
    steps: dict[Any, Steps] = {}

    def make(model: Any, config: TrainConfig) -> Steps:
        key = model, config.loss, config.optimizer, config.schedule, config.run
        return steps[key] if key in steps else steps.setdefault(key, Steps(model, config))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Steps", make)
        yield steps


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "frames.h5"
    write_hdf5(path, labelled(), {})
    return path


@pytest.fixture(scope="module")
def run(file: Path, made: dict[Any, Steps], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without interruption; each compiled function was compiled once."""
    folder = tmp_path_factory.mktemp("run")
    made.clear()  # of runs that came before
    result = train(settings(file), folder)
    assert (result.status, result.step) == ("completed", STEPS)
    (steps,) = made.values()
    assert (steps.train._cache_size(), steps.evaluate._cache_size()) == (1, 1)
    return folder


def test_it_learns(run: Path) -> None:
    first, last = rows(run)[0], rows(run)[-1]
    assert float(last["force_mae_meV_per_A"]) < 0.5 * float(first["force_mae_meV_per_A"])
    assert float(last["energy_mae_meV_per_atom"]) < 0.4 * float(first["energy_mae_meV_per_atom"])
    validated = [float(row["valid_force_mae_meV_per_A"]) for row in rows(run) if row["valid_loss"]]
    assert len(validated) == STEPS // 30
    assert validated[-1] < 0.7 * validated[0]
    assert [int(row["step"]) for row in rows(run)] == list(range(10, STEPS + 1, 10))


def test_the_exported_model_has_the_errors_that_were_told(run: Path, file: Path) -> None:
    config = settings(file)
    dataset = load_dataset(config.data, config.model)
    summary = json.loads((run / "summary.json").read_text())
    for indices, expected in (
        (dataset.valid, summary["best"]["validation"]),
        (dataset.test, summary["test"]),
    ):
        potential = load_potential(run / "best.safetensors", dtype="float64")
        de, df, carbon = [], [], []
        for frame in dataset.frames.select(indices):
            energy, forces = potential.energy_and_forces(frame.numbers, frame.positions)
            de.append(abs(energy - frame.energy) / len(frame.numbers))
            df.append(np.abs(forces - frame.forces).ravel())
            carbon.append(np.abs(forces - frame.forces)[frame.numbers == 6].ravel())
        assert expected["energy_mae_meV_per_atom"] == pytest.approx(1e3 * np.mean(de), rel=1e-3)
        assert expected["force_mae_meV_per_A"] == pytest.approx(1e3 * np.mean(np.concatenate(df)), rel=1e-4)
        by_element = expected["force_mae_by_element_meV_per_A"]
        assert by_element["C"] == pytest.approx(1e3 * np.mean(np.concatenate(carbon)), rel=1e-4)


def test_what_a_run_leaves(run: Path, file: Path) -> None:
    names = {"best.safetensors", "last.safetensors", "metrics.csv", "curve.png", "summary.json", "split.csv"}
    assert {path.name for path in run.iterdir()} == names | {"config.yaml", "checkpoints"}
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    split = dict(line.split(",") for line in (run / "split.csv").read_text().splitlines()[1:])
    assert set(split.values()) == {"train", "valid", "test"}
    summary = json.loads((run / "summary.json").read_text())
    assert sum(part["molecules"] for part in summary["data"].values()) == len(split)
    record = load_checkpoint(run / "best.safetensors").certificate
    assert record is not None
    assert record["training"]["data_sha256"] == summary["data_sha256"]
    references = tensors(run / "last.safetensors")["reference.energies"]
    assert references.dtype == np.float64
    assert references[6] == pytest.approx(ELEMENTS[6], abs=20.0)


def test_killed_and_resumed_is_the_same_run(run: Path, file: Path, tmp_path: Path) -> None:
    """kill -9 between two rows of the log, with checkpoints at each step until then."""
    config = tmp_path / "config.json"
    config.write_text(settings(file, run={"checkpoint_minutes": 1e-9}).model_dump_json())
    script = (
        "import os, signal, sys, pathlib\n"
        "from jaxff.train.config import TrainConfig\n"
        "from jaxff.train import loop\n"
        "steps = iter(range(46))\n"
        "def stop():\n"
        "    if next(steps) == 45: os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = TrainConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_text())\n"
        "loop.train(config, sys.argv[2], stop=stop)\n"
    )
    command = [sys.executable, "-c", script, str(config), str(tmp_path / "run")]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert rows(tmp_path / "run")[-1]["step"] == "40"
    notes: list[str] = []
    result = train(settings(file), tmp_path / "run", resume=True, note=notes.append)
    assert result.status == "completed"
    assert "going on at step 45" in notes
    assert curve(tmp_path / "run") == curve(run)
    for name in ("best.safetensors", "last.safetensors"):
        for one, other in zip(tensors(run / name).items(), tensors(tmp_path / "run" / name).items(), strict=True):
            assert one[0] == other[0]
            np.testing.assert_array_equal(one[1], other[1])


def test_a_resumed_run_may_have_more_steps_and_more_data(file: Path, tmp_path: Path) -> None:
    told: list[Status] = []
    stopped = train(settings(file), tmp_path, max_minutes=0.0, progress=told.append)
    assert (stopped.status, stopped.step) == ("stopped", 0)
    more = tmp_path / "more.h5"
    write_hdf5(more, labelled(["C2H6", "CH3COOH"], each=4, seed=3), {})
    notes: list[str] = []
    with pytest.raises(TrainingError, match="already holds a run"):
        train(settings(file), tmp_path)
    with pytest.raises(TrainingError, match=r"other settings \(model.hidden_dim: 16 before, 4 now\)"):
        train(settings(file, model={"hidden_dim": 4}), tmp_path, resume=True)
    result = train(
        settings(file, data={"train": [str(file), str(more)]}, run={"steps": 12}),
        tmp_path,
        resume=True,
        note=notes.append,
    )
    assert (result.status, result.step) == ("completed", 12)
    assert any(f"run.steps: {STEPS} before, 12 now" in line for line in notes)
    assert any("data changed" in line for line in notes)


def test_waiting_for_a_better_validation(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuts the rate after `patience` of them, and ends the run after `early_stop`."""
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.9, 1.9, 2.1, 2.2, 2.3, 0.1])
    evaluate = loop._Run.evaluate

    def scripted(self: Any, *args: Any) -> dict[str, Any]:
        return evaluate(self, *args) | {"loss": next(losses)}

    config = settings(
        file,
        optimizer={"learning_rate": 1e-3},
        schedule={"kind": "plateau", "patience": 2, "factor": 0.5, "final_learning_rate": 3e-4, "warmup_steps": 0},
        run={"steps": 200, "early_stop": 4, "validate_every": 2, "log_every": 2},
    )
    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "evaluate", scripted)
        patch.setattr(loop._Run, "_finish", lambda self, step, status: loop.Result(status, step, {}))
        result = train(config, tmp_path)
    assert (result.status, result.step) == ("early", 18)
    assert load_checkpoint(tmp_path / "best.safetensors").certificate["training"]["step"] == 10  # type: ignore[index]
    # a row has the rate of its last step, before its own validation
    rates = [float(row["learning_rate"]) for row in rows(tmp_path)]
    np.testing.assert_allclose(rates, [1e-3] * 4 + [5e-4] * 3 + [3e-4] * 2, rtol=1e-6)


def test_a_run_that_diverges_names_its_frames(file: Path, tmp_path: Path) -> None:
    config = settings(file, optimizer={"learning_rate": 1e30, "clip_norm": None}, schedule={"warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"steps in a row .* frames: \d+ \(\w+\)"):
        train(config, tmp_path)


@pytest.mark.parametrize("architecture", ["student", "painn"])
def test_fine_tuning(architecture: str, file: Path, tmp_path: Path) -> None:
    shape = {"hidden_dim": 8, "num_interactions": 1, "num_rbf": 4, "cutoff": 3.0, "max_z": 8}
    config: Any = StudentConfig(**shape) if architecture == "student" else PainnConfig(**shape)
    params = jax.tree.map(np.array, models.init_params(config, jax.random.key(5)))
    if architecture == "painn":
        params["reference"]["energies"][list(ELEMENTS)] = np.array(list(ELEMENTS.values())) + 5
    save_checkpoint(tmp_path / "init.safetensors", params, config)
    notes: list[str] = []
    train(
        settings(file, run={"steps": 2}, optimizer={"learning_rate": 1e-9}),
        tmp_path / "run",
        init=tmp_path / "init.safetensors",
        note=notes.append,
    )
    assert any("init.safetensors" in line for line in notes)
    made = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert made.config == config
    before, after = dict(flatten(params)), dict(flatten(made.params))
    for name, value in before.items():
        if name != "reference.energies":
            np.testing.assert_allclose(after[name], value, atol=1e-7)
            assert name.startswith("radial") or name == "embedding.table" or value.ndim < 2 or np.any(after[name])
    if architecture == "painn":
        # what the model itself says of an element is no longer in its reference
        energy = float(rows(tmp_path / "run")[-1]["energy_mae_meV_per_atom"])
        assert energy < 1000 * 2.0
    else:
        assert float(rows(tmp_path / "run")[-1]["energy_mae_meV_per_atom"]) > 1000 * 100.0


@pytest.mark.parametrize("architecture", ["student", "painn"])
def test_a_run_from_a_model_goes_on_without_it(architecture: str, file: Path, tmp_path: Path) -> None:
    """--resume alone: settings, frozen leaves and references are those of the run, the model's file is gone."""
    shape = {"hidden_dim": 8, "num_interactions": 1, "num_rbf": 4, "cutoff": 3.0, "max_z": 8}
    config: Any = StudentConfig(**shape) if architecture == "student" else PainnConfig(**shape)
    params = jax.tree.map(np.array, models.init_params(config, jax.random.key(5)))
    if architecture == "student":  # such as no fresh model has
        params["radial"]["centers"] += np.float32(0.123)
        params["radial"]["widths"] *= np.float32(1.3)
    init = tmp_path / "init.safetensors"
    save_checkpoint(init, params, config)
    wanted = settings(file, run={"steps": 8}, schedule={"kind": "constant"})
    train(wanted, tmp_path / "straight", init=init)
    steps = iter([False] * 4)
    stopped = train(wanted, tmp_path / "run", init=init, stop=lambda: next(steps, True))
    assert (stopped.status, stopped.step) == ("stopped", 4)
    init.unlink()
    notes: list[str] = []
    result = train(wanted, tmp_path / "run", resume=True, note=notes.append)
    assert (result.status, result.step) == ("completed", 8)
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").config == config
    assert notes == ["going on at step 4"]
    one, other = (tensors(tmp_path / name / "last.safetensors") for name in ("straight", "run"))
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(other[name], value, err_msg=name)
    if architecture == "student":
        np.testing.assert_array_equal(other["radial.centers"], params["radial"]["centers"])
    train(wanted, tmp_path / "run", resume=True, init=tmp_path / "other.safetensors", note=notes.append)
    assert f"{tmp_path / 'other.safetensors'} is not read: the run goes on from its checkpoint" in notes


def test_two_devices_make_one_batch(file: Path, tmp_path: Path) -> None:
    """Two devices with some of the frames each: sums and parameters of one device that has all of them."""
    config = tmp_path / "config.json"
    config.write_text(settings(file, run={"dtype": "float64", "padding": 2.0}).model_dump_json())
    script = """if True:
        import pathlib, sys
        import jax
        import numpy as np
        from jaxff import models
        from jaxff.train.batches import Packer, batch_shape, make_store
        from jaxff.train.config import TrainConfig
        from jaxff.train.data import read_frames
        from jaxff.train.step import Steps, split_frozen

        config = TrainConfig.model_validate_json(pathlib.Path(sys.argv[1]).read_text())
        frames, _ = read_frames(config.data.train)
        store = make_store(frames, frames.num_atoms * 0.1, 3.5, np.float64)
        shape = batch_shape(store, 16, 2.0)
        results = []
        for groups in ([np.arange(0, 48, 3)], [np.arange(0, 30, 3), np.arange(30, 48, 3)]):
            run = config.run.model_copy(update={"devices": len(groups)})
            steps = Steps(config.model, config.model_copy(update={"run": run}))
            assert steps.devices == len(groups)
            with steps.precision():
                params = models.init_params(config.model, jax.random.key(0), np.float64)
                trained, frozen = steps.replicate(split_frozen(params))
                state = steps.replicate(steps.first_state(trained))
                batch = steps.put(Packer(store, shape, len(groups)).pack(groups))
                energies = np.asarray(steps.energies(trained, frozen, batch))
                state = steps.train(steps.train(state, frozen, batch), frozen, batch)
                results.append(jax.device_get((state.sums, state.params)))
                results[-1] += (np.concatenate([e[: len(g)] for e, g in zip(energies, groups)]),)
        assert results[0][0]["frames"] == 32
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-10), *results)
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, str(config)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_data_that_do_not_fit_are_refused(file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the data hold \[8\]"):
        train(settings(file, model={"elements": [1, 6, 7]}), tmp_path)
    with pytest.raises(DataError, match="none for validation"):
        train(settings(file, data={"fractions": [1.0, 0.0, 0.0]}), tmp_path)


def test_the_command(run: Path, file: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    config = tmp_path / "train.yaml"
    config.write_text((run / "config.yaml").read_text())
    taken = runner.invoke(app, ["train", str(config), "-o", str(run), "-q"])
    assert taken.exit_code == 2
    assert "already holds a run" in taken.stderr
    done = runner.invoke(app, ["train", str(config), "-o", str(run), "-q", "--resume"])
    assert done.exit_code == 0, done.output
    assert f"{STEPS} of {STEPS} steps" in done.stdout
    config.write_text((run / "config.yaml").read_text().replace("split_seed: 0", "split_seed: 1"))
    other = runner.invoke(app, ["train", str(config), "-o", str(run), "-q", "--resume"])
    assert other.exit_code == 2
    assert "data.split_seed: 0 before, 1 now" in " ".join(other.stderr.split())
    config.write_text("data: {train: [nowhere.xyz]}")
    missing = runner.invoke(app, ["train", str(config), "-o", str(tmp_path / "none"), "-q"])
    assert missing.exit_code == 2
    assert "nowhere.xyz" in missing.stderr


def test_a_run_that_cannot_start_deletes_nothing(run: Path, file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    before = sorted(path.name for path in folder.rglob("*"))
    with pytest.raises(DataError, match="nowhere"):
        train(settings(file, data={"train": ["nowhere.h5"]}), folder, overwrite=True)
    with pytest.raises(CheckpointError, match="no such file"):
        train(settings(file), folder, init=tmp_path / "none.safetensors", overwrite=True)
    assert sorted(path.name for path in folder.rglob("*")) == before
    # a model in the folder that is replaced may be where the new run starts
    result = train(settings(file), folder, init=folder / "best.safetensors", overwrite=True, stop=lambda: True)
    assert (result.status, result.step, (folder / "best.safetensors").exists()) == ("stopped", 0, False)


def test_killed_before_its_first_checkpoint(file: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.csv").write_text("step\n")
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        train(settings(file), tmp_path)
    with pytest.raises(ConfigError, match="max_minutes"):
        train(settings(file), tmp_path, resume=True, max_minutes=float("nan"))
    seen = []

    def stop() -> bool:
        seen.append(sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()))
        return True

    assert train(settings(file), tmp_path, resume=True, stop=stop).status == "stopped"
    assert seen == [[0]]  # there from the start


def test_a_model_without_checkpoints_is_not_trained_over(run: Path, file: Path, tmp_path: Path) -> None:
    shutil.copy(run / "best.safetensors", tmp_path)
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        train(settings(file), tmp_path, resume=True)
    assert (tmp_path / "best.safetensors").exists()


def test_devices_that_are_not_there_leave_no_run(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.devices"):
        train(settings(file, run={"devices": 99}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_row_that_a_kill_cut_is_left_out(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.csv")
    metrics.append({"step": 10, "elapsed_s": 1.0})
    with metrics.path.open("a") as file:
        file.write("1")  # of 120
    assert [row["step"] for row in Metrics(metrics.path, 100).rows] == ["10"]


def test_signals_are_a_question() -> None:
    import signal

    notes: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with until_signalled(notes.append) as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(notes) == 1
    assert signal.getsignal(signal.SIGTERM) == before
