"""One direction of imports, those inside functions too (house.md, as adapted)."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "cifar_lab"

# Each row may import the rows before it; within a row, only what ALLOWED says.
LAYERS = [
    ["errors", "files"],
    ["schema"],
    ["config", "metrics", "device"],
    ["components", "datasets", "models"],
    ["door", "data", "run_dir"],
    ["training", "figures"],
    ["building", "bars"],
    ["evaluation", "guards"],
    ["execute"],
]
CORE = {name: level for level, names in enumerate(LAYERS) for name in names}


def files() -> dict[str, Path]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def ours(path: Path) -> set[str]:
    """Return the modules (or subpackages) of ours that a file imports."""
    return {
        name.split(".")[1]
        for name in imports(path)
        if name.startswith("cifar_lab.") and not name.startswith("cifar_lab.__")
    }


@pytest.mark.parametrize("module", files())
def test_imports_go_one_way(module: str) -> None:
    own = module.split(".")[0]
    for other in ours(files()[module]) - {own}:
        if own in CORE:
            assert other in CORE, f"{module} imports {other}, which is a command"
            assert CORE[other] < CORE[own], f"{module} imports {other}"


@pytest.mark.parametrize("module", [m for m in files() if m.startswith("models.")])
def test_models_import_torch_only(module: str) -> None:
    allowed = {"torch", "math", "collections", "typing", "functools", "itertools"}
    names = imports(files()[module])
    assert {n.split(".")[0] for n in names} <= allowed | {"cifar_lab"}
    assert all(n.startswith("cifar_lab.models") for n in names if n.startswith("cifar_lab"))


@pytest.mark.parametrize("module", [m for m in files() if m.startswith("datasets.")])
def test_datasets_import_errors_and_files_only(module: str) -> None:
    assert ours(files()[module]) <= {"errors", "files", "datasets"}


def test_hydra_is_known_at_the_door_only() -> None:
    knowing = {
        module
        for module, path in files().items()
        if any(n.split(".")[0] in ("hydra", "omegaconf") for n in imports(path))
    }
    assert knowing <= {"door", "train"}  # train lets Hydra answer --help, which is its own


def test_a_folder_knows_no_training_and_training_knows_no_files() -> None:
    assert ours(files()["run_dir"]) <= {"config", "errors", "files", "metrics", "schema"}
    assert "run_dir" not in ours(files()["training"])
    assert not {"pathlib", "os", "io", "shutil"} & imports(files()["training"])
    for module in ("training", "data"):
        source = files()[module].read_text(encoding="utf-8")
        assert "open(" not in source
        assert ".write_" not in source


@pytest.mark.parametrize("module", [m for m in files() if m.startswith("figures.")])
def test_figures_are_drawn_from_files_alone(module: str) -> None:
    assert ours(files()[module]) <= {"run_dir", "config", "metrics", "errors", "figures"}
    assert "torch" not in {n.split(".")[0] for n in imports(files()[module])}


def test_nobody_imports_private_names_of_others() -> None:
    private = {
        f"{module}: {name}"
        for module, path in files().items()
        for name in imports(path)
        if name.startswith("cifar_lab.") and name.rpartition(".")[2].startswith("_")
    }
    assert private == set()


def test_the_walk_sees_imports_inside_functions(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("def f():\n    if True:\n        from cifar_lab.training import fit\n")
    assert imports(path) == {"cifar_lab.training.fit"}
