"""Hydra's grammar of overrides: read, refused where it is not supported, and expanded to a grid.

For `cifar_lab.config.compose` only, which composes the config of each set of overrides.
"""

import itertools
import math
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException

from cifar_lab.config.command_line import default_options, default_settings, unknown_key
from cifar_lab.config.launch import LAUNCH_KEYS, MAX_RUNS, Dimension
from cifar_lab.config.run_config import RunConfig, flatten, merge
from cifar_lab.config.schema import as_typed, find_field, parse_as
from cifar_lab.errors import UsageError, did_you_mean, listing, shorten

Options = Mapping[str, Collection[str]]  # of each group


def parse_overrides(words: Sequence[str]) -> list[Override]:
    """Read `key=value` words; UsageError names the first one that is wrong or not supported."""
    parsed = []
    for word in words:
        # Around a name that is not UTF-8, which nobody can type, the quotes are added.
        needs_quotes = re.search(r"=[^\"'\[{].*[\udc80-\udcff]", word)
        override = _read(_quoted(word) if needs_quotes else word)
        if isinstance(override, Exception):
            raise _unreadable(word, override)
        _check_supported(override)
        parsed.append(override)
    return parsed


def _read(word: str) -> Override | Exception:
    try:
        (override,) = OverridesParser.create().parse_overrides([word])
    except (HydraException, ValueError, RecursionError) as error:
        return error
    return override


def _unreadable(word: str, error: Exception) -> UsageError:
    """Return the error for a word that is no override, such as a path with a bracket or an ü."""
    key, _, value = word.partition("=")
    problem, quoted = f"{shorten(word)} cannot be read", _quoted(word)
    default = default_options().get(key, default_settings().get(key))
    if reason := re.search(r" while evaluating .*': (.*)", str(error)):  # of range(a), ...
        return UsageError(f"{problem}: {shorten(reason[1])}")
    if key in default_options() or isinstance(default, bool | int | float | list):
        return UsageError(f"{problem}; write it as in {key}={as_typed(default).replace(', ', ',')}")
    if value and not re.match(r"[\[{'\"]|\w+\(", value) and isinstance(_read(quoted), Override):
        return UsageError(f"{problem} as it is; with quotes it can: {shlex.quote(quoted)}")
    return UsageError(f"{problem} as KEY=VALUE: no space beside =, and every quote closed")


def _quoted(word: str) -> str:
    """Return KEY=VALUE with quotes that Hydra reads around the value."""
    key, _, value = word.partition("=")
    escaped = value.replace('"', r"\"")
    return f'{key}="{escaped}"'


def _check_supported(override: Override) -> None:
    """Refuse what Hydra would accept, and this package does not support."""
    key, adds = override.key_or_group, override.is_add() or override.is_force_add()
    is_hydra = re.match(r"hydra\b", key) and not re.match(r"hydra/launcher$|hydra\.launcher\.", key)
    for is_wrong, why in (
        (override.is_delete(), "is wrong: nothing can be removed; choose another option"),
        (override.package, "is wrong: packages (@) are not supported; write group=OPTION"),
        (key.startswith("choices"), "is wrong: choices are filled in; write GROUP=OPTION"),
        (adds and key in default_options(), "is wrong: one option replaces another; leave out +"),
        (is_hydra, "is not supported: of Hydra's settings only hydra/launcher[.KEY] are"),
    ):
        if is_wrong:
            raise UsageError(f"{text_of(override)} {why}")


def check_choice(override: Override, options: Options) -> None:
    """Refuse what is not an option of its group, and several values where a sweep takes one."""
    group, swept = override.key_or_group, override.is_sweep_override()
    if swept and group.partition(".")[0] in LAUNCH_KEYS:
        raise UsageError(f"{text_of(override)} is wrong: {group} takes one value for all runs")
    if group not in options:
        return
    for option in listed_values(override, options) if swept else [override.value()]:
        if not isinstance(option, str) or option not in options[group]:
            right = f"it must be one of {listing(options[group])}"
            if isinstance(option, int | float):  # dropout=0.5
                keys = [key for key in default_settings() if re.match(rf"{group}\.(?!_)", key)]
                right += f"; single values are written as in {keys[0]}={option}" if keys else ""
            if isinstance(option, str):
                right += did_you_mean(option, options[group])
                if group == "model" and re.search(r"\d", option):  # resnet18, vit_b_16
                    right = f"write model=torchvision model.architecture={option}, or model=timm"
            raise UsageError(f"{text_of(override)} is wrong: {right}")


