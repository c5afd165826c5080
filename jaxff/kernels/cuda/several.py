"""Energies of several small molecules, and gradients by their positions, by one kernel, several.cu; PaiNN's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels.cuda import launch
from jaxff.kernels.cuda.engine import multiprocessors
from jaxff.kernels.cuda.matrices import by_columns, halves
from jaxff.models.parameters import Params

Config = StudentConfig | PainnConfig
CHANNELS, THREADS = 16, 512  # of a block
CHUNK, RING = 512, 4  # words of 16 bytes of a matrix that come at once, and how many such are on their way
MOST_ATOMS = 24  # of a molecule
ROWS, LATER = 16, 5  # that a block keeps of each layer, and those that the first does without
SENT = 7  # rows that messages read


def prepare(tree: Params, config: Config) -> dict[str, Any] | None:
    """Weights as the kernel takes them (NumPy), or None if the model doesn't fit it.

    tree: as jaxff.kernels.chain.prepare makes it, with what jaxff.kernels.cuda.one takes.
    """
    if not isinstance(config, PainnConfig) or tree.get("one", {}).get("larger") is None:
        return None
    if len(tree["read"]["hidden"]) != 1:
        return None
    f, scales = config.hidden_dim, tree["one"]["larger"]["constants"][0, -config.num_interactions - 2 :]
    blocks = [list(_matrices(tree, config, c)) for c in range(f // CHANNELS)]
    made: list[list[Any]] = [[] for _ in blocks]
    factors = []
    for stage in zip(*blocks, strict=True):
        largest = max(float(np.max(np.abs(matrix))) for _, matrix in stage)
        for words, (order, matrix) in zip(made, stage, strict=True):
            ordered, factor = order(matrix, largest)
            words.append(np.pad(ordered, ((0, -len(ordered) % CHUNK), (0, 0))))
        factors.append(factor)
    constants = [np.concatenate([*_constants(tree, config, c), scales, factors, np.zeros(2)]) for c in range(len(made))]
    return {
        "matrices": np.stack([np.concatenate(words) for words in made]),
        "constants": np.stack(constants).astype(np.float32),
    }


def serves(tree: Params, config: Config, num_atoms: int, molecules: int) -> bool:
    """Whether the kernel, for which the tree is prepared, takes so many molecules of so many atoms on this GPU."""
    if "several" not in tree or not 2 <= num_atoms <= MOST_ATOMS or not launch.can_run_together():
        return False
    return molecules <= _room(config) and _shared(tree, config, num_atoms, True) <= launch.most_shared()


def _room(config: Config) -> int:
    """Molecules that find room at once."""
    return multiprocessors() // (config.hidden_dim // CHANNELS)


def energies_and_gradients(
    tree: Params,
    config: Config,
    numbers: Int[Array, "B N"],
    positions: Float[Array, "B N 3"],
    mask: Bool[Array, "B E"],
    gradients: bool,
) -> tuple[Float[Array, "B N"], Float[Array, "B N 3"] | None]:
    """Energies without what elements add, and if wanted gradients of their sum by the positions (Å).

    mask: which of each molecule's pairs e = (receiver e // N, sender e % N) are to count, if within the cutoff.
    """
    molecules, n = numbers.shape
    one, several, of_molecule = tree["one"], tree["several"], config.hidden_dim // CHANNELS
    shared = max(_shared(tree, config, n, gradients), launch.most_shared() // 2 + 1024)  # one block a multiprocessor
    kernel = _kernel(config, n, _hidden(tree), _functions(tree), _room(config) * of_molecule, shared, gradients)
    filters, constants = (one["larger"]["table"], one["larger"]["weights"]), several["constants"]
    arrays = (*filters, constants, numbers.astype(jnp.int32), one["elements"], several["matrices"], positions, mask)
    results = (molecules, n), *([(molecules, n, 3)] if gradients else [])
    blocks = max(molecules * of_molecule, multiprocessors() // 2 + 1)
    made = launch.call(kernel, arrays, (molecules, several["matrices"].shape[1]), results, blocks)
    return made[0], made[1] if gradients else None


def _hidden(tree: Params) -> int:
    return int(tree["read"]["hidden"][0][0].shape[1])


def _functions(tree: Params) -> int:
    return int(tree["one"]["larger"]["table"].shape[1])


@functools.cache
def _kernel(config: Config, n: int, hidden: int, functions: int, room: int, shared: int, back: bool) -> launch.Kernel:
    defines = (
        *(
            ("N", n),
            ("LAYERS", config.num_interactions),
            ("F", config.hidden_dim),
            ("H", hidden),
            ("FUNCTIONS", functions),
        ),
        *(("BLOCKS", room), ("BACK", int(back))),
    )
    return launch.Kernel("several", launch.read("device.cu", "several.cu"), defines, THREADS, shared, together=True)


def _shared(tree: Params, config: Config, n: int, back: bool) -> int:
    """Bytes of shared memory, as several.cu lays it out."""
    f, layers, h, functions = config.hidden_dim, config.num_interactions, _hidden(tree), _functions(tree)
    p, tiles = f // CHANNELS, n * (n - 1) // 2 // 16 + 1
    full = (functions + 7) // 16
    of_tile = 64 * full + 32 * (functions > 16 * full)
    scalars, vectors = -(-n // 16), -(-3 * n // 16)
    gathered = 8 * max(vectors * (8 * p + 4), scalars * (8 * (h // 16) + 4))
    scattered = 2 * 16 * max(scalars * (8 * 3 + 4), vectors * (8 * 2 + 4))
    parts = (2 * vectors, 4), (2 * scalars, 6), ((1 if h > 64 else 2) * scalars, h // 8)
    more = (2 if p < 4 else 4) * scalars, 4
    made = max(16 * rows * (8 * columns + 8) for rows, columns in (*parts, more))
    made = max(made, 16 * (1 if h < 32 else 2) * scalars * 24 + scattered)
    heard = 2 * (4 + back) * n * CHANNELS
    region = max(max(3 * 16 * tiles * CHANNELS, 4 * gathered + scattered) + heard, 4 * gathered + made + scattered)
    constants = layers * 8 * CHANNELS + 2 * h + 3 + layers + 2 + 10 * layers
    rows = layers * ROWS - LATER + (SENT if back else 3)
    return 4 * (
        4 * of_tile * (tiles * (1 + back) + 3 * layers - 1)
        + region
        + 4 * 16 * tiles * (1 + back)
        + rows * n * CHANNELS
        + 4 * RING * CHUNK
        + 4 * ((RING + 1) // 2 + 1)
        + 3 * n
        + constants
        + 8 * tiles
        + 12 * -(-n // 3) * -(-n // 8)
    )


def _columns(matrix: Float[np.ndarray, "K C"], largest: float) -> tuple[UInt32[np.ndarray, "R 4"], float]:
    """By steps of 8 columns and 16 rows."""
    ordered, factor = by_columns(matrix, largest)
    return ordered.reshape(-1, 4), factor


def _rows(matrix: Float[np.ndarray, "K F"], largest: float) -> tuple[UInt32[np.ndarray, "R 4"], float]:
    """By 16 rows, then blocks' columns."""
    ordered, factor = halves(matrix, largest)
    return ordered.swapaxes(0, 1).reshape(-1, 4), factor


