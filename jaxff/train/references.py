"""Energies of elements: what a total energy holds besides the bonds, fitted by least squares on compositions."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from jaxff.errors import DataError
from jaxff.train.frames import Ragged, slabs


def fit_references(
    frames: Ragged, max_z: int, ridge: float = 0.0, chosen: Int[np.ndarray, "b"] | None = None
) -> Float[np.ndarray, "max_z+1"]:
    """Energy of each element in eV, [max_z + 1] by atomic number, float64: min over e of |n e - E|² + ridge |e|².

    n: atoms of each element in each frame; every frame weighs the same. chosen: which frames; None: all. Elements that
    aren't in them get 0. Where compositions leave a choice (water alone), the smallest |e| is taken. Raises DataError:
    no frames, an element above max_z, a ridge below 0.
    """
    if not len(frames) or (chosen is not None and not len(chosen)):
        raise DataError("expected frames to fit element references to, received none")
    if ridge < 0.0:
        raise DataError(f"expected a ridge of at least 0, received {ridge}")
    if frames.numbers.min(initial=1) < 1 or frames.numbers.max(initial=0) > max_z:
        raise DataError(
            f"expected atomic numbers in 1..max_z = {max_z}, received {frames.numbers.min()}..{frames.numbers.max()}"
        )
    elements = np.unique(frames.numbers)
    counts, energies = compositions(frames, elements), frames.energies
    if chosen is not None:
        counts, energies = counts[chosen], energies[chosen]
        present = counts.any(axis=0)
        counts, elements = counts[:, present], elements[present]
    counts = counts.astype(np.float64)
    if ridge > 0.0:
        counts = np.concatenate([counts, np.sqrt(ridge) * np.eye(len(elements))])
        energies = np.concatenate([energies, np.zeros(len(elements))])
    solution, *_ = np.linalg.lstsq(counts, energies, rcond=None)
    references = np.zeros(max_z + 1)
    references[elements] = solution
    return references


def compositions(frames: Ragged, elements: Int[np.ndarray, "k"]) -> Int[np.ndarray, "B k"]:
    """How many atoms of each of `elements` (all there are, sorted) a frame has."""
    width = len(elements)
    counts = np.zeros((len(frames), width), np.int32)
    for slab in slabs(frames.splits):
        splits = frames.splits[slab.start : slab.stop + 1]
        columns = np.searchsorted(elements, frames.numbers[splits[0] : splits[-1]])
        places = np.repeat(np.arange(len(splits) - 1), np.diff(splits)) * width + columns
        counts[slab] = np.bincount(places, minlength=counts[slab].size).reshape(-1, width)
    return counts


def remainders(frames: Ragged, references: Float[np.ndarray, "Z"]) -> Float[np.ndarray, "B"]:
    """Energies without the sum of the elements' references, [B] eV, in float64."""
    rest = frames.energies.copy()
    for slab in slabs(frames.splits):
        splits = frames.splits[slab.start : slab.stop + 1]
        rest[slab] -= np.add.reduceat(references[frames.numbers[splits[0] : splits[-1]]], splits[:-1] - splits[0])
    return rest
