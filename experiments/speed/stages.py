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
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import plot
from jaxtyping import Float, UInt32
from results import check_output, device, matched, refuse, stamp, write
from rows import CONFIGS, potential, problem

from jaxff.kernels import chain
from jaxff.kernels.cuda import launch, one, several

STAGES = tuple(  # as device.cu numbers them
    name.lower().replace("_back", ", backward")
    for name in re.findall(r"\bSTAGE_([A-Z_]+)[, ]", launch.read("device.cu"))
)
CLOCKS = 256  # that a block may write
LAUNCHES = 20
ROW = re.compile(rf"({'|'.join(CONFIGS)}):(?:([1-9][0-9]*)x)?([1-9][0-9]*)")


def one_kernel_serves(architecture: str, molecules: int, atoms: int) -> bool:
    """Whether one kernel does all of a row here. One molecule: molecules 0."""
    model = potential(architecture, "fused")
    if model.engine != "fused":
        return False
    tree = model._fused.fused
    if molecules:
        return chain.one_kernel_serves_several(tree, model.config, atoms, molecules)
    return chain.one_kernel_serves(tree, model.config, atoms)


def clocks(architecture: str, molecules: int, atoms: int) -> UInt32[np.ndarray, "B CLOCKS 2"]:
    """What begins, and when, in the order of each block that has channels, to "end"."""
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
    rows = {
        row: (match[1], int(match[2] or 0), int(match[3]))
        for row, match in matched(ROW, args.rows, "painn:21 or painn:16x21").items()
    }
    for row, what in rows.items():
        if not one_kernel_serves(*what):
            refuse(f"{row} can't be measured here: no kernel does all of it on this device")
    report: dict[str, Any] = stamp(device()[1]) | {"stages": {}}
    for row, what in rows.items():
        report["stages"][row] = found = stages(*what)
        print(f"{row}: {found['cycles']:.0f} cycles, {found['blocks']} blocks")
        for name, of in found["stages"].items():
            print(f"    {name}: {of['mean']:.0f} ({of['fewest']:.0f} to {of['most']:.0f})", flush=True)
        write(args.output, report)
    plot.draw_where_possible(plot.draw_stages, report["stages"], report["device"], args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
