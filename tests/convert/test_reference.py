"""The NumPy reference against PyTorch on fresh weights, against differences, and against the published numbers."""

from pathlib import Path

import numpy as np
import pytest

from jaxff.config import StudentConfig
from jaxff.convert.archive import open_archive
from jaxff.convert.layouts import find_student
from jaxff.convert.reference import reference_energy, reference_energy_and_forces
from jaxff.convert.structures import check_structures
from jaxff.convert.torch_reference import torch_energy_and_forces, torch_student
from tests.torch_student import SMALL, random_tensors

CONFIGS = [SMALL, StudentConfig(hidden_dim=16, num_interactions=3, num_rbf=5, cutoff=3.0, max_z=17)]


@pytest.mark.parametrize("config", CONFIGS)
def test_against_torch_on_random_weights(config: StudentConfig) -> None:
    pytest.importorskip("torch")
    tensors = random_tensors(config, seed=config.num_rbf)
    model = torch_student(config, tensors)
    structures = check_structures(config.cutoff, config.max_z)
    assert len(structures) == 7
    rng = np.random.default_rng(1)
    structures["random"] = rng.integers(1, 18, 8), rng.normal(scale=2.0, size=(8, 3))
    for name, structure in structures.items():
        energy, forces = reference_energy_and_forces(tensors, config, *structure)
        other, others = torch_energy_and_forces(model, *structure)
        assert abs(energy - other) <= 1e-11, name
        assert np.abs(forces - others).max() <= 1e-10, name


def test_forces_against_differences() -> None:
    tensors = random_tensors()
    numbers, positions = check_structures(SMALL.cutoff, SMALL.max_z)["ethanol"]
    _, forces = reference_energy_and_forces(tensors, SMALL, numbers, positions)
    h = 1e-5
    for atom, axis in [(0, 0), (3, 1), (8, 2)]:
        plus, minus = positions.copy(), positions.copy()
        plus[atom, axis] += h
        minus[atom, axis] -= h
        slope = reference_energy(tensors, SMALL, numbers, plus) - reference_energy(tensors, SMALL, numbers, minus)
        assert abs(forces[atom, axis] + slope / (2 * h)) <= 1e-7
    assert np.abs(forces.sum(0)).max() <= 1e-10


def test_cutoff_is_inclusive_and_isolated_atoms_feel_nothing() -> None:
    tensors = random_tensors()
    alone = 2 * reference_energy(tensors, SMALL, [6], np.zeros((1, 3)))
    for distance, same in [(SMALL.cutoff, False), (np.nextafter(SMALL.cutoff, 9.0), True), (30.0, True)]:
        positions = np.array([[0.0, 0.0, 0.0], [distance, 0.0, 0.0]])
        energy, forces = reference_energy_and_forces(tensors, SMALL, [6, 6], positions)
        assert (abs(energy - alone) < 1e-12) == same
        assert np.isfinite(forces).all()


@pytest.mark.parametrize("model", ["tiny", "original"])
def test_against_the_published_numbers(student_dir: Path, model: str) -> None:
    path = student_dir / f"{model}.pt"
    student = find_student(str(path), open_archive(path))
    with np.load(student_dir / "parity_public.npz") as data:
        parity = dict(data)
    small = np.flatnonzero(parity["natoms"] <= 6)
    assert len(small) > 20
    for i in small:
        atoms = slice(parity["offset"][i], parity["offset"][i + 1])
        energy, forces = reference_energy_and_forces(
            student.tensors, student.config, parity["numbers"][atoms], parity["positions"][atoms]
        )
        assert abs(energy - parity[f"energy_{model}_f64"][i]) <= 1e-10
        if not parity["force_ill_defined"][i]:
            assert np.abs(forces - parity[f"forces_{model}_f64"][atoms]).max() <= 1e-9
