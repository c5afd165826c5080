import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from jaxff.errors import ConfigError, SimulationError, StructureError
from jaxff.md import MDConfig, Summary, load_config, run
from jaxff.md.progress import Status
from jaxff.md.report import EnergyConservation, energy_conservation
from jaxff.potential import Potential
from tests.md.conftest import MakePotential

FILES = {"trajectory.xyz", "log.csv", "config.yaml", "summary.json", "energy.png"}


@pytest.fixture(scope="module")
def finished(painn: MakePotential, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Summary, list[Status]]:
    """A short run of heavy water, relaxed before."""
    folder = tmp_path_factory.mktemp("md") / "deep" / "run"
    atoms = molecule("H2O")
    atoms.set_masses([15.999, 2.014, 2.014])
    told: list[Status] = []
    config = MDConfig(steps=45, record_every=10, relax=True, relax_fmax=0.05, seed=3)
    summary = run(painn("float64"), atoms, config, folder, progress=told.append, known_defects=("it is random",))
    return folder, summary, told


def test_a_run_leaves_five_files(finished: tuple[Path, Summary, list[Status]]) -> None:
    folder, summary, _ = finished
    assert {path.name for path in folder.iterdir()} == FILES
    assert json.loads((folder / "summary.json").read_text()) == json.loads(summary.model_dump_json())
    assert (folder / "energy.png").read_bytes().startswith(b"\x89PNG")
    config = load_config(folder / "config.yaml")
    assert (config.steps, config.seed, config.dtype, config.engine) == (45, 3, "float64", "xla")


def test_summary_is_complete(finished: tuple[Path, Summary, list[Status]]) -> None:
    _, summary, _ = finished
    assert (summary.status, summary.steps_completed, summary.frames) == ("completed", 45, 6)
    assert summary.time_ps == pytest.approx(0.0225)
    assert (summary.degrees_of_freedom, summary.atoms, summary.formula) == (3, 3, "H2O")
    assert summary.conservation is not None
    assert summary.relaxation is not None
    assert summary.relaxation["converged"]
    assert summary.relaxation["energy_after"] < summary.relaxation["energy_before"]
    assert summary.steps_per_second is not None
    assert summary.ns_per_day == pytest.approx(summary.steps_per_second * 0.5e-6 * 86400)
    assert summary.known_defects == ("it is random",)
    assert {"jaxff", "jax", "jax-md", "ase", "numpy", "python"} <= set(summary.versions)
    assert summary.model["config"]["architecture"] == "painn"


def test_progress_is_told(finished: tuple[Path, Summary, list[Status]]) -> None:
    _, _, told = finished
    assert told[-1].step == told[-1].steps == 45
    assert [status.step for status in told] == sorted(status.step for status in told)
    assert told[-1].steps_per_second > 0


def test_ase_reads_the_trajectory_back(finished: tuple[Path, Summary, list[Status]], painn: MakePotential) -> None:
    folder, _, _ = finished
    frames = ase.io.read(folder / "trajectory.xyz", index=":")
    potential = painn("float64")
    assert [frame.info["step"] for frame in frames] == [0, 10, 20, 30, 40, 45]
    for frame in frames:
        energy, forces = potential.energy_and_forces(frame.numbers, frame.positions)
        assert frame.get_potential_energy() == pytest.approx(energy, abs=1e-8)
        np.testing.assert_allclose(frame.get_forces(), forces, rtol=0, atol=1e-7)
        assert frame.get_kinetic_energy() == pytest.approx(frame.info["kinetic_energy"], abs=1e-7)
        np.testing.assert_allclose(frame.get_masses(), [15.999, 2.014, 2.014])
        assert np.abs(frame.get_momenta().sum(axis=0)).max() < 1e-8
        assert frame.info["time_fs"] == frame.info["step"] * 0.5
        assert not frame.pbc.any()


