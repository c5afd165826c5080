"""Pretrained models: by name, by card, by default; what they refuse; and the arguments [MODEL] [STRUCTURE]."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.io
import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from typer.testing import CliRunner, Result

import jaxff
from jaxff import pretrained
from jaxff.checkpoint import save_checkpoint
from jaxff.cli import app
from jaxff.config import PainnConfig
from jaxff.errors import CheckpointError, ConfigError, StructureError
from jaxff.interop.ase import JaxffCalculator
from jaxff.models import init_params
from jaxff.potential import Potential

pytestmark = pytest.mark.usefixtures("compile_quickly")
ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35)
CONFIG = PainnConfig(
    hidden_dim=8, num_interactions=1, num_rbf=8, max_z=35, elements=ELEMENTS, repulsion="zbl", closed_shell=True
)
FIELDS: dict[str, Any] = {
    "description": "stand-in of the tests",
    "teacher": "nobody",
    "data": "none",
    "made": "2026-01-01",
    "not_for": ["anything"],
    "errors": [{"what": "force error", "value": 12.345, "unit": "meV/Å", "on": "3 frames"}],
    "uncertainty": {"members": ["organic", "organic-small"], "scale": 2.0, "logistic": [1.0, 0.5]},
}


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(result: Result) -> str:
    assert result.exit_code == 2, (result.exit_code, result.output, result.exception)
    assert result.stderr.startswith("jaxff: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two stand-ins and their cards."""
    folder = tmp_path_factory.mktemp("pretrained")
    for seed, name in enumerate(("organic", "organic-small")):
        params = jax.tree.map(np.asarray, init_params(CONFIG, jax.random.key(seed)))
        save_checkpoint(folder / f"{name}.safetensors", params, CONFIG, {"training": {"steps": 7}})
        pretrained.write_card(folder / f"{name}.safetensors", **FIELDS)
    return folder


@pytest.fixture(autouse=True)
def here(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", shelf)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def water() -> Path:
    ase.io.write("water.xyz", molecule("H2O"), format="extxyz")
    return Path("water.xyz")


def energy_of(model: str | Path = "organic") -> Any:
    """Of water, as the command line has it in float32."""
    atoms = molecule("H2O")
    return pytest.approx(jaxff.load_potential(model).energy_and_forces(atoms.numbers, atoms.positions)[0], abs=2e-6)


def printed(result: Result) -> float:
    assert result.exit_code == 0, result.output
    return float(result.stdout.split()[1])


def test_names_and_default(shelf: Path) -> None:
    assert pretrained.names() == ["organic", "organic-small"]
    one, other, small = jaxff.load_potential(), jaxff.load_potential("organic"), jaxff.load_potential("organic-small")
    same = [bool((a == b).all()) for a, b in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True)]
    assert all(same)
    assert energy_of("organic").expected != energy_of("organic-small")
    assert JaxffCalculator().potential.config == small.config == CONFIG
    assert JaxffCalculator("organic-small", dtype="float64").potential.dtype == np.float64
    assert energy_of(shelf / "organic.safetensors").expected == energy_of()


def test_a_pretrained_name_goes_before_a_folder_of_that_name() -> None:
    Path("organic").mkdir()
    assert jaxff.load_potential("organic").config == CONFIG


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(CheckpointError, match=r"organc: no such file.*there are: organic, organic-small"):
        jaxff.load_potential("organc")


def test_nothing_on_the_shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path)
    with pytest.raises(CheckpointError, match="there are: none"):
        jaxff.load_potential()
    assert cli("models").stdout == ""


def test_a_changed_file_is_refused(shelf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shelf, tmp_path / "copy")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "copy")
    file = tmp_path / "copy" / "organic.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="SHA-256"):
        jaxff.load_potential("organic")
    jaxff.load_potential("organic-small")
    (tmp_path / "copy" / "organic.json").write_text("{}")
    with pytest.raises(CheckpointError, match="card"):
        jaxff.load_potential("organic")


