"""What is wrong with labelled frames, found without a loop over them: bad frames, and units declared wrongly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxff.errors import DataError
from jaxff.train.frames import Frames
from jaxff.units import covalent_radii

FAR = 1e6  # Å from the origin: no molecule is there, and float32 loses its shape
OVERLAP = 0.2  # Å: atoms nearer than this lie on each other
NET_FORCE = 0.05, 1e-3  # eV/Å per atom, and relative to the mean force: more is no force of this molecule alone
BONDS = 0.65, 1.4  # shortest distance over the sum of covalent radii, median of a file; Å taken for Bohr: 0.53, or 1.9
FORCES = 10.0  # eV/Å, root mean square of a frame, median of a file; MD at 1000 K: about 3
_SLAB = 1 << 22  # pair distances at once
_DENSE = 512  # atoms up to which all pair distances are taken


@dataclass(frozen=True)
class Part:
    """Frames of one file; origin [B]: their places in it. problems: place and what is wrong, of those left out."""

    path: str
    frames: Frames
    origin: Int[np.ndarray, "B"]
    problems: list[tuple[int, str]]

    def without(self, bad: dict[int, str]) -> Part:
        """The part without the frames `bad` (index in `frames`, what is wrong), which join its problems."""
        if not bad:
            return self
        kept = np.ones(len(self.frames), bool)
        kept[list(bad)] = False
        found = [(int(self.origin[b]), what) for b, what in bad.items()]
        return Part(self.path, self.frames.select(kept), self.origin[kept], sorted(self.problems + found))

    @staticmethod
    def join(path: str, parts: Sequence[Part]) -> Part:
        """The parts of a file as one."""
        return Part(
            path,
            Frames.join([part.frames for part in parts]),
            np.concatenate([np.zeros(0, np.int64), *(part.origin for part in parts)]),
            [problem for part in parts for problem in part.problems],
        )


def check(parts: Iterable[Part], max_force: float, closed_shell: bool = False) -> Iterator[Part]:
    """The parts of one file without their bad frames; lengths in Å, energies in eV.

    Bad: no atoms, atomic numbers outside 1..118, NaN, a position beyond 1e6 Å, a force component above max_force
    (eV/Å), atoms closer than 0.2 Å, a net force, an odd number of electrons where `closed_shell`. Raises DataError
    after the last part where the units of the whole file are not plausible.
    """
    seen = _Seen()
    for part in parts:
        numeric = part.without(_not_numbers(part.frames))
        closest, scaled = closest_distances(numeric.frames)
        seen.add(numeric, scaled)
        yield numeric.without(_not_physical(numeric.frames, closest, max_force, closed_shell))
    seen.plausible()


class _Seen:
    """What tells of a file's units, gathered from its parts."""

    def __init__(self) -> None:
        self._path = ""
        self._closest: list[np.ndarray] = [np.zeros(0)]  # of each frame, in sums of covalent radii
        self._strength: list[np.ndarray] = [np.zeros(0)]  # root mean square force of each frame, eV/Å
        self._neighbours = _Neighbours()

    def add(self, part: Part, closest: Float[np.ndarray, "B"]) -> None:
        """closest: shortest distance of each frame in sums of covalent radii, infinite for one atom."""
        frames = part.frames
        square = _reduce(np.add, (frames.forces.astype(np.float64) ** 2).mean(axis=1), frames)
        self._path = part.path
        self._closest.append(closest[np.isfinite(closest)])
        self._strength.append(np.sqrt(square / frames.num_atoms))
        self._neighbours.add(frames)

    def plausible(self) -> None:
        """Raises DataError where shortest distances, forces, or energy changes against forces betray other units."""
        bonded, strengths = np.concatenate(self._closest), np.concatenate(self._strength)
        if bonded.size:
            median = float(np.median(bonded))
            if not BONDS[0] <= median <= BONDS[1]:
                raise DataError(
                    f"{self._path}: the declared unit of length looks wrong: the shortest distances are {median:.3g}"
                    f" times a bond's length (median of {bonded.size} frames), expected {BONDS[0]} to {BONDS[1]}"
                    " (Å, Bohr, nm?)"
                )
        if strengths.size:
            strength = float(np.median(strengths))
            if strength > FORCES:
                raise DataError(
                    f"{self._path}: the declared units of energy and length look wrong: the root mean square force is "
                    f"{strength:.3g} eV/Å (median of {strengths.size} frames), expected at most {FORCES}"
                )
        ratio = self._neighbours.ratio()
        if ratio is not None and not 0.5 < ratio < 2.0:
            raise DataError(
                f"{self._path}: energies and forces disagree: between neighbouring frames, energies change {ratio:.3g}"
                " times as much as the forces say; expected 1 (forces in units other than energy/length, or gradients?)"
            )


