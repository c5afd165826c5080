"""Defects of a model, measured on the model itself: for the certificate, and in plain sentences.

Works for any potential with energy(numbers, positions) and energy_and_forces(numbers, positions).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from jaxff.convert.structures import ase_molecule, rotation_structures

ROTATIONS = 20
JUMP_ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17)
JUMP_WIDTH = 1e-6  # Å, either side of the cutoff
CONTACT = 1e-3  # Å, two hydrogen atoms that close
WORTH_SAYING = 1e-5  # eV; below, a defect is rounding
_WATER_BOND, _WATER_ANGLE = 0.957, 104.5  # Å, degrees; experiment
_SEED = 20
_NEGLIGIBLE_WALL = 100.0  # eV


class _Evaluates(Protocol):
    def energy(self, numbers: Any, positions: Any) -> float: ...

    def energy_and_forces(self, numbers: Any, positions: Any) -> tuple[float, np.ndarray]: ...


def measure_defects(potential: _Evaluates, cutoff: float, max_z: int) -> dict[str, Any]:
    """All measurements below, as plain JSON: energies in eV, forces in eV/Å, lengths in Å, angles in degrees."""
    rotation = {
        name: dict(zip(("energy_eV", "force_eV_per_A"), rotation_spread(potential, *structure), strict=True))
        for name, structure in rotation_structures(max_z).items()
    }
    jumps = cutoff_jumps(potential, cutoff, [z for z in JUMP_ELEMENTS if z <= max_z])
    return {
        "rotations": ROTATIONS,
        "rotation_spread": rotation,
        "cutoff_A": cutoff,
        "cutoff_jump_eV": jumps,
        "largest_cutoff_jump_eV": max((abs(jump) for jump in jumps.values()), default=0.0),
        "hydrogen_contact_eV": contact_energy(potential),
        "relaxed_water": relaxed_water(potential) if max_z >= 8 else None,
    }


def rotation_spread(
    potential: _Evaluates, numbers: Any, positions: Float[np.ndarray, "N 3"], rotations: int = ROTATIONS
) -> tuple[float, float]:
    """Peak-to-peak energy (eV) over random rotations, and the largest |F(R Q) - F(R) Q| (eV/Å).

    Both vanish for an energy that doesn't depend on the orientation. The rotations are the same at each call.
    """
    from scipy.spatial.transform import Rotation

    centred = np.asarray(positions, np.float64) - np.mean(positions, axis=0)
    energies, deviation = [], 0.0
    first, reference = potential.energy_and_forces(numbers, centred)
    energies.append(first)
    for rotation in Rotation.random(rotations, np.random.default_rng(_SEED)):
        energy, forces = potential.energy_and_forces(numbers, rotation.apply(centred))
        energies.append(energy)
        deviation = max(deviation, float(np.abs(forces - rotation.apply(np.array(reference))).max()))
    return float(np.ptp(energies)), deviation


def cutoff_jumps(potential: _Evaluates, cutoff: float, elements: Sequence[int] = JUMP_ELEMENTS) -> dict[str, float]:
    """Pair of elements ('C-H') -> E just outside the cutoff minus E just inside (eV), two isolated atoms along x."""
    from ase.data import chemical_symbols

    def energy(pair: tuple[int, int], distance: float) -> float:
        return potential.energy(np.array(pair), np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]]))

    jumps = {}
    for pair in combinations_with_replacement(elements, 2):
        name = "-".join(sorted(chemical_symbols[z] for z in pair))
        jumps[name] = energy(pair, cutoff + JUMP_WIDTH) - energy(pair, cutoff - JUMP_WIDTH)
    return jumps


def contact_energy(potential: _Evaluates) -> float:
    """E of two hydrogen atoms 0.001 Å apart minus E at 0.74 Å (eV): huge where there is a repulsive wall."""
    near, far = (
        potential.energy(np.array([1, 1]), np.array([[0.0, 0.0, 0.0], [d, 0.0, 0.0]])) for d in (CONTACT, 0.74)
    )
    return float(near - far)


def relaxed_water(potential: _Evaluates) -> dict[str, Any] | None:
    """Both O-H (Å, the shorter first) and H-O-H (degrees) of relaxed water; None where no minimum is found."""
    from scipy.optimize import minimize

    numbers, start = ase_molecule("H2O")

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        energy, forces = potential.energy_and_forces(numbers, x.reshape(3, 3))
        return energy, -np.asarray(forces, np.float64).ravel()

    result = minimize(objective, start.ravel(), jac=True, method="BFGS", options={"gtol": 1e-3, "maxiter": 200})
    oxygen, one, two = result.x.reshape(3, 3)
    a, b = one - oxygen, two - oxygen
    lengths = np.linalg.norm(a), np.linalg.norm(b)
    if not np.isfinite(result.x).all() or np.abs(result.jac).max() > 0.02 or not 0.3 < min(lengths) < max(lengths) < 3:
        return None
    angle = np.degrees(np.arccos(np.clip(a @ b / (lengths[0] * lengths[1]), -1.0, 1.0)))
    return {"OH_A": sorted(map(float, lengths)), "HOH_degrees": float(angle)}


def describe_defects(certificate: Mapping[str, Any] | None) -> list[str]:
    """The defects in a certificate as plain sentences, one each; empty where none is worth a word."""
    measured = (certificate or {}).get("defects")
    if not measured:
        return []
    sentences = [*_rotation_sentence(measured), *_cutoff_sentence(measured)]
    contact = measured.get("hydrogen_contact_eV")
    if contact is not None and contact < _NEGLIGIBLE_WALL:
        sentences.append(
            f"There is no repulsive wall at short range: two H atoms {CONTACT:g} Å apart lie {contact:+.2f} eV from"
            " their energy at 0.74 Å, so atoms can fall into each other."
        )
    water = measured.get("relaxed_water")
    if water and (
        max(abs(bond - _WATER_BOND) for bond in water["OH_A"]) > 0.05 or abs(water["HOH_degrees"] - _WATER_ANGLE) > 3.0
    ):
        sentences.append(
            f"Relaxed water has O-H {water['OH_A'][0]:.2f} and {water['OH_A'][1]:.2f} Å at {water['HOH_degrees']:.0f}°"
            f" (experiment: {_WATER_BOND:.2f} Å and {_WATER_ANGLE:.1f}°)."
        )
    return sentences


def _rotation_sentence(measured: Mapping[str, Any]) -> list[str]:
    spread = measured.get("rotation_spread", {})
    if not spread or max(item["energy_eV"] for item in spread.values()) < WORTH_SAYING:
        return []
    shown = ", ".join(f"{item['energy_eV']:.3g} eV for {name}" for name, item in spread.items())
    force = max(item["force_eV_per_A"] for item in spread.values())
    return [
        f"The energy depends on the orientation: it varies by {shown} over {measured['rotations']} rotations,"
        f" and forces by up to {force:.2g} eV/Å."
    ]


def _cutoff_sentence(measured: Mapping[str, Any]) -> list[str]:
    jumps = measured.get("cutoff_jump_eV", {})
    if not jumps or measured["largest_cutoff_jump_eV"] < WORTH_SAYING:
        return []
    sizes = {name: abs(jump) for name, jump in jumps.items()}
    worst = max(sizes, key=lambda name: sizes[name])
    return [
        f"The energy jumps when a pair of atoms crosses the cutoff of {measured['cutoff_A']:g} Å: by"
        f" {min(sizes.values()):.2g} to {sizes[worst]:.2g} eV for two isolated atoms (most for {worst}),"
        " so NVE energy is not conserved where pairs cross."
    ]
