"""One molecule's energies and pair gradients in one kernel, one.cu, for both architectures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxff.config import PainnConfig, StudentConfig
from jaxff.kernels.cuda import larger, launch
from jaxff.kernels.cuda.engine import multiprocessors
from jaxff.models.parameters import Params
from jaxff.models.student import EPSILON

Config = StudentConfig | PainnConfig
CHANNELS, THREADS = 16, 256  # of a block
MAKERS = 224  # more threads, which make filters; and 32, of which one asks for matrices
CHUNK, MOST_CHUNKS, FEWEST_CHUNKS = 2, 5, 3  # float4 of each thread's that a copy brings; copies on their way
CHUNK_BYTES = 16 * CHUNK * THREADS + 16  # with two barriers, or room for them
WIDTHS = 16, 32, 64, 128  # channels of a model, and of its readout
LAYERS, MOST_ATOMS = range(2, 16), 2  # whose stages a tag can tell; of a group


def prepare(tree: Params, config: Config) -> dict[str, Any] | None:
    """Weights as the kernel takes them (NumPy), or None if the model doesn't fit it.

    tree: as jaxff.kernels.chain.prepare makes it.
    """
    f = config.hidden_dim
    if f not in WIDTHS[1:] or not _readout(tree) or config.num_interactions not in LAYERS:
        return None
    blocks = range(f // CHANNELS)
    tables = [np.asarray(tree[f"interaction_{i}"]["table"], np.float64) for i in range(config.num_interactions)]
    few = larger.filters(tables, f)
    more = None
    if few is not None:
        table, weights, scales = few
        constants = [np.concatenate([*_constants(tree, config, c, False), scales]) for c in blocks]
        more = {"table": table, "weights": weights, "constants": np.stack(constants).astype(np.float32)}
    return {
        "larger": more,
        "tables": [_table(tree[f"interaction_{i}"]["table"], f) for i in range(config.num_interactions)],
        "forward": np.stack([np.concatenate(list(_forward(tree, config, c))) for c in blocks]),
        "backward": np.stack([np.concatenate(list(_backward(tree, config, c))) for c in blocks]),
        "constants": np.stack([np.concatenate(list(_constants(tree, config, c))) for c in blocks]).astype(np.float32),
        "elements": np.concatenate(
            [*([tree["interaction_0"]["sent"]] if config.architecture == "painn" else []), tree["embedding"]["table"]],
            axis=1,
        ),
    }


def serves(tree: Params, config: Config, num_atoms: int) -> bool:
    """Whether the kernel, for which the tree is prepared, takes so many atoms on this GPU."""
    return launch.can_run_together() and _arranged(config, _readout(tree), _functions(tree), num_atoms) is not None


def _readout(tree: Params) -> tuple[int, ...]:
    """The hidden channels of its layers, if the kernel takes them."""
    widths = tuple(kernel.shape[1] for kernel, *_ in tree["read"]["hidden"])
    fits = 1 <= len(widths) <= 2 and all(width in WIDTHS for width in widths)
    return widths if fits and widths[0] <= tree["read"]["hidden"][0][0].shape[0] else ()


def _functions(tree: Params) -> int:
    """Of which all filters are sums; 0 if those are too many."""
    made = tree["one"]["larger"]
    return 0 if made is None else int(made["table"].shape[1])


class Places(NamedTuple):
    """Of all pairs e = (receiver e // N, sender e % N), as jaxff.kernels.message.Geometry has them."""

    places: Float[Array, "6 E"]


class Positions(NamedTuple):
    """Of a molecule in Å, and which pairs e are to count if they are within the cutoff."""

    positions: Float[Array, "N 3"]
    mask: Bool[Array, "E"]


def energies(tree: Params, config: Config, numbers: Int[Array, "N"], where: Places | Positions) -> Float[Array, "N"]:
    """Energies without what elements add, and without pairs' repulsion."""
    return _run(tree, config, numbers, where, False)[0]


def energies_and_gradients(
    tree: Params, config: Config, numbers: Int[Array, "N"], where: Places | Positions
) -> tuple[Float[Array, "N"], Float[Array, "..."]]:
    """Those, and gradients of their sum.

    By positions, [N, 3]; or of pairs, what i sends to j alone, by groups of channels, [G, 4, E]
    (jaxff.kernels.message.message_transpose).
    """
    made, bars = _run(tree, config, numbers, where, True)
    return made, bars


def _run(tree: Params, config: Config, numbers: Array, where: Places | Positions, back: bool) -> list[Array]:
    one, n, of_positions = tree["one"], len(numbers), isinstance(where, Positions)
    arranged = _arranged(config, _readout(tree), _functions(tree), n)
    assert arranged is not None
    kernel, blocks = arranged
    kernel = kernel._replace(defines=(*kernel.defines, ("BACK", int(back)), ("POSITIONS", int(of_positions))))
    filters, constants = one["tables"], one["constants"]
    if kernel.name == "larger":
        filters, constants = (one["larger"]["table"], one["larger"]["weights"]), one["larger"]["constants"]
    more = constants, numbers.astype(jnp.int32), one["elements"], one["forward"]
    arrays = (*filters, *more, *where, *([one["backward"]] if back else []))
    bars = (n, 3) if of_positions else (config.hidden_dim // CHANNELS, 4, n * n)
    integers = one["forward"].shape[1], *([one["backward"].shape[1]] if back else [])
    return launch.call(kernel, arrays, integers, ((n,), bars) if back else ((n,),), blocks)


@functools.cache
def _arranged(
    config: Config, readout: tuple[int, ...], functions: int, num_atoms: int
) -> tuple[launch.Kernel, int] | None:
    """The kernel with the fewest atoms a group whose blocks run at once, and their number; None if none fits."""
    groups = multiprocessors() // (config.hidden_dim // CHANNELS)
    atoms = -(-num_atoms // groups) if groups else larger.OF_GROUP + 1
    if atoms <= MOST_ATOMS:
        words, fewest = _words(config, readout, atoms, num_atoms), FEWEST_CHUNKS
    elif functions and atoms <= larger.OF_GROUP and num_atoms <= larger.MOST_ATOMS:
        words = larger.words(config, readout, functions, atoms, num_atoms)
        fewest = larger.FEWEST_CHUNKS[config.architecture]
    else:
        return None
    left = launch.most_shared() - 4 * words
    chunks, needed = min(MOST_CHUNKS, left // CHUNK_BYTES), -(-num_atoms // atoms) * config.hidden_dim // CHANNELS
    if chunks < fewest:
        return None
    half = launch.most_shared() // 2 + 1024  # so that a multiprocessor has room for one block
    shared = max(launch.most_shared() - left + chunks * CHUNK_BYTES, half)
    sizes = ("N", num_atoms), ("A", atoms), ("RING", chunks), ("BLOCKS", groups * config.hidden_dim // CHANNELS)
    kernel = _kernel if atoms <= MOST_ATOMS else _larger_kernel
    return kernel(config, readout, functions, sizes, shared), max(needed, multiprocessors() // 2 + 1)


Sizes = tuple[tuple[str, int], ...]


def _kernel(config: Config, readout: tuple[int, ...], functions: int, sizes: Sizes, shared: int) -> launch.Kernel:
    tables = "#define TABLES(x) " + " ".join(f"x({i})" for i in range(config.num_interactions))
    source, defines = launch.read("device.cu", "one.cu"), (*_defines(config, readout), ("MAKERS", MAKERS), *sizes)
    return launch.Kernel("one", f"{tables}\n{source}", defines, THREADS + MAKERS + 32, shared, together=True)


def _larger_kernel(
    config: Config, readout: tuple[int, ...], functions: int, sizes: Sizes, shared: int
) -> launch.Kernel:
    source = launch.read("device.cu", "larger.cu")
    defines = *_defines(config, readout), ("FUNCTIONS", functions), *sizes
    return launch.Kernel("larger", source, defines, THREADS + larger.LISTENERS, shared, together=True)


def _defines(config: Config, readout: tuple[int, ...]) -> Sizes:
    return (
        *(("PAINN", int(config.architecture == "painn")), ("LAYERS", config.num_interactions)),
        *(("F", config.hidden_dim), ("H", readout[0]), ("H2", sum(readout[1:]))),
    )


def _words(config: Config, readout: tuple[int, ...], atoms: int, num_atoms: int) -> int:
    """Of shared memory, as one.cu lays it out, without matrices on their way."""
    painn, layers, f, c = config.architecture == "painn", config.num_interactions, config.hidden_dim, CHANNELS
    pairs = atoms * num_atoms
    rows = 14 if painn else 9
    constants = layers * (2 * f + 6 * c + 9) + sum(readout) + readout[-1] + 4
    products = 8 if readout[1:] and readout[0] > 96 else 6
    return (
        4 * (2 * atoms * f + 3 * c + pairs + c // 2 * pairs)
        + 2 * (layers + layers % 2)
        + layers * 6 * c * (pairs | 1)
        + (4 + painn) * c * num_atoms
        + ((layers * rows + 8) * c + layers * (1 + painn) * f + (products + 1) * c + readout[0]) * atoms
        + constants
        + pairs
    )


def _table(table: Float[np.ndarray, "T 4 C"], f: int) -> Float[np.ndarray, "P T K 16 4"]:
    """A table of filters by blocks' channels, each cubic's numbers side by side."""
    cubics = np.asarray(table).reshape(len(table), 4, -1, f // CHANNELS, CHANNELS)
    return np.ascontiguousarray(cubics.transpose(3, 0, 2, 4, 1), np.float32)


def _forward(tree: Params, config: Config, c: int) -> Iterator[Float[np.ndarray, "R 2 T 4"]]:
    """What the threads of block c read of matrices for energies, in the order of one.cu's stages."""
    painn, last, f = config.architecture == "painn", config.num_interactions - 1, config.hidden_dim
    first, *others = (kernel for kernel, *_ in tree["read"]["hidden"])
    for i in range(last + 1):
        update = tree[f"interaction_{i}"]["update"]
        if painn:
            yield _outward_vectors(f, c, update["U"], update["V"])
        yield _inward(f, c, update["A"])
        yield _outward(f, c, _gates(update, f))
        if i == last:
            yield _inward(f, c, first)
        elif painn:
            gate = tree[f"interaction_{i + 1}"]["gate"]
            yield _inward(f, c, gate["C"])
            yield _outward(f, c, gate["D"])
    for matrix in others:  # each block has all of it
        yield _outward(CHANNELS, 0, matrix)
        yield _outward(CHANNELS, 0, matrix.T)


def _backward(tree: Params, config: Config, c: int) -> Iterator[Float[np.ndarray, "R 2 T 4"]]:
    """What they read then, for gradients."""
    painn, last, f = config.architecture == "painn", config.num_interactions - 1, config.hidden_dim
    updates = [tree[f"interaction_{i}"]["update"] for i in range(last + 1)]
    yield _outward(f, c, tree["read"]["hidden"][0][0].T)
    yield _inward(f, c, _gates(updates[last], f).T)
    for i in reversed(range(last + 1)):
        yield _outward(f, c, updates[i]["A"].T)
        if painn:
            yield _outward_vectors(f, c, updates[i]["U"].T, updates[i]["V"].T)
        if i == 0:
            break
        if painn:
            gate = tree[f"interaction_{i}"]["gate"]
            yield _inward(f, c, gate["D"].T)
            yield _outward(f, c, gate["C"].T)
        yield _inward(f, c, _gates(updates[i - 1], f).T)


def _gates(update: Params, f: int) -> Float[np.ndarray, "F 3F"]:
    """B; 0 where no energy depends on it."""
    return np.pad(update["B"], ((0, 0), (0, 3 * f - update["B"].shape[1])))


def _own(f: int, c: int, matrix: Float[np.ndarray, "K C"]) -> Float[np.ndarray, "K P 16"]:
    """Columns of block c's channels of each F."""
    return matrix.reshape(len(matrix), -1, f)[..., c * CHANNELS : (c + 1) * CHANNELS]


def _outward(f: int, c: int, *matrices: Float[np.ndarray, "K C"]) -> Float[np.ndarray, "R 2 T 4"]:
    """Columns of a block's channels: thread 16 o + l has rows l, l + 16, ... of column o of each F."""
    own = np.concatenate([_own(f, c, matrix) for matrix in matrices], axis=1)
    k, parts, _ = own.shape
    return _fours(own.reshape(k // 16, 16, parts, CHANNELS).transpose(2, 0, 3, 1).reshape(-1, THREADS))


def _inward(f: int, c: int, matrix: Float[np.ndarray, "K C"]) -> Float[np.ndarray, "R 2 T 4"]:
    """Rows of a block's channels: thread 8 h + k has rows k, k + 8, ... of columns 4 h to 4 h + 3."""
    own = _own(f, c, matrix.T)  # [H, part, q]
    eighths = own.reshape(len(own) // 4, 4, -1, 8).transpose(2, 1, 0, 3).reshape(-1, 2 * len(own))
    return _fours(np.pad(eighths, ((0, 0), (0, THREADS - eighths.shape[1]))))


def _outward_vectors(f: int, c: int, *matrices: Float[np.ndarray, "F F"]) -> Float[np.ndarray, "R 2 T 4"]:
    """Columns of a block's channels: lane l of warp w has rows l, l + 32, ... of columns 2 w and 2 w + 1."""
    own = np.stack([_own(f, c, matrix)[:, 0] for matrix in matrices])  # [U or V, k, o]
    return _fours(own.reshape(2, f // 32, 32, 8, 2).transpose(0, 4, 1, 3, 2).reshape(-1, THREADS))


def _fours(numbers: Float[np.ndarray, "N T"]) -> Float[np.ndarray, "R 2 T 4"]:
    """Chunks: by four of a thread, so that it reads them at once."""
    padded = np.pad(numbers, ((0, -len(numbers) % (4 * CHUNK)), (0, 0)))
    fours = padded.reshape(-1, CHUNK, 4, THREADS).swapaxes(2, 3)
    return np.ascontiguousarray(fours, np.float32)


def _constants(tree: Params, config: Config, c: int, gates: bool = True) -> Iterator[Float[np.ndarray, "K"]]:
    """Biases of hidden channels and of a block's own, by layers; the readout's; mixing matrices; and so on.

    gates: whether there is room for gates' where the model has none.
    """
    painn, layers, f = config.architecture == "painn", range(config.num_interactions), config.hidden_dim
    nothing = {"c": np.zeros((1, f)), "d": np.zeros((1, 3 * f))}
    for i in layers:
        layer = tree[f"interaction_{i}"]
        update, gate = layer["update"], layer.get("gate", nothing)
        b = np.pad(update["b"], ((0, 0), (0, 3 * f - update["b"].shape[1])))
        yield from (update["a"][0], _own(f, c, b).ravel())
        if painn or gates:
            yield from (gate["c"][0], _own(f, c, gate["d"]).ravel())
    yield from (bias[0] for *_, bias in tree["read"]["hidden"])
    yield tree["read"]["final"][0]
    for i in layers:
        yield np.zeros(9) if painn else np.ravel(tree[f"interaction_{i}"]["update"]["M"])
    intervals = tree["interaction_0"]["table"].shape[0]
    epsilon, of_distances = (config.vector_norm_epsilon, 0.0) if isinstance(config, PainnConfig) else (0.0, EPSILON)
    yield np.array([epsilon, config.cutoff, intervals, of_distances])