def set_value(plain: dict[str, Any], override: Override) -> None:
    """Set one value as Hydra does; refuse a key that does not exist, unless + adds it."""
    key = override.key_or_group
    *parents, name = key.split(".")
    adds = override.is_add() or override.is_force_add()
    # Files of one's own in conf/ need not name every setting.
    adds = adds or key == "model.weights" or find_field(RunConfig, key) is not None
    target: Any = plain
    for parent in parents:
        if adds and isinstance(target, dict):
            target.setdefault(parent, {})
        target = target.get(parent) if isinstance(target, dict) else None
    if not isinstance(target, dict) or (name not in target and not adds):
        hidden = ("_target_", "protocols", "choices")
        siblings = [k for k in target if k not in hidden] if isinstance(target, dict) else []
        keys = flatten({k: value for k, value in plain.items() if k not in hidden})
        raise unknown_key(key, siblings, keys)
    target[name] = merge(target.get(name), override.value())


def expand_points(points: Any, asked: Collection[str], options: Options) -> list[list[Override]]:
    """Return the runs of `points`, without the keys that a command line asks for; each once."""
    runs: dict[tuple[str, ...], list[Override]] = {}
    for point in parse_as(list[dict[str, Any]], points, "points"):
        words = [f"{key}={as_typed(value)}" for key, value in point.items() if key not in asked]
        for overrides in expand_grid(parse_overrides(words), options, multirun=True):
            runs.setdefault(lines_of(overrides), overrides)
    return list(runs.values())


def expand_grid(
    parsed: list[Override],
    options: Options,
    *,
    multirun: bool,
    points: Sequence[list[Override]] = (),
) -> list[list[Override]]:
    """Return the overrides of each run: all combinations of the values that are listed.

    `points` are one further axis, which sets several keys at once.
    """
    axes: list[Sequence[list[Override]]] = []
    for override in parsed:
        if not override.is_sweep_override():
            axes.append([[override]])
            continue
        line = text_of(override)
        if not multirun:
            raise UsageError(f"{line} names several values; add -m to run all of them")
        if override.is_interval_sweep():
            raise UsageError(f"{line} is wrong: a grid needs single values; add search=optuna")
        values = [f"{override.get_key_element()}={v}" for v in listed_values(override, options)]
        axes.append([[value] for value in parse_overrides(values)])
    axes.append(points or [[]])
    count = math.prod(map(len, axes))
    if count > MAX_RUNS:
        raise UsageError(
            f"this is a grid of {count:,} runs; the most is {MAX_RUNS:,}: list fewer values, or "
            "let search=optuna choose"
        )
    return [list(itertools.chain(*cell)) for cell in itertools.product(*axes)]


def listed_values(override: Override, options: Options) -> tuple[str, ...]:
    """Return the values that an override lists, as one types them; none of an interval."""
    value: Any = override.value()
    if isinstance(value, Glob):
        matches = tuple(value.filter(list(options.get(override.key_or_group, ()))))
        if not matches:
            raise UsageError(f"{text_of(override)} is wrong: it matches no option of a group")
        return matches
    if isinstance(value, RangeSweep) and not 0 < _size(value) <= MAX_RUNS:
        right = f"a range must have 1 to {MAX_RUNS:,} numbers"
        raise UsageError(f"{text_of(override)} is wrong: {right}")
    return () if override.is_interval_sweep() else tuple(override.sweep_string_iterator())


def _size(numbers: RangeSweep) -> float:
    try:
        start, stop, step = (float(n) for n in (numbers.start, numbers.stop, numbers.step))  # type: ignore[arg-type]
        return math.ceil((stop - start) / step)
    except (TypeError, ValueError, ArithmeticError):  # without an end, or with a step of 0
        return 0


def search_dimension(override: Override, options: Options) -> Dimension:
    """Return one axis of a search from an override of Hydra's sweep grammar."""
    key, value = override.key_or_group, override.value()
    step: float | None = None
    if isinstance(value, RangeSweep):
        values = [float(text) for text in listed_values(override, options)]
        low, high, step = values[0], values[-1], value.step
        whole = all(isinstance(n, int) for n in (value.start, value.stop, value.step))
    elif isinstance(value, IntervalSweep):
        nothing = math.nan
        low, high = (float(nothing if n is None else n) for n in (value.start, value.end))
        whole = all(isinstance(n, int) for n in (value.start, value.end))
    else:
        return Dimension(key, listed_values(override, options))
    log = "log" in value.tags
    if not (math.isfinite(low) and math.isfinite(high) and low < high) or (log and low <= 0):
        right = "its start must be below its end" + (" and above 0" if log else "")
        raise UsageError(f"{text_of(override)} is wrong: {right}")
    return Dimension(
        key, low=low, high=high, whole=whole, log=log, step=step or float(whole) or None
    )


def lines_of(overrides: Sequence[Override]) -> tuple[str, ...]:
    """Return overrides as they were written."""
    return tuple(str(override.input_line) for override in overrides)


def text_of(override: Override) -> str:
    """Return an override as it was written, for a message."""
    return shorten(str(override.input_line))