def work_ratio(frames: Frames) -> float | None:
    """ΔE / (-∫F·dR) between neighbouring frames of one molecule that lie close together: the median, or None.

    None where fewer than 8 such pairs are found, or where they don't agree with each other.
    """
    neighbours = _Neighbours()
    neighbours.add(frames)
    return neighbours.ratio()


class _Neighbours:
    """Ratios of energy changes to work between neighbouring frames, of pieces that follow each other."""

    def __init__(self, most: int = 2000) -> None:
        self._left = most  # neighbours of one molecule that are still looked at
        self._ratios: list[float] = []
        self._last = Frames.of([])

    def add(self, frames: Frames) -> None:
        """The next piece."""
        if self._left and len(frames):
            self._add(Frames.join([self._last, frames.select([0])]))
            self._add(frames)
            self._last = frames.select([len(frames) - 1])

    def _add(self, frames: Frames) -> None:
        atoms = frames.num_atoms
        same = np.flatnonzero((atoms[1:] == atoms[:-1]) & (frames.molecules[1:] == frames.molecules[:-1]))[: self._left]
        self._left -= len(same)
        for b in same:
            a, c = frames[int(b)], frames[int(b) + 1]
            step = c.positions - a.positions
            if not np.array_equal(a.numbers, c.numbers) or np.abs(step).max() > 0.1:
                continue
            work = -0.5 * float(np.sum((a.forces + c.forces) * step))
            change = c.energy - a.energy
            if work != 0.0 and max(abs(work), abs(change)) > 5e-3:
                self._ratios.append(change / work)

    def ratio(self) -> float | None:
        """Their median, where they are enough and agree."""
        if len(self._ratios) < 8:
            return None
        median = float(np.median(self._ratios))
        agree = np.abs(np.array(self._ratios) - median) < 0.5 * abs(median)
        return median if agree.mean() > 0.75 else None


def closest_distances(frames: Frames) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
    """Shortest distance in each frame (Å), and over the sum of the two covalent radii; infinite for one atom.

    Positions must be finite, numbers in 1..118.
    """
    shortest, scaled = np.full(len(frames), np.inf), np.full(len(frames), np.inf)
    radii = covalent_radii[frames.numbers]
    for chosen, atoms in _by_size(frames):
        r = frames.positions[atoms]
        i, j, distances = _closest(r)
        rows = np.arange(len(chosen))
        shortest[chosen] = distances
        scaled[chosen] = distances / (radii[atoms][rows, i] + radii[atoms][rows, j])
    return shortest, scaled


def _closest(r: Float[np.ndarray, "C n 3"]) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, "C"]]:
    """Indices of the closest two atoms of each frame, and their distance."""
    n = r.shape[1]
    if n > _DENSE:
        from scipy.spatial import cKDTree

        found = [cKDTree(frame).query(frame, k=2) for frame in r]
        i = np.array([np.argmin(distances[:, 1]) for distances, _ in found])
        j = np.array([near[k, 1] for (_, near), k in zip(found, i, strict=True)])
    else:
        # by products of matrices, in float32 about the centre: a tenth of the time, good to find the pair
        centred = (r - r.mean(axis=1, keepdims=True)).astype(np.float32)
        length = np.einsum("cni,cni->cn", centred, centred)
        square = -2.0 * (centred @ centred.transpose(0, 2, 1))
        square += length[:, :, None]
        square += length[:, None, :]
        square[:, np.arange(n), np.arange(n)] = np.inf
        flat = square.reshape(len(r), n * n).argmin(axis=1)
        i, j = flat // n, flat % n
    rows = np.arange(len(r))
    return i, j, np.linalg.norm(r[rows, i] - r[rows, j], axis=1)


