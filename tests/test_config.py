"""Settings: what is wrong is named, with what was expected and what came."""

from pathlib import Path

import pytest

from jaxff.config import PainnConfig, StudentConfig, parse_model_config, read_yaml
from jaxff.errors import ConfigError, JaxffError


def test_round_trip() -> None:
    for config in (StudentConfig(hidden_dim=32), PainnConfig(elements=(1, 6), repulsion="zbl")):
        assert parse_model_config(config.model_dump_json()) == config
        assert parse_model_config(config.model_dump()) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"architecture": "student", "hiden_dim": 3}, "unknown key.*hiden_dim.*did you mean 'hidden_dim'"),
        ({"architecture": "student", "cutoff": -1.0}, "cutoff.*greater than 0.*received -1.0"),
        ({"architecture": "student", "cutoff": float("nan")}, "cutoff"),
        ({"architecture": "student", "hidden_dim": 30}, "multiple of 4.*received 30"),
        ({"architecture": "painn", "elements": [1, 101]}, r"1..max_z = 100, received \(1, 101\)"),
        ({"architecture": "schnet"}, "schnet"),
        ({}, "architecture"),
    ],
)
def test_bad_model_configurations(data: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_model_config(data)


@pytest.mark.parametrize(("text", "message"), [("a: [", "not YAML"), ("- 1", "a list"), ("\x00", "not YAML")])
def test_bad_yaml(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(path)


def test_missing_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "empty.yaml").touch()
    assert read_yaml(tmp_path / "empty.yaml") == {}


def test_errors_are_value_errors() -> None:
    assert issubclass(ConfigError, JaxffError)
    assert issubclass(JaxffError, ValueError)
