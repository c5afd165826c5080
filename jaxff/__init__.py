"""jaxff: a PaiNN force field in JAX whose gradients are written by hand.

Names load on first use, so that `import jaxff` is quick and has no side effects.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxff import convert, interop, md, ops, uncertainty, validate
    from jaxff.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        HostileCheckpointError,
        JaxffError,
        LabelError,
        SimulationError,
        StructureError,
    )
    from jaxff.interop.ase import JaxffCalculator
    from jaxff.loading import load_potential
    from jaxff.potential import Potential

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HostileCheckpointError",
    "JaxffCalculator",
    "JaxffError",
    "LabelError",
    "Potential",
    "SimulationError",
    "StructureError",
    "__version__",
    "convert",
    "interop",
    "load_potential",
    "md",
    "ops",
    "uncertainty",
    "validate",
]

_HOMES = {
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "HostileCheckpointError": "errors",
    "JaxffCalculator": "interop.ase",
    "JaxffError": "errors",
    "LabelError": "errors",
    "Potential": "potential",
    "SimulationError": "errors",
    "StructureError": "errors",
    "load_potential": "loading",
}
# `convert` is a package that can be called: jaxff.convert(src, dst)
_MODULES = ("convert", "interop", "md", "ops", "uncertainty", "validate")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f"jaxff.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"jaxff.{name}")
    else:
        raise AttributeError(f"module 'jaxff' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
