"""A model with its parameters, ready to be evaluated: energy, forces, Hessian; dtype and engine are chosen once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxff import models, neighbors
from jaxff.config import PainnConfig, StudentConfig
from jaxff.errors import ConfigError
from jaxff.ops.distance import accumulate_forces, within_cutoff
from jaxff.system import Pairs, check_structure
from jaxff.tabulate import FilterError, tabulate

Engine = Literal["auto", "xla", "fused"]
FilterChoice = Literal["auto", "exact", "table"]
Config = StudentConfig | PainnConfig


class Potential:
    """A potential energy surface: parameters + model -> energy (eV) and forces (eV/Å).

    params: the parameter tree (jaxff.models.param_shapes); dtype: "float32" or "float64".
    engine: "xla"; "fused" (kernels for NVIDIA GPUs and for CPUs, float32); "auto", the fused one where it can run.
    Where "fused" was asked for and cannot run, a warning says why and "xla" serves.
    filters: "exact" networks; "table", cubics in the distance with `filter_error` (jaxff.tabulate); "auto", tables for
    the fused engine, which needs them, and exact filters otherwise.
    float64 needs no global JAX setting. Raises ConfigError for another dtype, engine or kind of filters.

    The methods take one structure: numbers [N] and positions [N, 3] Å; cell and pbc are accepted, but a periodic
    structure raises StructureError, as do NaN, unknown elements, shapes that disagree and, where the model knows
    closed-shell molecules only, an odd number of electrons.
    """

    def __init__(
        self,
        params: Any,
        config: Config,
        dtype: Any = "float32",
        engine: str = "auto",
        certificate: dict[str, Any] | None = None,
        filters: str = "auto",
    ) -> None:
        self.dtype = _check_dtype(dtype)
        self.config = config
        self.certificate = certificate
        self.engine, self.filters = _choose(engine, filters, self.dtype, config)
        self.filter_error: FilterError | None = None
        with self.precision():
            self.params = models.cast(params, self.dtype)
            self._tree = self.params
            if self.filters == "table":
                tabulated, self.filter_error = tabulate(params, config)
                self._tree = models.cast(tabulated, self.dtype)
            self._fused = _fused_tree(self._tree, config) if self.engine == "fused" else None
        self._key = models.jit_key(config)
        self._slots: dict[int, int] = {}

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which JAX computes in this potential's dtype, whatever the global setting."""
        return jax.enable_x64(True) if self.dtype == np.float64 else contextlib.nullcontext()

    def check(
        self, numbers: Any, positions: Any, cell: Any = None, pbc: Any = None
    ) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N 3"]]:
        """The structure as arrays (int32, float64), or StructureError."""
        return check_structure(
            numbers,
            positions,
            cell,
            pbc,
            max_z=self.config.max_z,
            elements=self.config.elements,
            closed_shell=self.closed_shell,
        )

    @property
    def closed_shell(self) -> bool:
        """Whether the model knows neutral closed-shell molecules only."""
        return isinstance(self.config, PainnConfig) and self.config.closed_shell

    def energy(self, numbers: Any, positions: Any, cell: Any = None, pbc: Any = None) -> float:
        """Energy in eV."""
        return float(np.sum(self.atomic_energies(numbers, positions, cell, pbc), dtype=np.float64))

    def atomic_energies(
        self, numbers: Any, positions: Any, cell: Any = None, pbc: Any = None
    ) -> Float[np.ndarray, "N"]:
        """The readout of each atom, [N] eV; they sum to the energy."""
        z, r = self.check(numbers, positions, cell, pbc)
        with self.precision():
            energies = _energies(self._trees, self._key, *self._prepare(z, r))
            return np.asarray(energies)[: len(z)]

    def energy_and_forces(
        self, numbers: Any, positions: Any, cell: Any = None, pbc: Any = None
    ) -> tuple[float, Float[np.ndarray, "N 3"]]:
        """Energy in eV and forces -dE/dR, [N, 3] eV/Å."""
        energies, forces = self.evaluate(numbers, positions, cell, pbc)
        return float(np.sum(energies, dtype=np.float64)), forces

    def evaluate(
        self, numbers: Any, positions: Any, cell: Any = None, pbc: Any = None
    ) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "N 3"]]:
        """Atomic energies [N] in eV and forces [N, 3] in eV/Å, by the explicit chain."""
        z, r = self.check(numbers, positions, cell, pbc)
        with self.precision():
            energies, forces = _energies_and_forces(self._trees, self._key, *self._prepare(z, r))
            return np.asarray(energies)[: len(z)], np.asarray(forces)[: len(z)]

    def hessian(self, numbers: Any, positions: Any, cell: Any = None, pbc: Any = None) -> Float[np.ndarray, "3N 3N"]:
        """Second derivatives d²E/dR², [3N, 3N] eV/Å², atom-major, by reverse mode over the hand-written rules."""
        z, r = self.check(numbers, positions, cell, pbc)
        with self.precision():
            senders, receivers = neighbors.neighbor_pairs(r, self.config.cutoff)
            pairs = Pairs(senders, receivers, np.ones(len(senders), bool), len(z), symmetric=True)
            return np.asarray(_hessian(self._tree, self._key, z, r.astype(self.dtype), pairs))

    def atomic_energies_of_vectors(
        self, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
    ) -> Float[Array, "N"]:
        """Atomic energies [N] in eV of traced pair vectors [E, 3]; pairs beyond the cutoff are masked here.

        For use under jit, vmap and grad (jax.grad runs the hand-written rules, twice by reverse mode). Arrays are of
        this potential's dtype; numbers 0 mark padding; they are not checked here.
        """
        return _atomic_energies(self._trees, self._key, numbers, vectors, self._counting(vectors, pairs))

    def energy_of_vectors(
        self, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
    ) -> Float[Array, ""]:
        """Energy in eV: the sum of `atomic_energies_of_vectors`, faster to differentiate."""
        return _energy(self._trees, self._key, numbers, vectors, self._counting(vectors, pairs))

    def energy_of_positions(
        self, numbers: Int[Array, "N"], positions: Float[Array, "N 3"], pairs: Pairs
    ) -> Float[Array, ""]:
        """`energy_of_vectors` of R[sender] - R[receiver], where `serves_positions` says so: faster, in one kernel."""
        from jaxff import kernels

        assert self._fused is not None
        return kernels.energy_of_positions(self._fused, self._key, numbers, positions, pairs)

    def serves_positions(self, pairs: Pairs) -> bool:
        """Whether positions of this dtype may take the place of pair vectors."""
        if self._fused is None:
            return False
        from jaxff import kernels

        return kernels.serves_positions(self._fused, self._key, pairs)

    def energies_and_vector_gradients(
        self, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
    ) -> tuple[Float[Array, "N"], Float[Array, "E 3"]]:
        """Atomic energies [N] (eV) and dE/dr_e [E, 3] (eV/Å) of traced pair vectors, by the explicit chain."""
        pairs = self._counting(vectors, pairs)
        return _energies_and_gradients(self._trees, self._key, numbers, vectors, pairs)

    def gradients_are_antisymmetric(self, pairs: Pairs) -> bool:
        """Whether dE/dr_e comes as minus that of the reverse pair: sums at the receivers then make the forces."""
        return _fused_serves(self._trees, pairs)

    @property
    def arrays(self) -> Any:
        """What `with_arrays` takes."""
        return self._tree, self._fused

    def with_arrays(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of (self.arrays, *args), to be compiled, of one of args which calls methods of traced arguments.

        Programs then don't hold the arrays, of tens of MB, which they and a cache would move; while it is traced, no
        other thread may use this potential.
        """

        def taking(arrays: Any, *args: Any) -> Any:
            mine = self.arrays
            self._tree, self._fused = arrays
            try:
                return function(*args)
            finally:
                self._tree, self._fused = mine

        return taking

    @property
    def _trees(self) -> _Trees:
        return _Trees(self._tree, self._fused)

    def _counting(self, vectors: Float[Array, "E 3"], pairs: Pairs) -> Pairs:
        """The pairs, of which those count that are within the cutoff; the fused engine sees to that itself."""
        return pairs if _fused_serves(self._trees, pairs) else within_cutoff(vectors, pairs, self.config.cutoff)

    def _prepare(
        self, z: Int[np.ndarray, "N"], r: Float[np.ndarray, "N 3"]
    ) -> tuple[Int[np.ndarray, "P"], Float[np.ndarray, "E 3"], Pairs]:
        """Padded numbers, pair vectors in this dtype, and pairs."""
        n = len(z)
        padded = neighbors.bucket(n)
        cutoff = self.config.cutoff
        if n <= neighbors.ALL_PAIRS_LIMIT:
            vectors, pairs = neighbors.all_pairs(r, cutoff, padded)
        else:
            senders, receivers = neighbors.neighbor_pairs(r, cutoff)
            needed = neighbors.slots_needed(receivers, n)
            if needed > self._slots.get(padded, 0):
                self._slots[padded] = neighbors.round_slots(needed)
            vectors, pairs = neighbors.slot_pairs(r, senders, receivers, padded, self._slots[padded])
        return np.pad(z, (0, padded - n)), vectors.astype(self.dtype), pairs


class _Trees(NamedTuple):
    """Parameters for the XLA engine, which takes any pairs, and for the fused one, where that is chosen."""

    xla: Any
    fused: Any


def _fused_serves(trees: _Trees, pairs: Pairs) -> bool:
    if trees.fused is None:
        return False
    from jaxff import kernels

    return kernels.serves(pairs)


def _atomic_energies(
    trees: _Trees, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, "N"]:
    if _fused_serves(trees, pairs):
        from jaxff import kernels

        return kernels.atomic_energies(trees.fused, config, numbers, vectors, pairs)
    return models.atomic_energies(trees.xla, config, numbers, vectors, pairs)


def _energy(
    trees: _Trees, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, ""]:
    if _fused_serves(trees, pairs):
        from jaxff import kernels

        return kernels.energy(trees.fused, config, numbers, vectors, pairs)
    return models.atomic_energies(trees.xla, config, numbers, vectors, pairs).sum()


def _energies_and_gradients(
    trees: _Trees, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> tuple[Float[Array, "N"], Float[Array, "E 3"]]:
    if _fused_serves(trees, pairs):
        from jaxff import kernels

        return kernels.energies_and_vector_gradients(trees.fused, config, numbers, vectors, pairs)
    return models.energies_and_vector_gradients(trees.xla, config, numbers, vectors, pairs)


@partial(jax.jit, static_argnums=1)
def _energies(
    trees: _Trees, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> Float[Array, "N"]:
    return _atomic_energies(trees, config, numbers, vectors, pairs)


@partial(jax.jit, static_argnums=1)
def _energies_and_forces(
    trees: _Trees, config: Config, numbers: Int[Array, "N"], vectors: Float[Array, "E 3"], pairs: Pairs
) -> tuple[Float[Array, "N"], Float[Array, "N 3"]]:
    energies, gradients = _energies_and_gradients(trees, config, numbers, vectors, pairs)
    return energies, accumulate_forces(gradients, pairs, antisymmetric=_fused_serves(trees, pairs))


@partial(jax.jit, static_argnums=1)
def _hessian(
    params: Any, config: Config, numbers: Int[Array, "N"], positions: Float[Array, "N 3"], pairs: Pairs
) -> Float[Array, "3N 3N"]:
    def energy(r: Float[Array, "N 3"]) -> Float[Array, ""]:
        return models.atomic_energies(params, config, numbers, r[pairs.senders] - r[pairs.receivers], pairs).sum()

    return jax.jacrev(jax.grad(energy))(positions).reshape(positions.size, positions.size)


def _check_dtype(dtype: Any) -> np.dtype:
    try:
        resolved = np.dtype(dtype)
    except TypeError:
        resolved = np.dtype(object)
    if resolved not in (np.dtype("float32"), np.dtype("float64")):
        raise ConfigError(f"expected dtype 'float32' or 'float64', received {dtype!r}")
    return resolved


def _choose(engine: str, filters: str, dtype: np.dtype, config: Config) -> tuple[str, str]:
    """Engine and kind of filters that will be used, or ConfigError."""
    if engine not in get_args(Engine):
        raise ConfigError(f"expected engine 'auto', 'xla' or 'fused', received {engine!r}")
    if filters not in get_args(FilterChoice):
        raise ConfigError(f"expected filters 'auto', 'exact' or 'table', received {filters!r}")
    chosen = "xla"
    if engine in ("fused", "auto"):
        obstacle = _obstacle(filters, dtype, config)
        if obstacle is None:
            chosen = "fused"
        elif engine == "fused":
            warnings.warn(f"the fused engine is not used: {obstacle}; the XLA engine serves", stacklevel=3)
    if filters == "auto":
        filters = "table" if chosen == "fused" else "exact"
    return chosen, filters


def _obstacle(filters: str, dtype: np.dtype, config: Config) -> str | None:
    """Why the fused engine can't be used, or None."""
    if dtype != np.float32:
        return f"it computes in float32, and {dtype} was asked for"
    if filters == "exact":
        return "it needs tabulated filters, and exact ones were asked for"
    try:
        from jaxff import kernels

        return kernels.why_not(config)
    except ImportError as error:
        return f"its library is missing ({error})"


def _fused_tree(tree: Any, config: Config) -> Any:
    from jaxff import kernels

    return kernels.prepare(tree, config)