def test_a_card_tells_what_the_file_holds(shelf: Path) -> None:
    card = pretrained.read_card("organic")
    file = shelf / "organic.safetensors"
    assert card.size == file.stat().st_size
    assert card.elements == ("H", "C", "N", "O", "F", "P", "S", "Cl", "Br")
    assert card.parameters == sum(x.size for x in jax.tree.leaves(jaxff.load_potential("organic").params))
    assert card.uncertainty is not None
    assert card.errors[0].text == "12.3 meV/Å (3 frames)"
    with pytest.raises(ConfigError, match=r"unknown key 'teachr'.*teacher"):
        pretrained.write_card(file, **{**FIELDS, "teachr": "x"})


def test_models_that_ship_have_valid_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", Path(pretrained.__file__).parent)
    for name in pretrained.names():
        potential = jaxff.load_potential(name)
        card = pretrained.read_card(name)
        assert card.name == name
        assert card.size < 5e6
        assert card.not_for
        assert card.errors
        assert potential.closed_shell
        assert potential.config.elements == ELEMENTS


def test_models_and_inspect_print_the_card() -> None:
    lines = cli("models").stdout.splitlines()
    assert lines[0].split()[0] == "organic"
    assert "H C N O F P S Cl Br" in lines[0]
    assert "12.3 meV/Å" in lines[1]
    shown = cli("inspect", "organic")
    assert shown.exit_code == 0, shown.output
    for word in ("Card", "stand-in", "12.3 meV/Å", "not for", pretrained.read_card("organic").sha256, "closed-shell"):
        assert word in shown.stdout
    assert "training steps" in shown.stdout


def test_every_way_to_name_model_and_structure(shelf: Path, water: Path) -> None:
    file = shelf / "organic-small.safetensors"
    for arguments, model in {
        (water,): "organic",
        ("-m", "water"): "organic",
        ("organic-small", water): "organic-small",
        ("organic-small", "-m", "water"): "organic-small",
        ("-m", "water", "organic-small"): "organic-small",
        (file, water): "organic-small",
        (file, "--molecule", "water"): "organic-small",
    }.items():
        assert printed(cli("energy", *arguments)) == energy_of(model), arguments


@pytest.mark.parametrize("command", ["energy", "md"])
def test_what_is_not_clear_is_refused(shelf: Path, water: Path, command: str) -> None:
    def line(*arguments: object) -> str:
        return refused(cli(command, *arguments, "-o", "out"))

    assert "received neither" in line()
    assert "received neither" in line("organic")
    assert "received neither" in line(shelf / "organic.safetensors")
    assert "received neither" in line("missing.pt")
    assert "received both (water.xyz and water)" in line(water, "-m", "water")
    assert "received both" in line("organic", water, "-m", "water")
    assert "in this order" in line(water, "organic")
    assert "no such file" in line("nothing.xyz")
    assert "no such file" in line("organic", "nothing.xyz")
    assert "did you mean --molecule aspirin" in line("aspirin")
    assert "there are: organic, organic-small" in line("organc", "-m", "water")
    assert "there are: organic, organic-small" in line("organc", water)
    assert not Path("out").exists()


def test_a_torch_archive_needs_no_suffix(shelf: Path, water: Path, student_dir: Path) -> None:
    os.symlink((student_dir / "tiny.pt").resolve(), "checkpoint")
    assert printed(cli("energy", "checkpoint", "-m", "water")) == energy_of("checkpoint")
    assert printed(cli("energy", "checkpoint", water)) == energy_of("checkpoint")
    assert "received neither" in refused(cli("energy", "checkpoint"))


def test_md_runs_with_the_default(water: Path) -> None:
    for run, arguments in {"a": ["-m", "water"], "b": [water], "c": ["organic", water]}.items():
        result = cli("md", *arguments, "-n", 2, "-t", 10, "-q", "-o", run)
        assert result.exit_code == 0, result.output
    log = [(Path(run) / "log.csv").read_text() for run in "bc"]
    assert log[0] == log[1]


