"""Several molecules in one kernel, on a CPU (tests/kernels/emulator.py) or on a GPU if one is there, and the models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import kernels, models
from jaxff.kernels import chain
from jaxff.kernels.cuda import launch, one, several
from jaxff.system import Pairs
from tests.kernels import GPU
from tests.kernels.test_cuda import WIDTHS, prepared
from tests.structures import CONFIGS, pairs_in_layout, random_structure

pytestmark = pytest.mark.usefixtures("cuda_kernels_run_here")


class Case:
    """Molecules of some atoms, the last of which is padding if wanted, and what the models make of each."""

    def __init__(self, atoms: int, molecules: int, padding: int = 0, name: str = "painn") -> None:
        self.config, tree, self.fused = prepared(name)
        rng, n = np.random.default_rng(0), atoms + padding
        numbers, positions = random_structure(atoms)
        self.numbers = np.pad(numbers, (0, padding))
        receivers, senders = np.divmod(np.arange(n * n, dtype=np.int32), np.int32(n))
        mask = (senders != receivers) & (np.maximum(senders, receivers) < atoms)
        self.pairs = Pairs(senders, receivers, mask, n, "all", symmetric=True)
        moved = positions + rng.normal(scale=0.05, size=(molecules, *positions.shape))
        self.positions = np.pad(moved, ((0, 0), (0, padding), (0, 0))).astype(np.float32)
        exact, config = models.cast(tree, np.dtype("float64")), self.config

        @jax.jit
        @jax.value_and_grad
        def energy(x: Any, inside: Pairs) -> Any:
            vectors = x[inside.senders] - x[inside.receivers]
            return models.atomic_energies(exact, config, numbers, vectors, inside).sum()

        each = moved.astype(np.float32).astype(np.float64)
        results = [energy(jnp.asarray(x), pairs_in_layout(x, config.cutoff, "all")[1]) for x in each]
        self.energies = np.asarray([e for e, _ in results])
        self.gradients = np.pad(np.stack([g for _, g in results]), ((0, 0), (0, padding), (0, 0)))

    def energy(self, x: Any) -> Any:
        return kernels.energy_of_positions(self.fused, self.config, self.numbers, x, self.pairs)


@pytest.fixture(autouse=True)
def as_on_a_large_gpu(monkeypatch: pytest.MonkeyPatch, cuda_kernels_run_here: None) -> None:
    if not GPU:
        monkeypatch.setattr(launch, "most_shared", lambda: 227 * 1024)
        monkeypatch.setattr(several, "multiprocessors", lambda: 10)
        monkeypatch.setattr(one, "multiprocessors", lambda: 132)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("atoms", "molecules", "padding", "width", "num_rbf"),
    [(5, 3, 0, 32, 6), (2, 1, 0, 32, 20), (17, 1, 1, 32, 20), (4, 1, 0, 128, 12)],
)
def test_several(
    atoms: int, molecules: int, padding: int, width: int, num_rbf: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Energies and gradients under vmap, energies of several alone; functions in one product or two; the same bits."""
    monkeypatch.setitem(CONFIGS, "painn", CONFIGS["painn"].model_copy(update={"num_rbf": num_rbf}))
    monkeypatch.setitem(WIDTHS, "painn", width)
    case = Case(atoms, molecules, padding)
    assert chain.one_kernel_serves_several(case.fused.fused, case.config, atoms + padding, molecules)
    run = jax.jit(jax.vmap(jax.value_and_grad(case.energy)))
    energies, gradients = run(case.positions)
    close(energies, case.energies)
    close(gradients, case.gradients)
    if molecules > 1:
        close(jax.jit(jax.vmap(case.energy))(case.positions), case.energies)
    for _ in range(300 if GPU else 0):
        np.testing.assert_array_equal(run(case.positions)[1], gradients)


def test_repulsion() -> None:
    """Which XLA adds; of an atom of padding none."""
    case = Case(4, 2, 1, "painn+zbl")
    energies, gradients = jax.jit(jax.vmap(jax.value_and_grad(case.energy)))(case.positions)
    close(energies, case.energies)
    close(gradients, case.gradients)


def test_batches_of_batches() -> None:
    """They go by pair vectors, as batches do for which there is no room."""
    case = Case(4, 4)
    two_by_two = case.positions.reshape(2, 2, *case.positions.shape[1:])
    got = jax.jit(jax.vmap(jax.vmap(case.energy)))(two_by_two)
    close(got.reshape(-1), case.energies)


def test_which_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many molecules as find room, of as many atoms as fit into shared memory, of models with one hidden layer."""
    config, _, fused = prepared("painn")
    tree = fused.fused
    assert several.serves(tree, config, 21, 5)
    assert not several.serves(tree, config, 21, 6)
    assert not several.serves(tree, config, 1, 2)
    assert not several.serves(tree, config, 25, 2)
    monkeypatch.setattr(launch, "most_shared", lambda: 99 * 1024)
    assert not several.serves(tree, config, 21, 5)
    more = tree | {"read": tree["read"] | {"hidden": tree["read"]["hidden"] * 2}}
    assert several.prepare(more, config) is None
    assert several.prepare({name: x for name, x in tree.items() if name != "one"}, config) is None
    assert "several" not in prepared("student")[2].fused
