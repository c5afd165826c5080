"""Element references: exact on exact data, the smallest answer where there are many, zero for what isn't there."""

import numpy as np
import pytest

from jaxff.errors import DataError
from jaxff.train.frames import Frame, Frames
from jaxff.train.references import fit_references

TRUE = {1: -10.7, 6: -1030.5, 8: -2041.25, 17: -12520.0}


def compounds(*compositions: list[int]) -> Frames:
    return Frames.of(
        [
            Frame(np.array(z), np.zeros((len(z), 3)), sum(TRUE[k] for k in z), np.zeros((len(z), 3)), "")
            for z in compositions
        ]
    )


def test_exact_data_give_exact_references() -> None:
    rng = np.random.default_rng(0)
    frames = compounds(*(rng.choice(list(TRUE), rng.integers(1, 20)).tolist() for _ in range(50)))
    references = fit_references(frames, max_z=20)
    assert references.shape == (21,)
    assert references.dtype == np.float64
    expected = np.zeros(21)
    expected[list(TRUE)] = list(TRUE.values())
    np.testing.assert_allclose(references, expected, atol=1e-8)


def test_least_squares_with_noise() -> None:
    """Against the normal equations."""
    rng = np.random.default_rng(1)
    frames = compounds(*(rng.choice([1, 6, 8], 10).tolist() for _ in range(200)))
    frames.energies[:] += rng.normal(0.0, 1.0, 200)
    counts = np.array([[np.sum(frame.numbers == z) for z in (1, 6, 8)] for frame in frames], dtype=float)
    expected = np.linalg.solve(counts.T @ counts, counts.T @ frames.energies)
    np.testing.assert_allclose(fit_references(frames, 8)[[1, 6, 8]], expected, rtol=1e-10)


def test_one_composition_has_the_smallest_references() -> None:
    frames = compounds([8, 1, 1], [8, 1, 1])
    references = fit_references(frames, 8)
    energy = 2 * TRUE[1] + TRUE[8]
    np.testing.assert_allclose(references[[1, 8]], energy * np.array([2.0, 1.0]) / 5.0, rtol=1e-12)
    assert 2 * references[1] + references[8] == pytest.approx(energy, rel=1e-12)
    assert not references[[0, 2, 3, 4, 5, 6, 7]].any()


def test_ridge_pulls_towards_zero() -> None:
    frames = compounds([1], [1])
    assert fit_references(frames, 1, ridge=2.0)[1] == pytest.approx(TRUE[1] / 2.0)


def test_refuses() -> None:
    with pytest.raises(DataError, match="received none"):
        fit_references(Frames.join([]), 10)
    with pytest.raises(DataError, match=r"1\.\.max_z = 8, received 1\.\.17"):
        fit_references(compounds([17, 1]), 8)
    with pytest.raises(DataError, match="ridge"):
        fit_references(compounds([1]), 8, ridge=-1.0)
