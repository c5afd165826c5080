"""Where the time of an NVE step goes: pairs, filters, messages, updates, readout, their backwards, the integrator.

    python experiments/speed/breakdown.py painn:fused:21 student:xla-table:10648 -o OUT.json [--seconds 200]

A step is traced once with the functions of PARTS watched. Each of them then runs alone, compiled, on the arrays that it
got there, in a loop of dependent turns; what the loop takes without it is subtracted. The integrator is jax-md's over
trivial forces, its loop included. "rest" is the whole step less all parts: what no part covers, and what XLA's fusing
across parts costs (a filter computed anew in each sum that reads it) or, where it is negative, saves. On a GPU the
profiler's time of each kernel stands beside it.
"""

from __future__ import annotations

import argparse
import collections
import glob
import gzip
import json
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import plot
from results import check_output, device, refuse, rounded, stamp, what_went_wrong, write
from rows import CONFIGS, ENGINES, TIMESTEP, Problem, potential, prepared, problem, spread
from sizes import CALLS, TINY, nve_block, size, steps_for
from systems import OPEN_LIMIT

from jaxff import interop
from jaxff.models import painn, student

REPEATS = 4  # of a part in a turn of the loop, for few atoms: a turn alone costs as much as several small kernels
# Part of a step, function, and how many of its first results a step uses (None: all). Gradients by weights are not
# needed, and left out of the compiled step.
Watched = tuple[str | Callable[..., str], str, int | None]  # a name, or what makes one of the arguments
OF_MODELS: list[Watched] = [
    ("pairs", "distance_fwd", None),
    ("filters", "filters_fwd", None),
    ("gate", "mlp_fwd", None),
    ("message", "message_fwd", None),
    ("message", "gated_message_fwd", None),
    ("update", "update_fwd", None),
    ("update", "equivariant_update_fwd", None),
    ("readout", "readout_fwd", None),
    ("repulsion", "pair_repulsion", None),
    ("readout, backward", "readout_bwd", 1),
    ("update, backward", "update_bwd", 2),
    ("update, backward", "equivariant_update_bwd", 2),
    ("message, backward", "message_bwd", 4),
    ("message, backward", "gated_message_bwd", 4),
    ("gate, backward", "mlp_bwd", 1),
    ("filters, backward", "filters_bwd", 1),
    ("repulsion, backward", "pair_repulsion_bwd", None),
    ("pairs, backward", "distance_bwd", None),
]


def _of_phases(step: Any, phases: Any, *_: Any) -> str:
    """What lies between two messages, PaiNN's gates included; after the last one, with its gradient."""
    names = {step.plan.between: "update", step.model.LAST: "update, readout", step.plan.between_bwd: "update, backward"}
    return names[phases]


def _of_cuda_phases(config: Any, phases: Any, weights: Any, state: Any, *_: Any) -> str:
    """The same, of CUDA kernels."""
    if phases == import_module(f"jaxff.kernels.{config.architecture}").LAST:
        return "update, readout"
    return "update, backward" if "s_bar" in state else "update"


def _of_phase(step: Any, phase: Callable[..., Any], weights: Any, state: Any, heard: Any) -> str:
    name = phase.__name__.removeprefix("message_").replace("_bwd", ", backward").replace("_", " ")
    return name if heard is None else "message, filters, " + name


OF_KERNELS: dict[str, list[Watched]] = {
    "chain": [
        ("pairs", "_geometry", None),
        ("repulsion", "pair_repulsion", None),
        ("repulsion, backward", "pair_repulsion_bwd", None),
        ("pairs, backward", "distance_bwd", None),
        ("message, filters, backward", "first_transpose", None),
    ],
    "atoms": [
        ("message, filters", "message", None),
        ("message, filters, backward", "message_transpose", None),
        (_of_phases, "_on_arrays", None),
    ],
    "programs": [(_of_phase, "_launch", None)],
    "cuda.engine": [(_of_cuda_phases, "run_phases", None), ("pairs, backward", "whole", None)],
}


KERNEL_PRIMITIVES = ("pallas_call", "ffi_call", "jaxff_cuda")


