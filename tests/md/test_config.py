from pathlib import Path

import pytest

from jaxff.errors import ConfigError
from jaxff.md.config import MDConfig, dump_config, load_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_defaults_then_file_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "md.yaml"
    file.write_text("steps: 7\nseed: 3\n")
    config = load_config(file, {"steps": 9, "seed": None})
    assert (config.steps, config.seed, config.timestep_fs) == (9, 3, 0.5)


def test_a_misspelt_key_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    file = tmp_path / "md.yaml"
    file.write_text("time_step_fs: 1.0\n")
    with pytest.raises(ConfigError, match=r"md\.yaml.*'time_step_fs'.*'timestep_fs'"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("steps: 0", "steps: .*0"),
        ("steps: 1.5", "steps"),
        ("timestep_fs: -1", "timestep_fs"),
        ("temperature_K: -5", "temperature_K"),
        ("temperature_K: .inf", "temperature_K"),
        ("ensemble: npt", "ensemble"),
        ("dtype: float16", "dtype"),
        ("- 1", "mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "md.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=match):
        load_config(file)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")


def test_the_written_configuration_reads_back(tmp_path: Path) -> None:
    config = MDConfig(steps=12, dtype="float64", relax=True, timestep_fs=0.125)
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    assert load_config(file) == config


def test_the_shipped_files_are_the_defaults() -> None:
    explicit = {"dtype": "float32", "engine": "auto"}
    assert load_config(CONFIGS / "md_nve.yaml") == MDConfig(**explicit)
    assert load_config(CONFIGS / "md_nvt.yaml") == MDConfig(ensemble="nvt_langevin", **explicit)
