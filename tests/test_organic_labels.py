"""How the data of `organic` are made: what RDKit can't handle is left out, not the end of a round."""

import importlib
import sys
import types
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "experiments" / "organic_gfn2"


@pytest.mark.parametrize("error", [ValueError, RuntimeError])
def test_molecules_that_rdkit_fails_on_are_left_out(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rdkit")
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    active = importlib.import_module("active")

    def embed(*_: object) -> None:
        raise error("odd")

    monkeypatch.setitem(sys.modules, "sampling", types.SimpleNamespace(embed=embed, Mechanics=None))
    assert active.start(("C", 0)) is None
