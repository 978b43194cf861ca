"""What Hydra composes: once for each combination of options, however many values a sweep lists."""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cifar_lab.config.command_line import unknown_key
from cifar_lab.config.run_config import flatten
from cifar_lab.errors import UsageError, first_line, shorten

_NO_CHOICES = ("hydra", "search", "tracker")  # groups that are no part of a run


@dataclass(frozen=True)
class Composition:
    """The config of some options, and Hydra's own part; neither is to be changed."""

    node: DictConfig
    hydra: DictConfig

    @cached_property
    def plain(self) -> dict[str, Any] | None:
        """The config as plain containers; None if there is something to resolve in it."""
        plain = {str(k): v for k, v in cast("Any", OmegaConf.to_container(self.node)).items()}
        resolved = not any("${" in str(v) or "???" in str(v) for v in flatten(plain).values())
        return plain if resolved else None


class Compositions:
    """The compositions of one root config, each made once: Hydra takes a tenth of a second."""

    def __init__(self, root: Path, options: Mapping[str, Mapping[str, Path]]) -> None:
        self._root = root
        self._options = options
        self._kept: dict[tuple[str, ...], Composition] = {}

    def node(self, overrides: Sequence[Override]) -> DictConfig:
        """Return the config of these overrides, to be changed at will."""
        node = self._composition(overrides).node.copy()
        for override in overrides:
            if not self._is_choice(override):
                apply_value(node, override)
        return node

    def hydra(self, overrides: Sequence[Override]) -> DictConfig:
        """Return Hydra's own part of the config, not to be changed."""
        return self._composition(overrides).hydra

    def cell(self, overrides: Sequence[Override]) -> dict[str, Any]:
        """Return the resolved config of these overrides, with the option of each group."""
        composition = self._composition(overrides)
        values = [override for override in overrides if not self._is_choice(override)]
        touched = sorted({override.key_or_group.split(".")[0] for override in values})
        if composition.plain is not None and set(touched) <= composition.plain.keys():
            # Copying the nodes of a whole config takes five times as long as all the rest.
            part = OmegaConf.masked_copy(composition.node, touched)
            OmegaConf.set_struct(part, True)
            for override in values:
                apply_value(part, override, composition.node)
            plain = copy.deepcopy({**composition.plain, **resolve(part)})
        else:
            plain = resolve(self.node(overrides))
        options = OmegaConf.select(self.hydra(overrides), "runtime.choices").items()
        chosen = {k: v for k, v in options if "/" not in k and k not in _NO_CHOICES}
        plain["choices"] = {**(plain.get("choices") or {}), **chosen}
        return plain

    def _is_choice(self, override: Override) -> bool:
        """Whether an override chooses an option or is Hydra's own, and does not set a value."""
        key = override.key_or_group
        return key in self._options or key.startswith("hydra")

    def _composition(self, overrides: Sequence[Override]) -> Composition:
        lines = lines_of([override for override in overrides if self._is_choice(override)])
        if lines not in self._kept:
            self._kept[lines] = self._compose(lines)
        return self._kept[lines]

    def _compose(self, lines: tuple[str, ...]) -> Composition:
        try:
            node = hydra.compose(self._root.stem, overrides=list(lines), return_hydra_config=True)
            with open_dict(node):
                return Composition(hydra=node.pop("hydra"), node=node)
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


def apply_value(node: DictConfig, override: Override, whole: DictConfig | None = None) -> None:
    """Set one value as Hydra does; refuse a key that does not exist.

    `whole` has the keys that the refusal suggests, where `node` is a part of it.
    """
    key = override.key_or_group
    parent_key, _, name = key.rpartition(".")
    try:
        parent = OmegaConf.select(node, parent_key) if parent_key else node
        siblings = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        if name not in siblings and not override.is_add() and not override.is_force_add():
            hidden = ("_target_", "protocols", "choices")
            keys = flatten(OmegaConf.to_container(node if whole is None else whole))
            raise unknown_key(key, [s for s in siblings if s not in hidden], keys)
        ConfigLoaderImpl._apply_overrides_to_config([override], node)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UsageError(
            f"{shorten(str(override.input_line))} is wrong: {first_line(error)}"
        ) from None


def resolve(node: DictConfig) -> dict[str, Any]:
    """Return the config as plain containers, interpolations resolved."""
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        assert isinstance(plain, dict)
        return {str(key): value for key, value in plain.items()}
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UsageError(f"the config cannot be resolved: {first_line(error)}") from None


def lines_of(overrides: Sequence[Override]) -> tuple[str, ...]:
    """Return overrides as they were written."""
    return tuple(str(override.input_line) for override in overrides)
