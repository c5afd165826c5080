"""The CUDA kernels on a CPU (tests/kernels/emulator.py), or on a GPU where one is, against the models."""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase.build import molecule

from jaxff import kernels, load_potential, models
from jaxff.kernels.cuda import engine, few, launch, molecules, packs, tiles
from jaxff.kernels.cuda.filters import of_bins, of_elements, packed, step_between, width_of
from jaxff.kernels.cuda.matrices import halves
from jaxff.kernels.message import Geometry, Launch, Lengths, Sources, whole
from jaxff.ops import accumulate_forces
from jaxff.ops.distance import distance_reference
from jaxff.system import Pairs
from jaxff.tabulate import tabulate
from tests.kernels import PROGRAMS
from tests.structures import CONFIGS, pairs_in_layout, random_params, random_structure

pytestmark = pytest.mark.usefixtures("cuda_kernels_run_here")
WIDTHS = {"student": 64, "painn": 32, "painn+zbl": 32}  # the readout's layers have multiples of 16, too


def prepared(name: str) -> tuple[Any, Any, Any]:
    config = CONFIGS[name].model_copy(update={"hidden_dim": WIDTHS[name], "num_interactions": 3})
    tree, _ = tabulate(random_params(config), config, 64)
    fused = kernels.prepare(models.cast(tree, np.dtype("float32")), config, PROGRAMS, cuda=True)
    assert "cuda" in fused.fused
    return config, tree, fused


def energies_and_forces(module: Any, tree: Any, config: Any, numbers: Any, vectors: Any, pairs: Any) -> Any:
    weights = jnp.linspace(1.0, 2.0, len(numbers)).astype(vectors.dtype)

    def energies(r: Any) -> Any:
        e = module.atomic_energies(tree, config, numbers, r, pairs)
        return jnp.sum(weights * e), e

    gradients, e = jax.jit(jax.grad(energies, has_aux=True))(vectors)
    return e, accumulate_forces(gradients, pairs)


