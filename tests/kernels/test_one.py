"""One molecule in one kernel, on a CPU (tests/kernels/emulator.py) or on a GPU where one is, against the models."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import kernels, models
from jaxff.kernels import chain
from jaxff.kernels.cuda import larger, launch, one
from jaxff.ops import accumulate_forces
from jaxff.system import Pairs
from tests.kernels import GPU
from tests.kernels.test_cuda import WIDTHS, prepared
from tests.structures import pairs_in_layout, random_structure

pytestmark = pytest.mark.usefixtures("cuda_kernels_run_here")
# the model, atoms, and how many groups of them find room
CASES = [("student", 4, 3), ("painn", 5, 3), ("painn+zbl", 3, 4)]
MORE_CASES = [("student", 8, 3), ("painn", 10, 3), ("painn+zbl", 10, 3)]  # groups of three atoms, and of four


@pytest.fixture(params=CASES + MORE_CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def case(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, cuda_kernels_run_here: None) -> Any:
    """Config, tree and fused tree; with an atom of padding numbers, positions, pairs; vectors, pairs in the cutoff."""
    name, atoms, groups = request.param
    config, tree, fused = prepared(name)
    if not GPU:
        monkeypatch.setattr(one, "multiprocessors", lambda: groups * config.hidden_dim // one.CHANNELS)
        monkeypatch.setattr(launch, "most_shared", lambda: 227 * 1024)
    numbers, positions = random_structure(atoms)
    vectors, inside = pairs_in_layout(positions, config.cutoff, "all", padding=1)
    positions = np.concatenate([positions, np.zeros((1, 3))])
    n = atoms + 1
    receivers, senders = np.divmod(np.arange(n * n, dtype=np.int32), np.int32(n))
    mask = (senders != receivers) & (np.maximum(senders, receivers) < atoms)
    pairs = Pairs(senders, receivers, mask, n, "all", symmetric=True)
    assert chain.one_kernel_serves(fused.fused, config, n)
    return config, tree, fused, np.pad(numbers, (0, 1)), positions, pairs, vectors, inside


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(1, np.abs(expected).max()))


of_vectors = jax.jit(models.energies_and_vector_gradients, static_argnums=1)


def test_vectors(case: Any) -> None:
    """Energies and gradients by pair vectors, which forces are made of; and energies alone."""
    config, tree, fused, numbers, _, _, vectors, inside = case
    exact = models.cast(tree, np.dtype("float64"))
    energies, gradients = of_vectors(exact, config, numbers, jnp.asarray(vectors), inside)
    forces = accumulate_forces(gradients, inside)
    r = jnp.asarray(vectors, jnp.float32)
    got, by_vectors = jax.jit(kernels.energies_and_vector_gradients, static_argnums=1)(
        fused, config, numbers, r, inside
    )
    close(got, energies)
    close(accumulate_forces(by_vectors, inside, antisymmetric=True), forces)
    assert got[-1] == 0
    alone, by_energy = jax.jit(jax.value_and_grad(kernels.energy, argnums=3), static_argnums=1)(
        fused, config, numbers, r, inside
    )
    close(alone, energies.sum())
    np.testing.assert_array_equal(by_energy, by_vectors)
    close(jax.jit(kernels.energy, static_argnums=1)(fused, config, numbers, r, inside), energies.sum())


def of_positions(case: Any) -> tuple[Any, Any]:
    """Energy of positions in float64 by the models, and by the kernel."""
    config, tree, fused, numbers, _, pairs, _, inside = case
    exact = models.cast(tree, np.dtype("float64"))

    def reference(x: Any) -> Any:
        r = x[inside.senders] - x[inside.receivers]
        return models.atomic_energies(exact, config, numbers, r, inside).sum()

    def energy(x: Any) -> Any:
        return kernels.energy_of_positions(fused, config, numbers, x, pairs)

    assert kernels.serves_positions(fused, config, pairs)
    return reference, energy


@pytest.mark.parametrize("case", [x for x in CASES + MORE_CASES if x != ("painn+zbl", 10, 3)], indirect=True)
def test_positions(case: Any) -> None:
    """Energy and gradients by positions."""
    (reference, energy), positions = of_positions(case), case[4]
    expected, gradient = jax.jit(jax.value_and_grad(reference))(jnp.asarray(positions))
    x = jnp.asarray(positions, jnp.float32)
    got, by_positions = jax.jit(jax.value_and_grad(energy))(x)
    close(got, expected)
    close(by_positions, gradient)
    assert np.all(by_positions[-1] == 0)
    close(jax.jit(energy)(x), expected)


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_positions_of_two_molecules_and_twice(case: Any) -> None:
    """Energies and gradients under vmap; second derivatives."""
    (reference, energy), positions = of_positions(case), case[4]
    expected, gradient = jax.jit(jax.value_and_grad(reference))(jnp.asarray(positions))
    x = jnp.asarray(positions, jnp.float32)
    energies, gradients = jax.jit(jax.vmap(jax.value_and_grad(energy)))(jnp.stack([x, x + 0.5]))
    close(energies, np.full(2, expected))
    close(gradients, np.stack([gradient, gradient]))

    direction = np.random.default_rng(0).normal(size=positions.shape)
    hessian = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(reference)(x), direction)))(jnp.asarray(positions))
    again = jax.jit(jax.grad(lambda x: jnp.vdot(jax.grad(energy)(x), direction.astype(np.float32))))(x)
    np.testing.assert_allclose(again, hessian, atol=2e-4 * np.abs(hessian).max())


@pytest.mark.parametrize(
    ("name", "atoms", "groups", "width"), [("painn", 50, 13, 32), ("student", 3, 1, 128), ("painn", 3, 1, 128)]
)
def test_more_atoms(name: str, atoms: int, groups: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of pairs, the fewest chunks of matrices; energies, gradients; the same bits launch after launch."""
    monkeypatch.setitem(WIDTHS, name, width)
    config, tree, fused = prepared(name)
    if not GPU:
        monkeypatch.setattr(one, "multiprocessors", lambda: groups * config.hidden_dim // one.CHANNELS)
        monkeypatch.setattr(launch, "most_shared", lambda: 227 * 1024)
    monkeypatch.setattr(one, "MOST_CHUNKS", larger.FEWEST_CHUNKS[config.architecture])
    numbers, positions = random_structure(atoms)
    vectors, inside = pairs_in_layout(positions, config.cutoff, "all")
    exact = models.cast(tree, np.dtype("float64"))
    energies, gradients = of_vectors(exact, config, numbers, jnp.asarray(vectors), inside)
    senders, receivers = inside.senders, inside.receivers
    pairs = Pairs(senders, receivers, senders != receivers, atoms, "all", symmetric=True)
    x = jnp.asarray(positions, jnp.float32)
    assert kernels.serves_positions(fused, config, pairs)
    run = jax.jit(jax.value_and_grad(lambda x: kernels.energy_of_positions(fused, config, numbers, x, pairs)))
    got, by_positions = run(x)
    close(got, energies.sum())
    close(by_positions, -accumulate_forces(gradients, inside))
    for _ in range(60 if GPU else 1):
        again = run(x)
        assert again[0] == got
        np.testing.assert_array_equal(again[1], by_positions)


def test_which_molecules() -> None:
    """More atoms than the groups of all multiprocessors have room for, and models that don't fit, are not served."""
    config, _, fused = prepared("painn")
    most = max(n for n in range(1, 200) if chain.one_kernel_serves(fused.fused, config, n))
    assert not chain.one_kernel_serves(fused.fused, config, most + 1)
    assert not chain.one_kernel_serves({name: x for name, x in fused.fused.items() if name != "one"}, config, 3)
    wide = fused.fused | {"read": fused.fused["read"] | {"hidden": [(np.zeros((32, 24)),) * 3]}}
    assert one.prepare(wide, config) is None
    assert one.prepare(fused.fused, config.model_copy(update={"num_interactions": 1})) is None
