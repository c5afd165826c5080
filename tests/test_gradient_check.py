"""The study of experiments/gradient_check: its molecules are what they claim, and its bars can fail."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("compile_quickly")
STUDY = Path(__file__).parents[1] / "experiments" / "gradient_check"
Chem = pytest.importorskip("rdkit.Chem")


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(STUDY))
    import measure
    import molecules
    import report
    import run

    return SimpleNamespace(measure=measure, molecules=molecules, report=report, run=run)


def test_molecules_have_the_formulas_of_their_names(study):
    from rdkit.Chem.rdMolDescriptors import CalcMolFormula

    rows = study.molecules.read_list()
    assert len({row["name"] for row in rows}) == len(rows) >= 100
    for row in rows:
        assert CalcMolFormula(Chem.MolFromSmiles(row["smiles"])) == row["formula"], row["name"]


def test_structures_are_reproducible_and_differ(study):
    first, again, other = (study.molecules.structure(i, seed=3) for i in (7, 7, 7 + 145))
    assert first.name == again.name == other.name
    np.testing.assert_array_equal(first.positions, again.positions)
    assert not np.allclose(first.positions, other.positions)


def test_a_small_study_meets_the_bars_and_a_wrong_force_does_not(study):
    from jaxff.config import PainnConfig

    model = study.run.random_study(PainnConfig(hidden_dim=16, num_interactions=2, num_rbf=8), 0)
    structures = [study.molecules.structure(i) for i in (25, 52)]  # halothane, amphetamine
    samples = study.run.measure_all("small", model, structures, 3, 0)
    figures = study.report.summarize(samples)
    assert study.report.missed(figures) == []
    assert figures["force_rms"] > 0.01
    samples[0].explicit64 = samples[0].explicit64 + 1e-6
    samples[1].differences[0] = np.nan
    problems = "; ".join(study.report.missed(study.report.summarize(samples)))
    assert "f64_max" in problems
    assert "differences_max is nan" in problems
