"""The summary of a run: the fields of `summary.json`, and where its result comes from.

That is the code that made it, its commit, and the versions of its packages.
"""

import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cifar_lab.config.identity import identity_hash
from cifar_lab.config.run_config import RunConfig, check_figure_name
from cifar_lab.config.schema import parse_as
from cifar_lab.config.targets import resolve
from cifar_lab.errors import UsageError
from cifar_lab.runs.metrics import columns, is_possible
from cifar_lab.version import RESULTS_VERSION

Status = Literal["queued", "running", "interrupted", "failed", "finished"]


@dataclass(frozen=True)
class RunSummary:
    """The result of a run: accuracies are fractions, losses means per image, seconds wall clock.

    `best_epoch` is the one that `training.monitor` chose, and the `best_val_*` are its scores.
    `test_images_trained_on` counts test images with the pixels of a training image, if there are
    any. `per_class_accuracy` has a row for each class: a name is no key, since it may be any text.
    `results_version` and `targets_hash` are those of the code that trained it; runs of before these
    have a `code_hash` instead.
    """

    status: Status
    seed: int
    choices: dict[str, str]
    protocol: str
    device: str
    precision: str
    threads: int | None = None
    device_name: str | None = None
    epochs: int = 0
    best_epoch: int | None = None
    best_val_accuracy: float | None = None
    best_val_loss: float | None = None
    best_val_balanced_accuracy: float | None = None
    best_val_macro_f1: float | None = None
    scored_weights: str | None = None
    test_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy_last: float | None = None
    test_accuracy_averaged: float | None = None
    test_size: int | None = None
    expected_calibration_error: float | None = None
    test_images_trained_on: int | None = None
    test_accuracy_without_them: float | None = None
    per_class_accuracy: list[dict[str, Any]] = field(default_factory=list)
    most_confused: list[dict[str, Any]] = field(default_factory=list)
    diagnosis: dict[str, float | int] = field(default_factory=dict)
    separation: dict[str, float | None] = field(default_factory=dict)
    initial_learning_rate: float | None = None
    effective_learning_rate: float | None = None
    parameters: int | None = None
    seconds: float = 0.0
    images_per_second: float | None = None
    epoch_seconds: float | None = None
    overhead_seconds: float | None = None
    stopped_early: bool = False
    figures: list[str] = field(default_factory=list)
    continued_from: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    commit: str | None = None
    results_version: int | None = None
    targets_hash: str | None = None
    code_hash: str | None = None
    dataset: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    identity: str | None = None

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, as they were when the run was evaluated."""
        return [str(row.get("class", "")) for row in self.per_class_accuracy]

    def check(self, path: str) -> None:
        """Refuse numbers that no run has, and figures that lead out of the run's folder."""
        for name in columns(RunSummary):
            value = getattr(self, name)
            if isinstance(value, int | float) and not is_possible(name, value):
                raise UsageError(f"{name} is {value:.6g}, which no run has")
        for figure in self.figures:
            check_figure_name(figure)


def queued(config: RunConfig) -> RunSummary:
    """Return the summary of a run that has not started."""
    same = ("seed", "choices", "protocol", "device", "precision", "threads")
    return RunSummary(
        status="queued",
        **{name: getattr(config, name) for name in same},
        initial_learning_rate=config.optimizer.get("lr"),
        identity=identity_hash(config),
    )


def parse_summary(text: bytes) -> RunSummary:
    """Return the summary in summary.json, without fields that this version does not know.

    Raises ValueError, UsageError or RecursionError if the text is anything else. A run that
    diverged has losses that are not finite.
    """
    data = json.loads(text)
    known = columns(RunSummary)
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if name in known}
        scores = data.get("per_class_accuracy")
        if isinstance(scores, dict):  # of a run of before names were no keys
            rows = [{"class": name, "accuracy": score} for name, score in scores.items()]
            data["per_class_accuracy"] = rows
    return parse_as(RunSummary, data, "", finite=False)


# --- the code that made a result ------------------------------------------------------------------

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]  # where it is one

_CHOSEN_BY_CONFIG = ("cifar_lab.models.", "cifar_lab.optimizers.")
_ENGINE = ("src/cifar_lab/training", "src/cifar_lab/datasets")  # decide results, not in the hash


def code_version(config: RunConfig) -> str:
    """Return what decides a run's result beside its config, such as `1-0123456789ab`.

    That is RESULTS_VERSION and 12 hex digits of the files of the config's targets (models,
    optimizers, loaders) and of those modules of one's own which they import: users edit these. Only
    their meaning counts, not comments, docstrings and layout.
    """
    sources: dict[Path, str] = {}
    for role in ("dataset.source", "model", "activation", "optimizer", "scheduler"):
        target_config = config.dataset.source if role == "dataset.source" else getattr(config, role)
        if target_config is not None and target_config.get("_target_") is not None:
            resolved = resolve(target_config["_target_"], role)
            named = target_config["_target_"].rpartition(".")[0]
            sources |= _own_sources({named, getattr(resolved, "__module__", None) or named})
    digest = hashlib.sha256()
    # The names are the same wherever the package is installed.
    names = {s: str(s.relative_to(_PACKAGE)) if _PACKAGE in s.parents else s.name for s in sources}
    for source in sorted(sources, key=lambda source: (names[source], source)):
        digest.update(f"{names[source]}\n{sources[source]}\n".encode())
    return f"{RESULTS_VERSION}-{digest.hexdigest()[:12]}"


