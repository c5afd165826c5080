"""Labels: right, each once, in order, whatever kills the run; what the teacher fails at; what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ase.io
import h5py
import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import Calculator, CalculatorSetupError
from ase.calculators.emt import EMT
from typer.testing import CliRunner, Result

from jaxff import pretrained
from jaxff.checkpoint import save_checkpoint
from jaxff.cli import app
from jaxff.config import PainnConfig
from jaxff.errors import ConfigError, DataError, LabelError, StructureError
from jaxff.loading import load_potential
from jaxff.models import init_params
from jaxff.train import journal as journal_module
from jaxff.train import label as label_module
from jaxff.train.data import read_frames
from jaxff.train.hdf5 import read_metadata
from jaxff.train.journal import Journal, Label
from jaxff.train.label import Structure, key_of, label, partial_path, read_structures
from jaxff.train.teachers import make_teacher

EMT_SPEC = "ase:ase.calculators.emt.EMT"
OWN = f"ase:{__name__}.Counting"


class Counting(Calculator):
    """EMT that writes down what it computes, fails at its will, and may be slow or die: a teacher from outside."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def __init__(self, log: str = "", fail: str = "", seconds: float = 0.0, die: str = "") -> None:
        super().__init__()
        self.log, self.fail, self.seconds, self.die = log, fail, seconds, die
        self.inner = EMT()

    def calculate(self, atoms: Any = None, properties: Any = None, system_changes: Any = None) -> None:
        super().calculate(atoms, properties, system_changes)
        formula = atoms.get_chemical_formula()
        time.sleep(self.seconds)
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{float(atoms.positions[0, 0])!r} {os.environ.get('OMP_NUM_THREADS')}\n")
        if formula == self.die:
            os._exit(9)
        if formula == self.fail:
            raise CalculatorSetupError("SCF not converged\nin 250 cycles")
        copy = Atoms(atoms.numbers, atoms.positions, calculator=self.inner)
        self.results = {"energy": copy.get_potential_energy(), "forces": copy.get_forces()}


def structures(count: int, names: tuple[str, ...] = ("H2O", "CH4", "C2H6")) -> list[Structure]:
    rng = np.random.default_rng(0)
    made = []
    for k in range(count):
        atoms = molecule(names[k % len(names)])
        made.append(Structure(atoms.numbers, atoms.positions + rng.normal(0.0, 0.05, atoms.positions.shape), ""))
    return made


def write(path: Path, given: list[Structure]) -> Path:
    images = [Atoms(s.numbers, s.positions, info={"smiles": s.molecule} if s.molecule else {}) for s in given]
    ase.io.write(path, images, format="extxyz")
    return path


def computed(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


# ---- teachers ----


def test_an_ase_calculator_teaches() -> None:
    atoms = molecule("CH3CH2OH")
    teacher = make_teacher(f"{EMT_SPEC}?asap_cutoff=True")
    energy, forces = teacher(atoms.numbers, atoms.positions)
    atoms.calc = EMT(asap_cutoff=True)
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
    np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-12)
    assert "ase" in teacher.versions


def test_a_jaxff_model_teaches(tmp_path: Path) -> None:
    config = PainnConfig(hidden_dim=8, num_interactions=1, num_rbf=8, max_z=10)
    params = jax.tree.map(np.asarray, init_params(config, jax.random.PRNGKey(0)))
    save_checkpoint(tmp_path / "m.safetensors", params, config)
    atoms = molecule("H2O")
    teacher = make_teacher(f"jaxff:{tmp_path / 'm.safetensors'}")
    energy, forces = teacher(atoms.numbers, atoms.positions)
    expected = load_potential(tmp_path / "m.safetensors", "float64").energy_and_forces(atoms.numbers, atoms.positions)
    assert energy == pytest.approx(expected[0], abs=1e-12)
    np.testing.assert_allclose(forces, expected[1], atol=1e-12)
    save_checkpoint(tmp_path / "m.safetensors", jax.tree.map(lambda x: 1.1 * x, params), config)
    assert make_teacher(teacher.spec).identity != teacher.identity  # another model under the same name
    with pytest.raises(StructureError):
        teacher([80, 80], [[0.0, 0.0, 0.0], [0.0, 0.0, 3.0]])