def test_uncertainty_on_the_command_line(water: Path) -> None:
    result = cli("energy", water, "--uncertainty")
    assert result.exit_code == 0, result.output
    atoms = molecule("H2O")
    a, b = (
        jaxff.load_potential(name).energy_and_forces(atoms.numbers, atoms.positions)[1] for name in pretrained.names()
    )
    spread = np.linalg.norm(np.float64(a) - np.float64(b), axis=1)
    *rows, last = result.stdout.splitlines()[2:]
    assert [float(text.split()[-1]) for text in rows] == pytest.approx(2.0 * spread, abs=1e-4)
    probability = 1 - np.prod(1 - 1 / (1 + np.exp(-1.0 - 0.5 * np.log(spread + 1e-3))))
    assert last == f"probability that a force is off by more than 0.2 eV/Å: {probability:.0%}"
    assert "no calibrated" in refused(cli("energy", "organic-small", water, "--uncertainty"))


def with_info(**info: Any) -> Atoms:
    atoms = molecule("H2O")
    atoms.info.update(info)
    return atoms


def with_charges(charges: list[float]) -> Atoms:
    return Atoms("OHH", positions=molecule("H2O").positions, charges=charges)


REFUSED: dict[str, Callable[[], Atoms]] = {
    "an odd number": lambda: Atoms("OH", positions=[[0, 0, 0], [0, 0, 0.97]]),
    "charge 1": lambda: with_info(charge=1),
    "charge -1.0": lambda: with_info(charge=-1.0),
    "charge unknown": lambda: with_info(charge="unknown"),
    "total_charge nan": lambda: with_info(total_charge=float("nan")),
    "multiplicity 3": lambda: with_info(multiplicity=3),
    "spin 2": lambda: with_info(spin=2),
    "sum to 1": lambda: with_charges([0.0, 0.0, 1.0]),
    "magnetic moments": lambda: molecule("O2"),
    "elements H C N O F P S Cl Br, received Si": lambda: molecule("SiH4"),
    "Br, received I ": lambda: Atoms("HI", positions=[[0, 0, 0], [0, 0, 1.6]]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_ions_radicals_and_other_elements_are_refused(message: str) -> None:
    atoms = REFUSED[message]()
    atoms.calc = JaxffCalculator()
    with pytest.raises(StructureError, match=message):
        atoms.get_potential_energy()
    with pytest.raises(StructureError, match=message):
        jaxff.md.run(jaxff.load_potential(), atoms, output="out")
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["energy", "md"])
def test_the_command_line_refuses_a_charge_in_the_file(command: str) -> None:
    ase.io.write("ion.xyz", with_info(charge=1), format="extxyz")
    assert "charge 1" in refused(cli(command, "ion.xyz", "-o", "out"))
    assert "closed-shell" in refused(cli(command, "-m", "CH3", "-o", "out"))
    assert not Path("out").exists()


def test_what_is_neutral_passes() -> None:
    for atoms in (with_info(charge=0, multiplicity=1, spin=0), with_charges([-0.83, 0.41, 0.41]), molecule("O3")):
        atoms.calc = JaxffCalculator()
        assert np.isfinite(atoms.get_potential_energy())


def test_a_charge_that_comes_later_is_seen() -> None:
    atoms = molecule("H2O")
    atoms.calc = JaxffCalculator()
    atoms.get_potential_energy()
    atoms.set_initial_charges([1.0, 0.0, 0.0])
    with pytest.raises(StructureError, match="initial charges"):
        atoms.get_forces()
    atoms.set_initial_charges(None)
    atoms.info["charge"] = 2
    with pytest.raises(StructureError, match="charge 2"):
        atoms.get_potential_energy()


def test_an_open_model_takes_them_all() -> None:
    config = CONFIG.model_copy(update={"closed_shell": False})
    potential = Potential(init_params(config, jax.random.key(0)), config)
    for message in ("an odd number", "charge 1", "magnetic moments"):
        atoms = REFUSED[message]()
        atoms.calc = JaxffCalculator(potential)
        assert np.isfinite(atoms.get_potential_energy())


def test_jax_md_refuses_a_radical() -> None:
    from jaxff.interop import jax_md as adapter

    with pytest.raises(StructureError, match="odd number"):
        adapter.energy(jaxff.load_potential(), [1, 6], lambda a, b, **kwargs: a - b)


def test_the_card_is_json_a_person_can_read(shelf: Path) -> None:
    card = json.loads((shelf / "organic.json").read_text(encoding="utf-8"))
    assert card["errors"][0]["unit"] == "meV/Å"
    assert "meV/Å" in (shelf / "organic.json").read_text(encoding="utf-8")
