"""The fused engine: a GPU's kernels themselves where one is, else interpreted, and the CPU's beside them."""

from typing import Any

import jax

GPU = jax.default_backend() == "gpu"
PROGRAMS: Any = "triton" if GPU else "interpret"  # how a GPU's kernels run here
ROUTES: list[Any] = [PROGRAMS] if GPU else [PROGRAMS, "native"]
