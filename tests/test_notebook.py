"""The notebook runs from top to bottom."""

import shutil

import pytest

from tests.conftest import REPOSITORY


NOTEBOOK = REPOSITORY / "examples" / "interpolate.ipynb"


def test_is_kept_without_outputs():
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.slow
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    shutil.copytree(REPOSITORY / "examples", tmp_path / "examples")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path / "examples")}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    pictures = [output for output in outputs if any(kind.startswith("image/") for kind in output.get("data", {}))]
    said = "".join(output.get("text", "") for output in outputs)
    assert len(pictures) == 3 and "12 frames, 6 of them made" in said
    assert (tmp_path / "examples" / "sway-smooth.mp4").is_file()
