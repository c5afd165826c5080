"""The kernels of a step on a GPU, seen without one: what XLA makes of a turn of the compiled loop, in its order.

    python experiments/speed/fusions.py student:size-10648 painn:nve-21 student:batch-16 -o RESULT.json

Rows are an architecture and a row of run.py, by the fused engine. XLA compiles for a GPU that it only has a description
of (h200.txtpb); it needs JAX's CUDA plugin, but no GPU, driver or CUDA library. A launch costs some 2 µs. Of rows
`energy-N`: the temporaries of energy alone and of energy with forces.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import jax
import rows
import sizes
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from results import check_output, matched, refuse, write

from jaxff import kernels
from jaxff.kernels.cuda import engine, launch, one, registry, several
from jaxff.versions import versions_with

TARGET = Path(__file__).with_name("h200.txtpb")
CAPABILITY, MULTIPROCESSORS, SHARED = 90, 132, 227 * 1024
ROW = re.compile(rf"({'|'.join(rows.CONFIGS)}):(size|nve|batch|energy)-([1-9][0-9]*)")
# instructions that are no kernel of their own
SILENT = "parameter|constant|tuple|get-tuple-element|bitcast|while|call|conditional"
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>[\w-]+)\(")


def empty(kernel: launch.Kernel, capability: int, form: str) -> bytes:
    """PTX of a kernel that does nothing."""
    entry = f".visible .entry {kernel.name}() {{ ret; }}"
    return f".version 8.0\n.target sm_{capability}\n.address_size 64\n{entry}\n".encode()


def unloaded(*args: Any) -> int:
    """The key of a kernel that no GPU has."""
    registry.register()
    return 0


@contextmanager
def compiling_for_a_gpu() -> Iterator[None]:
    """jaxff's engine as on a GPU, though JAX runs on a CPU."""
    from jax._src.pallas.triton import pallas_call_registration
    from jaxlib import gpu_triton

    prepare: Callable[..., Any] = kernels.prepare
    described = SimpleNamespace(compute_capability=CAPABILITY)
    with ExitStack() as patches:
        for where, name, value in (
            (kernels, "prepare", lambda tree, config: prepare(tree, config, "triton", cuda=True)),
            (kernels, "why_not", lambda config: None),
            *((module, "multiprocessors", lambda: MULTIPROCESSORS) for module in (engine, one, several)),
            (launch, "compiled", empty),
            (launch, "most_shared", lambda: SHARED),
            (launch, "can_run_together", lambda: True),
            (registry, "add", unloaded),
            (gpu_triton, "get_compute_capability", lambda device: CAPABILITY),
            (pallas_call_registration.gpu_info_lib, "get_gpu_info", lambda: described),
        ):
            patches.enter_context(patch.object(where, name, value))
        yield


def compiled(function: Callable[..., Any], *args: Any) -> Any:
    """The executable, for arguments of these shapes."""
    options = {"target_config": TARGET.read_text(encoding="utf-8"), "topology": "1x1x1"}
    device = topologies.get_topology_desc("described", "cuda", **options).devices[0]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device)), args)
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


def step(architecture: str, what: str, count: int) -> Any:
    """The executable of a row."""
    if what == "size" and count > rows.OPEN_LIMIT:
        block, state = sizes.nve_block(architecture, "fused", count, sizes.steps_for(count))
        return compiled(block, state, rows.problem(count).pairs)
    atoms, batch = (21, count) if what == "batch" else (count, 0)
    block, start = rows.nve_loop(architecture, "fused", atoms, batch, steps=20)
    return compiled(block, jax.eval_shape(start))


def seen(architecture: str, what: str, count: str) -> dict[str, Any]:
    """How many kernels of a row are ours and XLA's, and which; temporaries."""
    made = step(architecture, what, int(count))
    found = kernels_of(made.as_text())
    own = sum(re.match("pallas_call|jaxff_cuda", kernel["name"]) is not None for kernel in found)
    temporaries = made.memory_analysis().temp_size_in_bytes / 1e6
    return {"own": own, "of_xla": len(found) - own, "temporaries_MB": temporaries, "kernels": found}


def memory(architecture: str, _: str, atoms: str) -> dict[str, float]:
    """Temporaries of energy alone, and with forces; their ratio."""
    p = rows.problem(int(atoms))
    energy = p.energy(architecture, "fused")
    alone, both = (
        compiled(function, p.positions, p.pairs).memory_analysis().temp_size_in_bytes / 1e6
        for function in (energy, jax.value_and_grad(energy))
    )
    return {"energy_MB": alone, "energy_and_forces_MB": both, "memory_ratio": both / alone}


def kernels_of(text: str) -> list[dict[str, str]]:
    """What a loop's body runs, of the text of an optimised module: of its largest computation that a loop calls."""
    bodies = set(re.findall(r"body=%([\w.-]+)", text))
    found: list[dict[str, str]] = []
    for computation in re.split(r"\n(?=(?:ENTRY )?%[\w.-]+ \()", text):
        name = re.match(r"%([\w.-]+) ", computation)
        if name is None or name[1] not in bodies:
            continue
        instructions = filter(None, map(INSTRUCTION.match, computation.splitlines()))
        here = [_described(x) for x in instructions if not re.fullmatch(SILENT, x["kind"])]
        found = max(found, here, key=len)
    return found


def _described(instruction: re.Match[str]) -> dict[str, str]:
    source = re.search(r'op_name="([^"]*)"', instruction.string)
    shape = re.sub(r"\{[\d,]*\}", "", instruction["shape"])
    return {"name": instruction["name"], "result": shape, "of": source[1].rpartition("step_fn)/")[2] if source else ""}


def main() -> None:
    """The kernels of each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=["student:nve-21", "painn:nve-21", "student:batch-16"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    check_output(args.output)
    parsed = matched(ROW, args.rows, "painn:size-10648, painn:batch-16 or painn:energy-21")
    if find_spec("jax_cuda13_plugin") is None:
        versions = " ".join(f"jax-cuda13-{name}=={jax.__version__}" for name in ("plugin", "pjrt"))
        refuse(f"expected JAX's CUDA plugin, received none: pip install --no-deps {versions}")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"  # or the plugin asks for cuDNN, which nothing here calls
    jax.config.update("jax_platforms", "cpu")
    report: dict[str, Any] = {
        "target": TARGET.name,
        "versions": versions_with("jax", "jaxlib", "jax-cuda13-pjrt", "jax-md"),
        "rows": {},
    }
    with compiling_for_a_gpu():
        for row, match in parsed.items():
            facts = (memory if match[2] == "energy" else seen)(*match.groups())
            report["rows"][row] = facts
            lines = ["    {name}: {result}  {of}".format(**kernel) for kernel in facts.get("kernels", [])]
            print(row, {name: x for name, x in facts.items() if name != "kernels"}, *lines, sep="\n", flush=True)
            write(args.output, report)


if __name__ == "__main__":
    main()
