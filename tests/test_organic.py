"""The model that ships, against labels of GFN2-xTB that are in the repository, on molecules that it never saw."""

from pathlib import Path

import numpy as np
import pytest
from ase.build import molecule
from ase.optimize import BFGS
from scipy.spatial.transform import Rotation

import jaxff
from jaxff.errors import StructureError
from jaxff.potential import Potential
from jaxff.train.frames import Frames
from jaxff.train.hdf5 import read_hdf5

REFERENCE = Path(__file__).parents[1] / "experiments" / "organic_gfn2" / "reference"


@pytest.fixture(scope="module")
def organic() -> Potential:
    return jaxff.load_potential()


@pytest.fixture(scope="module")
def frames() -> Frames:
    """Frames at 300 K of 25 to 28 atoms, which share one compilation."""
    everything = read_hdf5(REFERENCE / "frames_300K.h5").frames
    return everything.select(np.flatnonzero((everything.num_atoms > 24) & (everything.num_atoms <= 28))[::3])


def test_forces_on_unseen_molecules(organic: Potential, frames: Frames) -> None:
    assert len(frames) >= 5
    for name, bound in (("organic", 0.045), ("organic-small", 0.075)):
        potential = organic if name == "organic" else jaxff.load_potential(name)
        found = np.concatenate([potential.energy_and_forces(f.numbers, f.positions)[1] for f in frames])
        assert np.abs(found - frames.forces).mean() < bound, name


def test_differences_of_energies_within_a_molecule(organic: Potential) -> None:
    frames = read_hdf5(REFERENCE / "frames_300K.h5").frames
    name = frames.molecules[int(np.argmin(frames.num_atoms))]
    own = [frame for frame in frames if frame.molecule == name]
    found = np.array([organic.energy(frame.numbers, frame.positions) for frame in own])
    teacher = np.array([frame.energy for frame in own])
    assert np.abs((found - found.mean()) - (teacher - teacher.mean())).max() < 0.005 * len(own[0].numbers)


def test_the_energy_does_not_depend_on_orientation_and_order(frames: Frames) -> None:
    potential = jaxff.load_potential(dtype="float64")
    numbers, positions, *_ = frames[0]
    energy = potential.energy(numbers, positions)
    order = np.random.default_rng(0).permutation(len(numbers))
    turned = Rotation.random(random_state=0).apply(positions)
    assert potential.energy(numbers, turned) == pytest.approx(energy, abs=1e-10)
    assert potential.energy(numbers[order], positions[order]) == pytest.approx(energy, abs=1e-10)


def test_water_relaxes_to_the_teachers_minimum(organic: Potential) -> None:
    atoms = molecule("H2O")
    atoms.calc = jaxff.JaxffCalculator(organic)
    assert BFGS(atoms, logfile=None).run(fmax=0.005, steps=100)
    assert atoms.get_distance(0, 1) == pytest.approx(0.959, abs=0.005)  # GFN2-xTB; the published student: 1.23 Å
    assert atoms.get_angle(1, 0, 2) == pytest.approx(107.2, abs=1.0)


def test_the_committee_doubts_what_is_far_from_the_data() -> None:
    atoms = molecule("CH3CH2OH")
    atoms.calc = jaxff.JaxffCalculator(uncertainty=True)
    atoms.get_forces()
    calm = atoms.calc.results["large_error_probability"]
    atoms.positions[0] += [0.35, 0.35, 0.0]
    atoms.get_forces()
    assert calm < 0.5 < atoms.calc.results["large_error_probability"]


def test_what_it_does_not_know_is_refused(organic: Potential) -> None:
    with pytest.raises(StructureError, match="elements H C N O F P S Cl Br, received Si"):
        organic.energy([14, 1, 1, 1, 1], molecule("SiH4").positions)
    with pytest.raises(StructureError, match="9 electrons, an odd number"):
        organic.energy([6, 1, 1, 1], molecule("CH3").positions)