@pytest.mark.parametrize(
    ("name", "few_slots", "some"),
    [
        ("student", 0, 0),
        ("painn", 0, 512),
        ("painn+zbl", 0, 0),
        ("painn", 1000, 0),
        ("student", 1000, 512),
    ],
)
def test_listed(name: str, few_slots: int, some: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than one tile of atoms, unequal weights, padding; float32 against float64 on the same tables.

    With messages on tensor cores, or by Pallas kernels; as of many atoms, the first of them by elements, or of some.
    """
    monkeypatch.setattr(kernels, "FEW_SLOTS", few_slots)
    monkeypatch.setattr(kernels, "CUT_ATOMS", some)
    config, tree, fused = prepared(name)
    numbers, positions = random_structure(19)
    vectors, pairs = pairs_in_layout(positions, config.cutoff, "slots", padding=2)
    numbers = np.pad(numbers, (0, 2))
    exact = models.cast(tree, np.dtype("float64"))
    energies, forces = energies_and_forces(models, exact, config, numbers, jnp.asarray(vectors, jnp.float64), pairs)
    got = energies_and_forces(kernels, fused, config, numbers, jnp.asarray(vectors, jnp.float32), pairs)
    scale = max(1, np.abs(forces).max())
    np.testing.assert_allclose(got[0], energies, atol=1e-5 * max(1, np.abs(energies).max()))
    np.testing.assert_allclose(got[1], forces, atol=1e-5 * scale)
    assert np.all(got[1][19:] == 0)


def smooth_table(rng: np.random.Generator, columns: int, functions: int = 12) -> Any:
    """Cubics of `columns` filters that few functions make, [128, 4, columns]."""
    t = np.linspace(0, 1, 129)
    curves = rng.normal(size=(columns, functions)) @ np.sin(np.arange(1, functions + 1)[:, None] * 3 * t)
    slope = np.gradient(curves, axis=1)
    delta, g, h = np.diff(curves, axis=1), slope[:, :-1], slope[:, 1:]
    return np.stack([curves[:, :-1], g, 3 * delta - 2 * g - h, g + h - 2 * delta]).transpose(2, 0, 1)


class RandomPairs:
    """Pairs that some count of, with the filters [count, N, M, F] and their slopes in float64."""

    def __init__(
        self,
        rng: np.random.Generator,
        n: int,
        slots: int,
        table: Any,
        f: int,
        molecules: bool = False,
        share: float = 0.8,
        hear_nothing: slice = slice(0, 1),
    ) -> None:
        """molecules: all pairs of molecules of `slots` atoms, alike in both directions; share: of pairs that count.

        hear_nothing: atoms, of others.
        """
        self.senders, self.mask = rng.integers(0, n, (n, slots)), rng.uniform(size=(n, slots)) < share
        self.mask[hear_nothing] = False
        self.u = rng.normal(size=(3, n, slots))
        x, interval = rng.uniform(size=(n, slots)).astype(np.float32), rng.integers(0, len(table), (n, slots))
        if molecules:
            self.senders = np.arange(n)[:, None] // slots * slots + np.arange(slots)
            square = [z.reshape(-1, slots, slots) for z in (self.mask, x, interval, *self.u)]
            lower = np.tri(slots, k=-1, dtype=bool)
            mask, x, interval, *u = (np.where(lower, z, z.swapaxes(1, 2)) for z in square)
            self.mask = (mask & ~np.eye(slots, dtype=bool)).reshape(n, slots)
            x, interval = x.reshape(n, slots), interval.reshape(n, slots)
            self.u = np.stack([np.where(lower, z, -z).reshape(n, slots) for z in u])
        places = np.concatenate([np.stack([x, self.mask]), self.u, interval[None]]).reshape(6, -1)
        self.geometry = Geometry(jnp.asarray(self.senders.reshape(-1), jnp.int32), jnp.asarray(places, jnp.float32))
        self.table, self.f = table, f
        self._evaluate(x, interval)

    def _evaluate(self, x: Any, interval: Any) -> None:
        table, (n, slots) = self.table, self.mask.shape
        x = x.astype(np.float64)[..., None]
        c0, c1, c2, c3 = (table[interval, k] for k in range(4))
        values, slopes = c0 + x * (c1 + x * (c2 + x * c3)), c1 + x * (2 * c2 + 3 * x * c3)
        self.filters, self.slopes = (
            (z * self.mask[..., None]).reshape(n, slots, -1, self.f).transpose(2, 0, 1, 3) for z in (values, slopes)
        )

    def arranged(self, filters: Any, cutoff: float = 4.0, epsilon: float = 0.125) -> engine.Arranged:
        """By the kernel, of vectors, some of which are beyond the cutoff or zero: its places are these pairs' then."""
        (n, slots), intervals = self.mask.shape, len(self.table)
        t, _, *u, interval = np.asarray(self.geometry.places, np.float64)
        d = (t + interval) * (cutoff / intervals)
        d[::29], d[::31], d[1::7] = (1 + 1e-6) * cutoff, 0, cutoff  # by a rounding within it or beyond
        vectors = (np.stack(u) / np.linalg.norm(u, axis=0) * d).T.astype(np.float32)
        pairs = Pairs(self.senders.reshape(-1), np.repeat(np.arange(n), slots), self.mask.reshape(-1), n, "slots", True)
        within = cutoff * (1 + 5e-7)
        made = engine.arranged(jnp.asarray(vectors), pairs, filters, intervals, cutoff, within, epsilon)
        t, counts, *u, interval = np.asarray(made.places, np.float64)
        np.testing.assert_allclose(t + interval, np.minimum(d, cutoff) / cutoff * intervals, atol=2e-5)
        np.testing.assert_allclose(np.stack(u).T, vectors / (d + epsilon)[:, None], atol=2e-7)
        assert t.min() >= 0
        assert t.max() <= 1
        assert set(interval) <= set(range(intervals))
        np.testing.assert_array_equal(counts, self.mask.reshape(-1) & (d <= cutoff))
        self.geometry, self.mask = made, counts.reshape(n, slots) > 0
        self.u = np.stack(u).reshape(3, n, slots)
        self._evaluate(t.astype(np.float32).reshape(n, slots), interval.astype(int).reshape(n, slots))
        return made

    def sums(self, a: Any, b: Any, y: Any, p: Any, q: Any) -> tuple[Any, ...]:
        """Δs, Δv, ā, b̄, ȳ of the sources, which may lack y, and the halves [4, N, M] (jaxff.kernels.message)."""
        senders, n = self.senders, len(a)
        (wa, wb, *wc), (sa, sb, *sc) = self.filters, self.slopes
        vectors = np.einsum("knm,nmf->nkf", self.u, wb * b[senders])
        along = np.einsum("knm,nmkf->nmf", self.u, q[senders])
        d = a[:, None] * p[senders] * sa - b[:, None] * along * sb
        y_bar = None
        if y is not None:
            vectors += np.einsum("nmf,nmkf->nkf", wc[0], y[senders])
            d += np.sum(y[:, None] * q[senders], axis=2) * sc[0]
            y_bar = np.einsum("nmf,nmkf->nkf", wc[0], q[senders]).reshape(n, -1)
        u_bar = np.einsum("nmf,nmkf->knm", b[:, None] * wb, q[senders])
        return (
            np.sum(wa * a[senders], axis=1),
            vectors.reshape(n, -1),
            np.sum(wa * p[senders], axis=1),
            -np.sum(wb * along, axis=1),
            y_bar,
            np.concatenate([d.sum(axis=-1)[None], u_bar]),
        )


def single(z: Any) -> Any:
    """[N, *] in float32."""
    return jnp.asarray(z.reshape(len(z), -1), jnp.float32)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-7 * np.abs(expected).max())


