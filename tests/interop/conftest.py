"""Small random models of both architectures."""

from collections.abc import Iterator
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxff.config import PainnConfig, StudentConfig
from jaxff.interop import jax_md as adapter  # before jax_md itself: it imports that without strict promotion
from jaxff.models import init_params
from jaxff.potential import Potential

partition = adapter.partition
CUTOFF = 3.0  # Å, so that small periodic boxes are allowed
BOX = 7.0  # Å, above 2 CUTOFF
# every architecture and every format once; the product is tested where it is cheap
PAIRED = pytest.mark.parametrize(
    ("potential", "fmt"),
    [("student", partition.Sparse), ("painn", partition.Dense), ("painn", partition.OrderedSparse)],
    indirect=["potential"],
    ids=["student-sparse", "painn-dense", "painn-ordered"],
)
CONFIGS = {
    "student": StudentConfig(hidden_dim=16, num_interactions=2, num_rbf=8, cutoff=CUTOFF, max_z=20),
    "painn": PainnConfig(hidden_dim=16, num_interactions=2, num_rbf=8, cutoff=CUTOFF, max_z=20),
}


@cache
def random_potential(architecture: str, dtype: str = "float64") -> Potential:
    """Every parameter is random, biases and mixing matrices too: the student's jump at the cutoff is there."""
    config = CONFIGS[architecture]
    leaves, tree = jax.tree.flatten(init_params(config, jax.random.key(7)))
    rng = np.random.default_rng(7)
    leaves = [np.asarray(x, np.float64) + 0.1 * rng.standard_normal(x.shape) for x in leaves]
    return Potential(jax.tree.unflatten(tree, leaves), config, dtype=dtype)


@pytest.fixture(scope="session", params=["student", "painn"])
def potential(request: pytest.FixtureRequest) -> Potential:
    return random_potential(request.param)


@pytest.fixture(scope="module", autouse=True)
def quickly(compile_quickly: None) -> None:
    """Energies of small systems take longer to compile than to run."""


@pytest.fixture
def lenient_promotion() -> Iterator[None]:
    """jax-md mixes dtypes freely; jaxff doesn't."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def random_atoms(n: int, box: float, seed: int = 0, closest: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Atomic numbers [n] and positions [n, 3] in a cube, no two closer than `closest` Å, walls included."""
    rng = np.random.default_rng(seed)
    numbers = rng.choice([1, 6, 7, 8], n)
    positions = [rng.uniform(0.0, box, 3)]
    while len(positions) < n:
        trial = rng.uniform(0.0, box, 3)
        separation = np.array(positions) - trial
        separation -= box * np.round(separation / box)
        if np.linalg.norm(separation, axis=1).min() > closest:
            positions.append(trial)
    return numbers, np.array(positions)


def with_list(potential, numbers, positions, displacement, box, **options):
    """(energy_fn(R), list) with a list made for `positions`."""
    neighbor_fn, energy_fn = adapter.energy_neighbor_list(displacement, box, potential, numbers, **options)
    neighbor = neighbor_fn.allocate(jnp.asarray(positions))
    return jax.jit(lambda R, **kwargs: energy_fn(R, neighbor=neighbor, **kwargs)), neighbor