@dataclass
class Part:
    """A call that a step makes `count` times; as a function of the arrays that depend on the positions."""

    name: str
    function: Callable[..., Any]
    structure: Any
    leaves: list[Any]  # of the arguments: these arrays, weights, and what is static
    places: list[int]  # where these arrays stand
    kept: list[int]  # leaves of the result that count
    count: int = 1

    def __call__(self, arrays: Sequence[jax.Array]) -> list[jax.Array]:
        leaves = list(self.leaves)
        for place, array in zip(self.places, arrays, strict=True):
            leaves[place] = array
        args, keywords = jax.tree.unflatten(self.structure, leaves)
        results = jax.tree.leaves(self.function(*args, **keywords))
        return [results[i] for i in self.kept]

    @property
    def arrays(self) -> list[jax.Array]:
        """The arrays that it gets in a step."""
        return [self.leaves[i] for i in self.places]

    def key(self) -> tuple[Any, ...]:
        """Calls with equal keys take equal time."""
        shapes = [(x.shape, x.dtype) if hasattr(x, "shape") else repr(x) for x in self.leaves]
        return self.name, self.function.__name__, str(self.structure), str(shapes), tuple(self.kept)


class _Plainly:
    """custom_vmap without its rule: what it wraps is traced where it is called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def def_vmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        return rule


def traced_parts(architecture: str, engine: str, p: Problem) -> list[Part]:
    """The parts of energies and pair gradients, each once with its count, with the arrays that they get."""
    model, found = potential(architecture, engine), collections.OrderedDict[Any, Part]()
    vectors = _vectors(p, architecture, engine)(p.positions, p.pairs)

    @jax.jit
    def evaluate(numbers: Any, vectors: Any, pairs: Any) -> Any:
        with _watching(found):
            model.energies_and_vector_gradients(numbers, vectors, pairs)
        return [part.arrays for part in found.values()]

    arrays = evaluate(jnp.asarray(p.numbers), vectors, p.pairs)
    for part, concrete in zip(found.values(), arrays, strict=True):
        for place, array in zip(part.places, concrete, strict=True):
            part.leaves[place] = array
    return list(found.values())


@contextmanager
def _watching(found: dict[Any, Part]) -> Iterator[None]:
    """Calls of the watched functions, those within another one aside, go to `found`."""

    where = [(module, OF_MODELS) for module in (student, painn)]
    where += [(import_module(f"jaxff.kernels.{name}"), watched) for name, watched in OF_KERNELS.items()]
    depth = 0

    def watched(
        name: str | Callable[..., str], function: Callable[..., Any], results: int | None
    ) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                out = function(*args, **keywords)
            finally:
                depth -= 1
            if depth == 0:
                leaves, structure = jax.tree.flatten((args, keywords))
                places = [i for i, x in enumerate(leaves) if isinstance(x, jax.core.Tracer)]
                named = name if isinstance(name, str) else name(*args)
                part = Part(named, function, structure, leaves, places, _kept(out, results, leaves))
                known = found.setdefault(part.key(), part)
                known.count += known is not part
            return out

        return call

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(jax.custom_batching, "custom_vmap", _Plainly))
        for module, functions in where:
            for name, function, results in functions:
                if hasattr(module, function):
                    wrapped = watched(name, getattr(module, function), results)
                    stack.enter_context(mock.patch.object(module, function, wrapped))
        yield


def _kept(out: Any, results: int | None, arguments: list[Any]) -> list[int]:
    """Leaves of the first `results` results that are arrays and not the arguments themselves."""
    count = len(jax.tree.leaves(out if results is None else out[:results]))
    given = {id(x) for x in arguments}
    return [i for i, x in enumerate(jax.tree.leaves(out)[:count]) if isinstance(x, jax.Array) and id(x) not in given]


def breakdown(architecture: str, engine: str, atoms: int) -> dict[str, Any]:
    """Microseconds of a step, of each of its parts (with how often it runs in a step), and of the rest."""
    p = problem(atoms)
    step = size(architecture, engine, atoms)
    parts = traced_parts(architecture, engine, p) + _outer_parts(p, architecture, engine)
    total: dict[str, dict[str, Any]] = {}
    turn_us = _turn(atoms)
    for part in parts:
        times = _times(part, atoms, turn_us)
        entry = total.setdefault(part.name, {"median_us": 0.0, "fastest_us": 0.0, "slowest_us": 0.0, "calls": 0})
        for name, value in zip(("median_us", "fastest_us", "slowest_us"), times, strict=True):
            entry[name] += value * part.count
        entry["calls"] += part.count
        print(f"      {part.name}: {times[0]:.2f} µs x {part.count} ({part.function.__name__})", flush=True)
    total["integrator"] = _integrator(atoms)
    result = {
        "step_us": step["median_us"],
        "parts": total,
        "rest_us": step["median_us"] - sum(entry["median_us"] for entry in total.values()),
        "atoms": atoms,
    }
    if jax.default_backend() == "gpu":
        result["kernels_us_and_calls"] = _or_error(lambda: kernels(architecture, engine, atoms))
    return result


def _outer_parts(p: Problem, architecture: str, engine: str) -> list[Part]:
    """Vectors of the positions, and forces of the vectors' gradients, as jax-md's energy function makes them."""
    vectors = _vectors(p, architecture, engine)

    def forces(R: jax.Array, pairs: Any, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda R: vectors(R, pairs), R)[1](g)[0]

    g = vectors(p.positions, p.pairs)
    made = []
    for name, function, args in (("pairs", vectors, ()), ("pairs, backward", forces, (g,))):
        leaves, structure = jax.tree.flatten(((p.positions, p.pairs, *args), {}))
        places = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]
        made.append(Part(name, function, structure, leaves, places, [0]))
    return made


def _vectors(p: Problem, architecture: str, engine: str) -> Callable[..., jax.Array]:
    gathers = p.pairs.layout == "slots" and potential(architecture, engine).gradients_are_antisymmetric(p.pairs)

    def vectors(R: jax.Array, pairs: Any) -> jax.Array:
        return interop.jax_md._pair_vectors(p.displacement, R, pairs, gathers)

    return vectors


def _turn(atoms: int) -> float:
    """Microseconds of a turn of a loop that does nothing."""
    return float(np.median(_loop(lambda x: [jnp.zeros(1)], [jnp.zeros(1)], 1, steps_for(atoms))))


def _times(part: Part, atoms: int, turn_us: float) -> tuple[float, float, float]:
    """Median, fastest and slowest microseconds of a call."""
    arrays, repeats = part.arrays, REPEATS if atoms <= OPEN_LIMIT else 1
    turns = max(2, steps_for(atoms) // repeats)
    if any(name in str(jax.make_jaxpr(part)(arrays)) for name in KERNEL_PRIMITIVES):
        # what a kernel reads is written before
        turn_us = float(np.median(_loop(lambda x: [y for y in x if _moves(y)], arrays, repeats, turns)))
    times = [(x - turn_us) / repeats for x in _loop(part, arrays, repeats, turns)]
    return float(np.median(times)), min(times), max(times)


def _loop(function: Callable[..., Any], arrays: list[jax.Array], repeats: int, turns: int) -> list[float]:
    """Microseconds of each run's turns, on average: `repeats` dependent calls a turn."""
    compiled, _ = prepared(jax.jit(partial(looped, function, repeats, turns)), arrays)
    return [x * 1e6 / turns for x in _seconds(lambda: compiled(arrays))]


