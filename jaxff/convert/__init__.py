"""PyTorch checkpoints of the student -> jaxff's file, and back. Nothing in a checkpoint is run.

The package can be called: jaxff.convert(src, dst) is jaxff.convert.convert(src, dst).
"""

import sys
from types import ModuleType
from typing import Any

from jaxff.convert.api import convert, inspect_source, read_student
from jaxff.convert.api import write_torch as to_torch

__all__ = ["convert", "inspect_source", "read_student", "to_torch"]


class _Callable(ModuleType):
    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return convert(*args, **keywords)


_Callable.__call__.__doc__ = convert.__doc__
sys.modules[__name__].__class__ = _Callable
