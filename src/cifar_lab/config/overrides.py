"""Hydra's grammar of overrides: read, refused where it is not supported, and expanded to a grid.

For `cifar_lab.config.compose` only, which composes the config of each set of overrides.
"""

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from cifar_lab.config.launch import LAUNCH_KEYS, Dimension, combinations, range_size
from cifar_lab.config.schema import as_typed, convert
from cifar_lab.errors import UsageError, first_line, shorten

INSTEAD_OF_PLUGINS = {
    "hydra/launcher": "leave it out and set jobs=N, or choose submitit_slurm or ray",
    "hydra/sweeper": "leave it out; -m and lists of values are a grid",
}


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Read `key=value` words; UsageError names the first one that cannot be read."""
    try:
        return OverridesParser.create().parse_overrides(list(words))
    except (HydraException, ValueError, RecursionError) as error:
        raise UsageError(_override_problem(words, error)) from None


def check_overrides(parsed: list[Override]) -> None:
    """Refuse what Hydra would accept, and this package does not support."""
    for override in parsed:
        line, key = shorten(str(override.input_line)), override.key_or_group
        if override.is_delete():
            raise UsageError(
                f"{line} is wrong: nothing can be removed; choose another option, "
                f"such as {shorten(key)}=OPTION"
            )
        if override.package is not None:
            raise UsageError(f"{line} is wrong: packages (@) are not supported; write group=OPTION")
        if key == "training.tensorboard":
            raise UsageError(f"{line} is wrong: write tracker=tensorboard")
        if key.split(".")[0] == "choices":
            raise UsageError(f"{line} is wrong: choices are filled in; write GROUP=OPTION")
        is_hydra = re.match(r"hydra\b", key) is not None
        if is_hydra and key not in INSTEAD_OF_PLUGINS and not key.startswith("hydra.launcher."):
            raise UsageError(
                f"{line} is not supported: of Hydra's settings only hydra/launcher and "
                "hydra.launcher.KEY are"
            )


def expand_points(
    points: Any, asked: Collection[str], options: Mapping[str, Collection[str]]
) -> list[list[Override]]:
    """Return the runs of `points`, without the keys that a command line asks for; each once."""
    found: dict[tuple[str, ...], list[Override]] = {}
    for place, point in enumerate(convert(list[dict[str, Any]], points, "points")):
        if not point:
            raise UsageError(f"points[{place}] is empty; it must be a group of settings")
        words = [f"{key}={as_typed(value)}" for key, value in point.items() if key not in asked]
        parsed = parse_overrides(words)
        check_overrides(parsed)
        for overrides in expand_grid(parsed, options, multirun=True):
            found.setdefault(tuple(str(o.input_line) for o in overrides), overrides)
    return list(found.values())


def expand_grid(
    parsed: list[Override],
    options: Mapping[str, Collection[str]],
    *,
    multirun: bool,
    points: Sequence[list[Override]] = (),
) -> list[list[Override]]:
    """Return the overrides of each run: all combinations of the values that are listed.

    `points` are one further axis, which sets several keys at once.
    """
    swept = [override for override in parsed if override.is_sweep_override()]
    for override in swept:
        line = shorten(str(override.input_line))
        if not multirun:
            raise UsageError(f"{line} names several values; add -m to run all of them")
        if override.is_interval_sweep():
            raise UsageError(f"{line} is wrong: a grid needs single values; add search=optuna")
    axes: list[Sequence[list[Override]]] = []
    for override in swept:
        values = [f"{override.get_key_element()}={v}" for v in listed_values(override, options)]
        axes.append([[value] for value in parse_overrides(values)])
    keys = [override.key_or_group for override in swept]
    for key in keys:
        if keys.count(key) > 1:
            raise UsageError(f"{shorten(key)} is listed twice: it can belong to one axis only")
    grid = []
    for cell in combinations([*axes, points or [[]]]):
        chosen = iter(cell)
        single = [next(chosen) if o.is_sweep_override() else [o] for o in parsed]
        grid.append(list(itertools.chain(*single, *chosen)))
    return grid


def listed_values(override: Override, options: Mapping[str, Collection[str]]) -> tuple[str, ...]:
    """Return the values that an override lists, as one types them; none of an interval."""
    value: Any = override.value()
    line = shorten(str(override.input_line))
    if isinstance(value, Glob):
        found = tuple(value.filter(list(options.get(override.key_or_group, ()))))
        if not found:
            raise UsageError(f"{line} is wrong: it matches no option of a group")
        return found
    if isinstance(value, RangeSweep):
        _range(override, value)
    return () if override.is_interval_sweep() else tuple(override.sweep_string_iterator())


def _range(override: Override, value: RangeSweep) -> tuple[float, float, float]:
    """Return start, last value and step of a range that can be listed."""
    line = shorten(str(override.input_line))
    if value.start is None or value.stop is None:
        raise UsageError(f"{line} is wrong: a range needs a start and an end")
    start, stop, step = float(value.start), float(value.stop), float(value.step)
    try:
        size = range_size(start, stop, step)
    except UsageError as error:
        raise UsageError(f"{line} is wrong: {error}") from None
    return start, start + (size - 1) * step, step


def search_dimension(override: Override, options: Mapping[str, Collection[str]]) -> Dimension:
    """Return one axis of a search from an override of Hydra's sweep grammar."""
    key, value = override.key_or_group, override.value()
    line = shorten(str(override.input_line))
    if key.partition(".")[0] in LAUNCH_KEYS:
        raise UsageError(f"{line} is wrong: {key} takes one value, as it is no setting of a run")
    if isinstance(value, RangeSweep):
        low, high, step = _range(override, value)
        if step < 0:
            raise UsageError(f"{line} is wrong: in a search a range goes upwards")
        whole = all(isinstance(n, int) for n in (value.start, value.stop, value.step))
        log = "log" in value.tags
        return Dimension(key, low=low, high=high, step=step, whole=whole, log=log)
    if not isinstance(value, IntervalSweep):
        return Dimension(key, listed_values(override, options))
    if value.start is None or value.end is None:
        raise UsageError(f"{line} is wrong: an interval needs a start and an end")
    low, high, log = float(value.start), float(value.end), "log" in value.tags
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
        raise UsageError(
            f"{line} is wrong: its start must be below its end" + (" and above 0" if log else "")
        )
    whole = isinstance(value.start, int) and isinstance(value.end, int)
    return Dimension(key, low=low, high=high, whole=whole, log=log, step=1.0 if whole else None)


def search_examples(space: list[Dimension], fixed: list[Override]) -> list[list[Override]]:
    """Return three runs of a search, at both ends of every axis and between, to check it with."""
    lines = [[f"{d.key}={d.samples[i]}" for d in space] for i in range(3 if space else 1)]
    return [[*fixed, *parse_overrides(some)] for some in lines]


def _override_problem(words: Sequence[str], error: Exception) -> str:
    for line in words:
        try:
            OverridesParser.create().parse_overrides([line])
        except (HydraException, ValueError, RecursionError):
            return f"{shorten(line)} cannot be read as key=value: {first_line(error)}"
    return first_line(error)


def value_text(override: Override) -> str:
    """Return the value of an override as it was typed."""
    return str(override.input_line).partition("=")[2]
