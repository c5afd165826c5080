"""Simulation by jax-md: `run` does one from a potential and a structure to a folder of results."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxff.md.config import MDConfig, load_config
    from jaxff.md.driver import run
    from jaxff.md.report import Summary
    from jaxff.md.structures import builtin_molecule, read_structure

_HOMES = {
    "MDConfig": "config",
    "Summary": "report",
    "builtin_molecule": "structures",
    "load_config": "config",
    "read_structure": "structures",
    "run": "driver",
}
__all__ = [
    "MDConfig",
    "Summary",
    "builtin_molecule",
    "load_config",
    "read_structure",
    "run",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