def other_code(summary: RunSummary, code: str) -> str | None:
    """Return how the code that made a run differs from `code` of today; None if it does not.

    A run of before results had a version counts as version 1, whatever files its targets had.
    """
    now, _, targets = code.partition("-")
    if summary.results_version is None and summary.code_hash is None:  # it has not started yet
        return None
    if str(summary.results_version or 1) != now:
        return f"results version {summary.results_version or 1}, this is {now}"
    if summary.targets_hash in (None, targets):
        return None
    return f"its model's or optimizer's files have the hash {summary.targets_hash}, now {targets}"


def reuse_note(summary: RunSummary) -> str | None:
    """Return what to tell of a finished run that is used again, None if there is nothing.

    That its code had no version yet, or that the training code of this checkout was edited since:
    a developer's change is not always meant to raise RESULTS_VERSION, and may change results.
    """
    if summary.results_version is None and summary.code_hash is not None:
        return "it is older than results versions and counts as version 1"
    if summary.commit is not None and _engine_changed_since(summary.commit.rstrip("+")):
        return (
            f"it was made at commit {summary.commit}, this is {commit()}, and the code of training "
            "or datasets differs"
        )
    return None


@functools.cache
def _engine_changed_since(revision: str) -> bool:
    """Whether the checkout's training code differs from a commit's; False if git cannot tell."""
    answer = _git("diff", "--quiet", revision, "--", *_ENGINE)
    return answer is not None and answer.returncode == 1


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    packages = ("cifar-lab", "torch", "torchvision", "timm", "numpy", "scikit-learn")
    found = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@functools.cache
def commit() -> str | None:
    """Return the git commit of the checkout that this code runs from, "+" if it is changed.

    A worker of Ray has the code and no checkout: the sweep tells it.
    """
    answer = _git("describe", "--always", "--abbrev=12", "--dirty=+")
    if answer is None or answer.returncode != 0:
        return os.environ.get("CIFAR_LAB_COMMIT") or None
    return answer.stdout.strip()


def _git(*words: str) -> subprocess.CompletedProcess[str] | None:
    """Return git's answer about the checkout; None where there is no checkout, or no git."""
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "-C", str(_CHECKOUT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None


def _own_sources(targets: set[str]) -> dict[Path, str]:
    """Return what the files of a target's modules mean, and those of one's own that they import.

    One's own are the modules of the target's package, and those outside the installed packages.
    Of cifar_lab only models and optimizers count: RESULTS_VERSION stands for the rest.
    """
    packages = {"cifar_lab", *(target.partition(".")[0] for target in targets)}
    sources: dict[Path, str] = {}
    seen, waiting = set(), list(targets)
    while waiting:
        name = waiting.pop()
        top = name.partition(".")[0]
        engine = top == "cifar_lab" and not name.startswith(_CHOSEN_BY_CONFIG)
        if name in seen or engine or top in ("", "torch"):
            continue
        seen.add(name)
        waiting.append(name.rpartition(".")[0])  # importing a.b runs a/__init__.py too
        if top not in packages and _is_installed(_file_of(top)):
            continue
        file = _file_of(name)
        if file is not None and (top in packages or not _is_installed(file)):
            package = name if file.name == "__init__.py" else name.rpartition(".")[0]
            imported, sources[file] = _read(file.read_bytes(), package)
            waiting += imported
    return sources


def _file_of(module: str) -> Path | None:
    """Return a module's Python file, or None if it has none; what is above it is imported."""
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # a class or function of a module, an optional package that is not here
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


@functools.lru_cache(maxsize=256)
def _read(source: bytes, package: str) -> tuple[list[str], str]:
    """Return the names that a module of a package may import anywhere in it, and what it means.

    That is its code without comments, docstrings and layout, which change no result.
    """
    tree, names = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [line for line in body if not _is_text(line)] or [ast.Pass()]
    return names, ast.unparse(tree)


def _is_installed(file: Path | None) -> bool:
    """Whether a file belongs to the standard library or to an installed package."""
    return file is not None and (
        not {"site-packages", "dist-packages"}.isdisjoint(file.parts)
        or file.is_relative_to(sysconfig.get_path("stdlib"))
    )


def _is_text(line: ast.stmt) -> bool:
    """Whether a statement is a string alone: a docstring, or text below an attribute."""
    return isinstance(line, ast.Expr) and isinstance(getattr(line.value, "value", None), str)
