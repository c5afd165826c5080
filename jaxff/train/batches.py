"""Frames as padded batches of one shape: pairs found once, packing by copies of slices, a thread that works ahead.

All frames lie in host memory: 12 bytes a number for positions and forces in float32 next to the labels' own arrays,
4 bytes a pair. A million frames of 20 atoms with 14 neighbours each take about 2.5 GB.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxff import neighbors
from jaxff.errors import DataError
from jaxff.train.frames import Frames

CHUNK = 1 << 21  # distances at once
LARGEST = 1 << 15  # atoms of a frame: pairs are kept as int16
DENSE_LIMIT = 400  # atoms; larger frames take a tree
AHEAD = 8  # batches made before they are asked for


class Batch(NamedTuple):
    """D batches of one shape, one for each device: frames B, atoms N, pairs E, padding included.

    Padding atoms have number 0 and come last, at least one; padding pairs join the last atom to itself.
    """

    numbers: Int[Array, "D N"]
    positions: Float[Array, "D N 3"]  # Å
    forces: Float[Array, "D N 3"]  # eV/Å
    frames: Int[Array, "D N"]  # which frame an atom belongs to; padding: the last
    energies: Float[Array, "D B"]  # eV
    atoms: Float[Array, "D B"]  # of each frame; 0 for a padding frame
    senders: Int[Array, "D E"]
    receivers: Int[Array, "D E"]


class Shape(NamedTuple):
    """The fixed shape of a batch."""

    frames: int
    atoms: int
    pairs: int


class Position(NamedTuple):
    """Where the stream of frames stands: frames taken of this epoch's order."""

    epoch: int = 0
    taken: int = 0


@dataclass(frozen=True, eq=False)
class Store:
    """Labelled frames with their pairs, ready to be packed. Frame b owns atoms and pairs start:start+count."""

    numbers: Int[np.ndarray, "A"]
    positions: Float[np.ndarray, "A 3"]  # from each frame's centroid, Å
    forces: Float[np.ndarray, "A 3"]
    energies: Float[np.ndarray, "B"]
    atom_start: Int[np.ndarray, "B"]
    atom_count: Int[np.ndarray, "B"]
    senders: Int[np.ndarray, "P"]  # int16, within the frame
    receivers: Int[np.ndarray, "P"]  # int16, sorted within the frame
    pair_start: Int[np.ndarray, "B"]
    pair_count: Int[np.ndarray, "B"]

    def __len__(self) -> int:
        return len(self.energies)


def make_store(frames: Frames, energies: Float[np.ndarray, "B"], cutoff: float, dtype: Any = np.float32) -> Store:
    """The frames in `dtype`, with `energies` [B] eV as labels and all pairs within `cutoff` Å, inclusive."""
    counts = frames.num_atoms
    start = frames.splits[:-1]
    sums = np.add.reduceat(frames.positions, start, axis=0) if len(frames) else np.zeros((0, 3))
    centroids = sums / counts[:, None]
    positions = frames.positions - np.repeat(centroids, counts, axis=0)
    pairs = find_pairs(positions, frames.splits, cutoff)
    return Store(
        frames.numbers.astype(np.int32),
        positions.astype(dtype),
        frames.forces.astype(dtype),
        np.asarray(energies).astype(dtype),
        start,
        counts,
        *pairs,
    )