@pytest.mark.parametrize("method", ["GFN2-xTB", "GFN1-xTB"])
def test_tblite_teaches_what_its_ase_calculator_says(method: str) -> None:
    tblite = pytest.importorskip("tblite.ase")
    teacher = make_teacher(f"tblite:{method}")
    for name in ("H2O", "C6H6", "CH3CH2OH"):
        atoms = molecule(name)
        atoms.rattle(0.05, seed=1)
        energy, forces = teacher(atoms.numbers, atoms.positions)
        atoms.calc = tblite.TBLite(method=method, verbosity=0)
        assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(forces, atoms.get_forces(), atol=1e-5)


def test_tblite_does_not_remember() -> None:
    pytest.importorskip("tblite")
    teacher = make_teacher("tblite:GFN2-xTB")
    atoms = molecule("CH4")
    first, _ = teacher(atoms.numbers, atoms.positions)
    teacher(atoms.numbers, 1.1 * atoms.positions)
    assert teacher(atoms.numbers, atoms.positions)[0] == first


def test_tblite_that_does_not_converge_is_a_label_error() -> None:
    pytest.importorskip("tblite")
    atoms = molecule("CH4")
    with pytest.raises(LabelError, match=r"tblite:GFN2-xTB\?max-iter=2: SCF not converged"):
        make_teacher("tblite:GFN2-xTB?max-iter=2")(atoms.numbers, atoms.positions)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("GFN2-xTB", "expected a teacher 'tblite:METHOD'"),
        ("tblite:", "expected a teacher"),
        ("tblite:GFN3-xTB", "expected one of GFN2-xTB, GFN1-xTB"),
        ("ase:EMT", "expected 'ase:module.Class'"),
        ("ase:ase.calculators.emt.ETM", "has no class ETM"),
        ("ase:no_such_library.calculator.X", "`pip install no_such_library` may provide it"),
        (f"{OWN}?nonsense=1", "can't be made with {'nonsense': 1}"),
        (f"{OWN}?nonsense", "expected options 'key=value&key=value', received 'nonsense'"),
    ],
)
def test_teachers_that_cannot_be_made(spec: str, message: str) -> None:
    if spec.startswith("tblite:G"):
        pytest.importorskip("tblite")
    with pytest.raises(ConfigError) as caught:
        make_teacher(spec)
    assert message in str(caught.value)


def test_a_missing_tblite_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tblite", None)
    monkeypatch.setitem(sys.modules, "tblite.interface", None)
    with pytest.raises(ConfigError, match="pip install tblite"):
        make_teacher("tblite:GFN2-xTB")


# ---- labels ----


def check_labels(path: Path, expected: list[Structure]) -> None:
    """The file holds EMT's labels of `expected`, in order."""
    frames, dropped = read_frames([path])
    assert dropped == []
    assert len(frames) == len(expected)
    for frame, structure in zip(frames, expected, strict=True):
        np.testing.assert_array_equal(frame.numbers, structure.numbers)
        np.testing.assert_array_equal(frame.positions, structure.positions)
        atoms = Atoms(structure.numbers, structure.positions, calculator=EMT())
        assert frame.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
        np.testing.assert_allclose(frame.forces, atoms.get_forces(), rtol=1e-6, atol=1e-6)


def test_labels_in_the_order_of_the_input_each_once(tmp_path: Path) -> None:
    given = structures(9)
    log = tmp_path / "log"
    told: list[tuple[int, int, int]] = []
    result = label(
        [*given, given[4], given[0]],
        f"{OWN}?log={log}",
        tmp_path / "a.h5",
        progress=lambda *now: told.append(now),
    )
    assert (result.labels, result.made, result.duplicates, result.failed) == (9, 9, 2, {})
    assert told == [(k, 9, 0) for k in range(1, 10)]
    assert len(computed(log)) == 9
    check_labels(tmp_path / "a.h5", given)
    assert not partial_path(tmp_path / "a.h5").exists()
    attributes, _ = read_metadata(tmp_path / "a.h5")
    assert attributes["teacher"] == f"{OWN}?log={log}"
    assert attributes["count"] == 9
    assert "ase" not in json.loads(attributes["versions"]) or json.loads(attributes["versions"])["ase"]


