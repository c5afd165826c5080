"""The student's tensors: PyTorch's names and shapes, and their places in jaxff's parameter tree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxff.checkpoint import flatten, unflatten
from jaxff.config import StudentConfig

MAX_INTERACTIONS = 32
_INDEX = r"(?:[0-9]|[12][0-9]|3[01])"
STUDENT_NAME = re.compile(
    r"(?P<prefix>.*?)(?P<name>embedding\.weight|rbf\.(?:centers|widths)"
    rf"|interactions\.{_INDEX}\.message\.rbf_to_scalar\.[02]\.(?:weight|bias)"
    rf"|interactions\.{_INDEX}\.update\.(?:update_mlp\.[02]\.(?:weight|bias)|mixing_matrix)"
    r"|energy_head\.[024]\.(?:weight|bias))",
    re.ASCII | re.DOTALL,
)
_LINEAR = {"weight": "kernel", "bias": "bias"}


def student_shapes(rows: int, F: int, K: int, L: int) -> dict[str, tuple[int, ...]]:
    """PyTorch's name -> shape, in the order of the class's own state dict. Linear weights are [out, in]."""
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (rows, F), "rbf.centers": (K,), "rbf.widths": (K,)}
    for i in range(L):
        message, update = f"interactions.{i}.message.rbf_to_scalar", f"interactions.{i}.update"
        shapes |= {f"{message}.0.weight": (F, K), f"{message}.0.bias": (F,)}
        shapes |= {f"{message}.2.weight": (3 * F, F), f"{message}.2.bias": (3 * F,)}
        shapes |= {f"{update}.mixing_matrix": (3, 3)}
        shapes |= {f"{update}.update_mlp.0.weight": (F, 2 * F), f"{update}.update_mlp.0.bias": (F,)}
        shapes |= {f"{update}.update_mlp.2.weight": (3 * F, F), f"{update}.update_mlp.2.bias": (3 * F,)}
    for layer, (out, into) in enumerate([(F // 2, F), (F // 4, F // 2), (1, F // 4)]):
        shapes |= {f"energy_head.{2 * layer}.weight": (out, into), f"energy_head.{2 * layer}.bias": (out,)}
    return shapes


def config_shapes(config: StudentConfig) -> dict[str, tuple[int, ...]]:
    """`student_shapes` of a configuration."""
    return student_shapes(config.max_z + 1, config.hidden_dim, config.num_rbf, config.num_interactions)


def tree_name(name: str) -> str:
    """The place of PyTorch's `name` in jaxff's tree, joined by '.'."""
    parts = name.split(".")
    if parts[0] == "embedding":
        return "embedding.table"
    if parts[0] == "rbf":
        return f"radial.{parts[1]}"
    if parts[0] == "energy_head":
        return f"readout.dense_{int(parts[1]) // 2}.{_LINEAR[parts[2]]}"
    if parts[-1] == "mixing_matrix":
        return f"interaction_{parts[1]}.update.mixing_matrix"
    block = {"message": "filter", "update": "update"}[parts[2]]
    return f"interaction_{parts[1]}.{block}.dense_{int(parts[4]) // 2}.{_LINEAR[parts[5]]}"


def to_tree(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """jaxff's parameter tree of the student's tensors; kernels are [in, out]."""
    leaves = {}
    for name, array in tensors.items():
        place = tree_name(name)
        leaves[place] = np.ascontiguousarray(array.T) if place.endswith(".kernel") else array
    return unflatten(leaves)


def from_tree(params: Mapping[str, Any], config: StudentConfig) -> dict[str, np.ndarray]:
    """The student's tensors by PyTorch's names, in the class's order."""
    leaves = dict(flatten(params))
    tensors = {}
    for name in config_shapes(config):
        place = tree_name(name)
        array = np.asarray(leaves[place])
        tensors[name] = np.ascontiguousarray(array.T) if place.endswith(".kernel") else array
    return tensors
