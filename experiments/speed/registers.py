"""What Triton and ptxas make of a step's GPU kernels, without a GPU: registers, spills, barriers, shared memory.

    pip install triton==3.6.0
    python experiments/speed/registers.py -o OUT.json [painn:21 student:21 painn:1000 ...] [--capability 90]

A row is architecture:atoms: all pairs of a molecule up to 128 atoms, slots above. XLA has a Triton and a ptxas of its
own, so that a GPU may get somewhat different code; what a change of a kernel does to it shows all the same.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from jaxlib.mlir import ir
from jaxlib.triton import dialect
from results import check_output, refuse, write
from rows import CONFIGS, problem

from jaxff import kernels, models
from jaxff.tabulate import tabulate
from jaxff.versions import versions_with

INTERVALS = 64  # of tables, which no kernel's code depends on


class Kernel(NamedTuple):
    """A Triton kernel as JAX hands it to XLA."""

    name: str
    warps: int
    stages: int
    text: str


def lowered(architecture: str, atoms: int) -> list[Kernel]:
    """The kernels of energies and forces, in the order in which they run."""
    config, system = CONFIGS[architecture], problem(atoms)
    tree, _ = tabulate(models.init_params(config, jax.random.key(0)), config, INTERVALS)
    fused = kernels.prepare(models.cast(tree, np.dtype("float32")), config, "triton", cuda=False)

    def step(vectors: jax.Array) -> Any:
        return kernels.energies_and_vector_gradients(fused, config, jnp.asarray(system.numbers), vectors, system.pairs)

    vectors = jax.ShapeDtypeStruct((len(system.pairs.mask), 3), jnp.float32)
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        module = jax.jit(step).trace(vectors).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    found = []
    for call in _operations(module.operation, "stablehlo.custom_call"):
        if "triton" in call.attributes["call_target_name"].value:
            options = call.attributes["mhlo.backend_config"]
            name, warps, stages = (options[key].value for key in ("name", "num_warps", "num_stages"))
            found.append(Kernel(name, warps, stages, _text(options["ir"].value_bytes)))
    return found


def compiled(kernel: Kernel, capability: int) -> dict[str, Any]:
    """Registers and bytes of stack (spills, mostly) a thread, shared memory, barriers."""
    import triton
    from triton.backends.compiler import GPUTarget

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ttir", Path(folder) / "kernel.cubin"
        source.write_text(kernel.text, encoding="utf-8")
        options = {"num_warps": kernel.warps, "num_stages": kernel.stages}
        result = triton.compile(str(source), target=GPUTarget("cuda", capability, 32), options=options)
        binary.write_bytes(result.asm["cubin"])
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", binary], capture_output=True, text=True, check=True)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage.stdout)[1]) for word in ("REG", "STACK"))  # type: ignore[index]
    return {
        "warps": kernel.warps,
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": result.metadata.shared,
        "barriers": len(re.findall(r"^\s*bar\.sync", result.asm["ptx"], re.MULTILINE)),
    }


def _operations(operation: Any, name: str) -> Iterator[Any]:
    for region in operation.regions:
        for block in region:
            for inner in block:
                if inner.operation.name == name:
                    yield inner.operation
                yield from _operations(inner.operation, name)


def _text(bytecode: bytes) -> str:
    with mlir.make_ir_context() as context:  # it knows the dialect of a barrier, too
        dialect.register_dialect(context)
        context.load_all_available_dialects()
        return str(ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False))


def main() -> None:
    """Every kernel of each row once, with how often a step runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", default=["student:21", "painn:21", "student:1000", "painn:1000"])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--capability", type=int, default=90, help="of the GPU: 90 for H100 and H200")
    args = parser.parse_args()
    check_output(args.output)
    wrong = [row for row in args.rows if not re.fullmatch(f"({'|'.join(CONFIGS)}):[1-9][0-9]*", row)]
    if wrong:
        refuse(f"expected rows like painn:21, of {' or '.join(CONFIGS)}, received {wrong[0]}")
    if find_spec("triton") is None:
        refuse("expected Triton, received none: pip install triton==3.6.0")
    report: dict[str, Any] = {"capability": args.capability, "versions": versions_with("jax", "triton"), "rows": {}}
    for row in args.rows:
        architecture, _, atoms = row.partition(":")
        runs: dict[str, list[dict[str, Any]]] = {}
        for kernel in lowered(architecture, int(atoms)):
            runs.setdefault(kernel.name, []).append(compiled(kernel, args.capability))
        # a name with other arguments is other code: the one with most registers is told
        found = {name: max(of, key=lambda run: run["registers"]) | {"runs": len(of)} for name, of in runs.items()}
        report["rows"][row] = found
        print(row, *(f"    {name} {facts}" for name, facts in found.items()), sep="\n", flush=True)
        write(args.output, report)


if __name__ == "__main__":
    main()