Order = Callable[[Float[np.ndarray, "K C"], float], tuple[UInt32[np.ndarray, "..."], float]]


def _matrices(tree: Params, config: PainnConfig, c: int) -> Iterator[tuple[Order, Float[np.ndarray, "K C"]]]:
    """Of block c, in the order of several.cu's stages: columns of what is gathered, or rows of what is scattered."""
    last, f = config.num_interactions - 1, config.hidden_dim

    def columns(*parts: Float[np.ndarray, "K C"]) -> tuple[Order, Float[np.ndarray, "K C"]]:
        return _columns, np.concatenate([_own(matrix, f, c) for matrix in parts], axis=1)

    def rows(*parts: Float[np.ndarray, "K F"]) -> tuple[Order, Float[np.ndarray, "K F"]]:
        return _rows, np.concatenate([_own(matrix.T, f, c).T for matrix in parts])

    updates = [tree[f"interaction_{i}"]["update"] for i in range(last + 1)]
    gates = [None, *(tree[f"interaction_{i}"]["gate"] for i in range(1, last + 1))]
    read = tree["read"]["hidden"][0][0]
    for i, update in enumerate(updates):
        yield columns(update["U"], update["V"])
        yield rows(update["A"])
        yield columns(_padded(update["B"], f))
        if i < last:
            yield rows(gates[i + 1]["C"])
            yield columns(gates[i + 1]["D"])
    yield _columns, read  # each block has all of it
    yield columns(read.T)
    for i in reversed(range(last + 1)):
        yield rows(_padded(updates[i]["B"], f).T)
        yield columns(updates[i]["A"].T)
        yield rows(updates[i]["U"].T, updates[i]["V"].T)
        if i > 0:
            yield rows(gates[i]["D"].T)
            yield rows(gates[i]["C"].T)


def _constants(tree: Params, config: PainnConfig, c: int) -> Iterator[Float[np.ndarray, "K"]]:
    """Biases of block c's channels by layers, all of the readout's; and of space."""
    f, nothing = config.hidden_dim, {"c": np.zeros((1, config.hidden_dim)), "d": np.zeros((1, 3 * config.hidden_dim))}
    for i in range(config.num_interactions):
        layer = tree[f"interaction_{i}"]
        update, gate = layer["update"], layer.get("gate", nothing)
        for bias in (update["a"], _padded(update["b"], f), gate["c"], gate["d"]):
            yield _own(bias, f, c).ravel()
    yield tree["read"]["hidden"][0][2][0]
    yield tree["read"]["final"][0]
    yield np.array([config.vector_norm_epsilon, config.cutoff, tree["interaction_0"]["table"].shape[0]])


def _padded(b: Float[np.ndarray, "K C"], f: int) -> Float[np.ndarray, "K 3F"]:
    """0 where no energy depends on it."""
    return np.pad(b, ((0, 0), (0, 3 * f - b.shape[1])))


def _own(matrix: Float[np.ndarray, "K C"], f: int, c: int) -> Float[np.ndarray, "K M"]:
    """Columns of block c's channels of each F."""
    own = matrix.reshape(len(matrix), -1, f)[..., c * CHANNELS : (c + 1) * CHANNELS]
    return own.reshape(len(matrix), -1)
