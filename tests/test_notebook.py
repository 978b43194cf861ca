"""The notebook in examples/ runs as it is."""

import importlib.util
import tomllib
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
    assert len(list(tmp_path.glob("outputs/runs/*/summary.json"))) == 7
    outputs = [cell.get("outputs", []) for cell in notebook.cells]
    shown = [{k: v for o in cell for k, v in o.get("data", {}).items()} for cell in outputs]
    assert [number for number in (5, 6, 11, 15) if "image/png" not in shown[number]] == []
    assert "Ranking" in "".join(output.get("text", "") for output in outputs[8])
    assert "adam" in shown[10]["text/html"]
    assert shown[16]["text/plain"].splitlines()[0].split()[0] == "7"


def test_the_repository_has_one_address() -> None:
    project = tomllib.loads((NOTEBOOK.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["urls"]["Repository"] in NOTEBOOK.read_text(encoding="utf-8")
