"""What fewer bits in messages do: forces, and an NVE run, of the shipped PaiNN in float64 on a CPU.

    python experiments/speed/rounding.py -o experiments/speed/results/rounding.json [--frames 12] [--blocks 100]

Kernels for many atoms pass the weights of directions xu and the vectors y = xv v on with 16 bits. Here xu and v, or xs,
too, are rounded before each message, as if that had no slope, and nothing else is. Forces are those of two rattled
molecules and of rattled aspirins; the run is aspirin at 300 K, steps of 0.5 fs, in blocks of 20 fs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
from ase.build import molecule
from results import check_output, device, stamp, write

import jaxff
from jaxff import interop
from jaxff.md.structures import builtin_molecule
from jaxff.models import painn
from jaxff.units import fs, kB

BITS = (12, 16, 18, 20)
SENT = {"xu, v": (False, True), "xs, xu, v": (True, True)}  # whether the parts of a gate are rounded: xs, xu
EVERY = 40  # steps of a block


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


def structures(frames: int) -> list[Any]:
    """Two molecules rattled by 0.1 Å, and aspirins by 0.05 Å."""
    found = [molecule(name) for name in ("CH3CH2OH", "CH3CONH2")]
    for atoms in found:
        atoms.rattle(0.1, seed=0)
    for seed in range(frames):
        found.append(builtin_molecule("aspirin"))
        found[-1].rattle(0.05, seed=seed)
    return found


def forces(frames: int) -> list[np.ndarray]:
    """Of all structures."""
    model = potential()
    return [model.energy_and_forces(atoms.numbers, atoms.positions)[1] for atoms in structures(frames)]


def drift(blocks: int) -> dict[str, float]:
    """Total energy of aspirin: slope and spread."""
    from jax_md import quantity, simulate, space

    atoms, (displacement, shift) = builtin_molecule("aspirin"), space.free()
    energy = interop.jax_md.energy(potential(), atoms.numbers, displacement)
    mass = jnp.asarray(atoms.get_masses()[:, None])
    init, step = simulate.nve(energy, shift, 0.5 * fs)
    state = jax.jit(lambda r: init(jax.random.key(0), r, kB * 300, mass=mass))(jnp.asarray(atoms.positions))
    block = jax.jit(lambda s: jax.lax.fori_loop(0, EVERY, lambda _, x: step(x), s))
    total = jax.jit(lambda s: energy(s.position) + quantity.kinetic_energy(momentum=s.momentum, mass=s.mass))
    energies = []
    for _ in range(blocks):
        state = block(state)
        energies.append(float(total(state)))
    picoseconds = np.arange(blocks) * EVERY * 0.5e-3
    slope = float(np.polyfit(picoseconds, energies, 1)[0]) * 1e3
    return {"slope_meV_per_ps": slope, "peak_to_peak_meV": float(np.ptp(energies)) * 1e3, "steps": blocks * EVERY}


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
    report = stamp(device()[1]) | {"rows": rows}

    def tell(name: str, row: dict[str, Any]) -> None:
        rows[name] = row
        print(f"[{time.perf_counter() - begin:.0f} s] {name}: {row}", flush=True)
        write(args.output, report)

    with messages_of(None, (False, False)):
        expected = forces(args.frames)
        tell("nve", drift(args.blocks))
    for bits in BITS:
        for name, parts in SENT.items():
            with messages_of(bits, parts):
                worst = max(float(np.abs(x - y).max()) for x, y in zip(forces(args.frames), expected, strict=True))
                largest = max(float(np.abs(x).max()) for x in expected)
                tell(f"forces, {name} to {bits} bits", {"max_dF_eV_per_A": worst, "max_F_eV_per_A": largest})
                if bits == 16 and name == "xu, v":
                    tell("nve, xu, v to 16 bits", drift(args.blocks))


if __name__ == "__main__":
    main()