def looped(function: Callable[..., Any], repeats: int, turns: int, arrays: list[jax.Array]) -> list[list[jax.Array]]:
    """The last turn's results. Each call's arguments are moved, by less than their last bits, by the result before.

    All results are the loop's state, so that XLA makes them in full, in every turn.
    """

    def turn(_: Any, state: Any) -> Any:
        token, results = state[1], []
        for _ in range(repeats):
            out = function([x + (TINY * token).astype(x.dtype) if _moves(x) else x for x in arrays])
            token = next(x for x in out if _moves(x)).reshape(-1)[0].astype(jnp.float32)
            results.append(out)
        return results, token

    like = jax.eval_shape(function, arrays)
    start = [[jnp.zeros(x.shape, x.dtype) for x in like] for _ in range(repeats)]
    return jax.lax.fori_loop(0, turns, turn, (start, jnp.float32(0)))[0]


def _moves(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating)) and x.size > 0


def _seconds(run: Callable[[], Any]) -> list[float]:
    jax.block_until_ready(run())
    seconds = []
    for _ in range(CALLS):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return seconds


def _integrator(atoms: int) -> dict[str, Any]:
    """jax-md's NVE step over forces that cost nothing, and its loop."""
    from jax_md import simulate

    p, turns = problem(atoms), steps_for(atoms)
    init, step = simulate.nve(lambda R, **_: 1e-6 * jnp.sum(R * R), p.shift, TIMESTEP)
    state = init(jax.random.key(0), p.positions, 1e-4, mass=12.0)
    block = jax.jit(lambda s: jax.lax.fori_loop(0, turns, lambda _, x: step(x), s))
    return spread(_seconds(lambda: block(state)), 1e6 / turns, "_us") | {"calls": 1}