def close_to_joined(got: Any, halves_of_pairs: Any) -> None:
    """[4, N, M] of all pairs of molecules of M atoms, and what each of them has of that."""
    n, size = got.shape[1:]
    here = halves_of_pairs.reshape(4, n // size, size, size)
    there = here.swapaxes(2, 3)
    close(got[0], (here + there)[0].reshape(n, size))
    close(got[1:], (there - here)[1:].reshape(3, n, size))


def in_three_words(a: Any, b: Any, y: Any) -> tuple[Sources, Any, Any]:
    """a, b and y of [N, F], [N, F] and [N, 3F] as one array, and b and y [N, 3, F] to 16 bits as that has them."""
    rows = np.stack([b, *np.split(np.asarray(y), 3, axis=1)])
    upper = rows.view(np.uint32) >> 8  # by how much to round is not tested here
    words = [upper[k] << 8 | upper[3] >> 8 * k & 255 for k in range(3)]
    back = np.stack([*words, upper[3] << 8 | upper[3] & 255]).view(np.float32)
    assert (abs(back - rows) < 2**-15 * abs(rows)).all()
    in_one = np.concatenate([a, *(x.view(np.float32) for x in words)], axis=1)
    return Sources(jnp.asarray(in_one), None, None), back[0], back[1:].swapaxes(0, 1)


def close_where_present(got: Sequence[Any], expected: Sequence[Any]) -> None:
    for x, wanted in zip(got, expected, strict=True):
        if x is not None:
            close(x, wanted)


def test_turns_are_full() -> None:
    """Each pair that counts is in one turn, within its bin; turns fit into their memory; most places have a pair."""
    rng, n, slots = np.random.default_rng(0), 80, 60
    table = smooth_table(rng, 32, 44)
    (filters,) = of_bins([table])
    bins, width = len(filters["matrices"]), width_of(filters)
    assert bins > 4
    pairs = RandomPairs(rng, n, slots, table, 16)
    arranged = pairs.arranged(filters)
    words = np.asarray(arranged.turns).view(np.uint32).astype(int)
    order = np.asarray(arranged.pairs)[5].view(np.int32).reshape(n, slots)
    intervals = np.asarray(pairs.geometry.places)[5].reshape(n, slots)
    taken, chunks_of_all = np.zeros((n, slots), int), 0
    for group, turns in enumerate(words):
        last = int(np.argmax(turns[:, 0] >> 23 & 1))
        assert turns[last, 0] >> 23 & 1
        for turn in turns[: last + 1]:
            chunks_of_all += turn[0] >> 20 & 7
            for a, word in enumerate(turn):
                begin, count, first_of_bin = word & 0xFFFF, word >> 16 & 15, (word >> 24) * step_between(width)
                assert count <= 2 * (word >> 20 & 7)
                slot = order[8 * group + a, begin : begin + count] & 0xFFFF
                here = intervals[8 * group + a, slot]
                assert ((here >= first_of_bin) & (here < first_of_bin + width)).all()
                taken[8 * group + a, slot] += 1
    np.testing.assert_array_equal(taken, pairs.mask)
    assert pairs.mask.sum() > 0.7 * 16 * chunks_of_all  # 0.54 if each turn had all pairs of its bin


def test_four_numbers_in_three_words() -> None:
    """Each is as near as 16 bits allow; zeros stay almost zero, and what is no number stays none."""
    body = """
extern "C" __global__ void packed(const float* x, int n, float* back) {
    for (int k = thread(); k < n; k += 32) {
        float words[3];
        pack({x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]}, words);
        for (int i = 0; i < 3; i++) back[4 * k + i] = words[i];
        back[4 * k + 3] = fourth_of(words[0], words[1], words[2]);
    }
}"""
    x = np.random.default_rng(0).normal(size=(1000, 4)) * 10.0 ** np.arange(-20, 20)[:, None, None].repeat(
        25, 1
    ).reshape(-1, 1)
    x[:4], x[4:8] = np.diag([np.nan] * 4), 0
    x = x.astype(np.float32)
    kernel = launch.Kernel("packed", launch.read("device.cu") + body, (), 32, 0)
    back = np.asarray(launch.call(kernel, [jnp.asarray(x)], (len(x),), [x.shape], 1)[0])
    np.testing.assert_array_equal(np.isnan(back), np.isnan(x))
    numbers = ~np.isnan(x)
    error = np.abs(back[numbers].astype(np.float64) - x[numbers])
    assert (error <= 2.0**-16 * 1.01 * np.abs(x[numbers]) + 1e-42).all()
    assert np.sqrt(np.mean((error[100:] / np.abs(x[numbers][100:])) ** 2)) < 2.0**-17


@pytest.mark.parametrize(
    ("has_b", "has_y", "slots", "n", "blocks", "stages", "share"),
    [
        (True, True, 70, 19, 2, 6, 0.8),
        (False, False, 70, 11, 2, 6, 0.8),
        (False, True, 130, 11, 1, 1, 0.8),
        (True, False, 50, 11, 1, 2, 0.8),
        (True, True, 3, 35, 4, 6, 0.8),
        (False, True, 130, 19, 10, 6, 0.8),
        (True, True, 70, 11, 30, 6, 0.1),
    ],
)
def test_messages_of_many_pairs(
    has_b: bool, has_y: bool, slots: int, n: int, blocks: int, stages: int, share: float, monkeypatch: Any
) -> None:
    """More pairs an atom than a block takes at once, or few, some of which don't count, against float64.

    Blocks share groups of atoms, also one of whose turns a block has none; or several share one. What senders have
    comes long before it is needed, or as soon as there is a place for it.
    """
    monkeypatch.setattr(engine, "multiprocessors", lambda: blocks)
    monkeypatch.setattr(engine, "STAGES", stages)
    engine._message_kernel.cache_clear()
    f, rng = 48, np.random.default_rng(slots)
    table = smooth_table(rng, (2 + has_y) * f)
    (filters,) = of_bins([table])
    pairs = RandomPairs(rng, n, slots, table, f, share=share)
    a, b, p = rng.normal(size=(3, n, f))
    y, q = rng.normal(size=(2, n, 3, f))
    sources = Sources(single(a), single(b) if has_b else None, single(y) if has_y else None)
    in_one = None
    if has_b and has_y:
        in_one, b, y = in_three_words(*sources)
        sources = Sources(sources.a, single(b), single(y))
    geometry = pairs.arranged(filters)
    cotangents = single(p), single(q)
    both = [
        (engine.message(s, filters, geometry), engine.message_transpose(s, cotangents, filters, geometry))
        for s in (sources, in_one or sources)
    ]
    for one, other in zip(*(jax.tree.leaves(x) for x in both), strict=True):
        np.testing.assert_array_equal(one, other)
    (ds, dv), (bars, halves_of_pairs) = both[0]

    *sums, expected_halves = pairs.sums(a, b if has_b else np.ones_like(b), y if has_y else None, p, q)
    close_where_present((ds, dv, *bars), sums)
    got = np.where(pairs.mask, np.asarray(halves_of_pairs).T.reshape(4, n, slots), 0)
    close(got[0], expected_halves[0])
    close(got[1:], expected_halves[1:])


@pytest.mark.parametrize(
    ("has_b", "has_y", "f", "size", "plan", "processors"),
    [
        (True, True, 48, 9, (24, 1, 1024), None),
        (False, True, 80, 6, (3, 2, 1024), None),
        (True, False, 16, 7, (3, 1, 1024), None),
        (True, True, 32, 9, None, 2),
        (False, True, 16, 12, None, 100),
        (True, False, 16, 2, None, 2),
    ],
)
def test_messages_within_molecules(
    has_b: bool, has_y: bool, f: int, size: int, plan: Any, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Molecules of an odd and of an even number of atoms: sums and pairs against float64.

    Of many, one or more atoms a warp; of few, more or less channels a block.
    """
    if plan is None:
        monkeypatch.setattr(engine, "multiprocessors", lambda: processors)
    else:
        monkeypatch.setattr(molecules, "PLANS", dict.fromkeys(molecules.PLANS, molecules.Plan(*plan)))
    module = few if plan is None else molecules
    count, rng = 3, np.random.default_rng(size)
    n = count * size
    table = smooth_table(rng, (2 + has_y) * f)
    pairs = RandomPairs(rng, n, size, table, f, molecules=True)
    a, b, p = rng.normal(size=(3, n, f))
    y, q = rng.normal(size=(2, n, 3, f))
    b = b if has_b else np.ones_like(b)
    sources = Sources(single(a), single(b) if has_b else None, single(y) if has_y else None)
    arguments = jnp.asarray(table, jnp.float32), pairs.geometry
    ds, dv = module.message(sources, *arguments)
    arguments = sources, (single(p), single(q)), *arguments
    if module is few:
        bars, halves_of_pairs = few.message_transpose(*arguments, None)
        np.testing.assert_array_equal(few.message_transpose(*arguments, None, sums=False)[1], halves_of_pairs)
        _, twice = few.message_transpose(*arguments, halves_of_pairs, sums=False)
        np.testing.assert_array_equal(twice, 2 * halves_of_pairs)
    else:
        bars, halves_of_pairs = molecules.message_transpose(*arguments)
    launched = Launch(f, 1, 0, "few" if module is few else "molecules", cuda=True, dense=True)
    joined = np.asarray(whole([halves_of_pairs], pairs.geometry, n, launched, Lengths(1.0, 0.0)))
    got = np.where(pairs.mask, joined.reshape(4, n, size), 0)

    *sums, expected_halves = pairs.sums(a, b, y if has_y else None, p, q)
    close_where_present((ds, dv, *bars), sums)
    close_to_joined(got, expected_halves)


@pytest.mark.parametrize(
    ("has_b", "has_y", "f", "size", "count", "functions", "processors"),
    [
        (True, True, 64, 9, 8, 21, 1),
        (False, True, 32, 6, 3, 12, 2),
        (True, False, 32, 21, 4, 12, 1),
        (True, True, 32, 21, 4, 28, 1),
        (True, True, 32, 2, 5, 12, 1),
        (False, True, 32, 4, 9, 21, 2),
    ],
)
def test_messages_in_packs(
    has_b: bool, has_y: bool, f: int, size: int, count: int, functions: int, processors: int, monkeypatch: Any
) -> None:
    """Molecules of an odd and of an even number of atoms, several of a block, whose last atoms fill no tile.

    Filters of as many functions as a product takes at once, of some more, and of twice as many.
    """
    monkeypatch.setattr(engine, "multiprocessors", lambda: processors)
    monkeypatch.setattr(launch, "most_shared", lambda: 227 * 1024)
    packs._fitting.cache_clear()
    rng, n = np.random.default_rng(size), count * size
    table = smooth_table(rng, (2 + has_y) * f, functions)
    two = packs._filters([smooth_table(rng, (2 + has_y) * f, functions), table])
    assert two is not None
    filters = two[1]
    assert 2 * filters["basis"].shape[1] == next(rank + rank % 2 for rank in packs.RANKS if functions <= rank)
    pairs = RandomPairs(rng, n, size, table, f, molecules=True)
    a, b, p = rng.normal(size=(3, n, f))
    y, q = rng.normal(size=(2, n, 3, f))
    b = b if has_b else np.ones_like(b)
    sources = Sources(single(a), single(b) if has_b else None, single(y) if has_y else None)
    arranged = packs.arranged(pairs.geometry, n, filters)
    ds, dv = packs.message(sources, filters, arranged)
    bars, joined = packs.message_transpose(sources, (single(p), single(q)), filters, arranged)
    got = np.where(pairs.mask, np.asarray(joined).reshape(4, n, size), 0)

    *sums, expected_halves = pairs.sums(a, b, y if has_y else None, p, q)
    close_where_present((ds, dv, *bars), sums)
    close_to_joined(got, expected_halves)


def test_which_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that fit into a GPU's memory, a small one's or an H200's; models with more functions have none."""
    table = smooth_table(np.random.default_rng(0), 3 * 128, 21)
    tree = {"embedding": {"table": np.zeros((10, 128))}, "packs": packs._filters([table])}
    for kilobytes, served in ((99, [*range(2, 12), 15, 16]), (227, [*range(2, 33)])):
        packs._fitting.cache_clear()
        monkeypatch.setattr(launch, "most_shared", lambda most=kilobytes * 1024: most)
        assert [size for size in range(1, 33) if packs.serves(tree, size)] == served
    packs._fitting.cache_clear()
    assert packs._filters([smooth_table(np.random.default_rng(0), 3 * 128, 40)]) is None


def test_messages_of_molecules_add_up() -> None:
    """Pair gradients of two messages, of a size whose blocks would have more channels if they sent less."""
    n, f, rng = 28, 32, np.random.default_rng(0)
    table = smooth_table(rng, 3 * f)
    pairs = RandomPairs(rng, n, n, table, f, molecules=True)
    table = jnp.asarray(table, jnp.float32)
    a, p, y, q = (single(rng.normal(size=(n, k * f))) for k in (1, 1, 3, 3))
    last = Sources(a, None, y), (p, q), table, pairs.geometry
    first = Sources(a, None, None), (p, q), table[..., : 2 * f], pairs.geometry
    _, bars = few.message_transpose(*last, None)
    _, alone = few.message_transpose(*first, None, sums=False)
    _, both = few.message_transpose(*first, bars, sums=False)
    assert len(alone) < len(bars)
    close(both.sum(axis=0), np.asarray(bars.sum(axis=0) + alone.sum(axis=0)))


def test_molecules_fit_small_gpus() -> None:
    """Shared memory and threads of a block, for all molecules that these kernels serve."""
    for slots, (name, plan) in itertools.product(range(1, kernels.FEW_SLOTS + 1), molecules.PLANS.items()):
        kernel = molecules._of_size(name, 128, slots, plan, True, True)
        assert kernel.shared <= 99 * 1024
        assert 32 <= kernel.threads <= 1024
    for slots, name in itertools.product(range(1, kernels.FEW_SLOTS + 1), few.THREADS):
        kernel = few._of_size(name, 128, slots, few.WIDTHS[-1], True, True, True, True)
        assert kernel.shared <= 99 * 1024
        assert dict(kernel.defines)["PARTS"] >= 1


@pytest.mark.parametrize(("has_b", "f", "slots"), [(True, 48, 37), (False, 64, 37), (True, 32, 150)])
def test_first_message_by_elements(has_b: bool, f: int, slots: int) -> None:
    """Sums and halves against float64: more pairs than fit at once; three tiles, one of which hears nothing."""
    n, rng = 37, np.random.default_rng(f)
    table = smooth_table(rng, 2 * f)
    of_element = rng.normal(size=(2, 128, f))
    filters = of_elements(table, of_element[0], of_element[1] if has_b else None)
    assert filters is not None
    pairs = RandomPairs(rng, n, slots, table, f, hear_nothing=slice(16, 32))
    numbers = rng.choice([1, 6, 7, 8, 17, 53, 127], n)
    a, b = of_element[:, numbers]
    p, q = rng.normal(size=(n, f)), rng.normal(size=(n, 3, f))
    sources = Sources(single(of_element[0]), single(of_element[1]) if has_b else None, None)
    arguments = filters, pairs.geometry, jnp.asarray(numbers, jnp.int32)
    ds, dv = engine.first_message(sources, *arguments)
    arguments = sources, (single(p), single(q)), *arguments
    got, beside = (np.asarray(engine.first_transpose(*arguments, beside)) for beside in (False, True))
    np.testing.assert_array_equal(got, beside.T)
    got = got.reshape(4, n, slots)

    senders, u, (wa, wb), (sa, sb) = pairs.senders, pairs.u, pairs.filters, pairs.slopes
    b = b if has_b else np.ones_like(b)
    close(ds, np.sum(wa * a[senders], axis=1))
    close(dv, np.einsum("knm,nmf->nkf", u, wb * b[senders]).reshape(n, -1))
    along = np.einsum("knm,nkf->nmf", u, q)
    close(got[0], np.sum(a[senders] * p[:, None] * sa + b[senders] * along * sb, axis=-1))
    close(got[1:], -np.einsum("nmf,nkf->knm", b[senders] * wb, q))
    assert np.all(got[:, ~pairs.mask] == 0)


def test_whole() -> None:
    """Pairs in any order of slots, more than a warp of them, some of which don't count, against a search in float64."""
    n, slots, rng, lengths = 50, 41, np.random.default_rng(0), Lengths(0.25, 0.5)
    near = np.triu(rng.uniform(size=(n, n)) < 0.6, 1)
    near |= near.T
    assert 32 < near.sum(axis=1).max() <= slots
    senders, mask = rng.integers(0, n, (n, slots)), np.zeros((n, slots), bool)
    for i in range(n):
        places = rng.permutation(slots)[: near[i].sum()]
        senders[i, places], mask[i, places] = rng.permutation(np.flatnonzero(near[i])), True
    parts = rng.normal(size=(3, n, slots, 4))
    distances, vectors = rng.uniform(1, 4, (n, slots)), rng.normal(size=(n, slots, 3))
    distances[distances < 1.1] = 0  # two at the same place
    for i, s in np.argwhere(mask):  # alike in both directions
        j = senders[i, s]
        (back,) = np.flatnonzero((senders[j] == i) & mask[j])
        distances[j, back], vectors[j, back] = distances[i, s], -vectors[i, s]
    vectors *= (distances / np.linalg.norm(vectors, axis=-1))[..., None]
    u, place = vectors / (distances + lengths.epsilon)[..., None], distances / lengths.interval
    places = np.stack([place % 1, mask, *np.moveaxis(u, -1, 0), place // 1]).reshape(6, -1)
    geometry = Geometry(jnp.asarray(senders.reshape(-1), jnp.int32), jnp.asarray(places, jnp.float32))
    arrays = [jnp.asarray(x.reshape(-1, 4), jnp.float32) for x in parts]
    got = np.asarray(engine.whole(arrays, geometry, n, lengths)).reshape(3, n, slots)
    assert np.all(got[:, ~mask] == 0)
    halves_of_pairs = parts.sum(axis=0)
    for i, s in np.argwhere(mask):
        j = senders[i, s]
        (back,) = np.flatnonzero((senders[j] == i) & mask[j])
        here, there = halves_of_pairs[i, s], halves_of_pairs[j, back]
        bars = (here[:1] + there[:1]) / lengths.interval, (there - here)[None, 1:]
        _, pullback = jax.vjp(partial(distance_reference, epsilon=lengths.epsilon), jnp.asarray(vectors[i, s, None]))
        np.testing.assert_allclose(got[:, i, s], pullback(bars)[0][0], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "few_slots", "some", "size"),
    [
        ("painn+zbl", 0, 0, 5),
        ("painn+zbl", 1000, 0, 5),
        ("painn", 1000, 0, 6),
        ("student", 1000, 0, 5),
        ("painn+zbl", 1000, 512, 5),
        ("student", 1000, 512, 17),
    ],
)
def test_batch(name: str, few_slots: int, some: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Molecules under vmap are one larger system; a batch of batches, too. Messages of systems, or of molecules.

    Of few, blocks have some channels of the phases, and those of messages one or two tiles of atoms.
    """
    monkeypatch.setattr(kernels, "FEW_SLOTS", few_slots)
    monkeypatch.setattr(kernels, "SOME_ATOMS", some)
    monkeypatch.setattr(kernels, "CUT_ATOMS", some)
    monkeypatch.setattr(kernels, "MANY_ATOMS", 0 if name == "painn" else 1000)  # from which on molecules are in packs
    monkeypatch.setattr(engine, "OWN", (16,) if name != "student" else (32,))
    threads = 256 if size <= 16 else 512  # as few as do: a CPU runs them one after the other
    monkeypatch.setattr(few, "THREADS", dict.fromkeys(few.THREADS, threads))
    config, tree, fused = prepared(name)
    numbers, positions = random_structure(size)
    moved = positions + 0.05 * np.random.default_rng(0).normal(size=(2, 2, size, 3))
    both = [[pairs_in_layout(x, config.cutoff, "all") for x in row] for row in moved]
    vectors = np.stack([[v for v, _ in row] for row in both])
    masks = np.stack([[p.mask for _, p in row] for row in both])
    pairs = both[0][0][1]

    def one(vectors: Any, mask: Any) -> Any:
        here = type(pairs)(pairs.senders, pairs.receivers, mask, size, "all", pairs.symmetric)
        return energies_and_forces(kernels, fused, config, numbers, vectors, here)

    energies, forces = jax.jit(jax.vmap(jax.vmap(one)))(jnp.asarray(vectors, jnp.float32), masks)
    exact = models.cast(tree, np.dtype("float64"))
    for i, j in np.ndindex(2, 2):
        expected = energies_and_forces(models, exact, config, numbers, jnp.asarray(vectors[i, j]), both[i][j][1])
        scale = max(1, np.abs(expected[1]).max())
        np.testing.assert_allclose(energies[i, j], expected[0], atol=1e-5 * max(1, np.abs(expected[0]).max()))
        np.testing.assert_allclose(forces[i, j], expected[1], atol=1e-5 * scale)


def launched(name: str, n: int, slots: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> set[launch.Kernel]:
    """The kernels of an evaluation."""
    config, _, fused = prepared(name)
    found = set()

    def note(kernel: Any, arrays: Any, integers: Any, results: Any, *_: Any) -> list[Any]:
        found.add(kernel)
        return [jnp.zeros(shape, jnp.float32) for shape in results]

    monkeypatch.setattr(launch, "call", note)
    layout = "all" if batch else "slots"
    pairs = Pairs(*np.zeros((2, n * slots), np.int32), np.ones(n * slots, bool), n, layout, True)
    vectors = jax.ShapeDtypeStruct((batch, n * slots, 3) if batch else (n * slots, 3), jnp.float32)

    def evaluate(r: Any) -> Any:
        return kernels.energies_and_vector_gradients(fused, config, np.ones(n, np.int32), r, pairs)

    jax.eval_shape(jax.vmap(evaluate) if batch else evaluate, vectors)
    return found


@pytest.mark.parametrize(
    ("n", "slots", "batch", "expected"),
    [
        (300, 40, 0, {"arrange", "message", "message_transpose", "painn_update", "painn_gate_bwd", "whole"}),
        (1000, 40, 0, {"arrange", "message", "message_transpose", "painn_update", "painn_gate_bwd", "whole"}),
        (1100, 40, 0, {"arrange", "message", "message_transpose", "first_message", "phases", "whole"}),
        (32, 32, 4, {"few_message", "few_transpose", "painn_update_hidden", "painn_gate_bwd"}),
        (9, 9, 20, {"few_message", "few_transpose", "painn_update", "painn_update_hidden_bwd"}),
        (9, 9, 60, {"molecule_message", "molecule_transpose", "phases"}),
        (9, 9, 300, {"pack_message", "pack_transpose", "phases"}),
    ],
)
def test_which_kernels_serve(
    n: int, slots: int, batch: int, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for some atoms or for many, of one system and of a batch of molecules."""
    names = {kernel.name for kernel in launched("painn", n, slots, batch, monkeypatch)}
    assert expected <= names
    assert ("phases" in names) == ("phases" in expected)


def close_to_exact(model: Any, numbers: Any, positions: Any) -> None:
    """Forces at 128 channels within 1e-4 eV/Å of float64 with exact filters."""
    potential, exact = load_potential(model, engine="fused"), load_potential(model, dtype="float64")
    fused = kernels.prepare(potential._fused.plain, potential.config, PROGRAMS, cuda=True)
    assert fused.fused["cuda"]["first"] is not None
    vectors, pairs = pairs_in_layout(positions, potential.config.cutoff, "slots")

    def energy(r: Any) -> Any:
        return jnp.sum(kernels.atomic_energies(fused, potential.config, jnp.asarray(numbers, jnp.int32), r, pairs))

    forces = accumulate_forces(jax.jit(jax.grad(energy))(jnp.asarray(vectors, jnp.float32)), pairs)
    np.testing.assert_allclose(forces, exact.energy_and_forces(numbers, positions)[1], atol=1e-4)


def test_the_model_that_ships(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW_SLOTS", 0)
    monkeypatch.setattr(kernels, "CUT_ATOMS", 0)
    atoms = molecule("CH3CH2OH")
    close_to_exact("organic", atoms.numbers, atoms.positions)


def test_published_student(student_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "FEW_SLOTS", 0)
    monkeypatch.setattr(kernels, "CUT_ATOMS", 0)
    data = np.load(student_dir / "parity_public.npz")
    which = int(np.argmax((data["natoms"] == 14) & ~data["force_ill_defined"]))
    part = slice(*data["offset"][which : which + 2])
    close_to_exact(student_dir / "original.pt", data["numbers"][part], data["positions"][part])


def test_halves() -> None:
    """22 bits of each number, at the places of mma.m16n8k16 with the columns permuted; and of zeros."""
    matrix = np.random.default_rng(0).normal(size=(32, 48)) * np.logspace(-3, 0, 32)[:, None]
    words, factor = halves(matrix)
    numbers = words.view(np.float16).astype(np.float64).reshape(3, 2, 2, 32, 2, 4).sum(axis=4) * factor
    for column, row in np.ndindex(48, 32):
        group, c = divmod(column, 16)
        step, k = divmod(row, 16)
        lane = 4 * (2 * (c // 4) + c % 2) + k % 8 // 2
        got = numbers[group, step, c % 4 // 2, lane, 2 * (k // 8) + k % 2]
        assert abs(got - matrix[row, column]) <= 2.0**-22 * abs(matrix[row, column]) + 2.0**-32 * np.abs(matrix).max()
    words, factor = halves(np.zeros((16, 16)))
    assert factor == 1
    assert not words.any()


def test_few_functions_make_the_filters() -> None:
    """Values and slopes from B and C within what `prepare` promises; a table that needs too many is refused."""
    t = np.linspace(0, 1, 257)
    curves = np.random.default_rng(0).normal(size=(20, 96)).T @ np.sin(np.arange(1, 21)[:, None] * np.pi * t)
    delta, slope = np.diff(curves, axis=1), np.gradient(curves, axis=1)
    g, h = slope[:, :-1], slope[:, 1:]
    table = np.stack([curves[:, :-1], g, 3 * delta - 2 * g - h, g + h - 2 * delta]).transpose(2, 0, 1)
    made = of_bins([table])[0]
    bins, width = len(made["matrices"]), width_of(made)
    assert bins > 1
    assert not made["basis"][0].any()
    basis = made["basis"][1:].reshape(bins, width, 14, 4)
    words = made["matrices"].view(np.float16).astype(np.float64).reshape(bins, 6, 2, 2, 16, 4, 2)
    c = np.empty((2, bins, 16, 96))  # of both products
    for group, tile, lane, word, half in np.ndindex(6, 2, 16, 4, 2):
        row, column = 2 * (lane % 4) + 8 * (word // 2) + half, 4 * (lane // 4) + 2 * tile + word % 2
        c[:, :, row, 16 * group + column] = words[:, group, tile, :, lane, word, half].T * made["scales"][0]
    for k in range(bins):
        here = table[k * step_between(width) :][:width]
        places = [*(7 * (row % 2) + row // 2 for row in range(14)), 4, 4]  # of even number first, then the ninth
        cubics = np.asarray(basis[k, : len(here)], np.float64)[:, places]
        for which, most in ((0, 5e-7), (1, 5e-6)):
            value = cubics[..., which] * made["scales"][1] ** which
            high = value.astype(np.float16).astype(np.float64)
            low = (value - high).astype(np.float16).astype(np.float64)
            high[:, 14] = low[:, 14]  # of the ninth function
            both = high @ c[0, k] + np.concatenate([low[:, :8], high[:, :8]], axis=1) @ c[1, k]
            expected, scale = here[:, which], np.abs(table[:, which]).max()
            np.testing.assert_allclose(both * made["scales"][2] ** which, expected, atol=most * scale)
    assert len(here) > width - step_between(width)
    noise = np.random.default_rng(0).normal(size=(256, 4, 96))
    assert of_bins([table, noise]) is None
    assert of_elements(noise, np.ones((2, 48)), None) is None


def test_quadratics_in_64_bits() -> None:
    """Read as first.cu reads them, they are the cubics to 24 bits, within pieces, too; coarse tables take more."""
    rng = np.random.default_rng(0)
    for intervals, pieces in ((2048, 4), (128, 64)):
        t = np.linspace(0, 1, intervals + 1)
        curves = 64 * np.sin(np.outer(t, [3, 36]))
        slope = 64 * np.cos(np.outer(t, [3, 36])) * [3, 36] / intervals
        delta, g, h = np.diff(curves, axis=0), slope[:-1], slope[1:]
        cubics = np.stack([curves[:-1], g, 3 * delta - 2 * g - h, g + h - 2 * delta], axis=1)
        made = packed(cubics, pieces)
        x = rng.uniform(size=(intervals * pieces, 1))
        whole = made.words[..., 1].view(np.int32)
        last = (whole & 0xFFF ^ 0x800) - 0x800
        value = made.words[..., 0].view(np.float32) + x * (made.units[0] * whole + x * made.units[1] * last * 2.0**20)
        interval, place = np.divmod(np.arange(intervals * pieces), pieces)
        at = (place[:, None] + x) / pieces
        c = cubics[interval].transpose(1, 0, 2)
        np.testing.assert_allclose(value, c[0] + at * (c[1] + at * (c[2] + at * c[3])), atol=64 * 2.0**-23)
        assert made.left(cubics, np.eye(2)) < 2.0**-23


def test_fewer_rows_wait() -> None:
    """Before a product comes what leaves fewer rows to remember; each needed equation once, after what it reads."""
    on = tiles._Tile(32)

    def run(x: Any, y: Any, scale: Any, kernel: Any) -> Any:
        a, b, c, _ = (on.product(z, kernel) for z in (x, y, x, y))
        return c + on.entry(scale, 0, 0) * (a * b)

    row, others = (
        jax.ShapeDtypeStruct((16, 32), jnp.float32),
        [jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (3, 32)],
    )
    jaxpr = jax.make_jaxpr(run)(row, row, *others).jaxpr
    names = [eqn.primitive.name for eqn in tiles._ordered(jaxpr, jaxpr.invars[:2])]
    product = "tile_product"
    assert names == [product, product, "mul", product, "tile_entry", "mul", "add"]


def test_rows_are_read_once_for_two_matrices() -> None:
    """Products of the same rows by two matrices run at once, with the factor of each; others by themselves."""

    def run(x: Any, y: Any, *kernels: Any) -> Any:
        on = tiles._Tile(32)
        return on.product(x, kernels[0]) * on.product(y, kernels[0]) + on.product(x, kernels[1])

    row, kernel = jax.ShapeDtypeStruct((16, 32), jnp.float32), jax.ShapeDtypeStruct((32, 32), jnp.float32)
    jaxpr = jax.make_jaxpr(run)(row, row, kernel, kernel).jaxpr
    writer = tiles.Writer(32, jaxpr, 2, tiles.UNITS)
    writer.walk(jaxpr.eqns, {})
    assert [p.sources for p in writer.products] == [(0,), (1,), (0,)]
    products = [line for line in writer.lines if line.startswith("accumulate")]
    assert ["Both{p0, p1}" in products[0], "p2 +" in products[1], len(products)] == [True, True, 2]
    assert any("factors[0], factors[1]" in line for line in writer.lines)


def test_compiles_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVRTC takes the kernels, where it is."""
    try:
        launch.nvrtc()
    except ImportError as error:
        pytest.skip(str(error))
    made = [
        engine._message_kernel(name, 585, engine._Sent(128, True, True, True))
        for name in ("message", "message_transpose")
    ]
    made += [molecules._of_size(name, 128, 21, plan, True, True) for name, plan in molecules.PLANS.items()]
    made += [packs._of_slots(name, 3, 4, 128, 21, 22, True, True) for name in packs.BACK]
    made += [packs._making(21, 22)]
    made += [engine._first_kernel(name, 128, 64, False, 61) for name in ("first_message", "first_transpose")]
    made += launched("painn", 17, 17, 8, monkeypatch)
    for kernel in made:
        ptx = launch.compiled(kernel, 90, "PTX")
        assert f".entry {kernel.name}".encode() in ptx
        assert kernel.early == (b"griddepcontrol.wait" in ptx)
        assert b"ld.global" not in ptx.partition(b"griddepcontrol.wait")[0] or not kernel.early
    assert launch.compiled(made[-1], 90, "CUBIN").startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match="could not compile broken"):
        launch.compiled(launch.Kernel("broken", "nonsense", (), 32, 0), 90, "PTX")


def test_without_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many atoms go without CUDA kernels, and a message says why."""
    monkeypatch.setattr(launch, "why_not", lambda: "NVRTC was not found")
    config = CONFIGS["painn"].model_copy(update={"hidden_dim": 16})
    tree, _ = tabulate(random_params(config), config, 16)
    with pytest.warns(UserWarning, match="CUDA kernels are not used: NVRTC was not found"):
        fused = kernels.prepare(models.cast(tree, np.dtype("float32")), config, "triton")
    assert "cuda" not in fused.fused