def _by_size(frames: Frames) -> Iterator[tuple[Int[np.ndarray, "C"], Int[np.ndarray, "C n"]]]:
    """Frames of equal size n > 1, and the rows of their atoms [C, n], in slabs of bounded size."""
    counts = frames.num_atoms
    for n in np.unique(counts[counts > 1]):
        group = np.flatnonzero(counts == n)
        step = max(1, _SLAB // int(n) ** 2)
        for start in range(0, len(group), step):
            chosen = group[start : start + step]
            yield chosen, frames.splits[chosen][:, None] + np.arange(n)


def _not_numbers(frames: Frames) -> dict[int, str]:
    bad: dict[int, str] = {}
    counts = frames.num_atoms
    _note(bad, counts < 1, lambda b: "no atoms")
    wrong = (frames.numbers < 1) | (frames.numbers > 118)
    _note(bad, _any(wrong, frames), lambda b: "an atomic number outside 1..118")
    _note(bad, ~np.isfinite(frames.energies), lambda b: f"energy {frames.energies[b]}")
    _note(bad, _any(~np.isfinite(frames.positions).all(axis=1), frames), lambda b: "NaN or infinity in its positions")
    far = np.abs(frames.positions).max(axis=1, initial=0.0) > FAR
    _note(bad, _any(far, frames), lambda b: f"a position beyond {FAR:g} Å")
    _note(bad, _any(~np.isfinite(frames.forces).all(axis=1), frames), lambda b: "NaN or infinity in its forces")
    return bad


def _not_physical(
    frames: Frames, closest: Float[np.ndarray, "B"], max_force: float, closed_shell: bool
) -> dict[int, str]:
    bad: dict[int, str] = {}
    _note(bad, closest < OVERLAP, lambda b: f"two atoms {closest[b]:.3g} Å apart, expected at least {OVERLAP} Å")
    largest = _reduce(np.maximum, np.abs(frames.forces).max(axis=1, initial=0.0), frames)
    _note(
        bad,
        largest > max_force,
        lambda b: f"a force component of {largest[b]:.4g} eV/Å, expected at most {max_force:g}",
    )
    forces = frames.forces.astype(np.float64)
    net = np.linalg.norm(np.stack([_reduce(np.add, forces[:, k], frames) for k in range(3)], axis=1), axis=1)
    mean = _reduce(np.add, np.linalg.norm(forces, axis=1), frames) / np.maximum(frames.num_atoms, 1)
    allowed = frames.num_atoms * (NET_FORCE[0] + NET_FORCE[1] * mean)
    _note(
        bad,
        net > allowed,
        lambda b: f"forces that add up to {net[b]:.3g} eV/Å instead of 0 (mixed units, or labels of something else?)",
    )
    if closed_shell:
        electrons = _reduce(np.add, frames.numbers, frames)
        _note(
            bad,
            electrons % 2 == 1,
            lambda b: f"{electrons[b]} electrons, an odd number, and the model is closed_shell: no radicals, no ions",
        )
    return bad


def _note(bad: dict[int, str], mask: Bool[np.ndarray, "B"], say: Callable[[int], str]) -> None:
    """Adds the frames of `mask` to `bad`, where they aren't in it."""
    for b in np.flatnonzero(mask):
        if int(b) not in bad:
            bad[int(b)] = say(int(b))


def _any(mask: Bool[np.ndarray, "A"], frames: Frames) -> Bool[np.ndarray, "B"]:
    return _reduce(np.logical_or, mask, frames).astype(bool)


def _reduce(operation: np.ufunc, values: np.ndarray, frames: Frames) -> np.ndarray:
    """operation over each frame's atoms, [B]; 0 for a frame without atoms."""
    result = np.zeros(len(frames), values.dtype)
    filled = frames.num_atoms > 0
    if filled.any():
        result[filled] = operation.reduceat(values, frames.splits[:-1][filled])
    return result
