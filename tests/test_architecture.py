"""The architecture: every module has a place, and imports go in one direction.

Imports inside functions count, and so do strings that are the name of a module or of something in
one, such as the list of modules that the fork server imports in advance.
"""

import ast
import functools
import graphlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import cifar_lab
from cifar_lab.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "cifar_lab"

# A package may import itself and the packages above it; those in one row do not import each other.
ORDER = [
    {"errors", "version"},
    {"config"},
    {"runs"},
    {"datasets", "models", "optimizers", "figures", "trackers"},
    {"training"},
    {"analysis"},
    {"sweeps", "throughput", "exports"},
    {"commands"},
]
PACKAGES = set.union(*ORDER) - {"errors", "version", "commands"}
BESIDE = {"cifar_lab.errors", "cifar_lab.version"}
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}
TOP_LEVEL = {
    "cifar_lab",
    *(f"cifar_lab.{name}" for name in ("__main__", "api", "cli", "errors", "objects", "version")),
} | {f"cifar_lab.{command}" for command in COMMANDS}

# {model: why it imports more than torch}
MODELS_OF_OTHERS = {
    "models.pretrained": "reads and compares files of weights",
    "models.zoo_torchvision": "its networks are torchvision's",
    "models.zoo_timm": "its networks are timm's",
}
# docs/your_own.md shows how to add a model to the package with these.
EXAMPLES = {
    "cifar_lab.models.perceptron.Perceptron",
    "src/cifar_lab/models/perceptron.py",
    "conf/model/perceptron.yaml",
}


def read_modules() -> dict[str, ast.Module]:
    """Return {dotted name: syntax tree} of every module of the package."""
    trees = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE.parent).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


MODULES = read_modules()


@functools.cache
def imported_names(tree: ast.Module) -> set[str]:
    """Return every dotted name that a module imports, or gives as a string, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"cifar_lab(\.\w+)+", str(node.value)):
            names.add(str(node.value))
    return names


def module_of(name: str) -> str:
    """Return the module that a dotted name of ours is, or is in."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


@functools.cache
def own_imports(module: str) -> set[str]:
    """Return the other modules of ours that a module imports."""
    names = imported_names(MODULES[module])
    return {module_of(name) for name in names if name.split(".")[0] == "cifar_lab"} - {module}


def package_of(module: str) -> str:
    """Return a module's package; those beside the packages are errors, version and commands."""
    parts = module.split(".")
    if len(parts) > 1 and parts[1] in PACKAGES:
        return parts[1]
    return module.removeprefix("cifar_lab.") if module in BESIDE else "commands"


def short(module: str) -> str:
    return module.removeprefix("cifar_lab.")


def test_every_module_belongs_to_a_package() -> None:
    beside = {module for module in MODULES if package_of(module) not in PACKAGES}
    assert beside == TOP_LEVEL


@pytest.mark.parametrize("module", MODULES)
def test_imports_follow_the_order_of_the_packages(module: str) -> None:
    own = package_of(module)
    for imported in own_imports(module):
        other = package_of(imported)
        if other != own:
            assert LEVEL[other] < LEVEL[own], f"{short(module)} imports {short(imported)}"


def test_no_modules_import_each_other_in_a_cycle() -> None:
    graph = {module: own_imports(module) for module in MODULES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) == "models"])
def test_models_import_torch_only(module: str) -> None:
    allowed = {"torch", "math", "collections", "typing", "functools", "itertools", "cifar_lab"}
    packages = {"models"}
    if short(module) in MODELS_OF_OTHERS:
        allowed |= {"torchvision", "timm", "safetensors", "pathlib", "hashlib", "difflib"}
        packages |= {"errors"}
    assert {name.split(".")[0] for name in imported_names(MODULES[module])} <= allowed
    assert {package_of(imported) for imported in own_imports(module)} <= packages


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) == "datasets"])
def test_datasets_import_errors_and_files_only(module: str) -> None:
    below = {"cifar_lab.errors", "cifar_lab.runs.files"}
    assert {m for m in own_imports(module) if package_of(m) != "datasets"} <= below


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) == "figures"])
def test_figures_need_no_torch(module: str) -> None:
    assert "torch" not in {name.split(".")[0] for name in imported_names(MODULES[module])}


