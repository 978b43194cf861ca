"""The config groups and their options, read from the folders that hold them, without Hydra."""

import functools
from pathlib import Path
from typing import Any

import yaml

from cifar_lab.config.run_config import flatten, merge
from cifar_lab.errors import UsageError, shorten

_PACKAGE = Path(__file__).resolve().parents[1]


def config_folder() -> Path:
    """Return where conf/ is: in the checkout, or inside the installed package."""
    checkout = _PACKAGE.parents[1] / "conf"
    return checkout if checkout.is_dir() else _PACKAGE / "conf"


def find_options(config_dir: str | Path | None = None) -> dict[str, dict[str, Path]]:
    """Return the file of each option of each group, without the reports: `find_files`."""
    files = find_files(config_dir)
    return {group: files[group] for group in files if group != "report"}


def find_files(config_dir: str | Path | None = None) -> dict[str, dict[str, Path]]:
    """Return the files of each folder of conf/; those in `config_dir` win over the shipped."""
    if config_dir is not None and not Path(config_dir).is_dir():
        raise UsageError(f"--config-dir {shorten(str(config_dir))} is not a folder")
    files: dict[str, dict[str, Path]] = {}
    for folder in (config_folder(), *([Path(config_dir)] if config_dir is not None else [])):
        for path in sorted(folder.rglob("*/*.yaml")):
            group = path.parent.relative_to(folder).as_posix()
            files.setdefault(group, {})[path.stem] = path
    return files


def experiments(config_dir: str | Path | None = None) -> dict[str, str | None]:
    """Return each experiment and the tag of the report that it reproduces, if any."""
    return {
        name: (read_experiment(name, config_dir).get("study") or {}).get("report")
        for name in find_options(config_dir)["experiment"]
    }


def read_experiment(name: str, config_dir: str | Path | None = None) -> dict[str, Any]:
    """Return what an experiment and those that it starts from set, as in conf/."""
    files = find_options(config_dir)["experiment"]
    content: dict[str, Any] = read_option(files[name]) or {}
    for start in content.get("defaults", []):
        if isinstance(start, str) and start in files:
            content = merge(read_experiment(start, config_dir), content)
    return content


@functools.cache
def default_options() -> dict[str, str]:
    """Return the default option of each group, in the order of conf/config.yaml."""
    chosen: dict[str, str] = {}
    for line in read_option(config_folder() / "config.yaml")["defaults"]:
        chosen |= line if isinstance(line, dict) else {}
    return chosen


@functools.cache
def default_settings() -> dict[str, Any]:
    """Return every dotted key of a run with the default options, and its value."""
    hidden = ("defaults", "hydra", "protocols", "study", "choices")
    main = read_option(config_folder() / "config.yaml")
    config = {key: value for key, value in main.items() if key not in hidden}
    for group, option in default_options().items():
        if group != "experiment":
            config[group] = read_option(find_options()[group][option])
    return dict.fromkeys(config) | flatten(config)


@functools.cache
def setting_keys() -> tuple[str, ...]:
    """Return every dotted key of a run with the default options, and the names of the groups."""
    return tuple(dict.fromkeys([*default_settings(), *find_options()]))


@functools.cache
def read_option(path: Path) -> Any:
    """Return the content of a file of conf/, not to be changed."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
