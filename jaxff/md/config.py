"""Settings of a simulation, from configs/md_nve.yaml, the command line or Python alike."""

# ruff: noqa: N815  (units keep their capital letters: temperature_K, meV)

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from jaxff.config import Settings, parse_settings, read_yaml


class MDConfig(Settings):
    """What to simulate. Times in fs, temperatures in K, lengths in Å."""

    ensemble: Literal["nve", "nvt_langevin"] = Field(default="nve", description="nve conserves the total energy")
    timestep_fs: float = Field(default=0.5, gt=0.0, le=20.0, description="step of velocity Verlet, fs")
    steps: int = Field(default=10_000, ge=1, description="number of steps")
    temperature_K: float = Field(
        default=300.0,
        ge=0.0,
        le=100_000.0,
        description="of the velocities drawn at the start; of the bath, too, for nvt_langevin",
    )
    friction_per_ps: float = Field(default=1.0, gt=0.0, le=1000.0, description="Langevin friction, 1/ps (nvt_langevin)")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the velocities and the thermostat's noise")
    remove_rotation: bool = Field(default=True, description="start without net rotation")
    relax: bool = Field(default=False, description="minimise the energy before the start")
    relax_fmax: float = Field(default=0.01, gt=0.0, description="largest force left after relaxing, eV/Å")
    relax_steps: int = Field(default=500, ge=1, description="most optimiser steps")
    dtype: Literal["float32", "float64"] | None = Field(
        default=None, description="float32 | float64 (null: that of the potential)"
    )
    engine: str | None = Field(default=None, description="how the model is evaluated (null: auto)")
    record_every: int = Field(default=10, ge=1, description="steps between two frames of trajectory and log")
    block: int = Field(
        default=1000, ge=1, description="most steps in one compiled block; Ctrl-C stops between two blocks"
    )
    neighbor_list_above: int = Field(default=200, ge=0, description="atoms; larger systems use a neighbour list")
    neighbor_skin: float = Field(
        default=0.5, gt=0.0, le=10.0, description="added to the cutoff for the neighbour list, Å"
    )
    max_temperature_K: float = Field(default=50_000.0, gt=0.0, description="hotter than this counts as an explosion")


def load_config(path: str | Path | None, overrides: Mapping[str, Any] | None = None) -> MDConfig:
    """Settings from a YAML file (None: the defaults), then `overrides` whose value isn't None.

    Raises ConfigError: the file can't be read or isn't YAML, or a key is unknown (the nearest one is named)
    or out of range.
    """
    data = {} if path is None else read_yaml(path)
    data |= {key: value for key, value in (overrides or {}).items() if value is not None}
    return parse_settings(MDConfig, data, "settings" if path is None else str(path))


def dump_config(config: MDConfig) -> str:
    """The settings as commented YAML that `load_config` reads."""
    lines = ["# Settings of this run; `jaxff md MODEL STRUCTURE --config THIS_FILE` repeats it."]
    for name, field in MDConfig.model_fields.items():
        entry = yaml.safe_dump({name: getattr(config, name)}, sort_keys=False).strip()
        lines.append(f"{entry}  # {field.description}")
    return "\n".join(lines) + "\n"
