"""The batch computes what Potential computes, and the loss's gradient is the slope of the loss."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import models
from jaxff.config import PainnConfig, StudentConfig
from jaxff.potential import Potential
from jaxff.train.batches import Batch, Packer, Shape, batch_shape, make_store
from jaxff.train.config import LossConfig, LossTerm, OptimizerConfig, ScheduleConfig
from jaxff.train.frames import Frame, Frames
from jaxff.train.loss import by_element, counts, loss_sums, penalty, predict, total_loss
from jaxff.train.step import learning_rate
from tests.train.teacher import labelled

MODELS: dict[str, Any] = {
    "painn": PainnConfig(hidden_dim=8, num_interactions=2, num_rbf=5, cutoff=3.0, max_z=9, repulsion="zbl"),
    "cone": PainnConfig(hidden_dim=4, num_interactions=2, num_rbf=3, cutoff=3.0, max_z=9, vector_norm_epsilon=0.0),
    "student": StudentConfig(hidden_dim=8, num_interactions=2, num_rbf=5, cutoff=3.0, max_z=9),
}
LOSS = LossConfig(
    energy=LossTerm(kind="huber", weight=3.0, delta=0.5),
    force=LossTerm(kind="mse", weight=1.0),
    angular_weight=0.3,
)


@pytest.fixture(scope="module")
def frames() -> Frames:
    lonely = Frame(np.array([8]), np.ones((1, 3)), -1.0, np.zeros((1, 3)), "O")
    return Frames.join([labelled(["H2O", "CH3OH", "HCN"], each=1), Frames.of([lonely])])


def one_batch(frames: Frames, dtype: Any = np.float64, chosen: Sequence[int] | None = None) -> Batch:
    """Some of the frames, in room for all."""
    store = make_store(frames, frames.energies, 3.0, dtype)
    frames_, atoms, pairs = batch_shape(store, len(frames), 1.0)
    ids = np.arange(len(frames)) if chosen is None else np.array(chosen, int)
    batch = Packer(store, Shape(frames_ + 1, atoms, pairs)).pack([ids])
    return jax.tree.map(lambda x: jnp.asarray(x[0]), batch)


def parameters(config: Any, dtype: Any = np.float64) -> Any:
    params = models.init_params(config, jax.random.key(1), dtype)
    if "reference" in params:
        params["reference"]["energies"] = jnp.linspace(-3, 2, config.max_z + 1, dtype=dtype)
    return params


def loss_of(params: Any, config: Any, batch: Batch) -> Any:
    return total_loss(loss_sums(*predict(params, config, batch), batch, LOSS), counts(batch, LOSS), LOSS)


@pytest.mark.parametrize("name", ["painn", "student"])
def test_a_batch_has_the_numbers_of_each_frame(name: str, frames: Frames) -> None:
    config, params, batch = MODELS[name], parameters(MODELS[name]), one_batch(frames)
    energies, forces = jax.jit(predict, static_argnums=1)(params, config, batch)
    potential = Potential(params, config, "float64")
    first = 0
    for b, frame in enumerate(frames):
        energy, expected = potential.energy_and_forces(frame.numbers, frame.positions)
        n = len(frame.numbers)
        np.testing.assert_allclose(energies[b], energy, rtol=0, atol=1e-10)
        np.testing.assert_allclose(forces[first : first + n], expected, rtol=0, atol=1e-10)
        first += n
    assert not np.any(energies[len(frames) :])
    assert not np.any(forces[first:])


@pytest.mark.parametrize("name", ["painn", "student"])
def test_the_gradient_is_the_slope_of_the_loss(name: str, frames: Frames) -> None:
    config, params, batch = MODELS[name], parameters(MODELS[name]), one_batch(frames)
    value_and_grad = jax.jit(jax.value_and_grad(lambda p: loss_of(p, config, batch)))
    gradient = jax.tree.leaves(value_and_grad(params)[1])
    leaves, tree = jax.tree.flatten(params)
    step = 1e-5
    for seed in range(4):
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        direction = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        ends = [
            value_and_grad(jax.tree.unflatten(tree, [x + h * d for x, d in zip(leaves, direction, strict=True)]))[0]
            for h in (step, -step)
        ]
        expected = sum(jnp.vdot(g, d) for g, d in zip(gradient, direction, strict=True))
        np.testing.assert_allclose((ends[0] - ends[1]) / (2 * step), expected, rtol=1e-6)


@pytest.mark.parametrize(("name", "dtype"), [("painn", np.float32), ("cone", np.float64), ("student", np.float32)])
def test_padding_adds_nothing_and_gives_no_nan(name: str, dtype: Any, frames: Frames) -> None:
    """Batches of one shape, differently full: sums and their gradients are those of the parts."""
    config = MODELS[name].model_copy(update={"num_interactions": 1})
    params = parameters(config, dtype)
    unit = {name: jnp.ones((), dtype) for name in ("frames", "components", "directions")}

    @jax.jit
    @jax.value_and_grad
    def summed(params: Any, batch: Batch) -> Any:
        return total_loss(loss_sums(*predict(params, config, batch), batch, LOSS), unit, LOSS)

    whole, *parts = (summed(params, one_batch(frames, dtype, chosen)) for chosen in (None, [1], [3, 0], [2]))
    scale = max(float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(whole))
    tolerance = {"rtol": 0, "atol": (1e-5 if dtype == np.float32 else 1e-12) * scale}
    together = jax.tree.map(lambda *x: sum(x), *parts)
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(one, other, **tolerance)
    assert all(not np.any(x) for x in jax.tree.leaves(summed(params, one_batch(frames, dtype, []))))


def test_sums_are_those_of_plain_numpy(frames: Frames) -> None:
    config, params, batch = MODELS["painn"], parameters(MODELS["painn"]), one_batch(frames)
    energies, forces = jax.jit(predict, static_argnums=1)(params, config, batch)
    sums, totals = loss_sums(energies, forces, batch, LOSS), counts(batch, LOSS)
    n, atoms = len(frames), len(frames.numbers)
    de = (np.asarray(energies)[:n] - frames.energies) / frames.num_atoms
    df = np.asarray(forces)[:atoms] - frames.forces
    assert (int(totals["frames"]), int(totals["components"])) == (n, 3 * atoms)
    np.testing.assert_allclose(sums["energy_absolute"], np.abs(de).sum())
    np.testing.assert_allclose(sums["energy_squared"], (de**2).sum())
    np.testing.assert_allclose(sums["force_absolute"], np.abs(df).sum())
    np.testing.assert_allclose(sums["force_loss"], (df**2).sum())
    np.testing.assert_allclose(sums["energy_loss"], np.where(abs(de) < 0.5, de**2, abs(de) - 0.25).sum())
    length = np.linalg.norm(frames.forces, axis=1)
    strong = length >= LOSS.angular_min_force
    cosine = np.sum(np.asarray(forces)[:atoms] * frames.forces, axis=1)[strong]
    cosine /= length[strong] * np.linalg.norm(np.asarray(forces)[:atoms], axis=1)[strong]
    assert int(totals["directions"]) == strong.sum() == atoms - 1
    np.testing.assert_allclose(sums["angular_loss"], np.sum(1 - cosine))
    elements = by_element(forces, batch, 9)
    np.testing.assert_allclose(elements["element_absolute"][6], np.abs(df[frames.numbers == 6]).sum())
    assert int(elements["element_components"][1]) == 3 * np.sum(frames.numbers == 1)


def test_penalties() -> None:
    x = jnp.array([-2.0, -0.05, 0.0, 0.1, 1.0])
    np.testing.assert_allclose(penalty(x, LossTerm(kind="mse")), x**2)
    np.testing.assert_allclose(penalty(x, LossTerm(kind="mae")), abs(x))
    np.testing.assert_allclose(penalty(x, LossTerm(kind="huber", delta=0.1)), [1.95, 0.0125, 0, 0.05, 0.95])
    slope = jax.vmap(jax.grad(lambda x: penalty(x, LossTerm(kind="huber", delta=0.1))))(x)
    np.testing.assert_allclose(slope, [-1, -0.5, 0, 1, 1], atol=1e-12)


def test_the_rate_warms_up_and_falls() -> None:
    optimizer = OptimizerConfig(learning_rate=1.0)
    schedule = ScheduleConfig(warmup_steps=10, final_learning_rate=0.01)

    def rate(step: float, steps: int = 110) -> float:
        return float(learning_rate(jnp.float64(step), optimizer, schedule, steps))

    assert rate(0) == pytest.approx(0.1)
    assert rate(4) == pytest.approx(0.5)
    assert rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx((1 + 0.01) / 2)
    assert rate(110) == rate(500) == pytest.approx(0.01)
    assert rate(60, 1000) > 0.98, "more steps, a slower fall"
    constant = schedule.model_copy(update={"kind": "constant"})
    assert float(learning_rate(jnp.float64(100.0), optimizer, constant, 110)) == 1.0
