"""Pairs found in bulk equal the single-structure list; batches hold each frame once, and padding does nothing."""

import itertools
import threading

import numpy as np
import pytest

from jaxff import neighbors
from jaxff.errors import DataError
from jaxff.train import pairs
from jaxff.train.batches import Packer, Position, Prefetch, Store, Work, batch_shape, epoch_order, make_store, stream
from jaxff.train.frames import Frame, Frames
from tests.train.teacher import labelled

CUTOFF = 2.5  # Å; some pairs of these molecules lie beyond


@pytest.fixture(scope="module")
def frames() -> Frames:
    lonely = Frame(np.array([1]), np.ones((1, 3)), -13.6, np.zeros((1, 3)), "H")
    return Frames.join([labelled(each=2), Frames.of([lonely]), labelled(["C2H6", "H2O"], each=3, seed=1)])


@pytest.fixture(scope="module")
def store(frames: Frames) -> Store:
    return make_store(frames, frames.energies, CUTOFF, np.float64)


@pytest.mark.parametrize(("dense_limit", "chunk"), [(400, 1 << 21), (400, 100), (4, 100)])
def test_pairs_are_those_of_each_frame(
    frames: Frames, dense_limit: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs, "DENSE_LIMIT", dense_limit)
    monkeypatch.setattr(pairs, "CHUNK", chunk)
    senders, receivers, start, count = pairs.find_pairs(frames.positions, frames.splits, CUTOFF)
    assert count.sum() == len(senders) == len(receivers)
    for b, frame in enumerate(frames):
        own = slice(start[b], start[b] + count[b])
        expected = neighbors.neighbor_pairs(frame.positions, CUTOFF)
        np.testing.assert_array_equal(senders[own], expected[0])
        np.testing.assert_array_equal(receivers[own], expected[1])


@pytest.mark.parametrize("devices", [1, 2])
def test_batches_hold_each_frame_once(frames: Frames, store: Store, devices: int) -> None:
    shape = batch_shape(store, 6, 1.0)
    packer = Packer(store, shape, devices)
    order = epoch_order(np.arange(len(frames)), 3, 0)
    groups = list(packer.groups(order))
    assert all(len(group) == devices for group in groups)
    np.testing.assert_array_equal(np.concatenate([ids for group in groups for ids in group]), order)
    for group in groups:
        batch = packer.pack(group)
        for k, ids in enumerate(group):
            first = 0
            for slot, b in enumerate(ids):
                frame, n = frames[b], len(frames[b].numbers)
                atoms = slice(first, first + n)
                np.testing.assert_array_equal(batch.numbers[k, atoms], frame.numbers)
                np.testing.assert_array_equal(batch.forces[k, atoms], frame.forces)
                moved = batch.positions[k, atoms] - batch.positions[k, first]
                np.testing.assert_allclose(moved, frame.positions - frame.positions[0], atol=1e-12)
                assert batch.energies[k, slot] == frame.energy
                assert batch.atoms[k, slot] == n
                assert np.all(batch.frames[k, atoms] == slot)
                first += n
            assert first < shape.atoms, "the last atom must be padding"
            assert not batch.numbers[k, first:].any()
            assert not batch.atoms[k, len(ids) :].any()
            count = int(store.records.pair_count[ids].sum())
            assert np.all(batch.receivers[k, count:] == shape.atoms - 1)
            assert np.all(batch.senders[k, count:] == shape.atoms - 1)
            assert np.all(np.diff(batch.receivers[k]) >= 0)
            assert np.all(np.diff(batch.frames[k]) >= 0)
            vectors = batch.positions[k][batch.senders[k, :count]] - batch.positions[k][batch.receivers[k, :count]]
            distances = np.linalg.norm(vectors, axis=1)
            assert np.all((distances > 0.1) & (distances <= CUTOFF + 1e-9))


def test_a_batch_has_room_for_the_largest_frame(frames: Frames, store: Store) -> None:
    shape = batch_shape(store, 1, 1.0)
    assert shape.atoms > frames.num_atoms.max()
    assert shape.pairs >= store.records.pair_count.max()
    groups = list(Packer(store, shape).groups(np.arange(len(store))))
    assert [len(group[0]) for group in groups] == [1] * len(store)


def test_orders_are_a_function_of_seed_and_epoch() -> None:
    indices = np.arange(100, 150)
    np.testing.assert_array_equal(epoch_order(indices, 1, 2), epoch_order(indices, 1, 2))
    assert sorted(epoch_order(indices, 1, 2)) == sorted(indices)
    assert list(epoch_order(indices, 1, 2)) != list(epoch_order(indices, 1, 3))
    assert list(epoch_order(indices, 1, 2)) != list(epoch_order(indices, 2, 2))


def test_a_stream_goes_on_where_it_stood(store: Store) -> None:
    packer = Packer(store, batch_shape(store, 7, 1.1), devices=2)
    indices = np.arange(0, len(store), 2)
    whole = list(itertools.islice(stream(packer, indices, 5, Position()), 9))
    assert whole[-1].after.epoch >= 2
    for k in (1, 4, 6):
        rest = itertools.islice(stream(packer, indices, 5, whole[k - 1].after), 9 - k)
        for one, other in zip(whole[k:], rest, strict=True):
            assert one.after == other.after
            for a, b in zip(one.batch, other.batch, strict=True):
                np.testing.assert_array_equal(a, b)


def test_prefetching_hands_on_items_and_errors() -> None:
    def works() -> itertools.chain:
        def fail() -> Work:
            raise RuntimeError("broken")

        return itertools.chain(range(3), (fail() for _ in range(1)))

    class Item(int):
        batch = 0

        def _replace(self, batch: int) -> "Item":
            return self

    with Prefetch(map(Item, works()), lambda batch: batch, ahead=1) as items:  # type: ignore[arg-type]
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(RuntimeError, match="broken"):
            next(items)
    with Prefetch(map(Item, itertools.count()), lambda batch: batch, ahead=2) as items:  # type: ignore[arg-type]
        assert next(items) == 0
    assert "jaxff-prefetch" not in [thread.name for thread in threading.enumerate()]


def test_frames_too_large_for_their_pairs_are_refused() -> None:
    n = pairs.LARGEST + 1
    with pytest.raises(DataError, match="at most 32768 atoms"):
        pairs.find_pairs(np.zeros((n, 3)), np.array([0, n]), 1.0)
