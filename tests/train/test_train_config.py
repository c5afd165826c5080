from pathlib import Path

import pytest
import yaml

from jaxff.config import PainnConfig
from jaxff.errors import ConfigError
from jaxff.train.config import TrainConfig, dump_train_config, load_train_config, resume_conflicts

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("train_*.yaml")), ids=lambda path: path.name)
def test_the_shipped_files_are_read(path: Path) -> None:
    config = load_train_config(path)
    assert load_train_config(path, steps=7).run == config.run.model_copy(update={"steps": 7})


def test_the_organic_model() -> None:
    config = load_train_config(CONFIGS / "train_organic.yaml")
    elements = (1, 6, 7, 8, 9, 15, 16, 17, 35)
    shape = {"hidden_dim": 128, "num_interactions": 3, "num_rbf": 20, "cutoff": 5.0, "max_z": 35, "elements": elements}
    assert config.model == PainnConfig(**shape, repulsion="zbl", closed_shell=True)
    assert config.run.batch_size == 64


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("run: {steps: 5}", "data: .*required"),
        ("data: {train: []}", "data.train"),
        ("data: {train: [a.xyz], fractions: [0.5, 0.5, 0.5]}", "add up to 1"),
        ("data: {train: [a.xyz], units: {energy: Ry}}", "data.units.energy"),
        ("data: {train: [a.xyz]}\nrun: {step: 5}", "unknown key 'run.step', did you mean 'steps'"),
        ("data: {train: [a.xyz]}\nloss: {force: {kind: l3}}", "loss.force.kind"),
        ("data: {train: [a.xyz]}\nmodel: {architecture: schnet}", "schnet"),
        ("data: {train: [a.xyz]}\noptimizer: {learning_rate: 0}", "optimizer.learning_rate"),
        ("- 1", "mapping"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_train_config(file)


def test_the_written_configuration_reads_back(tmp_path: Path) -> None:
    config = load_train_config(CONFIGS / "train_organic.yaml", steps=3)
    file = tmp_path / "config.yaml"
    file.write_text(dump_train_config(config), encoding="utf-8")
    assert load_train_config(file) == config


def test_what_a_resumed_run_may_change() -> None:
    config = TrainConfig.model_validate({"data": {"train": ["a.xyz"]}})
    before = yaml.safe_load(dump_train_config(config))
    assert resume_conflicts(before, config) == ([], [])
    del before["data"]["allow_overlap"]  # a checkpoint that is older than the setting
    assert resume_conflicts(before, config) == ([], [])
    for section, key, value in (
        ("data", "split_seed", 1),
        ("data", "fractions", [0.8, 0.1, 0.1]),
        ("data", "max_frames", 10),
        ("data", "units", {"energy": "meV"}),
        ("loss", "angular_weight", 0.5),
        ("optimizer", "learning_rate", 0.1),
        ("schedule", "warmup_steps", 3),
        ("run", "seed", 1),
        ("run", "batch_size", 3),
        ("run", "validation_frames", 3),
    ):
        other = yaml.safe_load(dump_train_config(config))
        other[section][key] = value
        fatal, notes = resume_conflicts(before, TrainConfig.model_validate(other))
        assert len(fatal) == 1
        assert fatal[0].startswith(f"{section}.{key}")
        assert not notes
    for section, key, value in (("data", "train", ["b.xyz"]), ("run", "devices", 2), ("run", "log_every", 7)):
        other = yaml.safe_load(dump_train_config(config))
        other[section][key] = value
        fatal, notes = resume_conflicts(before, TrainConfig.model_validate(other))
        assert not fatal
        assert len(notes) == 1
    longer = load_like(config, run={"steps": 5}, model={"architecture": "painn", "hidden_dim": 64})
    fatal, notes = resume_conflicts(before, longer)
    assert fatal == ["model.hidden_dim: 128 before, 64 now"]
    assert notes == ["run.steps: 100000 before, 5 now"]
    assert resume_conflicts(before, load_like(config, run={"dtype": "float64"}))[0]


def load_like(config: TrainConfig, **update: dict) -> TrainConfig:
    return TrainConfig.model_validate({"data": config.data.model_dump(), **update})
