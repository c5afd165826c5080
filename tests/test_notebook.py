"""The notebooks run from top to bottom in an empty folder, without trained weights."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "notebooks" / "first_steps.ipynb"
ORGANIC = NOTEBOOK.with_name("organic.ipynb")

pytestmark = [
    pytest.mark.usefixtures("compile_quickly"),
    # the kernel's own messages on shutting down are not ours to judge
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def executed(notebook_file, folder, monkeypatch):
    """The outputs of a notebook that is run in `folder`; nothing may come on stderr."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    notebook = nbformat.read(notebook_file, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output["text"] for output in outputs if output.get("name") == "stderr"] == []
    return outputs


def test_organic_runs(tmp_path, monkeypatch):
    outputs = executed(ORGANIC, tmp_path, monkeypatch)
    text = "".join(output.get("text", "") for output in outputs)
    assert "C-C 1.52" in text  # GFN2-xTB
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"md"}


def test_first_steps_runs(tmp_path, monkeypatch):
    outputs = executed(NOTEBOOK, tmp_path, monkeypatch)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "random.pt",
        "random.safetensors",
        "run",
        "student.safetensors",
    }
    assert (tmp_path / "run" / "trajectory.xyz").exists()


@pytest.mark.parametrize("notebook", [NOTEBOOK, ORGANIC], ids=lambda path: path.stem)
def test_committed_notebooks_are_small_and_name_no_machine(notebook):
    text = notebook.read_text(encoding="utf-8")
    assert len(text) < 300_000
    assert '"output_type": "stream"' in text, "commit the notebook as run"
    assert not any(f'"{root}' in text or f" {root}" in text for root in ("/home", "/work", "/tmp", "/root"))


def test_first_steps_was_committed_with_trained_weights():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert "converted original.pt" in text, "commit the notebook as run with trained weights"
