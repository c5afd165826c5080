"""jaxff inside other programs: `ase` (a Calculator) and `jax_md` (energy functions), imported when used."""

from importlib import import_module
from types import ModuleType

__all__ = ["ase", "jax_md"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
