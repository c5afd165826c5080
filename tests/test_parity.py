"""Bounds of the import: the published student's own energies and forces, and a PyTorch reference on fresh weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxff.config import StudentConfig
from jaxff.convert.torch_reference import torch_energy_and_forces, torch_student
from jaxff.loading import load_potential
from tests.structures import random_structure
from tests.torch_student import random_tensors, write_student

pytestmark = pytest.mark.usefixtures("compile_quickly")


@pytest.fixture(scope="module")
def public(student_dir: Path) -> Any:
    return np.load(student_dir / "parity_public.npz")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["original", "tiny"])
def test_published_student(name: str, dtype: str, public: Any, student_dir: Path) -> None:
    potential = load_potential(student_dir / f"{name}.pt", dtype=dtype)
    means, largest = [], []
    for i, (start, end) in enumerate(zip(public["offset"][:-1], public["offset"][1:], strict=True)):
        numbers, positions = public["numbers"][start:end], public["positions"][start:end]
        energies, forces = potential.evaluate(numbers, positions)
        expected = public[f"energy_{name}_f64"][i]
        if dtype == "float64":
            assert abs(energies.sum() - expected) <= 1e-10 + 1e-12 * abs(expected), public["name"][i]
            if name == "original":
                np.testing.assert_allclose(
                    energies, public["atomic_energy_original_f64"][start:end], rtol=1e-11, atol=1e-11
                )
        assert np.isfinite(forces).all()
        if not public["force_ill_defined"][i]:
            errors = np.abs(forces - public[f"forces_{name}_f64"][start:end])
            largest.append(errors.max())
            means.append(errors.mean())
    assert max(largest) <= (1e-9 if dtype == "float64" else 1e-4)
    assert np.mean(means) <= 5e-6


@pytest.mark.parametrize(
    "config", [StudentConfig(max_z=20), StudentConfig(hidden_dim=32, num_interactions=1, max_z=20)]
)
def test_pytorch_on_fresh_weights(config: StudentConfig, tmp_path: Path) -> None:
    """Random weights, random structures of up to 60 atoms: energies and autograd forces of PyTorch in float64."""
    pytest.importorskip("torch")
    tensors = random_tensors(config, seed=5)
    module = torch_student(config, tensors)
    path = write_student(tmp_path / "student.pt", tensors, config)
    double, single = (load_potential(path, dtype=dtype) for dtype in ("float64", "float32"))
    for num_atoms in (1, 2, 9, 60):
        numbers, positions = random_structure(num_atoms, seed=num_atoms)
        expected_energy, expected = torch_energy_and_forces(module, numbers, positions)
        energy, forces = double.energy_and_forces(numbers, positions)
        assert abs(energy - expected_energy) <= 1e-10 + 1e-12 * abs(expected_energy)
        np.testing.assert_allclose(forces, expected, rtol=0, atol=1e-9)
        errors = np.abs(single.energy_and_forces(numbers, positions)[1] - expected)
        assert errors.max() <= 1e-4
        assert errors.mean() <= 5e-6
