"""What the model sees of a structure: checked numbers and positions, and the directed pairs between atoms.

Index conventions, said once. A pair (edge) e goes from its sender j to its receiver i; its vector is
r_e = R[sender] - R[receiver], as in the student. N atoms, E pairs, padding included; padding has mask False.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxff.errors import StructureError
from jaxff.units import chemical_symbols

Layout = Literal["all", "slots", "edges"]
CHARGE_ROUNDING = 0.1  # e: partial charges in files are rounded
_NEUTRAL_SINGLET = {
    "charge": 0,
    "total_charge": 0,
    "spin": 0,
    "total_spin": 0,
    "uhf": 0,
    "multiplicity": 1,
    "spin_multiplicity": 1,
}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["senders", "receivers", "mask"],
    meta_fields=["num_atoms", "layout", "symmetric"],
)
@dataclass(frozen=True)
class Pairs:
    """Directed pairs of one structure (or of several, joined), in one of three layouts.

    all: E = N², pair e = (receiver e // N, sender e % N): small systems, no gather and no scatter at all.
    slots: E = N M, receiver e // M: a dense neighbour list, sums over receivers are reshapes.
    edges: any order; sums are segment sums.

    `symmetric` promises that with every valid pair its reverse is valid too. Then, for filters that depend on the
    distance alone, the transpose of a message sum is the same gather-sum (jaxff.ops.message), and no scatter is left.
    """

    senders: Int[Array | np.ndarray, "E"]
    receivers: Int[Array | np.ndarray, "E"]
    mask: Bool[Array | np.ndarray, "E"]
    num_atoms: int
    layout: Layout = "edges"
    symmetric: bool = False

    def at_senders(self, x: Float[Array, "N ..."]) -> Float[Array, "E ..."]:
        """x of each pair's sender."""
        if self.layout == "all":
            n = self.num_atoms
            return jnp.broadcast_to(x[None], (n, *x.shape)).reshape(n * n, *x.shape[1:])
        return x[self.senders]

    def at_receivers(self, x: Float[Array, "N ..."]) -> Float[Array, "E ..."]:
        """x of each pair's receiver."""
        if self.layout == "edges":
            return x[self.receivers]
        n, m = self.num_atoms, self._slots
        return jnp.broadcast_to(x[:, None], (n, m, *x.shape[1:])).reshape(n * m, *x.shape[1:])

    def sum_at_receivers(self, x: Float[Array, "E ..."]) -> Float[Array, "N ..."]:
        """Sum of x over the pairs that each atom receives."""
        if self.layout == "edges":
            return jax.ops.segment_sum(x, self.receivers, self.num_atoms)
        return x.reshape(self.num_atoms, self._slots, *x.shape[1:]).sum(axis=1)

    def sum_at_senders(self, x: Float[Array, "E ..."]) -> Float[Array, "N ..."]:
        """Sum of x over the pairs that each atom sends."""
        if self.layout == "all":
            return x.reshape(self.num_atoms, self.num_atoms, *x.shape[1:]).sum(axis=0)
        return jax.ops.segment_sum(x, self.senders, self.num_atoms)

    def transpose_sum(self, weights: Float[Array, "E ..."], x: Float[Array, "N ..."]) -> Float[Array, "N ..."]:
        """Sum over the pairs e that each atom sends of weights_e x[receiver]: the transpose of a message sum.

        Over a symmetric list it is taken at the receivers; `weights` must then be equal for a pair and its reverse.
        """
        if self.transposes_by_gather:
            return self.sum_at_receivers(weights * self.at_senders(x))
        return self.sum_at_senders(weights * self.at_receivers(x))

    @property
    def transposes_by_gather(self) -> bool:
        """Whether `transpose_sum` relies on the list's symmetry (a dense sum over senders is as cheap without)."""
        return self.symmetric and self.layout != "all"

    @property
    def _slots(self) -> int:
        return self.mask.shape[0] // max(self.num_atoms, 1)


def check_structure(
    numbers: Any,
    positions: Any,
    cell: Any = None,
    pbc: Any = None,
    *,
    max_z: int = 118,
    elements: tuple[int, ...] | None = None,
    closed_shell: bool = False,
) -> tuple[Int[np.ndarray, "N"], Float[np.ndarray, "N 3"]]:
    """Atomic numbers (int32) and positions (float64, Å) as arrays, or StructureError.

    Refused: no atoms, shapes that disagree, NaN or infinity, an atomic number outside 1..max_z or outside
    `elements`, an odd number of electrons where `closed_shell`, a periodic structure (pairs across cells are not
    implemented).
    """
    try:
        z, r = np.asarray(numbers), np.asarray(positions, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise StructureError(f"expected arrays of numbers, received something else ({error})") from None
    if z.ndim != 1 or r.shape != (z.shape[0], 3):
        raise StructureError(
            f"expected numbers of shape [N] and positions of shape [N, 3], received {list(z.shape)} and {list(r.shape)}"
        )
    if z.size == 0:
        raise StructureError("expected at least one atom, received none")
    if z.dtype.kind not in "iu":
        if z.dtype.kind != "f" or not np.all(z == np.round(z)):
            raise StructureError(f"expected integer atomic numbers, received dtype {z.dtype}")
        z = z.astype(np.int64)
    bad = np.flatnonzero(~np.isfinite(r).all(axis=1))
    if bad.size:
        raise StructureError(f"expected finite positions, received {r[bad[0]].tolist()} for atom {bad[0]}")
    largest = max_z if elements is None else len(chemical_symbols) - 1  # a list of elements tells more
    outside = np.flatnonzero((z < 1) | (z > largest))
    if outside.size:
        i = outside[0]
        raise StructureError(f"expected atomic numbers 1 to {largest}, received {int(z[i])} for atom {i}")
    if elements is not None:
        unknown = np.flatnonzero(~np.isin(z, elements))
        if unknown.size:
            i = unknown[0]
            known = " ".join(chemical_symbols[e] for e in sorted(elements))
            raise StructureError(
                f"the model was made for the elements {known}, received {chemical_symbols[z[i]]} (atom {i})"
            )
    electrons = int(z.sum())
    if closed_shell and electrons % 2:
        raise StructureError(
            f"expected a neutral closed-shell molecule, received {electrons} electrons, an odd number:"
            " the model knows neither radicals nor ions"
        )
    if pbc is not None and np.any(pbc):
        raise StructureError(
            f"expected an open (non-periodic) structure, received pbc = {np.asarray(pbc).tolist()}:"
            " periodic pairs are not implemented"
        )
    if cell is not None and np.shape(cell) not in ((3, 3), (3,), (6,)):
        raise StructureError(f"expected a cell of shape [3, 3], received {list(np.shape(cell))}")
    return z.astype(np.int32), r


def check_neutral_singlet(info: Mapping[str, Any], charges: Any = (), magnetic_moments: Any = ()) -> None:
    """StructureError where a structure says that it has a charge or unpaired electrons.

    info: what a file says of it by name (charge, spin, multiplicity, ...); charges, magnetic_moments: [N] of the atoms.
    Partial charges are fine as long as their sum rounds to zero.
    """
    for name, expected in _NEUTRAL_SINGLET.items():
        if name in info and not _equals(info[name], expected):
            raise StructureError(
                f"expected a neutral closed-shell molecule ({name} {expected}), received {name} {info[name]}:"
                " the model knows neither ions nor unpaired electrons"
            )
    charge = float(np.sum(np.asarray(charges, np.float64)))
    if not abs(charge) < CHARGE_ROUNDING:
        raise StructureError(f"expected a neutral molecule, received initial charges that sum to {charge:g}")
    moments = np.asarray(magnetic_moments, np.float64)
    if np.any(moments != 0):
        raise StructureError("expected a closed-shell molecule, received initial magnetic moments that are not zero")


def _equals(value: Any, expected: int) -> bool:
    try:
        return float(value) == expected
    except (TypeError, ValueError):
        return False


def closest_pair(positions: Float[np.ndarray, "N 3"]) -> tuple[float, int, int]:
    """Distance (Å) and indices of the two atoms that lie closest; infinity for one atom."""
    from scipy.spatial import cKDTree

    if len(positions) < 2:
        return float("inf"), 0, 0
    distance, index = cKDTree(positions).query(positions, k=2)
    # of two atoms at one place, either may come first in its own query
    i = int(np.argmin(distance[:, 1]))
    j = int(index[i, 1] if index[i, 1] != i else index[i, 0])
    return float(distance[i, 1]), min(i, j), max(i, j)
