from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.units import fs

from jaxff.errors import SimulationError
from jaxff.md.config import MDConfig
from jaxff.md.simulate import Simulation
from jaxff.md.structures import builtin_molecule
from jaxff.md.trajectory import Frames
from jaxff.md.velocities import draw_momenta, kinetic_energy
from tests.md.conftest import MakePotential


def simulate(make: MakePotential, atoms: Atoms, momenta: Any = None, **settings: Any) -> tuple[Simulation, Frames]:
    """All frames of a run, joined."""
    config = MDConfig(**({"dtype": "float64", "steps": 100, "record_every": 5} | settings))
    assert config.dtype is not None
    momenta = draw_momenta(atoms, config.temperature_K, config.seed) if momenta is None else momenta
    simulation = Simulation(make(config.dtype), atoms, momenta, config)
    blocks = [simulation.first_frame(), *simulation.run(config.steps)]
    names = Frames.__dataclass_fields__
    return simulation, Frames(**{name: np.concatenate([getattr(b, name) for b in blocks]) for name in names})


def test_energy_error_shrinks_as_the_square_of_the_time_step(painn: MakePotential) -> None:
    errors = []
    for halvings in range(3):
        dt = 0.5 / 2**halvings
        _, frames = simulate(
            painn, molecule("CH3CH2OH"), timestep_fs=dt, steps=100 * 2**halvings, record_every=2 ** (halvings + 1)
        )
        assert len(frames) == 51
        errors.append(np.std(frames.total))
    ratios = np.array(errors[:-1]) / np.array(errors[1:])
    assert np.all((ratios > 3.6) & (ratios < 4.4)), ratios


@pytest.mark.parametrize("ensemble", ["nve", "nvt_langevin"])
@pytest.mark.parametrize("neighbor_list_above", [200, 0])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_state_keeps_the_dtype(painn: MakePotential, dtype: str, neighbor_list_above: int, ensemble: str) -> None:
    before = jax.config.jax_enable_x64
    simulation, frames = simulate(
        painn, molecule("H2O"), dtype=dtype, steps=2, record_every=1, ensemble=ensemble,
        neighbor_list_above=neighbor_list_above,
    )  # fmt: skip
    state = simulation.state
    for array in (state.position, state.momentum, state.force, state.mass, frames.positions, frames.forces):
        assert array.dtype == dtype
    assert frames.potential.dtype == frames.kinetic.dtype == np.float64
    assert jax.config.jax_enable_x64 == before


def test_a_start_compiles_little(painn: MakePotential, compilations: Callable[[], int]) -> None:
    """The energy of the start, a block, and little else."""
    potential = painn("float32")
    jax.clear_caches()
    before = compilations()
    simulate(lambda _: potential, molecule("H2O"), dtype="float32", steps=2, record_every=1)
    assert 2 <= compilations() - before <= 4


def test_float64_runs_where_jax_has_float32_only(painn: MakePotential) -> None:
    potential = painn("float64")
    atoms = molecule("H2O")
    with jax.enable_x64(False):
        config = MDConfig(steps=20, dtype="float64")
        simulation = Simulation(potential, atoms, draw_momenta(atoms, 300.0, 0), config)
        inner = [frames.positions for frames in simulation.run(20)][-1][-1]
    _, frames = simulate(painn, atoms, steps=20)
    np.testing.assert_array_equal(inner, frames.positions[-1])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_same_seed_gives_the_same_bits(painn: MakePotential, dtype: str) -> None:
    first, second = (simulate(painn, molecule("CH3CH2OH"), dtype=dtype, seed=4)[1] for _ in range(2))
    for name in Frames.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def test_blocks_and_records_do_not_change_the_trajectory(painn: MakePotential) -> None:
    _, one = simulate(painn, molecule("H2O"), steps=60, record_every=20, block=20)
    _, other = simulate(painn, molecule("H2O"), steps=60, record_every=1, block=1000)
    np.testing.assert_allclose(one.positions[1:], other.positions[20::20], rtol=0, atol=1e-12)
    np.testing.assert_allclose(one.total[1:], other.total[20::20], rtol=0, atol=1e-12)


def test_the_last_step_is_recorded_whatever_the_interval(painn: MakePotential) -> None:
    _, frames = simulate(painn, molecule("H2O"), steps=23, record_every=10)
    assert frames.step.tolist() == [0, 10, 20, 23]
    np.testing.assert_allclose(frames.time_fs, [0, 5, 10, 11.5])
    assert simulate(painn, molecule("H2O"), steps=3, record_every=10)[1].step.tolist() == [0, 3]