def kernels(architecture: str, engine: str, atoms: int) -> dict[str, Any]:
    """Microseconds a step of each kernel and how often it runs in one, by the profiler, longest first."""
    p, steps = problem(atoms), min(100, steps_for(atoms))
    block, state = nve_block(architecture, engine, atoms, steps)
    jax.block_until_ready(block(state, p.pairs))
    return traced_kernels(lambda: block(state, p.pairs), steps)


def traced_kernels(run: Callable[[], Any], steps: int) -> dict[str, Any]:
    """Microseconds of each kernel in one of the steps that `run` makes, and how often it runs in one, likewise."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=False):
            jax.block_until_ready(run())
        (path,) = glob.glob(folder + "/**/*.trace.json.gz", recursive=True)
        with gzip.open(path) as file:
            events = json.load(file)["traceEvents"]
    total: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0])
    streams = {
        (e["pid"], e["tid"]) for e in events if e.get("name") == "thread_name" and "Stream" in str(e.get("args", ""))
    }
    for e in events:
        if e.get("ph") == "X" and (e["pid"], e["tid"]) in streams:
            total[e["name"]][0] += e["dur"] / steps
            total[e["name"]][1] += 1 / steps
    return dict(sorted(total.items(), key=lambda x: -x[1][0])[:40])


def _or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - what can't be measured says so, and the next is measured
        reason = what_went_wrong(str(error))
        if reason != "out of memory":
            traceback.print_exc()
        return {"error": reason or type(error).__name__}


def parsed(name: str) -> tuple[str, str, int]:
    """architecture:engine:atoms, or one line."""
    parts = name.split(":")
    engines = [engine for engine in ENGINES if engine != "autodiff"]
    good = len(parts) == 3 and parts[0] in CONFIGS and parts[1] in engines and parts[2].isdigit() and int(parts[2]) > 1
    if not good:
        kinds = f"{'|'.join(CONFIGS)}:{'|'.join(engines)}:ATOMS"
        refuse(f"expected {kinds}, 2 atoms or more, received {name!r}")
    return parts[0], parts[1], int(parts[2])


def main() -> None:
    """Break down what fits into the time, writing the file after each; then the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="+", help="architecture:engine:atoms")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="no breakdown begins later than that")
    args = parser.parse_args()
    wanted = {name: parsed(name) for name in args.what}
    check_output(args.output)
    warnings.simplefilter("ignore", DeprecationWarning)
    begin, (_, device_name) = time.perf_counter(), device()
    for name, (architecture, engine, _) in wanted.items():
        if engine == "fused" and potential(architecture, engine).engine != "fused":
            refuse(f"{name} can't be measured on this device ({device_name}): the fused engine does not run here")
    report: dict[str, Any] = stamp(device_name) | {"breakdowns": {}}
    for number, (name, what) in enumerate(wanted.items(), 1):
        passed = time.perf_counter() - begin
        if passed > args.seconds:
            print(f"{args.seconds:g} s are over: {len(wanted) - number + 1} breakdowns are left out", flush=True)
            break
        print(f"[{number}/{len(wanted)}, {passed:.0f} s] {name}", flush=True)
        report["breakdowns"][name] = found = _or_error(partial(breakdown, *what))
        print("   ", rounded({k: v for k, v in found.items() if not k.startswith("kernels")}), flush=True)
        write(args.output, report)
    picture = args.output.with_suffix(".png")
    plot.draw_where_possible(plot.draw_breakdowns, report["breakdowns"], device_name, picture)


if __name__ == "__main__":
    main()