def test_a_finished_file_is_taken_up_and_added_to(tmp_path: Path) -> None:
    given = structures(8)
    log = tmp_path / "log"
    spec = f"{OWN}?log={log}"
    label(given[:5], spec, tmp_path / "a.h5")
    before = (tmp_path / "a.h5").read_bytes()
    assert label(given[2:4], spec, tmp_path / "a.h5").made == 0
    assert (tmp_path / "a.h5").read_bytes() == before
    result = label([*given[5:], *given[3:5]], spec, tmp_path / "a.h5")
    assert (result.labels, result.made) == (8, 3)
    assert len(computed(log)) == 8
    check_labels(tmp_path / "a.h5", [*given[:3], *given[5:], *given[3:5]])


def test_processes_give_the_same_file(tmp_path: Path) -> None:
    """Byte for byte; each process with one thread for its libraries."""
    given = structures(30)
    log = tmp_path / "log"
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    before = dict(os.environ)
    spec = f"{OWN}?log={log}&fail=CH4"
    one = label(given, spec, tmp_path / "one" / "a.h5")
    log.unlink()
    two = label(given, spec, tmp_path / "two" / "a.h5", processes=2)
    assert (two.labels, two.made, two.failed) == (20, 20, one.failed)
    assert dict(os.environ) == before
    assert sorted(computed(log)) == sorted(repr(float(s.positions[0, 0])) for s in given)
    assert {line.split()[1] for line in log.read_text().splitlines()} == {"1"}
    assert (tmp_path / "one" / "a.h5").read_bytes() == (tmp_path / "two" / "a.h5").read_bytes()


def test_failures_are_recorded_and_retried_only_when_asked(tmp_path: Path) -> None:
    given = structures(6)
    log = tmp_path / "log"
    spec = f"{OWN}?log={log}&fail=CH4"
    result = label(given, spec, tmp_path / "a.h5")
    assert (result.labels, len(result.failed)) == (4, 2)
    assert set(result.failed.values()) == {f"CH4: {spec}: SCF not converged in 250 cycles"}
    check_labels(tmp_path / "a.h5", [s for s in given if len(s.numbers) != 5])
    _, tables = read_metadata(tmp_path / "a.h5")
    keys = [key_of(spec, s.numbers, s.positions).hex() for s in given if len(s.numbers) == 5]
    assert sorted(tables["failed_keys"]) == sorted(keys) == sorted(result.failed)
    again = label(given, spec, tmp_path / "a.h5")
    assert (again.made, again.failed) == (0, result.failed)
    assert len(computed(log)) == 6
    assert label(given, spec, tmp_path / "a.h5", retry_failed=True).failed == result.failed
    assert len(computed(log)) == 8


def test_a_teacher_that_always_fails_gives_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"failed at every one of 3 structures: H2O: .*SCF not converged"):
        label(structures(3, ("H2O",)), f"{OWN}?fail=H2O", tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    given = structures(10)
    log = tmp_path / "log"
    spec = f"{OWN}?log={log}"

    def until_four(done: int, total: int, failed: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(given, spec, tmp_path / "a.h5", progress=until_four)
    assert not (tmp_path / "a.h5").exists()
    told: list[tuple[int, int, int]] = []
    result = label(given, spec, tmp_path / "a.h5", progress=lambda *now: told.append(now))
    assert told[0] == (5, 10, 0)
    assert (result.labels, result.made) == (10, 6)
    assert len(computed(log)) == len(set(computed(log))) == 10
    check_labels(tmp_path / "a.h5", given)


def test_labels_of_structures_that_are_not_asked_for_now_are_kept(tmp_path: Path) -> None:
    given = structures(6)
    log = tmp_path / "log"
    spec = f"{OWN}?log={log}"

    def until_four(done: int, total: int, failed: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        label(given, spec, tmp_path / "a.h5", progress=until_four)
    label(given[:2], spec, tmp_path / "a.h5")
    assert label(given, spec, tmp_path / "a.h5").labels == 6
    assert len(computed(log)) == 6
    assert not partial_path(tmp_path / "a.h5").exists()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], list[str], Path]]:
    """`jaxff label` with two slow processes, as a user would start it."""
    write(tmp_path / "s.xyz", structures(60))
    log = tmp_path / "log"
    spec = f"{OWN}?log={log}&seconds=0.03"
    command = [sys.executable, "-m", "jaxff", "label", str(tmp_path / "s.xyz"), "--teacher", spec]
    command += ["-o", str(tmp_path / "a.h5"), "-p", "2", "-q"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE)
    yield process, command, log
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()


