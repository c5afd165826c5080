"""jax-md, imported without what takes longest and what nothing here uses: that is loaded when it is first asked for.

jax-md's rigid bodies compute for seconds on import, on a GPU for longer; its energies bring several libraries.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import LazyLoader
from types import ModuleType
from typing import Any

import jax

LATER = frozenset(f"jax_md.{name}" for name in ("energy", "interpolate", "nn", "rigid_body"))


def import_jax_md() -> None:
    """Import jax-md; where it is not imported yet, without LATER."""
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        with jax.numpy_dtype_promotion("standard"):  # strict promotion fails within
            import_module("jax_md")
    finally:
        sys.meta_path.remove(finder)


class _Finder:
    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name in LATER else None
        if spec is None or spec.origin is None:
            return None
        spec.loader = LazyLoader(_Loader(name, spec.origin))
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        with jax.numpy_dtype_promotion("standard"):
            super().exec_module(module)
