"""Parity and conservation of the fused engine on a GPU, against float64 and against the XLA engine.

    python experiments/speed/check.py original.pt PARITY.npz -o experiments/speed/results/h200_check.json [--seconds 60]

Forces of the parity structures (see shared/student/README.md for the file, which has those of the checkpoints
original.pt and tiny.pt), and of two molecules by the shipped PaiNN,
by the kernels that serve a molecule and by those that serve many atoms; of 16, 64 and 160 aspirins at once by both
models; NVE of ethanol for 1 ps at 0.5 fs with both engines from the same start; the same trajectory bit for bit in two
runs.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.build import molecule
from results import check_output, refuse, write

import jaxff
from jaxff import interop, kernels
from jaxff.md.structures import builtin_molecule
from jaxff.neighbors import bucket
from jaxff.units import fs, kB

ETHANOL = "CH3CH2OH"
BATCHES = (16, 64, 160)  # which kernels for few, some and many small molecules serve
CHECKS = ("organic", "student", "many", "batch", "nve", "nve-xla")
BUCKETS = (4, 12, 20, 24, 48, 64)  # padded sizes that are compiled for the parity structures


def parity(potential: jaxff.Potential, data: Any, expected: np.ndarray, seconds: float) -> dict[str, Any]:
    """Largest and mean |dF| against float64 forces of the structures' atoms, outside `force_ill_defined`."""
    begin, worst, total, count, used = time.perf_counter(), 0.0, 0.0, 0, 0
    order = np.argsort([BUCKETS.index(bucket(n)) if bucket(n) in BUCKETS else 99 for n in data["natoms"]])
    for i in order:
        too_late = time.perf_counter() - begin > seconds
        if data["force_ill_defined"][i] or bucket(int(data["natoms"][i])) not in BUCKETS or too_late:
            continue
        part = slice(*data["offset"][i : i + 2])
        forces = potential.energy_and_forces(data["numbers"][part], data["positions"][part])[1]
        error = np.abs(forces - expected[part])
        worst, total, count, used = max(worst, float(error.max())), total + error.sum(), count + error.size, used + 1
    return {"max_dF_eV_per_A": worst, "mean_dF_eV_per_A": total / max(count, 1), "structures": used}


def rattled_molecules() -> list[Atoms]:
    """Ethanol and acetamide, by 0.1 Å."""
    found = [molecule(name) for name in (ETHANOL, "CH3CONH2")]
    for atoms in found:
        atoms.rattle(0.1, seed=0)
    return found


def rattled_aspirins(count: int) -> list[Atoms]:
    """By 0.05 Å, each otherwise."""
    found = [builtin_molecule("aspirin") for _ in range(count)]
    for k, atoms in enumerate(found):
        atoms.rattle(0.05, seed=k)
    return found


def parity_of_organic() -> dict[str, float]:
    """Largest |dF| of the shipped model's fused engine against float64 and exact filters; the largest force."""
    fused, exact = jaxff.load_potential("organic"), jaxff.load_potential("organic", dtype="float64", filters="exact")
    worst, largest = 0.0, 0.0
    for atoms in rattled_molecules():
        expected = exact.energy_and_forces(atoms.numbers, atoms.positions)[1]
        error = np.abs(fused.energy_and_forces(atoms.numbers, atoms.positions)[1] - expected)
        worst, largest = max(worst, float(error.max())), max(largest, float(np.abs(expected).max()))
    return {"max_dF_eV_per_A": worst, "max_F_eV_per_A": largest}


def by_kernels_of_many(checkpoint: Path, data: Any, expected: np.ndarray, seconds: float) -> dict[str, Any]:
    """Both parities through the kernels for many atoms and many pairs (jaxff.kernels.cuda), not those of molecules."""
    limits = kernels.FEW_ATOMS, kernels.FEW_SLOTS, kernels.CUT_ATOMS
    kernels.FEW_ATOMS = kernels.FEW_SLOTS = kernels.CUT_ATOMS = 0
    jax.clear_caches()
    try:
        student = parity(jaxff.load_potential(checkpoint, engine="fused"), data, expected, seconds)
        return {"parity_many_fused": student, "parity_organic_many_fused": parity_of_organic()}
    finally:
        kernels.FEW_ATOMS, kernels.FEW_SLOTS, kernels.CUT_ATOMS = limits
        jax.clear_caches()


