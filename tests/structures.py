"""Small random structures and models for tests, all seeded."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxff import models
from jaxff.config import PainnConfig, StudentConfig
from jaxff.neighbors import all_pairs, neighbor_pairs, slot_pairs, slots_needed
from jaxff.system import Pairs

STUDENT = StudentConfig(hidden_dim=8, num_interactions=2, num_rbf=5, cutoff=3.0, max_z=20)
PAINN = PainnConfig(hidden_dim=8, num_interactions=2, num_rbf=5, cutoff=3.0, max_z=20)
ZBL = PAINN.model_copy(update={"repulsion": "zbl"})
CONFIGS = {"student": STUDENT, "painn": PAINN, "painn+zbl": ZBL}
LAYOUTS = ("all", "slots", "edges")


def random_params(config: StudentConfig | PainnConfig, seed: int = 0, dtype: Any = jnp.float64) -> Any:
    """Parameters without zeros or symmetry: initial values plus noise."""
    params = models.init_params(config, jax.random.key(seed), jnp.float64)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), dtype), params)


def random_structure(num_atoms: int, seed: int = 0, closest: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """Numbers [N] of H, C, N, O, S and positions [N, 3] Å, no two closer than `closest`."""
    rng = np.random.default_rng(seed)
    side = 1.6 * num_atoms ** (1 / 3)
    positions: list[np.ndarray] = []
    while len(positions) < num_atoms:
        trial = rng.uniform(0, side, 3)
        if all(np.linalg.norm(trial - r) > closest for r in positions):
            positions.append(trial)
    return rng.choice([1, 6, 7, 8, 16], num_atoms).astype(np.int32), np.array(positions)


def pairs_in_layout(positions: np.ndarray, cutoff: float, layout: str, padding: int = 0) -> tuple[Any, Pairs]:
    """Pair vectors and pairs of a structure in a layout, with padding atoms and pairs."""
    padded = len(positions) + padding
    if layout == "all":
        return all_pairs(positions, cutoff, padded)
    senders, receivers = neighbor_pairs(positions, cutoff)
    if layout == "slots":
        slots = slots_needed(receivers, len(positions)) + padding
        return slot_pairs(positions, senders, receivers, padded, slots)
    shuffled = np.random.default_rng(0).permutation(len(senders))
    senders, receivers = (np.append(x[shuffled], [0] * padding) for x in (senders, receivers))
    mask = np.arange(len(senders)) < len(senders) - padding
    vectors = np.where(mask[:, None], positions[senders] - positions[receivers], 0)
    return vectors, Pairs(senders, receivers, mask, padded, layout="edges")