def test_velocity_verlet_step_by_hand(painn: MakePotential) -> None:
    atoms = molecule("H2O")
    potential = painn("float64")
    dt, m = 0.5 * fs, atoms.get_masses()[:, None]
    r, p = atoms.positions.copy(), draw_momenta(atoms, 300.0, 0)
    _, force = potential.energy_and_forces(atoms.numbers, r)
    for _ in range(3):
        p = p + 0.5 * dt * force
        r = r + dt * p / m
        energy, force = potential.energy_and_forces(atoms.numbers, r)
        p = p + 0.5 * dt * force
    _, frames = simulate(painn, atoms, steps=3, record_every=3)
    # jax-md rounds the step to float32: 1e-8 of the move
    np.testing.assert_allclose(frames.positions[-1], r, rtol=0, atol=1e-8)
    np.testing.assert_allclose(frames.momenta[-1], p, rtol=0, atol=1e-7)
    np.testing.assert_allclose(frames.forces[-1], force, rtol=0, atol=1e-6)
    assert frames.potential[-1] == pytest.approx(energy, abs=1e-7)
    assert frames.kinetic[-1] == pytest.approx(kinetic_energy(p, m[:, 0]), rel=1e-7)


def test_momentum_and_angular_momentum_stay_zero(painn: MakePotential) -> None:
    atoms = molecule("CH3CH2OH")
    _, frames = simulate(painn, atoms, steps=200, record_every=20)
    assert np.abs(frames.momenta.sum(axis=1)).max() < 1e-11
    assert np.abs(np.cross(frames.positions, frames.momenta).sum(axis=1)).max() < 1e-10


def test_neighbor_list_equals_all_pairs(painn: MakePotential) -> None:
    atoms = builtin_molecule("ibuprofen")
    _, dense = simulate(painn, atoms, steps=60, temperature_K=600.0)
    _, listed = simulate(painn, atoms, steps=60, temperature_K=600.0, neighbor_list_above=0, neighbor_skin=0.1)
    np.testing.assert_allclose(listed.potential, dense.potential, rtol=0, atol=1e-10)
    np.testing.assert_allclose(listed.positions, dense.positions, rtol=0, atol=1e-9)


def test_an_overflowing_neighbor_list_is_made_longer_and_the_block_repeated(painn: MakePotential) -> None:
    one, other = molecule("CH3CH2OH"), molecule("CH3CH2OH")
    other.translate((0.0, 0.0, 10.0))
    atoms = one + other
    # two molecules that fly into each other
    velocity = np.where(np.arange(len(atoms)) < len(one), 0.07, -0.07)[:, None] * np.array([0.0, 0.0, 1.0 / fs])
    momenta = atoms.get_masses()[:, None] * velocity
    settings = {"steps": 200, "timestep_fs": 0.25, "max_temperature_K": 1e6}
    simulation, listed = simulate(painn, atoms, momenta, neighbor_list_above=0, **settings)
    _, dense = simulate(painn, atoms, momenta, **settings)
    assert simulation.reallocations >= 1
    assert listed.step.tolist() == dense.step.tolist()
    np.testing.assert_allclose(listed.potential, dense.potential, rtol=0, atol=1e-8)


def test_isolated_atoms_and_single_atoms(painn: MakePotential) -> None:
    atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, 50.0]])
    for above in (0, 200):
        _, frames = simulate(painn, atoms, steps=10, neighbor_list_above=above)
        assert np.ptp(frames.total) < 1e-12
    _, frames = simulate(painn, Atoms("C"), steps=10)
    assert np.ptp(frames.positions) == 0.0
    assert np.all(frames.temperature == 0.0)


def test_an_explosion_is_an_error_after_the_good_frames(painn: MakePotential) -> None:
    atoms = Atoms("OH2", positions=[[0, 0, 0], [0, 0, 0.15], [0, 1, 0]])
    config = MDConfig(steps=200, record_every=1, dtype="float64", timestep_fs=1.0, max_temperature_K=5000.0)
    simulation = Simulation(painn("float64"), atoms, draw_momenta(atoms, 300.0, 0), config)
    seen: list[Frames] = []
    with pytest.raises(SimulationError, match=r"exploded by step \d+: the temperature reached"):
        seen.extend(simulation.run(200))
    assert all((frames.temperature < 5000.0).all() for frames in seen)


def test_langevin_reaches_the_temperature_of_its_bath(painn: MakePotential) -> None:
    atoms = molecule("CH3CH2OH")
    simulation, frames = simulate(
        painn, atoms, np.zeros((9, 3)), ensemble="nvt_langevin", steps=6000, friction_per_ps=50.0, record_every=10
    )
    assert simulation.degrees_of_freedom == 27
    assert frames.temperature[0] == 0.0
    assert frames.temperature[200:].mean() == pytest.approx(300.0, rel=0.12)
