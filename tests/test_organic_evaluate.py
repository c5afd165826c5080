"""The study of experiments/organic_gfn2/evaluate: its measures against definitions, and its scripts from end to end.

A small random painn stands in for the model, another for the teacher; neither tblite nor the real model is needed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.units import _amu, _c, _e

from jaxff import pretrained
from jaxff.checkpoint import load_checkpoint, save_checkpoint
from jaxff.config import PainnConfig
from jaxff.errors import CheckpointError, ConfigError
from jaxff.loading import load_potential
from jaxff.train.frames import Frame, Frames
from jaxff.train.hdf5 import write_hdf5
from jaxff.uncertainty import pretrained_committee
from tests.structures import random_params

pytest.importorskip("h5py")
pytestmark = pytest.mark.usefixtures("compile_quickly")
STUDY = Path(__file__).parents[1] / "experiments" / "organic_gfn2"
ELEMENTS = (1, 6, 7, 8, 9, 15, 16, 17, 35)
NAMES = ("CH3CH2OH", "H2O", "CH3NO2")


@pytest.fixture(autouse=True)
def study(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(STUDY))
    import ship
    from evaluate import common, forces, geometry, nve, run, stability, uncertainty

    return SimpleNamespace(
        common=common, forces=forces, geometry=geometry, nve=nve, run=run, stability=stability, uncertainty=uncertainty,
        ship=ship,
    )  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of a teacher and two models; the first model's forces are nearly the teacher's."""
    folder = tmp_path_factory.mktemp("models")
    config = PainnConfig(hidden_dim=8, num_interactions=1, num_rbf=6, max_z=35, elements=ELEMENTS, repulsion="zbl")
    params = random_params(config, dtype=np.float32)
    training = {"training": {"step": 7, "data_sha256": "a" * 64, "data": {"train": {"frames": 1234, "molecules": 5}}}}
    for name, factor in (("teacher", 1.0), ("model", 1.02), ("small", 1.1)):
        shifted = jax.tree.map(lambda x, f=factor: np.float32(f) * np.asarray(x), params)
        save_checkpoint(folder / f"{name}.safetensors", shifted, config, training)
    return {path.stem: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def reference(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference folder as reference.py leaves it, of the stand-in teacher."""
    folder = tmp_path_factory.mktemp("reference")
    teacher = load_potential(models["teacher"], dtype="float64")

    def frame(name: str, spread: float, seed: int) -> Frame:
        atoms = molecule(name)
        atoms.positions += np.random.default_rng(seed).normal(0, spread, atoms.positions.shape) if spread else 0.0
        return Frame(atoms.numbers, atoms.positions, *teacher.energy_and_forces(atoms.numbers, atoms.positions), name)

    def write(file: str, rows: list[tuple[Frame, Any]]) -> None:
        write_hdf5(folder / f"{file}.h5", Frames.of([f for f, _ in rows]), {}, {"about": [about for _, about in rows]})

    write("small", [(frame("H2O", 0, 0), 0.0)])
    write("drug", [(frame(name, 0, 0), 0.0) for name in NAMES])
    write("frames_300K", [(frame(name, 0.05, seed), "300 K") for name in NAMES for seed in range(3)])
    kinds = {"300 K": 0.03, "1000 K": 0.1, "moved": 0.2}
    write("frames_mixed", [(frame(name, s, i), k) for i, name in enumerate(NAMES) for k, s in kinds.items()])
    write("frames_mixed_others", [(frame(name, s, 9), k) for name in NAMES[:2] for k, s in kinds.items()])
    write("torsions", [(frame(name, 0.02, i), float(i)) for name in ("CH3CH2OH", "CH3NO2") for i in range(4)])
    (folder / "frequencies.json").write_text(json.dumps({"H2O": [1000.0, 2000.0, 3000.0]}))
    (folder / "reference.json").write_text(json.dumps({"sha256": "0" * 64}))
    return folder


@pytest.fixture
def context(study: SimpleNamespace, models: dict[str, str], reference: Path, tmp_path: Path) -> Any:
    return study.common.Context(models["model"], reference, tmp_path, models["small"], options={"groups": 1})


def labels(context: Any) -> Path:
    """Frames to calibrate with; on every second one, two forces are wrong."""
    frames = context.frames("frames_300K")
    frames.forces[frames.splits[:-1:2]] += np.float32([0.5, 0, 0])
    frames.forces[frames.splits[:-1:2] + 1] -= np.float32([0.5, 0, 0])
    write_hdf5(context.output / "labels.h5", frames, {})
    return context.output / "labels.h5"


def test_frequencies_of_a_diatomic_and_of_a_linear_spring_chain(study: SimpleNamespace) -> None:
    k, r = 30.0, np.array([[0, 0, 0], [0, 0, 1.1]])
    hessian = np.zeros((6, 6))
    hessian[np.ix_([2, 5], [2, 5])] = k * np.array([[1, -1], [-1, 1]])
    (found,) = study.common.frequencies([6, 8], r, hessian)
    mu = 12.011 * 15.999 / (12.011 + 15.999) * _amu
    assert found == pytest.approx(np.sqrt(k * _e * 1e20 / mu) / (2 * np.pi * _c * 100), rel=1e-5)
    (found,) = study.common.frequencies([6, 8], r, -hessian)
    assert found < 0
    water = molecule("H2O")
    assert len(study.common.frequencies(water.numbers, water.positions, np.eye(9))) == 3


def test_auroc_counts_pairs(study: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, 40), rng.random(40) < 0.3
    pairs = [(a > b) + 0.5 * (a == b) for a in score[positive] for b in score[~positive]]
    assert study.common.auroc(score, positive) == pytest.approx(np.mean(pairs))
    assert study.common.auroc(score, np.ones(40, bool)) is None


def test_bonds_and_angles_of_water(study: SimpleNamespace) -> None:
    atoms = molecule("H2O")
    pairs = study.common.bonds(atoms.numbers, atoms.positions)
    assert pairs.tolist() == [[0, 1], [0, 2]]
    triples = study.geometry.bonded_triples(pairs)
    assert triples.tolist() == [[1, 0, 2]]
    assert study.geometry.bond_lengths(atoms.positions, pairs) == pytest.approx([atoms.get_distance(0, 1)] * 2)
    assert study.geometry.bond_angles(atoms.positions, triples) == pytest.approx([atoms.get_angle(1, 0, 2)])


def test_a_bar_is_met_on_its_own_side(study: SimpleNamespace) -> None:
    low, high = study.common.Bar("x", "y", 2, 1), study.common.Bar("x", "y", 1, 2, high=True)
    assert [low.row(v, "")["bar_reached"] for v in (1.5, 2.5, None)] == [True, False, False]
    assert [high.row(v, "")["aim_reached"] for v in (1.5, 2.5)] == [False, True]


def test_relative_energies_have_no_mean(study: SimpleNamespace, context: Any) -> None:
    frames = context.frames("frames_300K")
    found = study.forces.relative(frames.energies, frames)
    own = frames.molecules == "H2O"
    np.testing.assert_allclose(found[own], (frames.energies[own] - frames.energies[own].mean()) / 3, atol=1e-12)


def test_frames_that_the_model_does_not_know_are_left_out(study: SimpleNamespace, context: Any) -> None:
    assert context.knows(np.array([1, 35]))
    assert not context.knows(np.array([1, 14]))
    assert not context.knows(np.array([53]))
    some = study.common.Context(context.model, context.reference, context.output, limit=1)
    assert set(some.frames("drug").molecules) == {NAMES[0]}


def test_figures_from_end_to_end(study: SimpleNamespace, context: Any) -> None:
    names = ["forces", "torsions", "invariance", "calibration", "uncertainty"]
    context.options["labels"] = [labels(context)]
    assert study.run.evaluate(context, names) == []
    results = {name: json.loads((context.output / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    frames = context.frames("frames_300K")
    teacher = np.concatenate([frame.forces for frame in frames])
    model = load_potential(context.model, dtype="float64")
    found = np.concatenate([model.energy_and_forces(frame.numbers, frame.positions)[1] for frame in frames])
    mae = results["forces"]["headline"][0]["value"]
    assert mae == pytest.approx(1e3 * np.abs(found - teacher).mean(), rel=1e-3)
    by_element = results["forces"]["by_element"]
    atoms = {symbol: row["atoms"] for symbol, row in by_element.items()}
    assert atoms == {"H": 33, "C": 9, "N": 3, "O": 12}
    weighted = sum(row["mae_meV_per_A"] * row["atoms"] for row in by_element.values()) / sum(atoms.values())
    assert weighted == pytest.approx(mae, rel=1e-6)
    assert {"aim_reached", "bar_reached"} <= set(results["torsions"]["headline"][0])
    assert all(row["value"] < 1e-10 for row in results["invariance"]["headline"])
    assert results["uncertainty"]["calibration"]["scale"] == results["calibration"]["calibration"]["scale"] > 0
    counts = results["uncertainty"]["file"], results["uncertainty"]["frames"]
    assert counts == ("frames_mixed_others", 6)
    assert results["uncertainty"]["frames_it_was_chosen_with"]["frames"] == 3 * len(NAMES)
    summary = json.loads((context.output / "summary.json").read_text(encoding="utf-8"))
    assert len(summary) == sum(len(result["headline"]) for result in results.values())
    for name in ("forces", "torsions", "uncertainty"):
        assert (context.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_other_molecules_are_all_others(study: SimpleNamespace) -> None:
    from evaluate.reference import jobs

    drugs = [job for job in jobs(None) if job[0] == "drug"]
    others = jobs(None, others=True)
    assert {job[1] for job in others} == {job[1] for job in drugs if not job[3]}
    assert len(others) == 108
    assert all(mixed for *_, mixed in others)


def test_the_teacher_has_no_error(
    study: SimpleNamespace, models: dict[str, str], reference: Path, tmp_path: Path
) -> None:
    itself = study.common.Context(models["teacher"], reference, tmp_path)
    forces, torsions = study.forces.measure(itself), study.run.FIGURES["torsions"](itself)
    assert forces["headline"][0]["value"] < 0.1
    assert torsions["headline"][0]["value"] < 1e-6


def test_one_figure_that_fails_leaves_the_others(study: SimpleNamespace, context: Any, monkeypatch: Any) -> None:
    def fail(_: Any) -> Any:
        raise ValueError("no")

    monkeypatch.setitem(study.run.FIGURES, "geometry", fail)
    assert study.run.evaluate(context, ["geometry", "invariance"]) == ["geometry"]
    assert (context.output / "invariance.json").exists()
    assert not (context.output / "geometry.json").exists()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, study: SimpleNamespace) -> Iterator[None]:
    monkeypatch.setattr(study.stability, "EVERY", 5)
    monkeypatch.setattr(study.stability, "MOLECULES", {300: 2, 600: 1})
    return


def test_stability_goes_on_where_it_stopped(study: SimpleNamespace, context: Any, short: None, tmp_path: Path) -> None:
    context.options["ps"] = 0.02
    straight = study.stability.measure(context)
    assert straight["complete"]
    assert [run["kelvin"] for run in straight["runs"]] == [300, 300, 600]
    (tmp_path / "stability_state.npz").unlink()
    context.options["seconds"] = -1.0  # one block, then stop
    stopped = study.stability.measure(context)
    assert (stopped["complete"], stopped["ps"]) == (False, pytest.approx(0.01))
    assert stopped["headline"][0]["bar_reached"] is None
    resumed = study.stability.measure(context)
    assert resumed["complete"]
    assert resumed["runs"] == straight["runs"]


def test_stability_sees_what_goes_wrong(study: SimpleNamespace, context: Any, short: None) -> None:
    _, _, (group,) = study.stability._groups(context)
    start = group.state
    words = [study.stability.WORDS[int(w)] for w in group.look(start)[0]]
    assert words == ["whole"] * 3
    assert np.asarray(group.look(start)[1]) == pytest.approx([1.0] * 3, abs=1e-5)
    water = int(np.flatnonzero(group.dynamics.counts == 3)[0])
    moved = {
        "a bond broke": start.positions.at[water, 1].set(2.0 * start.positions[water, 1] - start.positions[water, 0]),
        "a new bond": start.positions.at[water, 1].set(start.positions[water, 2] + np.float32([0.5, 0.0, 0.0])),
        "exploded": start.positions.at[water, 1].set(np.nan),
    }
    for word, positions in moved.items():
        found = np.asarray(group.look(start._replace(positions=positions))[0])
        assert study.stability.WORDS[found[water]] == word
        assert np.delete(found, water).tolist() == [0, 0]
    fast = start._replace(velocities=start.velocities.at[water].multiply(100.0))
    assert study.stability.WORDS[np.asarray(group.look(fast)[0])[water]] == "exploded"


def test_nve_conserves_and_is_drawn_later(
    study: SimpleNamespace, context: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study.nve, "EVERY", 5)
    monkeypatch.setattr(study.common, "find_spec", lambda name: None)  # a machine without matplotlib
    context.options.update(nve_ps=0.01, equilibration_ps=0.002)
    assert study.run.evaluate(context, ["nve"]) == []
    assert not (context.output / "nve.png").exists()
    result = json.loads((context.output / "nve.json").read_text(encoding="utf-8"))
    assert np.abs(result["change_meV_per_atom"]).max() < 1.0
    assert np.shape(result["change_meV_per_atom"]) == (len(NAMES), len(result["ps"]))
    slopes = [np.polyfit(result["ps"], row, 1)[0] for row in result["change_meV_per_atom"]]
    assert result["headline"][0]["value"] == pytest.approx(np.abs(slopes).mean(), rel=0.05)
    monkeypatch.undo()
    study.nve.draw(context, result)
    assert (context.output / "nve.png").exists()


def test_energies_without_references_have_the_same_differences(study: SimpleNamespace, context: Any) -> None:
    checkpoint = load_checkpoint(context.model)
    checkpoint.params["reference"]["energies"] += 100.0
    path = context.output / "shifted.safetensors"
    save_checkpoint(path, checkpoint.params, checkpoint.config)
    shifted = load_potential(path, dtype="float64")
    bare = study.nve.without_references(shifted)
    atoms = molecule("H2O")
    (a, f), (b, g) = (p.energy_and_forces(atoms.numbers, atoms.positions) for p in (shifted, bare))
    references = checkpoint.params["reference"]["energies"][atoms.numbers].sum()
    assert a - b == pytest.approx(references, abs=1e-3)
    np.testing.assert_array_equal(f, g)


def test_dihedral_gradient_and_rotatable_bonds() -> None:
    chem = pytest.importorskip("rdkit.Chem")
    from evaluate.reference import dihedral_gradient, rotatable_bond

    r = np.random.default_rng(0).normal(size=(4, 3))
    for i, k in np.ndindex(4, 3):
        shift = np.zeros((4, 3))
        shift[i, k] = 1e-5
        angles = [np.radians(Atoms("H4", positions=r + s).get_dihedral(0, 1, 2, 3)) for s in (shift, -shift)]
        assert dihedral_gradient(r)[i, k] == pytest.approx((angles[0] - angles[1]) / 2e-5, abs=1e-7)
    for smiles, bond in {"CCCC": {1, 2}, "CC(=O)Nc1ccccc1": {3, 4}, "COC(=O)c1ccccc1": {2, 4}}.items():
        atoms, side = rotatable_bond(chem.AddHs(chem.MolFromSmiles(smiles)))
        assert set(atoms[1:3]) == bond
        assert atoms[2] in side
        assert atoms[1] not in side


def test_ship_takes_its_figures_from_the_results(
    study: SimpleNamespace, context: Any, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = context.output / "pretrained"
    shelf.mkdir()
    monkeypatch.setattr(pretrained, "FOLDER", shelf)
    with pytest.raises(ConfigError, match=r"found no forces\.json"):
        study.ship.ship("organic", Path(context.model), context.output)
    context.options["labels"] = [labels(context)]
    assert study.run.evaluate(context, ["uncertainty"]) == ["uncertainty"]  # not calibrated yet
    assert study.run.evaluate(context, ["forces", "calibration", "uncertainty"]) == []
    with pytest.raises(CheckpointError, match="no pretrained model 'organic-small'"):
        study.ship.ship("organic", Path(context.model), context.output)
    small = study.common.Context(models["small"], context.reference, context.output / "small")
    assert study.run.evaluate(small, ["forces"]) == []
    assert study.ship.ship("organic-small", Path(small.model), small.output).uncertainty is None
    card = study.ship.ship("organic", Path(context.model), context.output)
    summary = json.loads((context.output / "summary.json").read_text(encoding="utf-8"))
    assert [figure.value for figure in card.errors] == [row["value"] for row in summary if row["value"] is not None]
    assert card.uncertainty is not None
    assert card.uncertainty.members == ("organic", "organic-small")
    assert "1,234 labelled frames of 5 molecules" in card.data
    assert any("H C N O F P S Cl Br" in text for text in card.not_for)
    assert load_potential("organic").closed_shell
    assert pretrained_committee().scale == card.uncertainty.scale
    with pytest.raises(ConfigError, match="expected figures of the parameters"):
        study.ship.ship("organic-small", Path(context.model), small.output)
    study.ship.ship("other", Path(context.model), context.output)
    with pytest.raises(ConfigError, match="expected a committee with the other"):
        study.ship.ship("organic", Path(context.model), context.output, partner="other")
