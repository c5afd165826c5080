"""What fewer bits in messages do: forces, and an NVE run, of the shipped PaiNN in float64 on a CPU.

    python experiments/speed/rounding.py -o experiments/speed/results/rounding.json [--frames 12] [--blocks 100]

Kernels for many atoms pass the weights of directions xu and the vectors y = xv v on with 16 bits. Here xu and v, or xs,
too, are rounded before each message, as if that had no slope, and nothing else is. They make filters, but the first, of
few functions by products of halves: here tables have what comes out where intervals begin. Forces are those of two
rattled molecules and of rattled aspirins; the run is aspirin at 300 K, steps of 0.5 fs, in blocks of 20 fs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from check import drift, rattled_aspirins, rattled_molecules
from results import check_output, device, stamp, write

import jaxff
from jaxff.kernels.cuda import filters
from jaxff.md.structures import builtin_molecule
from jaxff.models import painn

BITS = (12, 16, 18, 20)
SENT = {"xu, v": (False, True), "xs, xu, v": (True, True)}  # whether the parts of a gate are rounded: xs, xu


def rounded(x: jax.Array, bits: int) -> jax.Array:
    """x to so many bits, with the slope of x."""
    mantissa, exponent = jnp.frexp(jax.lax.stop_gradient(x))
    return x + jax.lax.stop_gradient(jnp.ldexp(jnp.round(mantissa * 2.0**bits) / 2.0**bits, exponent) - x)


@contextmanager
def messages_of(bits: int | None, parts: tuple[bool, bool]) -> Iterator[None]:
    """PaiNN's messages with what atoms send rounded; None: as it is."""
    message: Callable[..., Any] = painn.gated_message_fwd

    def fwd(x: jax.Array, v: jax.Array, *rest: Any) -> Any:
        if bits is None:
            return message(x, v, *rest)
        *gates, last = jnp.split(x, 3, axis=1)
        gates = [rounded(part, bits) if is_rounded else part for part, is_rounded in zip(gates, parts, strict=True)]
        return message(jnp.concatenate([*gates, last], axis=1), rounded(v, bits), *rest)

    jax.clear_caches()
    with patch.object(painn, "gated_message_fwd", fwd):
        yield
    jax.clear_caches()


def potential() -> jaxff.Potential:
    """The shipped PaiNN by plain float64."""
    return jaxff.load_potential("organic", dtype="float64", filters="exact", engine="xla")


def with_halves(model: jaxff.Potential) -> jaxff.Potential:
    """A potential with tables, whose values and slopes where intervals begin become those that message.cu makes."""
    made, names = copy(model), [f"interaction_{i}" for i in range(1, model.config.num_interactions)]
    tables = [np.array(model._tree[name]["filter"]["coefficients"]) for name in names]
    found = filters.in_bins(tables)
    assert found is not None
    for table, binned in zip(tables, found, strict=True):
        width = binned.basis.shape[1]
        for k, (basis, weights) in enumerate(zip(*binned, strict=True)):
            first = k * filters.step_between(width)  # bins overlap: what the last one has of an interval stays
            for power, x in enumerate(filters.products(basis[: len(table) - first], weights)):
                table[first : first + width, power] = x
    layers = {name: {"filter": {"coefficients": jnp.asarray(x)}} for name, x in zip(names, tables, strict=True)}
    made._tree = model._tree | {name: model._tree[name] | layer for name, layer in layers.items()}
    return made


def forces(structures: Sequence[Atoms], model: jaxff.Potential | None = None) -> list[np.ndarray]:
    """Of all structures, in eV/Å."""
    model = model or potential()
    return [model.energy_and_forces(atoms.numbers, atoms.positions)[1] for atoms in structures]


def worst(some: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    """The largest difference of forces."""
    return max(float(np.abs(x - y).max()) for x, y in zip(some, others, strict=True))


def main() -> None:
    """Measure, and write what came out after each row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--frames", type=int, default=12, help="rattled aspirins")
    parser.add_argument("--blocks", type=int, default=100, help="of the NVE run, 20 fs each")
    args = parser.parse_args()
    check_output(args.output)
    jax.config.update("jax_enable_x64", True)
    begin, rows = time.perf_counter(), dict[str, Any]()
    structures = rattled_molecules() + rattled_aspirins(args.frames)
    report = stamp(device()[1]) | {"rows": rows}

    def tell(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        print(f"[{time.perf_counter() - begin:.0f} s] {name}: {row}", flush=True)
        write(args.output, report)

    with messages_of(None, (False, False)):
        expected = forces(structures)
        tell("nve", drift(potential(), builtin_molecule("aspirin"), args.blocks)[0])
    tabulated = jaxff.load_potential("organic", dtype="float64", filters="table", engine="xla")
    plain, made = (forces(structures, model) for model in (tabulated, with_halves(tabulated)))
    tell("forces, filters of halves", {"max_dF_eV_per_A": worst(made, plain)})
    for bits in BITS:
        for name, parts in SENT.items():
            with messages_of(bits, parts):
                difference = worst(forces(structures), expected)
                largest = max(float(np.abs(x).max()) for x in expected)
                tell(f"forces, {name} to {bits} bits", {"max_dF_eV_per_A": difference, "max_F_eV_per_A": largest})
                if bits == 16 and name == "xu, v":
                    tell("nve, xu, v to 16 bits", drift(potential(), builtin_molecule("aspirin"), args.blocks)[0])


if __name__ == "__main__":
    main()
