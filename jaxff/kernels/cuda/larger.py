"""What larger.cu takes besides one.py: one molecule of more atoms, three or four of them a group."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt32

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels.cuda.filters import few_functions
from jaxff.kernels.cuda.matrices import halves, power_of_two

Config = StudentConfig | PainnConfig
CHANNELS = 16  # as one.py
LISTENERS = 256  # more threads, which sum messages
MOST_ATOMS, OF_GROUP = 64, 4  # of a molecule, and of a group
FUNCTIONS = range(4, 65, 4)  # of which filters may be sums
FEWEST_CHUNKS = {"student": 3, "painn": 4}  # that are taken before more are asked for


def words(config: Config, readout: tuple[int, ...], functions: int, atoms: int, num_atoms: int) -> int:
    """Of shared memory, as larger.cu lays it out, without matrices on their way."""
    painn, layers, f, c = config.architecture == "painn", config.num_interactions, config.hidden_dim, CHANNELS
    senders, steps, kinds = -(-num_atoms // 16) * 16, -(-functions // 16), 3 * layers - 1
    pairs, rows = atoms * senders, 14 if painn else 9
    constants = layers * ((1 + painn) * (f + 3 * c) + 10) + sum(readout) + readout[-1] + 6
    products = 8 if readout[1:] and readout[0] > 96 else 6
    return (
        4 * ((2 * atoms if painn else 1) * f + 3 * c + pairs)
        + 4 * 32 * steps * (pairs // 16 * 4 + kinds * 2)
        + 8
        + (4 + painn) * 2 * (c // 2 * senders + 16)
        + ((layers * rows + 4) * c + layers * (1 + painn) * f + (products + 4 + painn) * c) * atoms
        + constants
        + atoms
        + pairs // 2
    )


def filters(
    tables: list[Float[np.ndarray, "T 4 C"]], f: int
) -> tuple[Float[np.ndarray, "T K 4"], UInt32[np.ndarray, "P R 32 4"], Float[np.ndarray, "L+2"]] | None:
    """W(t) = Σ_k B_k(t) C_k of all layers: cubics of the fewest B, C of each block's channels, what undoes scales.

    None if those are too many.
    """
    heights = [float(np.max(np.abs(table[:, 0]))) or 1.0 for table in tables]
    joined = np.concatenate([table / height for table, height in zip(tables, heights, strict=True)], axis=2)
    few = few_functions(joined, FUNCTIONS, 256)
    if few is None:
        return None
    basis, weights = few
    weights = np.pad(weights, ((0, -len(weights) % 16), (0, 0)))
    lane, tile, place = np.arange(8), np.arange(2)[:, None], np.arange(16)
    function = 4 * (place % 2 + 2 * (place // 8)) + place % 8 // 2  # as larger.cu's lanes have them
    channel = np.empty(16, int)
    channel[4 * (lane // 2) + 2 * tile + lane % 2] = 8 * tile + lane  # not as matrices.halves has them
    matrices, factors = [], []
    for own in np.split(weights, np.cumsum([table.shape[2] for table in tables])[:-1], axis=1):
        ordered = own.reshape(-1, 16, own.shape[1] // 16, 16)[:, function][..., channel].reshape(own.shape)
        matrix, factor = halves(ordered)  # [kinds P, K / 16, 2, 32, 4]
        matrices.append(matrix.reshape(-1, f // CHANNELS, *matrix.shape[1:]))
        factors.append(factor)
    slope = power_of_two(float(np.max(np.abs(basis[:, 1]))), 64.0)
    scales = [*(factor * height for factor, height in zip(factors, heights, strict=True)), slope, 1 / slope]
    of_blocks = np.concatenate(matrices).swapaxes(0, 1)
    return (
        np.ascontiguousarray(basis.transpose(0, 2, 1), np.float32),
        np.ascontiguousarray(of_blocks).reshape(f // CHANNELS, -1, 32, 4),
        np.asarray(scales),
    )