def test_kill_9_in_the_middle_and_again(
    running: tuple[subprocess.Popen[bytes], list[str], Path], tmp_path: Path
) -> None:
    """No label is made twice but those under way; the processes that computed don't stay behind."""
    process, command, log = running
    deadline = time.monotonic() + 60.0
    while len(computed(log)) < 16 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "a.h5").exists()
    time.sleep(1.5)  # a chunk under way takes half a second
    killed_at = len(computed(log))
    assert killed_at < 60
    kept = label_count(partial_path(tmp_path / "a.h5"), command[command.index("--teacher") + 1])
    assert kept > 0
    time.sleep(0.3)
    assert len(computed(log)) == killed_at  # nobody works on
    given = list(read_structures([tmp_path / "s.xyz"]))
    spec = command[command.index("--teacher") + 1]
    result = label(given, spec, tmp_path / "a.h5")
    assert (result.labels, result.made) == (60, 60 - kept)
    assert len(computed(log)) == killed_at + 60 - kept
    assert set(computed(log)) == {repr(float(s.positions[0, 0])) for s in given}
    check_labels(tmp_path / "a.h5", given)


def label_count(path: Path, spec: str) -> int:
    teacher = make_teacher(spec)
    with Journal(path, {"teacher": teacher.identity, "versions": teacher.versions}) as journal:
        return len(journal.outcomes)


def test_ctrl_c_says_where_the_labels_are(
    running: tuple[subprocess.Popen[bytes], list[str], Path], tmp_path: Path
) -> None:
    process, _, log = running
    deadline = time.monotonic() + 60.0
    while len(computed(log)) < 6 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60.0)
    assert process.returncode == 130
    assert b"a.h5.partial keeps the labels so far" in stderr
    assert b"Traceback" not in stderr


def test_a_process_that_dies_is_an_error_and_what_was_made_stays(tmp_path: Path) -> None:
    given = structures(12, ("H2O",)) + structures(1, ("CH4",))
    spec = f"{OWN}?die=CH4"
    with pytest.raises(DataError, match=r"a process of the teacher .* died \(exit code .*9"):
        label(given, spec, tmp_path / "a.h5", processes=2)
    assert label(given[:12], spec, tmp_path / "a.h5").made < 12


# ---- the journal ----


HEADER = {"teacher": "t", "versions": {"a": "1"}}


def fill(path: Path, count: int) -> list[int]:
    """Sizes of the journal after each record."""
    sizes = []
    with Journal(path, HEADER) as journal:
        sizes.append(path.stat().st_size)
        for k in range(count):
            journal.append(bytes([k]) * 32, "why" if k == 1 else Label(float(k), np.full((k, 3), k, np.float32)))
            sizes.append(path.stat().st_size)
    return sizes


def test_the_journal_survives_a_cut_anywhere(tmp_path: Path) -> None:
    sizes = fill(tmp_path / "whole", 4)
    data = (tmp_path / "whole").read_bytes()
    for cut in range(len(data) + 1):
        path = tmp_path / "cut"
        path.write_bytes(data[:cut])
        whole = sum(cut >= size for size in sizes[1:])
        with Journal(path, HEADER) as journal:
            assert len(journal.outcomes) == whole
            journal.append(b"x" * 32, Label(7.0, np.ones((1, 3), np.float32)))
        with Journal(path, HEADER) as journal:
            assert len(journal.outcomes) == whole + 1
            outcome = journal.outcomes[b"x" * 32]
            assert isinstance(outcome, Label)
            assert outcome.energy == 7.0


