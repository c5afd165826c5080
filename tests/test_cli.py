"""The command line, as a user meets it: what it prints, what it writes, and how it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import ase.io
import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from typer.testing import CliRunner, Result

import jaxff
from jaxff.checkpoint import save_checkpoint
from jaxff.cli import app
from jaxff.config import PainnConfig, StudentConfig
from jaxff.loading import load_potential
from jaxff.models import init_params

pytestmark = pytest.mark.usefixtures("compile_quickly")


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    """The one line on stderr of a run that bad input ended."""
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("jaxff: error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.output
    return result.stderr


@pytest.fixture(scope="session")
def painn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = PainnConfig(hidden_dim=8, num_interactions=1, num_rbf=8, max_z=10, repulsion="zbl")
    params = jax.tree.map(lambda x: np.asarray(0.8 * x), init_params(config, jax.random.PRNGKey(0)))
    path = tmp_path_factory.mktemp("model") / "painn.safetensors"
    save_checkpoint(path, params, config)
    return path


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = StudentConfig(hidden_dim=8, num_interactions=2, num_rbf=6, max_z=10)
    rng = np.random.default_rng(0)
    params = init_params(config, jax.random.PRNGKey(0))
    params = jax.tree.map(lambda x: np.asarray(x) + rng.normal(0.0, 0.3, x.shape).astype(np.float32), params)
    path = tmp_path_factory.mktemp("model") / "student.safetensors"
    save_checkpoint(path, params, config)
    return path


@pytest.fixture(scope="session")
def water(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("structure") / "water.xyz"
    ase.io.write(path, molecule("H2O"), format="extxyz")
    return path


def test_version_and_help() -> None:
    assert cli("--version").stdout == f"jaxff {jaxff.__version__}\n"
    for arguments in (["--help"], ["md", "--help"], ["convert", "-h"]):
        result = cli(*arguments)
        assert result.exit_code == 0
        assert "Usage" in result.stdout


def test_the_command_line_starts_without_jax() -> None:
    code = "import sys, jaxff.cli; print(sorted({'jax', 'ase', 'jax_md', 'torch', 'matplotlib'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "[]\n"


def test_molecules_are_listed() -> None:
    lines = cli("molecules").stdout.splitlines()
    assert any(line.startswith("aspirin") and "C9H8O4" in line and "21 atoms" in line for line in lines)
    assert any(line.startswith("ethanol") for line in lines)


def test_energy_prints_and_writes(painn: Path, water: Path, tmp_path: Path) -> None:
    result = cli("energy", painn, water, "--dtype", "float64", "-o", tmp_path / "out.xyz")
    assert result.exit_code == 0, result.output
    atoms = molecule("H2O")
    energy, forces = load_potential(painn, dtype="float64").energy_and_forces(atoms.numbers, atoms.positions)
    assert f"{energy:.8f} eV" in result.stdout
    assert all(f"{force:.8f}" in result.stdout for force in forces.ravel())
    read = ase.io.read(tmp_path / "out.xyz")
    assert read.get_potential_energy() == pytest.approx(energy)
    np.testing.assert_allclose(read.get_forces(), forces, atol=1e-7)


def test_inspect_tells_architecture_elements_and_defects(painn: Path, student: Path) -> None:
    result = cli("inspect", painn)
    assert result.exit_code == 0, result.output
    for word in ("painn", "8 channels", "5 Å", "H to Ne", "eV/Å", "not measured"):
        assert word in result.stdout
    result = cli("inspect", student)
    assert "crosses the cutoff" in result.stdout


def test_convert_inspect_and_back(student: Path, tmp_path: Path) -> None:
    result = cli("convert", student, "--to-torch", "-o", tmp_path / "model.pt")
    assert result.exit_code == 0, result.output
    result = cli("convert", tmp_path / "model.pt", "-o", tmp_path / "again.safetensors")
    assert result.exit_code == 0, result.output
    assert "passed" in result.stdout
    first, again = load_potential(student), load_potential(tmp_path / "again.safetensors")
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first.params, again.params))
    assert "passed" in cli("inspect", tmp_path / "again.safetensors").stdout
    assert "SHA-256" in cli("inspect", tmp_path / "model.pt").stdout


def test_md_leaves_a_run(painn: Path, water: Path, tmp_path: Path) -> None:
    (tmp_path / "md.yaml").write_text("steps: 5\nseed: 7\nrecord_every: 2\n")
    result = cli("md", painn, water, "--config", tmp_path / "md.yaml", "--steps", 6, "--dtype", "float64",
                 "-o", tmp_path / "run")  # fmt: skip
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["seed"], summary["dtype"]) == (6, 7, "float64")
    assert len(ase.io.read(tmp_path / "run" / "trajectory.xyz", index=":")) == 4
    for word in ("energy drift", "steps/s", "ns/day", "completed", "run"):
        assert word in result.stdout
    again = cli("md", painn, water, "-o", tmp_path / "run", "--steps", 2)
    assert "already holds a run" in refused(again)


def test_md_of_a_student_shows_its_defects(student: Path, tmp_path: Path) -> None:
    result = cli("md", student, "-m", "water", "-n", 2, "-t", 10, "-o", tmp_path / "run", "--quiet")
    assert result.exit_code == 0, result.output
    shown = [line for line in result.stderr.splitlines() if line.startswith("jaxff: known defect: ")]
    assert any("crosses the cutoff" in line for line in shown)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["known_defects"]) == len(shown)


def test_md_repeats_from_the_configuration_it_wrote(painn: Path, tmp_path: Path) -> None:
    one = cli("md", painn, "-m", "water", "-n", 4, "--seed", 5, "--record-every", 2, "-o", tmp_path / "a")
    other = cli("md", painn, "-m", "water", "-c", tmp_path / "a" / "config.yaml", "-o", tmp_path / "b")
    assert one.exit_code == other.exit_code == 0
    a, b = (tmp_path / name / "trajectory.xyz" for name in "ab")
    assert a.read_bytes() == b.read_bytes()


def test_bad_models_are_one_line(tmp_path: Path, water: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "folder.pt").mkdir()
    for name in ("none.pt", "none.safetensors", "text.pt", "text.safetensors", "folder.pt"):
        for command in (["inspect"], ["energy"], ["md"]):
            extra = [] if command == ["inspect"] else [water]
            output = ["-o", tmp_path / "run"] if command == ["md"] else []
            assert name in refused(cli(*command, tmp_path / name, *extra, *output))
        assert name in refused(cli("convert", tmp_path / name, "-o", tmp_path / "out.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pt", "text.pt", "text.safetensors"]


def _bad_structures(folder: Path) -> dict[str, list[str]]:
    def write(name: str, atoms: Atoms) -> str:
        ase.io.write(folder / name, atoms, format="extxyz")
        return str(folder / name)

    (folder / "broken.xyz").write_text("3\n\nH 0 0 0\n")
    (folder / "nan.xyz").write_text("1\n\nH nan 0 0\n")
    return {
        "no such file": ["nothing.xyz"],
        "broken.xyz": [str(folder / "broken.xyz")],
        "finite": [str(folder / "nan.xyz")],
        "1 to 10": [write("gold.xyz", Atoms("Au"))],
        "periodic": [write("bulk.xyz", Atoms("C", cell=[4, 4, 4], pbc=True))],
        "frame 7": [write("one.xyz", molecule("H2O")), "--index", "7"],
        "did you mean ethanol": ["--molecule", "etanol"],
        "received neither": [],
        "received both": [write("two.xyz", molecule("H2O")), "--molecule", "water"],
    }


@pytest.mark.parametrize("command", ["energy", "md"])
def test_bad_structures_are_one_line(painn: Path, tmp_path: Path, command: str) -> None:
    for match, arguments in _bad_structures(tmp_path).items():
        assert match in refused(cli(command, painn, *arguments, "-o", tmp_path / "out"))
        assert not (tmp_path / "out").exists()


def test_atoms_at_one_place_have_an_energy_but_no_dynamics(painn: Path, tmp_path: Path) -> None:
    ase.io.write(tmp_path / "x.xyz", Atoms("CO", positions=[[0, 0, 0], [0, 0, 0.04]]), format="extxyz")
    assert cli("energy", painn, tmp_path / "x.xyz").exit_code == 0
    line = refused(cli("md", painn, tmp_path / "x.xyz", "-o", tmp_path / "run"))
    assert "C (atom 0) and O (atom 1) are 0.04 Å apart" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--steps", "0"], "steps"),
        (["--timestep", "-1"], "timestep_fs"),
        (["--timestep", "nan"], "timestep_fs"),
        (["--temperature", "-1"], "temperature_K"),
        (["--seed", "-1"], "seed"),
        (["--dtype", "float16"], "dtype"),
        (["--engine", "warp"], "engine"),
        (["--ensemble", "npt"], "ensemble"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_bad_settings_are_one_line(painn: Path, water: Path, tmp_path: Path, options: list[str], match: str) -> None:
    assert match in refused(cli("md", painn, water, "-o", tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_a_misspelt_key_is_named(painn: Path, water: Path, tmp_path: Path) -> None:
    (tmp_path / "md.yaml").write_text("temprature_K: 300\n")
    line = refused(cli("md", painn, water, "-c", tmp_path / "md.yaml", "-o", tmp_path / "run"))
    assert "temprature_K" in line
    assert "temperature_K" in line.replace("temprature_K", "")


def test_outputs_that_can_not_be_written(painn: Path, water: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "file" in refused(cli("md", painn, water, "-o", tmp_path / "file"))
    assert "file" in refused(cli("md", painn, water, "-o", tmp_path / "file" / "run", "-n", 1))
    assert "nowhere" in refused(cli("energy", painn, water, "-o", tmp_path / "nowhere" / "x.xyz"))
    assert (tmp_path / "file").read_text() == "mine"


def test_unknown_options_exit_with_2() -> None:
    assert cli("md", "--stepps", "3").exit_code == 2
    assert cli("fly").exit_code == 2


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_ctrl_c_keeps_the_run(painn: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jaxff", "md", str(painn), "-m", "water", "--steps", "100000000",
               "-t", "50", "-o", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.csv"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "stopped after step" in stderr
    assert "Traceback" not in stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "interrupted"
    frames = ase.io.read(tmp_path / "run" / "trajectory.xyz", index=":")
    assert frames[-1].info["step"] == summary["steps_completed"] > 0


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_killed_run_leaves_a_readable_trajectory(painn: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "jaxff", "md", str(painn), "-m", "water", "--steps", "100000000",
               "-t", "50", "--record-every", "1", "-q", "-o", str(tmp_path / "run")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "run" / "log.csv"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_bytes().count(b"\n") > 50) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait(timeout=60)
    trajectory = tmp_path / "run" / "trajectory.xyz"
    lines = trajectory.read_bytes().splitlines(keepends=True)
    torn = len(lines) % 5 or not lines[-1].endswith(b"\n")  # 3 atoms and 2 lines a frame
    if torn:  # Linux ends a write that it is killed in at a page
        assert trajectory.stat().st_size % 4096 == 0
        trajectory.write_bytes(b"".join(lines[: (len(lines) - 1) // 5 * 5]))
    frames = ase.io.read(trajectory, index=":")
    assert len(frames) > 10
    assert [frame.info["step"] for frame in frames] == list(range(len(frames)))