def test_the_log_agrees_with_the_trajectory(finished: tuple[Path, Summary, list[Status]]) -> None:
    folder, summary, _ = finished
    with (folder / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    frames = ase.io.read(folder / "trajectory.xyz", index=":")
    assert list(rows[0]) == ["step", "time_fs", "potential_eV", "kinetic_eV", "total_eV", "temperature_K"]
    assert len(rows) == len(frames)
    for row, frame in zip(rows, frames, strict=True):
        assert float(row["potential_eV"]) == pytest.approx(frame.get_potential_energy(), abs=1e-9)
        assert float(row["total_eV"]) == pytest.approx(frame.get_total_energy(), abs=1e-7)
        assert float(row["temperature_K"]) == pytest.approx(frame.info["temperature_K"], abs=1e-3)
    assert float(rows[-1]["total_eV"]) == pytest.approx(summary.energy_end_eV, abs=1e-9)


def test_a_second_run_refuses_to_replace_the_first(painn: MakePotential, tmp_path: Path) -> None:
    config = MDConfig(steps=2, record_every=1)
    run(painn("float32"), molecule("H2O"), config, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(SimulationError, match="already holds a run"):
        run(painn("float32"), molecule("CH4"), config, tmp_path)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    run(painn("float32"), molecule("CH4"), config, tmp_path, overwrite=True)
    assert len(ase.io.read(tmp_path / "trajectory.xyz")) == 5
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_stopping_early_keeps_a_whole_run(painn: MakePotential, tmp_path: Path) -> None:
    config = MDConfig(steps=1000, record_every=5)
    summary = run(painn("float32"), molecule("H2O"), config, tmp_path, stop=lambda: True)
    assert summary.status == "interrupted"
    assert 0 < summary.steps_completed < 1000
    assert {path.name for path in tmp_path.iterdir()} == FILES
    frames = ase.io.read(tmp_path / "trajectory.xyz", index=":")
    assert frames[-1].info["step"] == summary.steps_completed


def test_an_explosion_keeps_what_came_before(painn: MakePotential, tmp_path: Path) -> None:
    atoms = Atoms("OH2", positions=[[0, 0, 0], [0, 0, 0.15], [0, 1, 0]])
    config = MDConfig(steps=200, record_every=1, max_temperature_K=5000.0)
    with pytest.raises(SimulationError, match="exploded"):
        run(painn("float64"), atoms, config, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "failed"
    assert len(ase.io.read(tmp_path / "trajectory.xyz", index=":")) >= 1


BAD: dict[str, tuple[Callable[[], Atoms], dict[str, Any], type[Exception], str]] = {
    "one place": (lambda: Atoms("CO", positions=np.zeros((2, 3))), {}, StructureError, "at one place"),
    "no atoms": (Atoms, {}, StructureError, "at least one atom"),
    "nan": (lambda: Atoms("H", positions=[[np.nan, 0, 0]]), {}, StructureError, "finite"),
    "periodic": (lambda: Atoms("H", cell=[9, 9, 9], pbc=True), {}, StructureError, "periodic"),
    "unknown element": (lambda: Atoms("Og"), {}, StructureError, "118"),
    "other dtype": (lambda: Atoms("H"), {"dtype": "float64"}, ConfigError, "dtype float64"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_writes_nothing(painn: MakePotential, tmp_path: Path, case: str) -> None:
    atoms, settings, error, match = BAD[case]
    with pytest.raises(error, match=match):
        run(painn("float32"), atoms(), MDConfig(steps=2, **settings), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_output_that_is_a_file_is_refused(painn: MakePotential, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(SimulationError, match="file"):
            run(painn("float32"), molecule("H2O"), MDConfig(steps=1), output)
    assert (tmp_path / "file").read_text() == "x"


def test_drift_is_that_of_a_line() -> None:
    time = np.linspace(0.0, 2000.0, 41)
    wave = 0.01 * np.cos(np.pi * np.arange(41))
    fit = energy_conservation(time, 5.0 + 0.003 * time * 1e-3 + wave, atoms=10)
    assert isinstance(fit, EnergyConservation)
    assert fit.drift_meV_per_atom_per_ps == pytest.approx(0.3, abs=3 * fit.drift_standard_error)
    assert fit.fluctuation_rms_meV_per_atom == pytest.approx(1.0, rel=0.01)
    assert fit.fluctuation_peak_to_peak_meV_per_atom == pytest.approx(2.0, rel=0.4)
    assert energy_conservation(time[:2], time[:2], 1) is None


def test_the_original_student_on_ethanol(student_dir: Path, tmp_path: Path) -> None:
    """NVE, 1 ps at 0.5 fs: 0.30 meV drift of the total energy (student-model.md)."""
    from jaxff.loading import load_potential

    potential: Potential = load_potential(student_dir / "original.pt", dtype="float64")
    config = MDConfig(steps=2000, relax=True, temperature_K=300.0)
    summary = run(potential, molecule("CH3CH2OH"), config, tmp_path)
    assert summary.conservation is not None
    drift = summary.conservation.drift_meV_per_atom_per_ps * summary.atoms * summary.time_ps
    assert abs(drift) < 0.5
    assert summary.conservation.fluctuation_peak_to_peak_meV_per_atom < 0.3
