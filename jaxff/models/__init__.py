"""The architectures, by the name in their configuration; all take (params, config, numbers, vectors, pairs)."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.models import painn, student
from jaxff.models.painn import Painn
from jaxff.models.parameters import ParameterTree, Params, shapes_of
from jaxff.models.student import Student
from jaxff.system import Pairs

__all__ = [
    "Painn",
    "Student",
    "atomic_energies",
    "energies_and_vector_gradients",
    "filters_reference",
    "init_params",
    "param_shapes",
    "reference_atomic_energies",
]

Config = StudentConfig | PainnConfig
_ARCHITECTURES: dict[str, ModuleType] = {"student": student, "painn": painn}


def param_shapes(config: Config, dtype: Any = jnp.float32) -> Params:
    """The parameter tree with jax.ShapeDtypeStruct leaves."""
    return shapes_of(_ARCHITECTURES[config.architecture].leaves(config), dtype)


def init_params(config: Config, key: Array, dtype: Any = jnp.float32) -> Params:
    """Fresh random parameters from a PRNG key."""
    tree = ParameterTree(_ARCHITECTURES[config.architecture].leaves(config), dtype)
    return tree.init(key)["params"]


def atomic_energies(
    params: Params, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, "N"]:
    """Atomic energies [N] in eV, differentiable by the hand-written rules, twice by reverse mode.

    numbers: [N], 0 marks padding; vectors: r_e = R[sender] - R[receiver], [E, 3] Å; pairs: mask True within the cutoff.
    """
    return _ARCHITECTURES[config.architecture].atomic_energies(params, config, numbers, vectors, pairs)


def reference_atomic_energies(
    params: Params, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, "N"]:
    """The same energies through plain functions, without any rule: what autodiff is measured on."""
    return _ARCHITECTURES[config.architecture].reference_atomic_energies(params, config, numbers, vectors, pairs)


def filters_reference(params: Params, config: Config, d: Float[Array, "E"]) -> list[Float[Array, "E 3F"]]:
    """Filters of all interactions at distances d [E] Å, by plain functions; each [E, 3F]."""
    return _ARCHITECTURES[config.architecture].filters_reference(params, config, d)


def energies_and_vector_gradients(
    params: Params, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> tuple[Float[Array, "N"], Float[Array, "E 3"]]:
    """Atomic energies [N] (eV) and dE/dr_e [E, 3] (eV/Å) by the explicit chain: no jax.grad, no jax.vjp."""
    model = _ARCHITECTURES[config.architecture]
    energies, residuals = model.forward(params, config, numbers, vectors, pairs)
    return energies, model.backward(config, residuals, jnp.ones_like(energies))[2]


def jit_key(config: Config) -> Config:
    """The configuration as a static argument: what the compiled code depends on."""
    return config.model_copy(update={"elements": None})


def cast(params: Params, dtype: Any) -> Params:
    """All parameters as JAX arrays of a dtype, copied by NumPy: for each shape, XLA would compile its copy."""
    return jax.device_put(jax.tree.map(lambda x: np.array(x, dtype), params))