def test_hydra_is_reached_through_compose_only() -> None:
    compose, *parts = (f"cifar_lab.config.{n}" for n in ("compose", "overrides"))
    importing = {
        module
        for module, tree in MODULES.items()
        if {"hydra", "omegaconf"} & {name.split(".")[0] for name in imported_names(tree)}
    }
    assert importing == {compose, *parts}
    for part in parts:
        assert [module for module in MODULES if part in own_imports(module)] == [compose]


def test_the_training_loop_touches_no_files() -> None:
    for module in (
        "cifar_lab.training.loop",
        "cifar_lab.training.splits",
        "cifar_lab.training.batches",
    ):
        names = {name.split(".")[0] for name in imported_names(MODULES[module])}
        assert not {"os", "io", "shutil"} & names
        source = ast.unparse(MODULES[module])
        assert "open(" not in source
        assert ".write_" not in source
    loop = imported_names(MODULES["cifar_lab.training.loop"])
    assert not {"pathlib.Path", "cifar_lab.runs.run_dir"} & loop


@pytest.mark.parametrize("module", [m for m in MODULES if package_of(m) != "commands"])
def test_nothing_below_a_command_prints(module: str) -> None:
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "sys.stdout.write"), node.lineno


@functools.cache
def private_definitions(tree: ast.Module) -> set[str]:
    """Return the names with one leading underscore that a file defines, attributes included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if re.fullmatch(r"_[^_]\w*", name)}


def foreign_private_names(tree: ast.Module, of_others: set[str]) -> Iterator[str]:
    """Yield the private names of other files that a file imports or reaches as attributes.

    What a class inherits (`self._x`) is its own.
    """
    for name in imported_names(tree):
        if name.startswith("cifar_lab.") and re.search(r"\._[^_]", name):
            yield name
    foreign = of_others - private_definitions(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in foreign:
            owner = ast.unparse(node.value)
            if owner != "self":
                yield f"{owner}.{node.attr}"


def test_no_private_name_is_used_in_another_file() -> None:
    for module, tree in MODULES.items():
        others = (private_definitions(other) for name, other in MODULES.items() if name != module)
        assert set(foreign_private_names(tree, set().union(*others))) == set(), module


def tracked_texts() -> Iterator[tuple[str, str]]:
    """Yield name and text of the files in which modules and files are named for people."""
    command = ["git", "ls-files", "*.md", "*.py", "*.yaml", "*.toml", "*.yml", "scripts", ".ci"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in listed.stdout.splitlines():
        if not name.startswith("tests/") and (ROOT / name).is_file():
            yield name, (ROOT / name).read_text(encoding="utf-8")


def test_no_module_is_named_that_does_not_exist() -> None:
    defined = {
        f"{module}.{node.name}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    } | {f"{module}.{name}" for module, tree in MODULES.items() for name in assigned(tree)}
    defined |= {f"cifar_lab.{name}" for name in cifar_lab.__all__}
    for file, text in tracked_texts():
        for name in re.findall(r"(?<![\w./-])cifar_lab(?:\.[A-Za-z]\w*)+", text):
            known = name in MODULES or name in defined or name.rpartition(".")[0] in defined
            assert known or name in {"cifar_lab.conf", *EXAMPLES}, f"{file} names {name}"


def assigned(tree: ast.Module) -> set[str]:
    """Return the names that a module assigns at its top."""
    return {
        node.id
        for statement in tree.body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }


def test_no_file_is_named_that_does_not_exist() -> None:
    pattern = (
        r"(?<![\w./<>-])(?:src|tests|docs|conf|scripts|examples)/[\w./-]+\.(?:py|md|yaml|png)\b"
    )
    for file, text in tracked_texts():
        for name in re.findall(pattern, text):
            assert name in EXAMPLES or (ROOT / name).is_file(), f"{file} names {name}"
