"""What Hydra composes, kept and combined: the options of a group are composed once in a sweep.

Hydra takes a tenth of a second for each combination of options, a minute for some hundred of them.
Nearly all options change their own part of the config and nothing else, so a combination is put
together from compositions that differ from a first one in one option each.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cifar_lab.config.groups import any_depends_on_others
from cifar_lab.config.run_config import flatten
from cifar_lab.config.suggestions import unknown_key
from cifar_lab.errors import UsageError, first_line, shorten

_NO_CHOICES = ("hydra", "search", "tracker")  # groups that are no part of a run


@dataclass(frozen=True)
class Composition:
    """The config of some options, and Hydra's own part; neither is to be changed."""

    node: DictConfig
    hydra: DictConfig
    choices: dict[str, str]  # the option of each group

    @cached_property
    def unresolved(self) -> dict[str, Any]:
        """The config as plain containers, with its interpolations."""
        return _to_dict(OmegaConf.to_container(self.node))

    @cached_property
    def is_plain(self) -> bool:
        """Whether there is nothing to resolve."""
        values = flatten(self.unresolved).values()
        return not any("${" in text or "???" in text for text in map(str, values))

    @property
    def run_choices(self) -> dict[str, str]:
        """The option of each group that is part of a run."""
        return {k: v for k, v in self.choices.items() if "/" not in k and k not in _NO_CHOICES}

    def differs_only_in(self, group: str, other: "Composition") -> bool:
        """Whether another choice in `group` changes the part of that name and nothing else."""

        def rest(composition: Composition) -> tuple[dict[str, Any], dict[str, str]]:
            parts = {k: v for k, v in composition.unresolved.items() if k != group}
            return parts, {k: v for k, v in composition.choices.items() if k != group}

        both_have_it = group in self.unresolved and group in other.unresolved
        return both_have_it and rest(self) == rest(other)


class Compositions:
    """The compositions of one root config, each made once."""

    def __init__(self, root: Path, options: Mapping[str, Mapping[str, Path]]) -> None:
        self._root = root
        self._options = options
        self._found: dict[tuple[str, ...], Composition] = {}
        self._bases: dict[tuple[str, ...], list[Override]] = {}

    def node(self, overrides: Sequence[Override]) -> DictConfig:
        """Return the config of these overrides, to be changed at will."""
        groups, values = self._split(overrides)
        node = self._find(groups).node.copy()
        for value in values:
            apply_value(node, value)
        return node

    def hydra(self, overrides: Sequence[Override]) -> DictConfig:
        """Return Hydra's own part of the config, not to be changed."""
        return self._find(self._split(overrides)[0]).hydra

    def cell(self, overrides: Sequence[Override]) -> dict[str, Any]:
        """Return the resolved config of these overrides, with the option of each group."""
        groups, values = self._split(overrides)
        composition = self._find(groups)
        touched = sorted({value.key_or_group.split(".")[0] for value in values})
        if composition.is_plain and set(touched) <= composition.unresolved.keys():
            part = OmegaConf.masked_copy(composition.node, touched)
            OmegaConf.set_struct(part, True)
            for value in values:
                apply_value(part, value, composition.node)
            plain = copy.deepcopy({**composition.unresolved, **resolve(part)})
        else:
            plain = resolve(self.node(overrides))
        plain["choices"] = {**(plain.get("choices") or {}), **composition.run_choices}
        return plain

    def _split(self, overrides: Sequence[Override]) -> tuple[list[Override], list[Override]]:
        """Return the choices of options and what is Hydra's, and then the values."""
        groups: list[Override] = []
        values: list[Override] = []
        for override in overrides:
            key = override.key_or_group
            (groups if key in self._options or key.startswith("hydra") else values).append(override)
        return groups, values

    def _find(self, groups: list[Override]) -> Composition:
        lines = lines_of(groups)
        if lines not in self._found:
            self._found[lines] = self._combine(groups) or self._compose(lines)
        return self._found[lines]

    def _combine(self, groups: list[Override]) -> Composition | None:
        """Put a combination together; None if it is the first of its kind, which Hydra composes."""
        names = [override.key_or_group for override in groups]
        # Options of Hydra's own groups (hydra/launcher) change its part, which is not combined.
        own = [line for line in lines_of(groups) if line.startswith("hydra")]
        base = self._bases.setdefault((*names, *own), groups)
        changed = [i for i, line in enumerate(lines_of(groups)) if line != lines_of(base)[i]]
        if len(changed) < 2 or self._any_may_depend:  # nothing can be combined
            return None
        first = self._find(base)
        others = {names[i]: self._find([*base[:i], groups[i], *base[i + 1 :]]) for i in changed}
        if not all(first.differs_only_in(name, other) for name, other in others.items()):
            return None
        node = first.node.copy()
        with open_dict(node):
            for name, other in others.items():
                node[name] = other.node[name]
        changes = {name: other.choices[name] for name, other in others.items()}
        return Composition(node, first.hydra, first.choices | changes)

    @cached_property
    def _any_may_depend(self) -> bool:
        files = {path for group in self._options.values() for path in group.values()}
        return any_depends_on_others({self._root, *files})

    def _compose(self, lines: tuple[str, ...]) -> Composition:
        try:
            node = hydra.compose(self._root.stem, overrides=list(lines), return_hydra_config=True)
            with open_dict(node):
                own = node.pop("hydra")
        except HydraException as error:
            message = first_line(error)
            if found := re.match(r"Could not override '(\S+)'", message):
                key = shorten(found[1])
                message = (
                    f"{key} cannot be changed; a key that is not there is added by +{key}=VALUE"
                )
            raise UsageError(message) from None
        except OmegaConfBaseException as error:
            raise UsageError(f"the config cannot be resolved: {first_line(error)}") from None
        return Composition(node, own, dict(OmegaConf.select(own, "runtime.choices").items()))


def apply_value(node: DictConfig, override: Override, everything: DictConfig | None = None) -> None:
    """Set one value as Hydra does; refuse a key that does not exist.

    `everything` has the keys that the refusal suggests, where `node` is a part of it.
    """
    key = override.key_or_group
    parent_key, _, name = key.rpartition(".")
    try:
        parent = OmegaConf.select(node, parent_key) if parent_key else node
        siblings = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        if name not in siblings and not override.is_add() and not override.is_force_add():
            hidden = ("_target_", "protocols", "choices")
            keys = flatten(OmegaConf.to_container(node if everything is None else everything))
            raise unknown_key(key, [s for s in siblings if s not in hidden], keys)
        ConfigLoaderImpl._apply_overrides_to_config([override], node)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(
            f"{shorten(str(override.input_line))} is wrong: {first_line(error)}"
        ) from None


def resolve(node: DictConfig) -> dict[str, Any]:
    """Return the config as plain containers, interpolations resolved."""
    try:
        return _to_dict(OmegaConf.to_container(node, resolve=True, throw_on_missing=True))
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UsageError(f"the config cannot be resolved: {first_line(error)}") from None


def _to_dict(plain: Any) -> dict[str, Any]:
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def lines_of(overrides: Sequence[Override]) -> tuple[str, ...]:
    """Return overrides as they were written."""
    return tuple(str(override.input_line) for override in overrides)
