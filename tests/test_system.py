"""Pairs: the three layouts gather and sum alike."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.structures import LAYOUTS, pairs_in_layout, random_structure


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_against_loops(layout: str) -> None:
    _, positions = random_structure(6)
    vectors, pairs = pairs_in_layout(positions, 2.5, layout, padding=2)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 2)), rng.normal(size=(len(pairs.mask), 2))
    w[~np.asarray(pairs.mask)] = 0
    received, sent, transposed = (np.zeros((8, 2)) for _ in range(3))
    for e, (j, i, real) in enumerate(zip(pairs.senders, pairs.receivers, pairs.mask, strict=True)):
        received[i] += w[e]
        sent[j] += w[e]
        transposed[j] += w[e] * x[i]
        if real:
            np.testing.assert_allclose(vectors[e], positions[j] - positions[i])
            assert np.linalg.norm(vectors[e]) <= 2.5
    expected = {tuple(p) for p in np.argwhere(distances(positions) <= 2.5) if p[0] != p[1]}
    real = np.asarray(pairs.mask)
    assert set(zip(np.asarray(pairs.senders)[real], np.asarray(pairs.receivers)[real], strict=True)) == expected
    np.testing.assert_allclose(pairs.sum_at_receivers(jnp.asarray(w)), received, atol=1e-14)
    np.testing.assert_allclose(pairs.sum_at_senders(jnp.asarray(w)), sent, atol=1e-14)
    np.testing.assert_array_equal(pairs.at_senders(jnp.asarray(x)), x[np.asarray(pairs.senders)])
    np.testing.assert_array_equal(pairs.at_receivers(jnp.asarray(x)), x[np.asarray(pairs.receivers)])
    general = type(pairs)(pairs.senders, pairs.receivers, pairs.mask, 8, pairs.layout, symmetric=False)
    np.testing.assert_allclose(general.transpose_sum(jnp.asarray(w), jnp.asarray(x)), transposed, atol=1e-14)


def distances(positions: Any) -> Any:
    return np.linalg.norm(positions[:, None] - positions[None], axis=-1)
