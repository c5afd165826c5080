"""Validated settings, from YAML or Python alike: an unknown key is an error that names its nearest neighbour."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from jaxff.errors import ConfigError


class Settings(BaseModel):
    """Base of all settings: immutable, strict about names."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _ModelSettings(Settings):
    hidden_dim: int = Field(128, ge=4, le=4096, description="F, channels of the atom features")
    num_interactions: int = Field(3, ge=1, le=32, description="L, message and update pairs")
    num_rbf: int = Field(20, ge=1, le=4096, description="K, radial functions")
    cutoff: float = Field(5.0, gt=0.0, le=100.0, description="Å")
    max_z: int = Field(100, ge=1, le=118, description="largest atomic number with an embedding row")
    elements: tuple[int, ...] | None = Field(
        None, description="atomic numbers that the model was made for; None: every row of the embedding"
    )

    @model_validator(mode="after")
    def _elements_have_rows(self) -> _ModelSettings:
        if self.elements is not None and not all(1 <= z <= self.max_z for z in self.elements):
            raise ValueError(f"elements must lie in 1..max_z = {self.max_z}, received {self.elements}")
        return self


class StudentConfig(_ModelSettings):
    """MLFF-Distiller's StudentForceField: PaiNN-like, with all its defects (jaxff.models.student)."""

    architecture: Literal["student"] = "student"

    @model_validator(mode="after")
    def _readout_divides(self) -> StudentConfig:
        if self.hidden_dim % 4:
            raise ValueError(f"hidden_dim must be a multiple of 4 (readout F, F/2, F/4), received {self.hidden_dim}")
        return self


class PainnConfig(_ModelSettings):
    """PaiNN as published, smooth at the cutoff (jaxff.models.painn)."""

    architecture: Literal["painn"] = "painn"
    vector_norm_epsilon: float = Field(
        0.1, ge=0.0, description="ε in sqrt(|Vv|² + ε²) - ε; 0 is the published norm, with its cone at Vv = 0"
    )
    repulsion: Literal["none", "zbl"] = Field("none", description="short-range pair repulsion")
    closed_shell: bool = Field(False, description="the model knows neutral closed-shell molecules only")


ModelConfig = Annotated[StudentConfig | PainnConfig, Field(discriminator="architecture")]
T = TypeVar("T", bound=BaseModel)


def parse_model_config(data: Mapping[str, Any] | str) -> StudentConfig | PainnConfig:
    """Model settings from a mapping or its JSON. Raises ConfigError."""
    values = json.loads(data) if isinstance(data, str) else dict(data)
    try:
        return TypeAdapter(ModelConfig).validate_python(values)
    except ValidationError as error:
        raise ConfigError(_describe(error, "model configuration", (StudentConfig, PainnConfig))) from None


def parse_settings(kind: type[T], data: Mapping[str, Any], source: str) -> T:
    """`kind` from a mapping; `source` (a file's name) stands in the error. Raises ConfigError."""
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(_describe(error, source, (kind,))) from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, received a {type(data).__name__}")
    return data


def _describe(error: ValidationError, source: str, kinds: tuple[type[BaseModel], ...]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "settings"
        if item["type"] == "extra_forbidden":
            names = sorted({name for kind in kinds for name in _field_names(kind)})
            near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
            lines.append(f"unknown key '{key}'" + (f", did you mean '{near[0]}'?" if near else ""))
        else:
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')}, received {item.get('input')!r}")
    return f"{source}: " + "; ".join(lines)


def _field_names(kind: type[BaseModel]) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _field_names(field.annotation)
