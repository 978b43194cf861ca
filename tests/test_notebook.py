"""The notebook in examples/ runs as it is."""

import importlib.util
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "quickstart.ipynb"
needs_jupyter = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("nbclient", "ipykernel", "pandas")),
    reason="the extra dev is not installed",
)


@pytest.mark.slow
@needs_jupyter
def test_the_quickstart_runs(tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    assert len(list(tmp_path.glob("outputs/runs/*/summary.json"))) == 5
    curves, table, answer = (notebook.cells[number].outputs[-1].data for number in (5, 7, 9))
    assert "image/png" in curves
    assert "adam" in table["text/html"]
    assert len(answer["text/plain"].splitlines()) == 4
