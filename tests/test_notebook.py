"""The notebook runs from top to bottom in an empty folder, without trained weights."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "first_steps.ipynb"

# the kernel's own messages on shutting down are not ours to judge
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def test_first_steps_runs(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "random.pt",
        "random.safetensors",
        "run",
        "student.safetensors",
    }
    assert (tmp_path / "run" / "trajectory.xyz").exists()


def test_committed_notebook_is_small_and_names_no_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert not any(f'"{root}' in text or f" {root}" in text for root in ("/home", "/work", "/tmp", "/root"))
    assert "converted original.pt" in text, "commit the notebook as run with trained weights"
