"""Other versions of CUDA kernels beside those of the package: evaluations by each, by turns, and how far forces differ.

    python experiments/speed/variants.py painn:10648 student:10648 --variants FOLDER .,engine.STAGES=4 -o OUT.json

A variant is a folder with .cu files that stand for those of the same name in jaxff/kernels/cuda, "." for none, with
other constants of the modules there where it needs them; the package as it is comes first in any case. Energy and
forces in a loop of dependent evaluations, all variants in one process, so that ratios count: GPUs differ by some 2 %.
Random weights at 128/3/20, float32. What counts for a variant that is right is `max_dF`, eV/Å.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from breakdown import looped, traced_kernels
from results import check_output, device, refuse, rounded, stamp, what_went_wrong, write
from rows import potential, prepared, problem, sized, spread
from sizes import by_turns, steps_for

from jaxff.kernels.cuda import engine, launch, packs, tiles

HERE = "."
MODULES = {"engine": engine, "packs": packs, "tiles": tiles}


class Variant(NamedTuple):
    """Sources by the names of files, and constants by MODULE.CONSTANT."""

    sources: Mapping[str, str]
    constants: Mapping[str, int]


def parsed(name: str) -> Variant:
    """FOLDER[,MODULE.CONSTANT=VALUE ...], or one line."""
    folder, *settings = name.split(",")
    sources = {} if folder == HERE else {path.name: path.read_text() for path in Path(folder).glob("*.cu")}
    if folder != HERE and not sources:
        refuse(f"expected a folder with .cu files, received {folder}")
    constants = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        module, _, constant = name.partition(".")
        if not isinstance(getattr(MODULES.get(module), constant, None), int) or not value.isdigit():
            refuse(f"expected MODULE.CONSTANT=VALUE, an integer of {', '.join(MODULES)}, received {setting}")
        constants[name] = int(value)
    return Variant(sources, constants)


@contextmanager
def using(variant: Variant) -> Iterator[None]:
    """What is traced here has the variant's kernels."""
    own = launch.read

    def read(*names: str) -> str:
        return "\n".join(variant.sources.get(name) or own(name) for name in names)

    def forget() -> None:
        jax.clear_caches()
        for module in MODULES.values():
            for function in vars(module).values():
                if hasattr(function, "cache_clear") and function is not engine.multiprocessors:
                    function.cache_clear()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "read", read))
        for name, value in variant.constants.items():
            module, _, constant = name.partition(".")
            stack.enter_context(mock.patch.object(MODULES[module], constant, value))
        stack.callback(forget)
        forget()
        yield


def race(architecture: str, atoms: int, variants: Mapping[str, Variant], calls: int, profile: bool) -> dict[str, Any]:
    """Microseconds of an evaluation by each variant; how far forces differ from the first one's that runs."""
    p, turns = problem(atoms), steps_for(atoms)
    potential(architecture, "fused")  # made before any variant
    runs: dict[str, Any] = {}
    found: dict[str, Any] = {}
    forces: dict[str, np.ndarray] = {}

    def evaluate(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        energy, gradient = jax.value_and_grad(p.energy(architecture, "fused"))(arrays[0], p.pairs)
        return [jnp.nan_to_num(energy), gradient]  # no number would move all atoms out of the cutoff

    for name, variant in variants.items():
        try:
            with using(variant):
                compiled, found[name] = prepared(jax.jit(partial(looped, evaluate, 1, turns)), [p.positions])
            forces[name] = np.nan_to_num(np.asarray(compiled([p.positions])[0][1]))
            runs[name] = partial(compiled, [p.positions])
        except Exception as error:  # noqa: BLE001 - a variant that doesn't compile says so, and the next is measured
            found[name] = {"error": what_went_wrong(str(error))}
    seconds = by_turns(runs, calls)
    for name, run in runs.items():
        difference = float(np.abs(forces[name] - forces[next(iter(runs))]).max())
        found[name] |= spread(seconds[name], 1e6 / turns, "_us") | {"max_dF": difference}
        if profile:
            found[name]["kernels_us_and_calls"] = traced_kernels(run, turns)
    return found


def main() -> None:
    """Each row by all variants."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", help="architecture:atoms")
    parser.add_argument("--variants", nargs="+", required=True, help="FOLDER[,MODULE.CONSTANT=VALUE ...]")
    parser.add_argument("--calls", type=int, default=9, help="of a loop")
    parser.add_argument("--kernels", action="store_true", help="each kernel's time, too, by the profiler")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    rows = sized(args.rows)
    variants = {name: parsed(name) for name in dict.fromkeys([HERE, *args.variants])}
    check_output(args.output)
    warnings.simplefilter("ignore", DeprecationWarning)
    gpu, device_name = device()
    if not gpu:
        refuse(f"expected a GPU, received {device_name}")
    report: dict[str, Any] = stamp(device_name) | {"rows": {}}
    for row, what in rows.items():
        report["rows"][row] = race(*what, variants, args.calls, args.kernels)
        for name, numbers in report["rows"][row].items():
            print(row, name, rounded(numbers), flush=True)
        write(args.output, report)


if __name__ == "__main__":
    main()