def parity_of_batch(model: Any, count: int) -> dict[str, Any]:
    """Largest |dF| of so many rattled aspirins under vmap against float64 and exact filters; same bits twice?"""
    from jax_md import space

    frames = rattled_aspirins(count)
    positions, numbers = np.stack([atoms.positions for atoms in frames]), frames[0].numbers
    energy = interop.jax_md.energy(jaxff.load_potential(model, engine="fused"), numbers, space.free()[0])
    gradients = jax.jit(jax.vmap(jax.grad(energy)))
    first, again = (np.asarray(gradients(jnp.asarray(positions, jnp.float32))) for _ in range(2))
    exact = jaxff.load_potential(model, dtype="float64", filters="exact")
    expected = np.stack([exact.energy_and_forces(numbers, x)[1] for x in positions])
    error = float(np.abs(-first - expected).max())
    same = bool(np.array_equal(first, again))
    return {"max_dF_eV_per_A": error, "max_F_eV_per_A": float(np.abs(expected).max()), "same_bits": same}


def drift(potential: jaxff.Potential, atoms: Atoms, blocks: int = 50, every: int = 40) -> tuple[dict[str, Any], Any]:
    """Total energy of a molecule over blocks · every steps of 0.5 fs at 300 K: slope and spread; the last positions."""
    from jax_md import quantity, simulate, space

    displacement, shift = space.free()
    energy = interop.jax_md.energy(potential, atoms.numbers, displacement)
    mass = jnp.asarray(atoms.get_masses()[:, None], potential.dtype)
    init, step = simulate.nve(energy, shift, 0.5 * fs)
    state = jax.jit(lambda r: init(jax.random.key(0), r, kB * 300, mass=mass))(
        jnp.asarray(atoms.positions, potential.dtype)
    )
    block = jax.jit(lambda s: jax.lax.fori_loop(0, every, lambda _, x: step(x), s))
    total = jax.jit(lambda s: energy(s.position) + quantity.kinetic_energy(momentum=s.momentum, mass=s.mass))
    energies = []
    for _ in range(blocks):
        state = block(state)
        energies.append(float(total(state)))
    picoseconds = np.arange(blocks) * every * 0.5e-3
    slope = np.polyfit(picoseconds, energies, 1)[0] * 1e3
    result = {"slope_meV_per_ps": slope, "peak_to_peak_meV": float(np.ptp(energies)) * 1e3, "steps": blocks * every}
    return result, np.asarray(state.position)


def twice(potential: jaxff.Potential) -> dict[str, Any]:
    """The drift of one run, and whether another ends in the same bits."""
    (first, positions), (_, again) = (drift(potential, molecule(ETHANOL)) for _ in range(2))
    return {"nve_fused": first, "same_bits_in_two_runs": bool(np.array_equal(positions, again))}


def main() -> None:
    """Run all checks and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("parity", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1e9, help="for the parity structures")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=CHECKS, help="which checks")
    args = parser.parse_args()
    check_output(args.output)
    data, reference = np.load(args.parity), f"forces_{args.checkpoint.stem}_f64"
    if reference not in data:
        refuse(f"expected {reference} in {args.parity.name}, received {', '.join(data)}")
    expected = data[reference]
    warnings.simplefilter("ignore", DeprecationWarning)
    fused = jaxff.load_potential(args.checkpoint, engine="fused")
    xla = jaxff.load_potential(args.checkpoint, engine="xla")
    report: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "engine": fused.engine,
        "filter_error": str(fused.filter_error),
    }
    write(args.output, report)
    checks: dict[str, Callable[[], dict[str, Any]]] = {
        "organic": lambda: {"parity_organic_fused": parity_of_organic()},
        "student": lambda: {"parity_fused": parity(fused, data, expected, args.seconds)},
        "many": lambda: by_kernels_of_many(args.checkpoint, data, expected, args.seconds),
        "batch": lambda: {
            f"parity_{name}batch_{count}_fused": parity_of_batch(model, count)
            for name, model in (("", args.checkpoint), ("organic_", "organic"))
            for count in BATCHES
        },
        "nve": lambda: twice(fused),
        "nve-xla": lambda: {"nve_xla": drift(xla, molecule(ETHANOL))[0]},
    }
    for name in args.only:  # written one by one: a GPU's time may run out
        found = checks[name]()
        print(found, flush=True)
        report |= found
        write(args.output, report)


if __name__ == "__main__":
    main()
