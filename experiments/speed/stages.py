"""Where the time goes inside a kernel that does all of a molecule: clocks of its blocks, at each of its stages.

    python experiments/speed/stages.py painn:21 student:21 painn:64 painn:16x21 -o OUT.json

Rows are an architecture and atoms, or molecules x atoms. The kernel is compiled with CLOCKS (device.cu), by which each
block's first thread writes when a stage begins; of the last of some launches. "exchange" is waiting for what other
blocks send, and what is made of it at once; batches have it in the stage that needs it, and 33 to 64 atoms a message's
in the message. Random weights at 128/3/20, float32.
"""

from __future__ import annotations

import argparse
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import plot
from jaxtyping import Float, UInt32
from results import check_output, device, refuse, stamp, write
from rows import CONFIGS, potential, problem

from jaxff.kernels.cuda import launch, one, several

STAGES = (  # as device.cu numbers them
    "pairs", "filters", "exchange", "message", "vectors", "update", "gate", "readout",
    "message, backward", "vectors, backward", "update, backward", "gate, backward", "pairs, backward", "end",
)  # fmt: skip
CLOCKS = 256  # that a block may write
LAUNCHES = 20
ROW = re.compile(rf"({'|'.join(CONFIGS)}):(?:([1-9][0-9]*)x)?([1-9][0-9]*)")


def clocks(architecture: str, molecules: int, atoms: int) -> UInt32[np.ndarray, "B CLOCKS 2"]:
    """What begins, and when, in the order of each block that has channels, to "end". One molecule: molecules 0."""
    model, p = potential(architecture, "fused"), problem(atoms)
    tree, numbers, mask = model._fused.fused, jnp.asarray(p.numbers), jnp.asarray(p.pairs.mask)
    call, seen = launch.call, list[Any]()

    def with_clocks(kernel: launch.Kernel, arrays: Any, integers: Any, results: Any, blocks: int) -> list[Any]:
        clocked = kernel._replace(defines=(*kernel.defines, ("CLOCKS", CLOCKS)))
        *made, found = call(clocked, arrays, integers, (*results, (blocks, CLOCKS, 2)), blocks)
        groups = molecules or -(-atoms // dict(kernel.defines)["A"])
        seen[:] = [found[: groups * model.config.hidden_dim // one.CHANNELS]]
        return made

    def evaluate(positions: jax.Array) -> tuple[Any, jax.Array]:
        with patch.object(launch, "call", with_clocks):
            if molecules:
                of_all = (jnp.stack([x] * molecules) for x in (numbers, positions, mask))
                made: Any = several.energies_and_gradients(tree, model.config, *of_all, True)
            else:
                made = one.energies_and_gradients(tree, model.config, numbers, one.Positions(positions, mask))
        return made, seen[0]

    compiled = jax.jit(evaluate)
    for _ in range(LAUNCHES):
        (_, gradients), found = jax.block_until_ready(compiled(p.positions))
    assert bool(jnp.isfinite(gradients).all())
    return np.asarray(found).view(np.uint32)


def by_stages(found: UInt32[np.ndarray, "B CLOCKS 2"]) -> Float[np.ndarray, "B S"]:
    """Cycles of each block in each stage."""
    last, cycles = len(STAGES) - 1, []
    for block in found:
        what, when = block[: np.argmax(block[:, 0] == last) + 1].T
        cycles.append(np.bincount(what[:-1], np.diff(when), minlength=last))  # also if the counter began anew
    return np.array(cycles)


def stages(architecture: str, molecules: int, atoms: int) -> dict[str, Any]:
    """Cycles by stages: mean over blocks, fewest and most; and the sum of the means."""
    cycles = by_stages(clocks(architecture, molecules, atoms))
    parts = {
        name: {"mean": float(of.mean()), "fewest": float(of.min()), "most": float(of.max())}
        for name, of in zip(STAGES, cycles.T, strict=False)
        if of.any()
    }
    return {"blocks": len(cycles), "cycles": float(cycles.sum(axis=1).mean()), "stages": parts}


def main() -> None:
    """The stages of each row; then the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="+", help="architecture:atoms or architecture:MOLECULESxATOMS")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    check_output(args.output)
    parsed = [ROW.fullmatch(row) for row in args.rows]
    for row, match in zip(args.rows, parsed, strict=True):
        if match is None:
            refuse(f"expected rows like painn:21 or painn:16x21, received {row}")
    report: dict[str, Any] = stamp(device()[1]) | {"stages": {}}
    for row, match in zip(args.rows, parsed, strict=True):
        architecture, molecules, atoms = match[1], int(match[2] or 0), int(match[3])
        model = potential(architecture, "fused")
        fits = one.serves(model._fused.fused, model.config, atoms) if model.engine == "fused" else False
        if molecules and fits:
            fits = several.serves(model._fused.fused, model.config, atoms, molecules)
        if not fits:
            refuse(f"{row} can't be measured here: no kernel does all of it on this device")
        report["stages"][row] = found = stages(architecture, molecules, atoms)
        print(f"{row}: {found['cycles']:.0f} cycles, {found['blocks']} blocks")
        for name, of in found["stages"].items():
            print(f"    {name}: {of['mean']:.0f} ({of['fewest']:.0f} to {of['most']:.0f})", flush=True)
        write(args.output, report)
    if find_spec("matplotlib") is None:
        print("no matplotlib here, no picture: plot.py makes it later", flush=True)
    else:
        plot.draw_stages(report["stages"], report["device"], args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
