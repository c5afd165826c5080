"""The message kernels, the GPU's interpreted and the CPU's compiled, against plain sums and their autodiff."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff import kernels
from jaxff.kernels.message import Geometry, Launch, Lengths, Sources, first_transpose, message, message_transpose, whole
from tests.kernels import GPU, PROGRAMS

N, F, T = 6, 16, 9


def random_case(has_b: bool, has_y: bool) -> tuple[Sources, Any, Geometry]:
    """Sources, table and a symmetric geometry of N² pairs, some of them masked."""
    rng = np.random.default_rng(0)

    def symmetric(x: np.ndarray) -> np.ndarray:
        return np.tril(x) + np.tril(x, -1).T

    def normal(*shape: int) -> Any:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    mask = symmetric(np.tril(rng.random((N, N)) < 0.7, -1))
    u = rng.normal(size=(N, N, 3))
    intervals = symmetric(rng.integers(0, T, (N, N)))
    places = [symmetric(rng.random((N, N))), mask, *np.moveaxis(u - u.swapaxes(0, 1), 2, 0), intervals]
    geometry = Geometry(
        jnp.asarray(np.tile(np.arange(N), N), jnp.int32), jnp.asarray(np.stack(places).reshape(6, -1), jnp.float32)
    )
    sources = Sources(normal(N, F), normal(N, F) if has_b else None, normal(N, 3 * F) if has_y else None)
    return sources, normal(T, 4, (2 + has_y) * F), geometry


def plain_message(sources: Sources, table: Any, geometry: Geometry, t: Any, u: Any) -> tuple[Any, Any]:
    """The equation in jaxff.kernels.message, in dense sums."""
    c = jnp.moveaxis(table[geometry.places[5].astype(int)], 1, 0)
    t = t[:, None]
    w = (c[0] + t * c[1] + t**2 * c[2] + t**3 * c[3]) * geometry.places[1][:, None]
    wa, wb, *wc = jnp.split(w.reshape(N, N, -1), table.shape[2] // F, axis=2)
    if sources.b is not None:
        wb = wb * sources.b[None]
    ds = jnp.einsum("ijf,jf->if", wa, sources.a, precision="highest")
    dv = jnp.einsum("ijc,ijf->icf", u.reshape(N, N, 3), wb, precision="highest")
    if sources.y is not None:
        dv = dv + jnp.einsum("ijf,jcf->icf", wc[0], sources.y.reshape(N, 3, F), precision="highest")
    return ds, dv.reshape(N, 3 * F)


NATIVE = Launch(16, slots=4, parts=0, route="native")
LAUNCHES = [*([] if GPU else [NATIVE]), *(Launch(block, slots=4, parts=0, route=PROGRAMS) for block in (8, 16))]
on_a_cpu = pytest.mark.skipif(GPU, reason="Numba's kernels run on a CPU")


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: f"{launch.route}-{launch.block}")
@pytest.mark.parametrize("has_y", [False, True])
@pytest.mark.parametrize("has_b", [False, True])
def test_kernels_against_plain_sums(has_b: bool, has_y: bool, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.message, "SOME_ATOMS", 0)  # or the launch would be another one
    sources, table, geometry = random_case(has_b, has_y)
    t, u = geometry.places[0], geometry.places[2:5].T
    expected, pullback = jax.vjp(lambda s, t, u: plain_message(s, table, geometry, t, u), sources, t, u)
    actual = message(sources, table, geometry, launch)
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)
    rng = np.random.default_rng(1)
    cotangents = tuple(jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in expected)
    sources_bar, t_bar, u_bar = pullback(cotangents)
    bars, pair_bars = message_transpose(sources, cotangents, table, geometry, launch)
    for a, e in zip(jax.tree.leaves(bars), jax.tree.leaves(sources_bar), strict=True):
        np.testing.assert_allclose(a, e, atol=2e-5)
    t_bar, u_bar = t_bar.reshape(N, N), u_bar.reshape(N, N, 3)
    mask = np.asarray(geometry.places[1], bool)
    halves_of_pairs = [pair_bars]
    if not has_y:
        halves_of_pairs.append(first_transpose(sources, cotangents, table, geometry, launch))
    for halves in halves_of_pairs:
        for dense in (True, False):
            bars = whole([halves], geometry, N, launch._replace(dense=dense), Lengths(1.0, 0.0))
            np.testing.assert_allclose(bars[0][mask], (t_bar + t_bar.T).reshape(-1)[mask], atol=1e-4)
            np.testing.assert_allclose(bars[1:].T[mask], (u_bar - u_bar.swapaxes(0, 1)).reshape(-1, 3)[mask], atol=1e-4)


@on_a_cpu
@pytest.mark.parametrize("has_b", [False, True])
def test_native_in_slots(has_b: bool) -> None:
    """A list with places in another order, free ones too, gives what all pairs give."""
    sources, table, geometry = random_case(has_b, True)
    slots, order = N + 3, np.random.default_rng(2).permutation(N)
    places, senders = np.zeros((6, N, slots), np.float32), np.zeros((N, slots), np.int32)
    places[:, :, 1 : N + 1] = np.asarray(geometry.places).reshape(6, N, N)[:, :, order]
    senders[:, 1 : N + 1] = np.asarray(geometry.senders).reshape(N, N)[:, order]
    listed = Geometry(jnp.asarray(senders.reshape(-1)), jnp.asarray(places.reshape(6, -1)))
    sums, expected = (message(sources, table, g, NATIVE) for g in (listed, geometry))
    plain = plain_message(sources, table, geometry, geometry.places[0], geometry.places[2:5].T)
    for a, e, p in zip(sums, expected, plain, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5)
        np.testing.assert_allclose(a, p, atol=1e-5)
    (bars, pair_bars), (bars_all, pair_bars_all) = (
        message_transpose(sources, sums, table, g, NATIVE) for g in (listed, geometry)
    )
    for a, e in zip(jax.tree.leaves(bars), jax.tree.leaves(bars_all), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-4)
    back = np.asarray(pair_bars).reshape(4, N, slots)[:, :, 1 : N + 1][:, :, np.argsort(order)]
    np.testing.assert_allclose(back.reshape(4, -1), pair_bars_all, atol=1e-4)


@on_a_cpu
def test_native_under_vmap() -> None:
    """Batches, batches of batches, and batches of tables give what each system gives."""
    sources, table, geometry = random_case(True, True)
    scale = jnp.asarray([[0.5, 1.0, 2.0], [3.0, -1.0, 0.0]], jnp.float32)

    def both(scale: Any, table: Any) -> Any:
        scaled = jax.tree.map(lambda x: scale * x, sources)
        sums = message(scaled, table, geometry, NATIVE)
        return sums, message_transpose(scaled, sums, table, geometry, NATIVE)

    tables = jnp.stack([table, 2 * table])
    batches = {
        "twice": (jax.vmap(jax.vmap(both, (0, None)), (0, None))(scale, table), lambda i, j: table),
        "tables": (jax.vmap(jax.vmap(both, (0, None)))(scale, tables), lambda i, j: tables[i]),
    }
    for name, (batch, table_of) in batches.items():
        for i, j in np.ndindex(2, 3):
            one = both(scale[i, j], table_of(i, j))
            for a, e in zip(jax.tree.leaves(batch), jax.tree.leaves(one), strict=True):
                np.testing.assert_allclose(a[i, j], e, rtol=1e-5, atol=1e-4, err_msg=name)


def test_kernels_lower_for_cuda() -> None:
    """Everything that they contain has a Triton form; no GPU is needed to see that."""
    sources, table, geometry = random_case(True, True)

    def both(sources: Sources, table: Any, geometry: Geometry) -> Any:
        launch = Launch(16, slots=4, parts=0, route="triton")
        sums = message(sources, table, geometry, launch)
        return message_transpose(sources, sums, table, geometry, launch)

    traced = jax.jit(both).trace(sources, table, geometry)
    try:
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    except RuntimeError as error:  # JAX 0.12 asks the GPU what it can do
        pytest.skip(f"this JAX lowers for a GPU only where one is: {error}")
    assert text.count("custom_call") >= 2
