"""A small potential that molecules can live on: PaiNN with random weights, made gentle."""

from collections.abc import Callable

import jax
import pytest

from jaxff.config import PainnConfig
from jaxff.models import init_params
from jaxff.potential import Potential

MakePotential = Callable[[str], Potential]


@pytest.fixture(scope="session")
def painn() -> MakePotential:
    """dtype -> the potential; weights are scaled so that 300 K at 0.5 fs is well integrated."""
    config = PainnConfig(hidden_dim=8, num_interactions=1, num_rbf=8, repulsion="zbl")
    params = jax.tree.map(lambda x: 0.8 * x, init_params(config, jax.random.PRNGKey(0)))
    return lambda dtype: Potential(params, config, dtype=dtype)
