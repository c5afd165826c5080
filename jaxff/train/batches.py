"""Frames as padded batches of one shape: records read from disk and packed by a thread that works ahead."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxff.train.frames import Frames, cumulative
from jaxff.train.records import Records, Writer, centred

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
    """Frames and their labels, ready to be packed."""

    records: Records
    energies: Float[np.ndarray, "B"]  # the labels, eV; their dtype is that of the batches

    def __len__(self) -> int:
        return len(self.energies)


def make_store(frames: Frames, energies: Float[np.ndarray, "B"], cutoff: float, dtype: Any = np.float32) -> Store:
    """The frames in `dtype`, with `energies` [B] eV as labels and all pairs within `cutoff` Å, inclusive."""
    writer = Writer(cutoff)
    writer.append(frames)
    return Store(writer.finish(), np.asarray(energies).astype(dtype))


def batch_shape(store: Store, batch_size: int, padding: float, chosen: Int[np.ndarray, "b"] | None = None) -> Shape:
    """Room for `batch_size` average frames of `chosen` (None: all) times `padding`, and for the largest of them."""
    atoms, pairs = store.records.num_atoms, store.records.pair_count
    if chosen is not None:
        atoms, pairs = atoms[chosen], pairs[chosen]
    if not len(atoms):
        return Shape(batch_size, 64, 64)

    def room(count: np.ndarray) -> int:
        wanted = max(batch_size * count.mean() * padding, count.max())
        # no batch is larger than the largest frames together
        return _round_up(min(int(wanted), batch_size * int(count.max())) + 1, 64)

    return Shape(batch_size, room(atoms), room(pairs))


def _round_up(count: int, step: int) -> int:
    return -(-count // step) * step


class Packer:
    """Cuts an order of frames into batches of `shape`, greedily, `devices` at a time."""

    def __init__(self, store: Store, shape: Shape, devices: int = 1) -> None:
        self.store, self.shape, self.devices = store, shape, devices

    def groups(self, order: Int[np.ndarray, "b"]) -> Iterator[list[np.ndarray]]:
        """Lists of `devices` index arrays, which together are `order`; the last ones may be empty."""
        records = self.store.records
        atoms, pairs = cumulative(records.atoms_of(order)), cumulative(records.pair_count[order])
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
        kind = store.energies.dtype
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
    records = store.records
    count, pairs = records.atoms_of(ids), records.pair_count[ids]
    total, total_pairs = int(count.sum()), int(pairs.sum())
    contents = records.read(ids)
    numbers[:total] = records.numbers_of(ids)
    positions[:total] = centred(contents.positions, count)
    forces[:total] = contents.forces
    frames[:total] = np.repeat(np.arange(len(ids), dtype=np.int32), count)
    energies[: len(ids)] = store.energies[ids]
    atoms[: len(ids)] = count
    offset = np.repeat((np.cumsum(count) - count).astype(np.int32), pairs)
    np.add(contents.pairs[:, 0], offset, out=senders[:total_pairs])
    np.add(contents.pairs[:, 1], offset, out=receivers[:total_pairs])


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