def test_the_journal_keeps_what_it_was_given(tmp_path: Path) -> None:
    fill(tmp_path / "j", 4)
    with Journal(tmp_path / "j", HEADER) as journal:
        assert journal.outcomes[b"\1" * 32] == "why"
        outcome = journal.outcomes[b"\3" * 32]
        assert isinstance(outcome, Label)
        assert outcome.energy == 3.0
        np.testing.assert_array_equal(outcome.forces, np.full((3, 3), 3.0))
        with pytest.raises(DataError, match="in use by another run"):
            Journal(tmp_path / "j", HEADER)


@pytest.mark.parametrize("header", [{**HEADER, "teacher": "u"}, {**HEADER, "versions": {"a": "2"}}])
def test_the_journal_of_another_teacher_is_refused(tmp_path: Path, header: dict[str, Any]) -> None:
    fill(tmp_path / "j", 2)
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(DataError, match="its labels are of"):
        Journal(tmp_path / "j", header)
    assert (tmp_path / "j").read_bytes() == before


def test_a_file_that_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"my thesis")
    with pytest.raises(DataError, match="expected a journal"):
        Journal(tmp_path / "j", HEADER)
    assert (tmp_path / "j").read_bytes() == b"my thesis"


# ---- refusals ----


def test_outputs_that_cannot_be(tmp_path: Path) -> None:
    given = structures(2)
    label(given, EMT_SPEC, tmp_path / "a.h5")
    with pytest.raises(DataError, match=r"a\.h5: its labels are of teacher .*EMT, and .*asap"):
        label(given, f"{EMT_SPEC}?asap_cutoff=True", tmp_path / "a.h5")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["mine"] = 1.0
    with pytest.raises(DataError, match="no output of `jaxff label`"):
        label(given, EMT_SPEC, tmp_path / "b.h5")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        label(given, EMT_SPEC, tmp_path / "none" / "a.h5")
    with pytest.raises(DataError, match=r"a\.xyz: expected the name of an output to end in \.h5"):
        label(given, EMT_SPEC, tmp_path / "a.xyz")
    with pytest.raises(DataError, match="received none"):
        label([], EMT_SPEC, tmp_path / "c.h5")
    with pytest.raises(DataError, match="at least one process"):
        label(given, EMT_SPEC, tmp_path / "c.h5", processes=0)
    with pytest.raises(StructureError, match="finite positions"):
        label([(np.array([1]), np.full((1, 3), np.nan))], EMT_SPEC, tmp_path / "c.h5")
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_that_ends_while_another_begins_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between reading structures and locking the journal, a whole run of others comes and goes."""
    first, second = structures(4)[:2], structures(4)[2:]
    real = label_module.Journal

    def journal(*arguments: Any) -> Journal:
        monkeypatch.setattr(label_module, "Journal", real)
        label(first, EMT_SPEC, tmp_path / "a.h5")
        return real(*arguments)

    monkeypatch.setattr(label_module, "Journal", journal)
    assert label(second, EMT_SPEC, tmp_path / "a.h5").labels == 4


def test_a_journal_that_is_removed_while_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, locked = tmp_path / "a.partial", journal_module._lock, []

    def lock(file: Any, at: Path) -> None:
        real(file, at)
        locked.append(file)
        if len(locked) == 1:
            at.unlink()

    monkeypatch.setattr(journal_module, "_lock", lock)
    with Journal(path, {"teacher": "x", "versions": {}}) as journal:
        journal.append(bytes(32), "reason")
        assert path.stat().st_size > 0
        with pytest.raises(DataError, match="in use"):
            Journal(path, {"teacher": "x", "versions": {}})


def test_a_pretrained_model_is_known_by_its_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "organic-small").write_text("a file of this name is not what is loaded")
    digest = pretrained.read_card("organic-small").sha256
    assert make_teacher("jaxff:organic-small").identity == f"jaxff:{digest}"
    result = cli("inspect", "./organic-small")  # the file
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_tblite_labels_no_radicals() -> None:
    pytest.importorskip("tblite")
    with pytest.raises(StructureError, match="9 electrons"):
        make_teacher("tblite:GFN2-xTB")(molecule("CH3").numbers, molecule("CH3").positions)


@pytest.mark.parametrize("said", ["info", "charges", "moments"])
def test_what_a_file_calls_charged_or_open_shell_is_refused(tmp_path: Path, said: str) -> None:
    atoms = molecule("H2O")
    if said == "info":
        atoms.info["charge"] = 1
    elif said == "charges":
        atoms.set_initial_charges([1.0, 0.0, 0.0])
    else:
        atoms.set_initial_magnetic_moments([2.0, 0.0, 0.0])
    ase.io.write(tmp_path / "s.xyz", [molecule("H2O"), atoms], format="extxyz")
    with pytest.raises(DataError, match=r"s\.xyz, frame 1: expected a (neutral|closed-shell)"):
        list(read_structures([tmp_path / "s.xyz"]))
    assert len(list(read_structures([tmp_path / "s.xyz"], any_charge=True))) == 2


def test_ctrl_c_is_not_for_processes_that_start() -> None:
    before = signal.getsignal(signal.SIGINT)
    with label_module._deaf_to_ctrl_c():
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == before


def test_structures_that_cannot_be(tmp_path: Path) -> None:
    atoms = molecule("H2O")
    periodic = Atoms(atoms.numbers, atoms.positions, cell=np.eye(3) * 9.0, pbc=True)
    ase.io.write(tmp_path / "s.xyz", [atoms, periodic], format="extxyz")
    with pytest.raises(DataError, match=r"s\.xyz, frame 1: .*periodic"):
        list(read_structures([tmp_path / "s.xyz"]))
    label(structures(3), EMT_SPEC, tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["structures/pbc"][2] = True
    with pytest.raises(DataError, match=r"a\.h5, frame 2: periodic"):
        list(read_structures([tmp_path / "a.h5"]))


# ---- the command ----


def cli(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command(tmp_path: Path) -> None:
    """Structures of two kinds of file; the molecule's name goes along, and a labelled file can be labelled again."""
    given = [s._replace(molecule=name) for s, name in zip(structures(3), ("O", "C", "CC"), strict=True)]
    write(tmp_path / "s.xyz", given)
    ase.io.write(tmp_path / "t.pdb", molecule("C6H6"))
    result = cli(
        "label", tmp_path / "s.xyz", tmp_path / "t.pdb", "--teacher", EMT_SPEC, "-o", tmp_path / "a.h5", "-p", 1
    )
    assert result.exit_code == 0, result.output
    assert f"4 in {tmp_path / 'a.h5'}" in result.stdout
    frames, _ = read_frames([tmp_path / "a.h5"])
    assert frames.molecules.tolist() == ["O", "C", "CC", "C6H6"]
    result = cli("label", tmp_path / "a.h5", "--teacher", f"{OWN}?fail=CH4", "-o", tmp_path / "b.h5", "-p", 1)
    assert result.exit_code == 0, result.output
    assert "failed at 1 structures" in result.stderr
    again, _ = read_frames([tmp_path / "b.h5"])
    assert again.molecules.tolist() == ["O", "CC", "C6H6"]
    np.testing.assert_array_equal(again.positions, frames.select([0, 2, 3]).positions)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.xyz", "--teacher", EMT_SPEC), "none.xyz: no such file"),
        (("s.xyz", "--teacher", "zz"), "expected a teacher"),
        (("s.xyz", "--teacher", "ase:..emt.EMT"), "can't be imported"),
        (("s.xyz", "--teacher", EMT_SPEC, "-p", "0"), "at least one process"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "s.xyz", structures(1))
    result = cli("label", *arguments, "-o", "a.h5", "-q")
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a.h5").exists()
