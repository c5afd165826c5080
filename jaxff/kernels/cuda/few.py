"""Messages over all pairs of few small molecules, as jaxff.kernels.message has them, with its tables: few.cu.

Their kernels may run the phase that follows (jaxff.kernels.cuda.cut), which needs no other channels.
"""

from __future__ import annotations

import functools
from typing import Any

from jaxtyping import Array, Float

from jaxff.kernels.atoms import Heard, Made, Phase, Step
from jaxff.kernels.cuda import cut, engine, launch
from jaxff.kernels.cuda.molecules import MOST_SHARED, Launched
from jaxff.kernels.message import Geometry, Sources

THREADS = {"few_message": 1024, "few_transpose": 896}  # as many as have registers enough
WIDTHS = 16, 8  # channels of a block
PARTS = 4  # threads that share an atom's channel, at most


def message(
    sources: Sources, table: Float[Array, "T 4 C"], geometry: Geometry
) -> tuple[Float[Array, "N F"], Float[Array, "N 3F"]]:
    """As jaxff.kernels.message.message, for pairs e = (receiver e // M, sender e % M) of each molecule of M atoms."""
    made, _ = _run_alone(Heard(sources, table), geometry)
    return made["ds"][0], made["dv"]


def message_transpose(
    sources: Sources,
    cotangents: tuple[Float[Array, "N F"], Float[Array, "N 3F"]],
    table: Float[Array, "T 4 C"],
    geometry: Geometry,
    before: Float[Array, "G 4 E"] | None,
    sums: bool = True,
) -> tuple[Sources, Float[Array, "G 4 E"]]:
    """As jaxff.kernels.message.message_transpose, likewise; pair gradients by groups of channels, added to `before`.

    They are zeros for pairs that don't count. sums: whether cotangents of the sources are wanted, or those are None.
    """
    made, bars = _run_alone(Heard(sources, table, cotangents, before=before), geometry, sums)
    (a,), (b,) = (made.get(name, [None]) for name in ("a", "b"))
    return Sources(a, b, made.get("y")), bars


def run_phase(
    step: Step, phase: Phase, weights: Any, state: Made, heard: Heard, matrices: cut.Matrices
) -> tuple[Made, Any] | None:
    """What a message and the first phase after it make, as `_run`; None where a block has few channels.

    The next phase sums over as many shares as there are blocks, and matrices come in units of 16 channels.
    """
    launched = _launched(heard, step.geometry)
    own, atoms = (dict(launched.kernel.defines)[name] for name in ("OWN", "ATOMS"))
    if own != WIDTHS[0]:
        return None
    sums = [x for row in _sums(heard).values() for x in row]
    return _run(launched, heard, step.geometry, cut.lines(step, [phase], weights, state, sums, matrices, own, atoms))


def _run_alone(heard: Heard, geometry: Geometry, sums: bool = True) -> tuple[Made, Any]:
    launched, (n, f) = _launched(heard, geometry, sums), heard.sources.a.shape
    own = dict(launched.kernel.defines)["OWN"]
    return _run(launched, heard, geometry, cut.stored(_sums(heard) if sums else {}, f, own, n, ("dv", "y")))


def _sums(heard: Heard) -> dict[str, list[str]]:
    """What few.cu calls the sums, by what they are."""
    names = [f"sums[{k}]" for k in range(5)]
    if heard.above is None:
        return {"ds": names[:1], "dv": names[1:4]}
    rows = zip(("a", "b", "y"), (names[:1], names[1:2], names[2:]), heard.sources, strict=True)
    return {name: row for name, row, x in rows if x is not None}


def _run(launched: Launched, heard: Heard, geometry: Geometry, then: cut.Lines) -> tuple[Made, Any]:
    """What the lines make of the sums, and a transposed message's pair gradients."""
    kernel, molecules, blocks = launched
    arrays = [geometry.places, heard.table, *(heard.above or ()), *engine.with_stand_ins(heard.sources)]
    shapes = list(then.shapes)
    if heard.above is not None:
        arrays.append(heard.sources.a if heard.before is None else heard.before)  # or what the kernel doesn't read
        shapes.insert(0, (blocks // molecules, 4, geometry.places.shape[1]))
    listed = {"THEN_TAKES": then.inputs, "THEN_MAKES": then.outputs}
    macros = {name: "".join(f", {x}" for x in names) for name, names in listed.items()}
    macros |= {"THEN_ASKS": " ".join(then.asks), "THEN": " ".join(then.then)}
    source = "".join(f"#define {name} {text}\n" for name, text in macros.items()) + kernel.source
    kernel = kernel._replace(source=source, shared=max(kernel.shared, 4 * then.words))
    results = iter(launch.call(kernel, [*arrays, *then.inputs.values()], (molecules,), shapes, blocks))
    pair_bars = None if heard.above is None else next(results)
    return then.taken(results), pair_bars


def _launched(heard: Heard, geometry: Geometry, sums: bool = True) -> Launched:
    """With as many channels a block as `before`, or as fit, if those blocks keep half of the multiprocessors busy."""
    n, f = heard.sources.a.shape
    slots = geometry.places.shape[1] // n
    molecules, name = n // slots, "few_message" if heard.above is None else "few_transpose"
    of = heard.sources.b is not None, heard.sources.y is not None, sums, heard.before is not None
    wide, narrow = (
        Launched(_of_size(name, f, slots, width, *of), molecules, molecules * f // width) for width in WIDTHS
    )
    fit = 2 * wide.blocks > engine.multiprocessors() and wide.kernel.shared <= MOST_SHARED
    if heard.before is not None:
        fit = len(heard.before) == f // WIDTHS[0]
    return wide if fit else narrow


@functools.cache
def _of_size(
    name: str, f: int, slots: int, width: int, has_b: bool, has_y: bool, sums: bool, adds: bool
) -> launch.Kernel:
    """Without the lines that `_run` adds."""
    transposed, sent, filters = name == "few_transpose", 1 + has_b + 3 * has_y, 2 + has_y
    rows, pairs, threads = (sent + 4 * transposed) | 1, slots * (slots - 1) // 2, THREADS[name]
    parts = min(PARTS, threads // width // slots)
    shares = (parts - 1) * slots * (4 + transposed)
    shared = 4 * ((slots * rows + pairs * (filters | 1) + shares) * width + 4 * pairs)
    defines = (
        *(("THREADS", threads), ("F", f), ("M", slots), ("OWN", width), ("ATOMS", 16 * -(-slots // 16))),
        *(("HAS_B", int(has_b)), ("HAS_Y", int(has_y)), ("PARTS", parts)),
        *(("TRANSPOSE", int(transposed)), ("SUMS", int(sums)), ("ADDS", int(adds))),
    )
    return launch.Kernel(name, launch.read("device.cu", "cut.cu", "few.cu"), defines, threads, shared, early=True)
