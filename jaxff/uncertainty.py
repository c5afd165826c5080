"""How far can the forces be trusted? A committee: models that were trained apart agree where there were data.

The spread σ of a committee is, for each atom, the root mean square over the other members m of |F_m - F_1|. Measured on
molecules outside the training set, a scale makes it an estimate of the error |F_1 - F_teacher| in eV/Å, and a logistic
curve in ln σ makes it the probability that this error exceeds LARGE_ERROR; for a whole structure, that of any atom's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxff import pretrained
from jaxff.errors import ConfigError
from jaxff.loading import load_potential
from jaxff.potential import Potential

LARGE_ERROR = 0.2  # eV/Å
_FLOOR = 1e-3  # eV/Å, added to a spread before its logarithm


class Evaluation(NamedTuple):
    """Of one structure: atomic energies [N] (eV) and forces [N, 3] (eV/Å) of the first member, spread [N] (eV/Å)."""

    energies: Float[np.ndarray, "N"]
    forces: Float[np.ndarray, "N 3"]
    spread: Float[np.ndarray, "N"]


@dataclass(frozen=True)
class Committee:
    """Potentials of one surface; the first gives energies and forces, the others say how sure they are.

    scale: mean force error / mean spread, measured outside the training set; 1 gives the bare spread.
    logistic: (a, b) of the probability 1/(1 + exp(-a - b ln σ)) that an atom's force error exceeds LARGE_ERROR.
    `calibrate` gives both. Raises ConfigError for fewer than two members or a scale that isn't positive.
    """

    members: Sequence[Potential]
    scale: float = 1.0
    logistic: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if len(self.members) < 2:
            raise ConfigError(f"expected a committee of at least two potentials, received {len(self.members)}")
        if not 0 < self.scale < float("inf"):
            raise ConfigError(f"expected a positive scale of the uncertainty, received {self.scale}")

    def evaluate(self, numbers: Any, positions: Any, cell: Any = None, pbc: Any = None) -> Evaluation:
        """Energies, forces and their spread. Raises StructureError where one of the members does."""
        (energies, forces), *others = (member.evaluate(numbers, positions, cell, pbc) for member in self.members)
        return Evaluation(energies, forces, spread(forces, [other for _, other in others]))

    def force_error(self, numbers: Any, positions: Any, cell: Any = None, pbc: Any = None) -> Float[np.ndarray, "N"]:
        """Estimated error of each atom's force vector, [N] eV/Å."""
        return self.calibrated(self.evaluate(numbers, positions, cell, pbc).spread)

    def large_error_probability(self, spread: Float[np.ndarray, "N"]) -> float:
        """Probability that the force on at least one atom of a structure is wrong by more than LARGE_ERROR.

        spread: [N] eV/Å, as `evaluate` gives it. Raises ConfigError where the committee has no logistic curve.
        """
        if self.logistic is None:
            raise ConfigError("expected a committee with a logistic curve (jaxff.uncertainty.calibrate), it has none")
        return float(-np.expm1(-hazard(spread, self.logistic).sum()))

    def calibrated(self, spread: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N"]:
        """A spread as the error to expect, eV/Å."""
        return self.scale * spread


def spread(forces: Float[np.ndarray, "N 3"], others: Sequence[Float[np.ndarray, "N 3"]]) -> Float[np.ndarray, "N"]:
    """sqrt(mean_m |F_m - F|²) of each atom, in float64."""
    differences = np.asarray(others, np.float64) - np.asarray(forces, np.float64)
    return np.sqrt((differences**2).sum(axis=-1).mean(axis=0))


def hazard(spread: Float[np.ndarray, "N"], logistic: tuple[float, float]) -> Float[np.ndarray, "N"]:
    """-ln(1 - P) of each atom, P the probability that its force error exceeds LARGE_ERROR: adds up over atoms."""
    intercept, slope = logistic
    return np.logaddexp(0, intercept + slope * np.log(np.asarray(spread, np.float64) + _FLOOR))


def calibrate(spread: Float[np.ndarray, "A"], errors: Float[np.ndarray, "A"]) -> tuple[float, tuple[float, float]]:
    """Scale and logistic curve of a committee, from spreads and true force errors |F_1 - F| of many atoms, eV/Å.

    The curve is the maximum-likelihood fit. Raises ConfigError unless there are errors on both sides of LARGE_ERROR.
    """
    from scipy.optimize import minimize

    large = np.asarray(errors) > LARGE_ERROR
    if not 0 < large.sum() < large.size:
        raise ConfigError(f"expected force errors on both sides of {LARGE_ERROR} eV/Å, received {large.size} on one")
    logarithm = np.log(np.asarray(spread, np.float64) + _FLOOR)

    def loss(curve: np.ndarray) -> tuple[float, np.ndarray]:
        x = curve[0] + curve[1] * logarithm
        excess = 1 / (1 + np.exp(-x)) - large
        return float(np.mean(np.logaddexp(0, x) - large * x)), np.array([excess.mean(), (excess * logarithm).mean()])

    intercept, slope = minimize(loss, np.zeros(2), jac=True).x
    return float(np.mean(errors) / np.mean(spread)), (float(intercept), float(slope))


def pretrained_committee(
    name: str = pretrained.DEFAULT, dtype: Any = "float32", engine: str = "auto", first: Potential | None = None
) -> Committee:
    """The committee that a pretrained model's card names, with its scale.

    first: the model itself, where it is loaded already. Raises ConfigError where the card has no committee.
    """
    calibration = pretrained.read_card(name).uncertainty
    if calibration is None or calibration.members[0] != name:
        raise ConfigError(f"the pretrained model {name} has no calibrated uncertainty on its card")
    rest = [load_potential(member, dtype, engine) for member in calibration.members[1:]]
    return Committee((first or load_potential(name, dtype, engine), *rest), calibration.scale, calibration.logistic)
