"""Every notebook runs from top to bottom at a reduced size."""

from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_notebook_runs(path, tmp_path, monkeypatch):
    corpus = tmp_path / "text"
    corpus.mkdir()
    for i in range(60):
        (corpus / f"{i}.txt").write_text("".join(f"def f{i}_{j}(x):\n    return x + {j}\n" for j in range(20)))
    monkeypatch.setenv("QUICK", str(corpus))
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "bits per byte; gzip -9 needs" in printed
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert (tmp_path / "runs/notebook/checkpoints/6").is_dir()
