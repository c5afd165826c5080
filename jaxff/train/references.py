"""Energies of elements: what a total energy holds besides the bonds, fitted by least squares on compositions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from jaxff.errors import DataError
from jaxff.train.frames import Frames


def fit_references(frames: Frames, max_z: int, ridge: float = 0.0) -> Float[np.ndarray, "max_z+1"]:
    """Energy of each element in eV, [max_z + 1] by atomic number, float64: min over e of |n e - E|² + ridge |e|².

    n: atoms of each element in each frame; every frame weighs the same. Elements that aren't in the data get 0. Where
    compositions leave a choice (water alone), the smallest |e| is taken. Raises DataError: no frames, an element
    above max_z, a ridge below 0.
    """
    if not len(frames):
        raise DataError("expected frames to fit element references to, received none")
    if ridge < 0.0:
        raise DataError(f"expected a ridge of at least 0, received {ridge}")
    if frames.numbers.min(initial=1) < 1 or frames.numbers.max(initial=0) > max_z:
        raise DataError(
            f"expected atomic numbers in 1..max_z = {max_z}, received {frames.numbers.min()}..{frames.numbers.max()}"
        )
    elements, columns = np.unique(frames.numbers, return_inverse=True)
    counts = compositions(frames, columns, len(elements))
    energies = frames.energies
    if ridge > 0.0:
        counts = np.concatenate([counts, np.sqrt(ridge) * np.eye(len(elements))])
        energies = np.concatenate([energies, np.zeros(len(elements))])
    solution, *_ = np.linalg.lstsq(counts, energies, rcond=None)
    references = np.zeros(max_z + 1)
    references[elements] = solution
    return references


def compositions(frames: Frames, columns: np.ndarray, width: int) -> Float[np.ndarray, "B width"]:
    """How many atoms of each column [A] a frame has."""
    places = frames.frame_of_atom * width + columns
    return np.bincount(places, minlength=len(frames) * width).reshape(len(frames), width).astype(np.float64)
