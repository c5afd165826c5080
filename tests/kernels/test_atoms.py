"""Phases between two messages: arrays against the ops that they must equal, interpreted programs against arrays."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import kernels, models
from jaxff.kernels import atoms, chain, painn, student
from jaxff.kernels.message import Launch
from jaxff.kernels.programs import fits
from jaxff.models.parameters import dense_layers
from jaxff.ops.mlp import mlp_fwd
from jaxff.ops.readout import readout_bwd, readout_fwd
from jaxff.ops.update import equivariant_update_bwd, equivariant_update_fwd, update_bwd, update_fwd
from jaxff.tabulate import tabulate
from tests.kernels import PROGRAMS
from tests.structures import PAINN, STUDENT, pairs_in_layout, random_params, random_structure

N, F = 5, 16


def prepared(config: Any, hidden_dim: int = F) -> tuple[Any, Any]:
    config = config.model_copy(update={"hidden_dim": hidden_dim})
    tree, _ = tabulate(random_params(config), config, 16)
    return config, kernels.prepare(models.cast(tree, np.dtype("float32")), config, PROGRAMS)


def normal(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def rows(v: Any) -> list[Any]:
    return [v[:, axis] for axis in range(3)]


def joined(v: Any) -> Any:
    return v.reshape(len(v), -1)


def run(phases: Any, config: Any, weights: Any, state: Any) -> Any:
    """Phases without a message, over arrays; names are joined by the next message alone."""
    for phase in phases:
        state = state | phase(atoms.Atoms(config.hidden_dim), config, weights, state)
    return state


def close(actual: Any, expected: Any) -> None:
    np.testing.assert_allclose(jnp.stack(actual, 1), expected, atol=3e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1e-2])
def test_update_of_painn(epsilon: float) -> None:
    """Values and cotangents; an atom without a vector. The cotangents of s' and v' come with those of the sums."""
    config, tree = prepared(PAINN)
    config = config.model_copy(update={"vector_norm_epsilon": epsilon})
    s, v = normal(N, F), normal(N, 3, F).at[0].set(0)
    plain = tree.plain["interaction_0"]["update"]
    layers, matrices = dense_layers({k: plain[k] for k in ("dense_0", "dense_1")}), ("kernel_u", "kernel_v")
    expected, residuals = equivariant_update_fwd(s, v, layers, *(plain[k] for k in matrices), epsilon)
    weights = painn.weights(tree.fused, 0, False)
    state = run([painn.update_hidden, painn.update], config, weights, {"s": [s], "v": rows(v)})
    np.testing.assert_allclose(state["s"][0], expected[0], atol=1e-5)
    close(state["v"], expected[1])
    s_bar, v_bar = normal(N, F, seed=1), normal(N, 3, F, seed=1)
    above = state | {
        "s_bar": [s_bar],
        "v_bar": rows(v_bar),
        "hidden_gate": [s],
        "z_gate_bar": atoms.Shares(jnp.zeros((N, F), jnp.float32)),
    }
    below = run([painn.update_hidden_bwd, painn.update_bwd, painn.vectors_bwd], config, weights, above)
    bars = equivariant_update_bwd(epsilon, residuals, (s_bar, v_bar))
    np.testing.assert_allclose(below["s_bar"][0], bars[0], atol=2e-5)
    close(below["v_bar"], bars[1])


@pytest.mark.parametrize("config", [STUDENT, PAINN], ids=["student", "painn"])
def test_last_update(config: Any) -> None:
    """Energies and their gradients through readout and update, which leaves out what no energy depends on."""
    config, tree = prepared(config)
    i, s, v = config.num_interactions - 1, normal(N, F), normal(N, 3, F).at[0].set(0)
    plain, read = tree.plain[f"interaction_{i}"]["update"], dense_layers(tree.plain["readout"])
    layers, zero = dense_layers({k: plain[k] for k in ("dense_0", "dense_1")}), jnp.zeros((N, F), jnp.float32)
    if config.architecture == "painn":
        model: Any = painn
        matrices, epsilon = (plain["kernel_u"], plain["kernel_v"]), config.vector_norm_epsilon
        (s_new, _), residuals = equivariant_update_fwd(s, v, layers, *matrices, epsilon)
        update_backward: Any = partial(equivariant_update_bwd, epsilon)
    else:
        model, update_backward = student, update_bwd
        (s_new, _), residuals = update_fwd(s, v, layers, plain["mixing_matrix"])
    energies, kept = readout_fwd(s_new, read)
    s_bar = readout_bwd(kept, jnp.ones(N, jnp.float32))[0]
    bars = update_backward(residuals, (s_bar, jnp.zeros_like(v)))
    first, *phases = model.LAST
    weights, state = model.weights(tree.fused, i, True), {"s": [s], "v": rows(v)}
    state |= first(atoms.Atoms(F), config, weights, state, [zero] * 4)
    state = run(phases, config, weights, state)
    np.testing.assert_allclose(state["energy"].x + tree.fused["read"]["offset"][0], energies, atol=1e-5)
    np.testing.assert_allclose(state["s_bar"][0], bars[0], atol=3e-5)
    close(state["v_bar"], bars[1])


def test_gate_of_painn() -> None:
    config, tree = prepared(PAINN)
    gate, s, v = dense_layers(tree.plain["interaction_1"]["gate"]), normal(N, F), normal(N, 3, F)

    def plain(s: Any, v: Any) -> Any:
        xs, xu, xv = jnp.split(mlp_fwd(s, gate)[0], 3, axis=1)
        return xs, xu, *(xv * x for x in rows(v))

    expected, pullback = jax.vjp(plain, s, v)
    on, weights = atoms.Atoms(F), painn.weights(tree.fused, 0, False)
    state = {"s": [s], "v": rows(v), "z_gate": on.inward([s], weights.gate["C"])}
    state |= painn.gate(on, config, weights, state)
    for a, e in zip([*state["xs"], *state["xu"], *state["y"]], expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)
    bars, zero = [normal(N, F, seed=k) for k in range(1, 6)], jnp.zeros((N, F), jnp.float32)
    state |= {"s_bar": [zero], "v_bar": [zero] * 3, "uv": [zero] * 3, "vv": [zero] * 3}
    state |= painn.gate_bwd(on, config, weights, state, bars)
    state |= painn.update_hidden_bwd(on, config, weights, state)
    expected_s, expected_v = pullback(tuple(bars))
    np.testing.assert_allclose(state["s_bar"][0], expected_s, atol=1e-5)
    close(state["v_bar"], expected_v)


def test_update_of_student() -> None:
    """Values and cotangents; an atom without a vector."""
    config, tree = prepared(STUDENT)
    s, v = normal(N, F), normal(N, 3, F).at[0].set(0)
    plain = tree.plain["interaction_0"]["update"]
    layers = dense_layers({k: plain[k] for k in ("dense_0", "dense_1")})
    expected, residuals = update_fwd(s, v, layers, plain["mixing_matrix"])
    on, weights = atoms.Atoms(F), student.weights(tree.fused, 0, False)
    zero = jnp.zeros((N, F), jnp.float32)
    state = {"s": [s], "v": rows(v)}
    state |= student.message_heard(on, config, weights, state, [zero] * 4)
    state |= student.update(on, config, weights, state)
    np.testing.assert_allclose(state["s"][0], expected[0], atol=1e-5)
    close(state["v"], expected[1])
    s_bar, v_bar = normal(N, F, seed=1), normal(N, 3, F, seed=1)
    state |= {"s_bar": [s_bar], "v_bar": rows(v_bar)}
    state |= student.hidden_bwd(on, config, weights, state, [zero] * 4)
    state |= student.update_bwd(on, config, weights, state)
    bars = update_bwd(residuals, (s_bar, v_bar))
    np.testing.assert_allclose(state["s_bar"][0], bars[0], atol=2e-5)
    close(state["v_bar"], bars[1])


@pytest.mark.parametrize("sizes", [(F, 1), (F, 8, 1), (F, 16, 8, 1)])
def test_readout(sizes: tuple[int, ...]) -> None:
    """Any number of hidden layers; programs want one at least."""
    layers = tuple((normal(a, b) / a**0.5, normal(b)) for a, b in pairwise(sizes))
    s, on = normal(N, F), atoms.Atoms(F)
    expected, residuals = readout_fwd(s, layers)
    read = atoms.prepare_readout(layers)
    energy, slopes = atoms.read_on(on, read, atoms.read_in(on, read, s))
    np.testing.assert_allclose(energy.x + read["offset"][0], expected, atol=1e-5)
    np.testing.assert_allclose(slopes, readout_bwd(residuals, jnp.ones(N, jnp.float32))[0], atol=1e-5)
    assert fits({"read": read}, F) == (len(sizes) > 2)


@pytest.mark.parametrize(
    ("config", "parts"), [(STUDENT, 1), (STUDENT, 2), (PAINN, 2)], ids=["student-1", "student-2", "painn-2"]
)
def test_programs_against_arrays(config: Any, parts: int) -> None:
    """Energies and gradients with unequal weights of the atoms; an isolated atom; at least 16 channels a program."""
    config, tree = prepared(config, 16 * parts)
    assert fits(tree.fused, 16 * parts)
    numbers, positions = random_structure(3)
    positions[0] += 50.0
    vectors, pairs = pairs_in_layout(positions, config.cutoff, "all")

    def run(launch: Launch, vectors: Any) -> Any:
        e, kept = chain.forward(tree.fused, config, numbers, vectors, pairs, launch)
        w = 1 + jnp.arange(3, dtype=e.dtype)
        return e, chain.backward(tree.fused, config, kept, numbers, vectors, pairs, w, launch)

    programs, arrays = (
        jax.jit(run, static_argnums=0)(Launch(16, 4, 2 * count, PROGRAMS), jnp.asarray(vectors, jnp.float32))
        for count in (parts, 0)
    )
    for a, e in zip(programs, arrays, strict=True):
        np.testing.assert_allclose(a, e, atol=3e-5 * max(1, np.abs(e).max()))
    assert np.abs(arrays[1]).max() > 1e-3


@pytest.mark.parametrize("hidden_dim", [32, 48])
@pytest.mark.parametrize("config", [STUDENT, PAINN], ids=["student", "painn"])
def test_kernels_lower_for_cuda(config: Any, hidden_dim: int) -> None:
    """A kernel for each phase; a width that is no power of 2 keeps message kernels alone."""
    config, tree = prepared(config, hidden_dim)
    assert fits(tree.fused, hidden_dim) == (hidden_dim == 32)
    numbers, positions = random_structure(5)
    vectors, pairs = pairs_in_layout(positions, config.cutoff, "all")

    def both(vectors: Any) -> Any:
        launch = Launch(16, 4, 2, "triton")
        e, kept = chain.forward(tree.fused, config, numbers, vectors, pairs, launch)
        return e, chain.backward(tree.fused, config, kept, numbers, vectors, pairs, jnp.ones_like(e), launch)

    traced = jax.jit(both).trace(jnp.asarray(vectors, jnp.float32))
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # JAX 0.12 asks the GPU what it can do
        pytest.skip(f"this JAX lowers for a GPU only where one is: {error}")
    model, last = chain._MODELS[config.architecture], config.num_interactions - 1
    phases = last * (len(model.PLAN.between) + len(model.PLAN.between_bwd)) + len(model.LAST) + 1
    taken = {"student": 6, "painn": 16}[config.architecture]  # arrays in the memory of others that die
    assert text.count("output_operand_alias<") == (taken if hidden_dim == 32 else 0)
    assert text.count("custom_call") >= (phases if hidden_dim == 32 else 2 * config.num_interactions)
