"""Where a result comes from: the code that made it, its commit, the versions of its packages."""

import ast
import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.metadata
import platform
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.targets import resolve

_PACKAGE = Path(__file__).resolve().parents[1]

# All of training/, even the part that only prints: a list of exceptions would have to be kept by
# hand, and a module that is wrongly on it changes results without changing the hash.
_DECIDES_RESULTS = ("training", "datasets", "runs/metrics.py")
_CHOSEN_BY_CONFIG = ("cifar_lab.models.", "cifar_lab.optimizers.")


def code_hash(config: RunConfig) -> str:
    """Return 12 hex digits of the code that decides a run's result.

    It covers the meaning (not comments, docstrings and layout) of the training loop and everything
    around it, the datasets, the metrics, the files of the config's targets, and those modules of
    one's own which they import. A result with another hash is never presented silently.
    """
    sources: set[Path] = set()
    for name in _DECIDES_RESULTS:
        path = _PACKAGE / name
        sources |= set(path.rglob("*.py")) if path.is_dir() else {path}
    for role in ("dataset.source", "model", "activation", "optimizer", "scheduler"):
        target_config = config.dataset.source if role == "dataset.source" else getattr(config, role)
        if target_config is not None and target_config.get("_target_") is not None:
            resolved = resolve(target_config["_target_"], role)
            named = target_config["_target_"].rpartition(".")[0]
            sources |= _own_files({named, getattr(resolved, "__module__", None) or named})
    digest = hashlib.sha256()
    for name, source in sorted((_stable_name(source), source) for source in sources):
        state = source.stat()
        meaning = _meaning(source, state.st_mtime_ns, state.st_size)
        digest.update(f"{name}\n{meaning}\n".encode())
    return digest.hexdigest()[:12]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    packages = ("cifar-lab", "torch", "torchvision", "timm", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def commit() -> str | None:
    """Return the git commit of the checkout that this code runs from, "+" if it is changed."""
    folder = _PACKAGE.parents[1]
    if not (folder / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--abbrev=12", "--dirty=+"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _own_files(modules: set[str]) -> set[Path]:
    """Return the files of a target's modules and of the modules of one's own that they import.

    One's own are the modules of the target's package, and those outside the installed packages.
    Of cifar_lab only models and optimizers count here: what else decides a result is covered as a
    whole.
    """
    packages = {module.partition(".")[0] for module in modules} - {"torch"}
    found: dict[str, Path] = {}
    waiting = [name for module in modules for name in _with_parents(module)]
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        if name in found or top == "torch":
            continue
        if top == "cifar_lab" and not name.startswith(_CHOSEN_BY_CONFIG):
            continue
        file = _file_of(name)
        if file is not None and (top in (*packages, "cifar_lab") or not _is_installed(file)):
            found[name] = file
            waiting += _imports(file, name, file.stat().st_mtime_ns)
    return set(found.values())


def _file_of(module: str) -> Path | None:
    """Return a module's Python file, or None if it has none. Nothing is imported to find it."""
    loaded, parent = sys.modules.get(module), module.rpartition(".")[0]
    if loaded is not None:
        file = getattr(loaded, "__file__", None)
    else:
        search = getattr(sys.modules.get(parent), "__path__", None)
        if parent and search is None:
            above = _file_of(parent)
            search = [str(above.parent)] if above is not None else []
        spec = importlib.machinery.PathFinder.find_spec(module, search)
        file = spec.origin if spec is not None else None
    return Path(file) if file is not None and file.endswith(".py") else None


@functools.lru_cache(maxsize=256)
def _imports(file: Path, module: str, changed: int) -> tuple[str, ...]:
    """Return the modules that a file may import anywhere in it; `changed` is its time of change."""
    is_package = file.name == "__init__.py"
    names: list[str] = []
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    # Importing a.b runs a/__init__.py too.
    return tuple(dict.fromkeys(parent for name in names for parent in _with_parents(name)))


def _with_parents(module: str) -> Iterator[str]:
    parts = module.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _is_installed(file: Path) -> bool:
    """Whether a file belongs to the standard library or to an installed package."""
    if {"site-packages", "dist-packages"} & set(file.parts):
        return True
    return file.is_relative_to(sysconfig.get_path("stdlib"))


def _stable_name(file: Path) -> str:
    """Return a file's name in the hash: the same wherever the package is installed."""
    return str(file.relative_to(_PACKAGE)) if file.is_relative_to(_PACKAGE) else file.name


@functools.lru_cache(maxsize=256)
def _meaning(source: Path, changed: int, size: int) -> str:
    """Return a Python file without comments, docstrings and layout, which change no result.

    `changed` and `size` tell a changed file from the one that was read before: a sweep asks for
    every cell.
    """
    tree = ast.parse(source.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [line for line in body if not _is_text(line)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_text(line: ast.stmt) -> bool:
    """Whether a statement is only a string: a docstring, or text below an attribute."""
    is_constant = isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)
    return is_constant and isinstance(line.value.value, str)  # type: ignore[attr-defined]