def find_pairs(
    positions: Float[np.ndarray, "A 3"], splits: Int[np.ndarray, "B+1"], cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers (int16, local), start and count of each frame's directed pairs, receivers sorted.

    Frames of one size are taken together, in chunks of dense distances in float64. Raises DataError for a frame of
    more than 32768 atoms.
    """
    counts = np.diff(splits)
    if counts.max(initial=0) > LARGEST:
        raise DataError(f"expected frames of at most {LARGEST} atoms, received one of {counts.max()}")
    pair_start, pair_count = np.zeros(len(counts), np.int64), np.zeros(len(counts), np.int64)
    senders: list[np.ndarray] = [np.zeros(0, np.int16)]
    receivers: list[np.ndarray] = [np.zeros(0, np.int16)]
    total = 0
    for n in np.unique(counts):
        members = np.flatnonzero(counts == n)
        chunk = max(1, CHUNK // int(n) ** 2)
        for first in range(0, len(members), chunk):
            own = members[first : first + chunk]
            found = _pairs_of_equal_frames(positions, splits[own], int(n), cutoff)
            pair_count[own] = found[2]
            pair_start[own] = total + np.cumsum(found[2]) - found[2]
            senders.append(found[0])
            receivers.append(found[1])
            total += len(found[0])
    return np.concatenate(senders), np.concatenate(receivers), pair_start, pair_count


def _pairs_of_equal_frames(
    positions: Float[np.ndarray, "A 3"], start: Int[np.ndarray, "b"], n: int, cutoff: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Senders, receivers and counts of frames that all have n atoms."""
    if n > DENSE_LIMIT:
        lists = [neighbors.neighbor_pairs(positions[s : s + n], cutoff) for s in start]
        parts = [np.concatenate([pair[k] for pair in lists]).astype(np.int16) for k in (0, 1)]
        return parts[0], parts[1], np.array([len(pair[0]) for pair in lists])
    r = positions[start[:, None] + np.arange(n)]
    square = np.zeros((len(start), n, n))
    for axis in range(3):
        x = np.ascontiguousarray(r[:, :, axis])
        difference = x[:, None, :] - x[:, :, None]
        difference *= difference
        square += difference
    inside = np.sqrt(square, out=square) <= cutoff
    inside[:, np.arange(n), np.arange(n)] = False
    flat = np.flatnonzero(inside.reshape(-1)).astype(np.int32) % np.int32(n * n)
    receivers, senders = np.divmod(flat, np.int32(n))
    return senders.astype(np.int16), receivers.astype(np.int16), np.count_nonzero(inside, axis=(1, 2))


def batch_shape(store: Store, batch_size: int, padding: float) -> Shape:
    """Room for `batch_size` average frames times `padding`, never less than for the largest frame."""
    if not len(store):
        return Shape(batch_size, 64, 64)

    def room(count: np.ndarray) -> int:
        wanted = max(batch_size * count.mean() * padding, count.max())
        # no batch is larger than the largest frames together
        return _round_up(min(int(wanted), batch_size * int(count.max())) + 1, 64)

    return Shape(batch_size, room(store.atom_count), room(store.pair_count))


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


class Packer:
    """Cuts an order of frames into batches of `shape`, greedily, `devices` at a time."""

    def __init__(self, store: Store, shape: Shape, devices: int = 1) -> None:
        self.store, self.shape, self.devices = store, shape, devices

    def groups(self, order: Int[np.ndarray, "b"]) -> Iterator[list[np.ndarray]]:
        """Lists of `devices` index arrays, which together are `order`; the last ones may be empty."""
        atoms = np.concatenate([[0], np.cumsum(self.store.atom_count[order])])
        pairs = np.concatenate([[0], np.cumsum(self.store.pair_count[order])])
        first = 0
        while first < len(order):
            group = []
            for _ in range(self.devices):
                last = min(
                    first + self.shape.frames,
                    int(np.searchsorted(atoms, atoms[first] + self.shape.atoms - 1, "right")) - 1,
                    int(np.searchsorted(pairs, pairs[first] + self.shape.pairs, "right")) - 1,
                    len(order),
                )
                group.append(order[first:last])
                first = last
            yield group

    def pack(self, group: Sequence[np.ndarray]) -> Batch:
        """One batch of NumPy arrays, [D, ...]."""
        store, (b, n, e), d = self.store, self.shape, len(group)
        kind = store.positions.dtype
        arrays: Any = (
            np.zeros((d, n), np.int32),
            np.zeros((d, n, 3), kind),
            np.zeros((d, n, 3), kind),
            np.full((d, n), b - 1, np.int32),
            np.zeros((d, b), kind),
            np.zeros((d, b), kind),
            np.full((d, e), n - 1, np.int32),
            np.full((d, e), n - 1, np.int32),
        )
        for k, ids in enumerate(group):
            if len(ids):
                _fill(store, ids, *(array[k] for array in arrays))
        return Batch(*arrays)


def _fill(
    store: Store,
    ids: np.ndarray,
    numbers: np.ndarray,
    positions: np.ndarray,
    forces: np.ndarray,
    frames: np.ndarray,
    energies: np.ndarray,
    atoms: np.ndarray,
    senders: np.ndarray,
    receivers: np.ndarray,
) -> None:
    count, pairs = store.atom_count[ids], store.pair_count[ids]
    own = [slice(a, a + c) for a, c in zip(store.atom_start[ids].tolist(), count.tolist(), strict=True)]
    total, total_pairs = int(count.sum()), int(pairs.sum())
    np.concatenate([store.numbers[s] for s in own], out=numbers[:total])
    np.concatenate([store.positions[s] for s in own], out=positions[:total])
    np.concatenate([store.forces[s] for s in own], out=forces[:total])
    frames[:total] = np.repeat(np.arange(len(ids), dtype=np.int32), count)
    energies[: len(ids)] = store.energies[ids]
    atoms[: len(ids)] = count
    own = [slice(a, a + c) for a, c in zip(store.pair_start[ids].tolist(), pairs.tolist(), strict=True)]
    offset = np.repeat((np.cumsum(count) - count).astype(np.int32), pairs)
    for target, source in ((senders, store.senders), (receivers, store.receivers)):
        np.concatenate([source[s] for s in own], out=target[:total_pairs])
        target[:total_pairs] += offset


def epoch_order(indices: Int[np.ndarray, "b"], seed: int, epoch: int) -> Int[np.ndarray, "b"]:
    """The order of an epoch: a pure function of (indices, seed, epoch)."""
    return np.random.default_rng([seed, epoch]).permutation(indices)


class Work(NamedTuple):
    """A batch on its way: what to compute on, its frames, and where the stream stands after it."""

    batch: Batch
    frames: list[np.ndarray]
    after: Position


def stream(packer: Packer, indices: np.ndarray, seed: int, position: Position) -> Iterator[Work]:
    """Batches without end from `position` on, epoch after epoch, in NumPy arrays."""
    epoch, taken = position
    while True:
        order = epoch_order(indices, seed, epoch)[taken:]
        for group in packer.groups(order):
            taken += sum(map(len, group))
            done = taken >= len(indices)
            yield Work(packer.pack(group), group, Position(epoch + 1, 0) if done else Position(epoch, taken))
        epoch, taken = epoch + 1, 0


class Prefetch:
    """Runs an iterator of Work in a thread, `ahead` items early; `put` moves a batch to the devices.

    A context manager: the thread ends with it. An error in the thread is raised by `next`.
    """

    def __init__(self, works: Iterator[Work], put: Callable[[Batch], Batch], ahead: int = AHEAD) -> None:
        self._works, self._put = works, put
        self._queue: queue.Queue[Work | BaseException] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jaxff-prefetch", daemon=True)

    def __enter__(self) -> Prefetch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()
        self._thread.join()

    def __next__(self) -> Work:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def _run(self) -> None:
        try:
            for work in self._works:
                if not self._offer(work._replace(batch=self._put(work.batch))):
                    return
        except BaseException as error:  # noqa: BLE001  (handed to the caller's thread)
            self._offer(error)

    def _offer(self, item: Work | BaseException) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return True
        return False
