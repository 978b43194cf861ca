"""The door: from a command line to checked RunConfigs. Hydra is known here and nowhere below.

Hydra composes; what it lets pass (added keys, deleted groups, lists of options, values of the
wrong type) is refused here, in one line, before anything is imported that takes long, downloaded
or written.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hydra import compose as hydra_compose
from hydra import initialize_config_dir, initialize_config_module
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from cifar_lab import components, config
from cifar_lab.config import RunConfig, flatten
from cifar_lab.errors import RequestError, did_you_mean
from cifar_lab.schema import parse_as, setting, shorten


@dataclass(frozen=True)
class SearchOptions:
    """Who chooses the values that a sweep lists: a grid has them all, Optuna looks for the best."""

    method: Literal["none", "optuna"] = "none"
    trials: int = setting(20, ge=1, le=1_000_000)
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "hyperband", "none"] = "median"
    warmup_epochs: int = setting(2, ge=0)
    study: str = "search"
    seed: int = setting(0, ge=0, le=2**32 - 1)


@dataclass(frozen=True)
class Dimension:
    """One axis of a search: choices, or a range of numbers (`step` null: continuous)."""

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: float | None = None
    whole: bool = False
    log: bool = False

    @property
    def samples(self) -> tuple[str, str, str]:
        """Three values as one types them, by which a request is checked before it starts."""
        if self.choices:
            return self.choices[0], self.choices[len(self.choices) // 2], self.choices[-1]
        inside = self.low + (self.high - self.low) * 0.618
        if self.whole or self.step is not None:
            inside = self.low
        return tuple(str(int(n)) if self.whole else repr(n) for n in (self.low, inside, self.high))  # type: ignore[return-value]


@dataclass(frozen=True)
class LaunchOptions:
    """What a command line says about launching; none of it is part of a run."""

    plan: bool = False
    rerun: bool = False
    accept_code: bool = False
    jobs: int | Literal["auto"] = setting("auto", ge=1, le=1024)
    jobs_per_gpu: int = setting(1, ge=1, le=64)
    trust: list[str] = field(default_factory=list)
    search: SearchOptions = field(default_factory=SearchOptions)


@dataclass(frozen=True)
class Cell:
    """One run of a request, with the overrides that tell it from its siblings."""

    config: RunConfig
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Request:
    """A command line, understood: the runs, how to launch them, or a config to show."""

    cells: list[Cell]
    options: LaunchOptions
    is_sweep: bool
    launcher: dict[str, Any]
    shown: str | None = None
    space: tuple[Dimension, ...] = ()
    fixed: tuple[str, ...] = ()


_LAUNCH_KEYS = frozenset(spec.name for spec in dataclasses.fields(LaunchOptions))
_COMPONENTS = ("model", "optimizer", "activation", "dropout", "scheduler", "dataset", "figures")
_INSTEAD_OF_PLUGINS = {
    "hydra/launcher": "leave it out and set jobs=N, or choose submitit_slurm or submitit_local",
    "hydra/sweeper": "leave it out; -m and lists of values are a grid",
}
_CHECKOUT_CONF = Path(__file__).resolve().parents[2] / "conf"


def config_path() -> str:
    """Return where conf/ is: the checkout's folder, or inside the installed package."""
    return str(_CHECKOUT_CONF) if _CHECKOUT_CONF.is_dir() else "pkg://cifar_lab.conf"


def options(group: str) -> list[str]:
    """Return the names of a config group's options."""
    with _Composer(None, None) as composer:
        return composer.options(group)


def experiments() -> dict[str, str | None]:
    """Return each experiment and the tag of the report that it reproduces, if any."""
    with _Composer(None, None) as composer:
        return {name: composer.report_of(name) for name in composer.options("experiment")}


def read_arguments(argv: Sequence[str]) -> Any:
    """Parse Hydra's own flags; a wrong one is a RequestError."""
    parser = get_args_parser()

    def refuse(message: str) -> None:
        raise RequestError(f"{message}; see --help")

    parser.error = refuse  # type: ignore[method-assign, assignment]
    return parser.parse_intermixed_args(list(argv))  # overrides may stand around flags


def compose(argv: Sequence[str], *, check_all: bool = False) -> Request:
    """Turn a command line of overrides and Hydra's flags into a Request.

    RequestError for anything that is not a run that can be built. The components are checked
    against their targets (which imports torch) unless a config is only shown and no override
    touches them: the shipped options are known to fit.
    """
    arguments = read_arguments(argv)
    overrides = list(arguments.overrides)
    folder = None
    if overrides and "=" not in overrides[0] and not overrides[0].startswith("~"):
        folder = Path(overrides.pop(0))
        if not (folder / "config.yaml").is_file():
            raise RequestError(
                f"{shorten(str(folder))} is neither a key=value nor a run folder with a config.yaml"
            )
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except (HydraException, ValueError, RecursionError) as error:
        raise RequestError(_override_problem(overrides, error)) from None
    _check_overrides(parsed)
    if folder is not None:
        return _compose_folder(folder, parsed, arguments)
    with _Composer(arguments.config_dir, arguments.config_name) as composer:
        return composer.request(parsed, arguments, check_all=check_all)


def _compose_folder(folder: Path, parsed: list[Override], arguments: Any) -> Request:
    base = config.to_plain(config.load(folder / "config.yaml"))
    cells = []
    options = LaunchOptions()
    for overrides in _expand(parsed, multirun=bool(arguments.multirun)):
        node = OmegaConf.create({**dataclasses.asdict(LaunchOptions()), **base})
        OmegaConf.set_struct(node, True)
        plain = _apply_values(node, overrides)
        options = _take_options(plain)
        cells.append(_cell(plain, overrides, deep=arguments.cfg is None))
    shown = _show(OmegaConf.create(config.to_plain(cells[0].config)), arguments)
    return Request(cells, options, len(cells) > 1, {}, shown)


class _Composer:
    """A context in which Hydra composes; a group choice is composed once, values set on copies."""

    def __init__(self, config_dir: str | None, config_name: str | None) -> None:
        if config_dir is not None and not Path(config_dir).is_dir():
            raise RequestError(f"--config-dir {shorten(config_dir)} is no folder")
        self._config_dir = config_dir
        self._name = config_name or "config"
        self._cache: dict[tuple[str, ...], tuple[DictConfig, DictConfig]] = {}
        self._group_names: frozenset[str] | None = None

    def __enter__(self) -> "_Composer":
        GlobalHydra.instance().clear()
        path = config_path()
        self._context: Any = (
            initialize_config_module(path.removeprefix("pkg://"), version_base="1.3")
            if path.startswith("pkg://")
            else initialize_config_dir(path, version_base="1.3")
        )
        self._context.__enter__()
        loader: Any = GlobalHydra.instance().config_loader()
        if self._config_dir is not None:
            # what --config-dir does in Hydra's own main
            path = f"file://{Path(self._config_dir).resolve()}"
            schema = SearchPathQuery(provider="schema")  # Hydra wants it to stay the last
            search_path = loader.get_search_path()
            search_path.prepend(provider="command-line", path=path, anchor=schema)
            loader.repository.initialize_sources(search_path)
        self._loader = loader
        return self

    def __exit__(self, *exception: Any) -> None:
        self._context.__exit__(*exception)

    def request(self, parsed: list[Override], arguments: Any, *, check_all: bool) -> Request:
        """Compose every cell of a command line."""
        for override in parsed:
            self._check_choice(override)
        plain_overrides = [o for o in parsed if not o.is_sweep_override()]
        first, hydra = self._compose(plain_overrides)
        multirun = arguments.multirun or str(OmegaConf.select(hydra, "mode")) == (
            "RunMode.MULTIRUN"
        )
        grid = OmegaConf.select(hydra, "sweeper.params") or {}
        if multirun and grid:
            asked = {o.key_or_group for o in parsed}
            extra = [f"{k}={v}" for k, v in grid.items() if k not in asked]
            parsed = OverridesParser.create().parse_overrides(extra) + parsed
        cells: list[Cell] = []
        options = LaunchOptions()
        deep = check_all or arguments.cfg is None or _touches_components(parsed)
        node = first
        space: list[Dimension] = []
        if multirun and OmegaConf.select(first, "search.method") != "none":
            space = [_dimension(o) for o in parsed if o.is_sweep_override()]
            combinations = _ends(space, [o for o in parsed if not o.is_sweep_override()])
        else:
            combinations = _expand(parsed, multirun=bool(multirun))
        for overrides in combinations:
            node, hydra = self._compose(overrides)
            plain = _resolve(node)
            options = _take_options(plain)
            choices = OmegaConf.select(hydra, "runtime.choices")
            plain["choices"] = {
                **(plain.get("choices") or {}),
                **{
                    k: v
                    for k, v in choices.items()
                    if "/" not in k and k not in ("hydra", "search")
                },
            }
            cells.append(_cell(plain, overrides, deep=deep))
        shown = _show(node, arguments, hydra)
        fixed = tuple(
            str(o.input_line)
            for o in parsed
            if not o.is_sweep_override() and o.key_or_group.split(".")[0] != "search"
        )
        return Request(cells, options, bool(multirun), _launcher(hydra), shown, tuple(space), fixed)

    def _compose(self, overrides: list[Override]) -> tuple[DictConfig, DictConfig]:
        """Return the config of these overrides, and Hydra's own part, which is not to be changed.

        Hydra's part is by far the larger one, so it is not copied for each cell.
        """
        groups = [o for o in overrides if self._is_group(o) or o.key_or_group.startswith("hydra")]
        values = [o for o in overrides if o not in groups]
        lines = tuple(str(o.input_line) for o in groups)
        try:
            if lines not in self._cache:
                composed = hydra_compose(
                    self._name, overrides=list(lines), return_hydra_config=True
                )
                with open_dict(composed):
                    hydra = composed.pop("hydra")
                self._cache[lines] = (composed, hydra)
            node, hydra = self._cache[lines]
            node = node.copy()
            for value in values:
                _apply_value(node, value)
            return node, hydra
        except HydraException as error:
            raise RequestError(_first_line(error)) from None
        except OmegaConfBaseException as error:
            raise RequestError(f"the config does not hold together: {_first_line(error)}") from None

    def options(self, group: str) -> list[str]:
        """Return the names of a group's options."""
        return list(self._loader.get_group_options(group))

    def report_of(self, experiment: str) -> str | None:
        """Return `study.report` as an experiment's own file says it, without composing it."""
        loaded = self._loader.repository.load_config(f"experiment/{experiment}")
        tag = OmegaConf.select(loaded.config, "study.report") if loaded else None
        return None if tag is None else str(tag)

    def _is_group(self, override: Override) -> bool:
        return override.key_or_group in self._groups()

    def _groups(self) -> frozenset[str]:
        if self._group_names is None:
            self._group_names = frozenset(self._loader.list_groups(""))
        return self._group_names

    def _check_choice(self, override: Override) -> None:
        """Refuse what is no single existing option of a group."""
        group = override.key_or_group
        if group in _INSTEAD_OF_PLUGINS and not override.is_sweep_override():
            if override.value() not in self._loader.get_group_options(group):
                raise _not_supported(group, _value_text(override))
            return
        if group not in self._groups():
            return
        chosen = [override.value()]
        if override.is_sweep_override():
            chosen = list(override.sweep_string_iterator()) if override.is_choice_sweep() else []
        options = self._loader.get_group_options(group)
        for option in chosen:
            if not isinstance(option, str) or option not in options:
                guess = did_you_mean(option, options) if isinstance(option, str) else ""
                raise RequestError(
                    f"{group}={shorten(_value_text(override))} is wrong: it must be one of "
                    f"{', '.join(options)}{guess}"
                )


def _launcher(hydra: DictConfig) -> dict[str, Any]:
    """Return the settings of hydra/launcher; refuse launchers and sweepers that are not ours."""
    choices = OmegaConf.select(hydra, "runtime.choices")
    settings = OmegaConf.to_container(OmegaConf.select(hydra, "launcher"), resolve=True)
    assert isinstance(settings, dict)
    if choices["hydra/launcher"] != "basic" and "cluster" not in settings:
        raise _not_supported("hydra/launcher", choices["hydra/launcher"])
    if choices["hydra/sweeper"] != "basic":
        raise _not_supported("hydra/sweeper", choices["hydra/sweeper"])
    return {str(key): value for key, value in settings.items()}


def _not_supported(group: str, option: Any) -> RequestError:
    return RequestError(
        f"{group}={shorten(str(option))} is not supported: {_INSTEAD_OF_PLUGINS[group]}"
    )


def _check_overrides(parsed: list[Override]) -> None:
    for override in parsed:
        line = shorten(str(override.input_line))
        if override.is_delete():
            raise RequestError(
                f"{line} is wrong: nothing can be taken away; choose another option, "
                f"such as {override.key_or_group}=OPTION"
            )
        if override.package is not None:
            raise RequestError(
                f"{line} is wrong: packages (@) are not used here; write group=OPTION"
            )


def _expand(parsed: list[Override], *, multirun: bool) -> list[list[Override]]:
    """Return the overrides of each cell: the product of all values that are listed."""
    swept = [o for o in parsed if o.is_sweep_override()]
    if swept and not multirun:
        line = shorten(str(swept[0].input_line))
        raise RequestError(f"{line} names several values; add -m to run all of them")
    if not swept:
        return [parsed]
    for override in swept:
        if override.is_interval_sweep():
            line = shorten(str(override.input_line))
            raise RequestError(f"{line} is wrong: a grid cannot have all of it; add search=optuna")
    try:
        batches = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    except HydraException as error:
        raise RequestError(_first_line(error)) from None
    parser = OverridesParser.create()
    return [parser.parse_overrides(list(cell)) for batch in batches for cell in batch]


def _dimension(override: Override) -> Dimension:
    """Return what Hydra's sweep grammar says about one axis of a search."""
    key, value = override.key_or_group, override.value()
    line = shorten(str(override.input_line))
    if isinstance(value, ChoiceSweep):
        return Dimension(key, tuple(override.sweep_string_iterator()))
    if isinstance(value, RangeSweep):
        numbers = (value.start, value.stop, value.step)
        if any(n is None for n in numbers):
            raise RequestError(f"{line} is wrong: a range needs a start and an end")
        last = list(value.range())[-1]
        whole = all(isinstance(n, int) for n in numbers)
        return Dimension(
            key,
            low=float(value.start or 0),
            high=float(last),
            step=float(value.step),
            whole=whole,
            log="log" in value.tags,
        )
    if isinstance(value, IntervalSweep) and value.start is not None and value.end is not None:
        whole = isinstance(value.start, int) and isinstance(value.end, int)
        log = "log" in value.tags
        if not value.start < value.end or (log and value.start <= 0):
            raise RequestError(
                f"{line} is wrong: an interval goes upwards" + (", from above 0" if log else "")
            )
        return Dimension(
            key,
            low=float(value.start),
            high=float(value.end),
            whole=whole,
            log=log,
            step=1.0 if whole else None,
        )
    raise RequestError(
        f"{line} is wrong: a search takes lists, choice(), range(), interval() and tag(log,...)"
    )


def _ends(space: list[Dimension], fixed: list[Override]) -> list[list[Override]]:
    """Return three runs of a search, at and between the ends of every axis, to check it by."""
    parser = OverridesParser.create()
    lines = [[f"{d.key}={d.samples[i]}" for d in space] for i in range(3 if space else 1)]
    return [[*fixed, *parser.parse_overrides(some)] for some in lines]


def _apply_values(node: DictConfig, overrides: list[Override]) -> dict[str, Any]:
    for override in overrides:
        _apply_value(node, override)
    return _resolve(node)


def _apply_value(node: DictConfig, override: Override) -> None:
    """Set one value as Hydra does; a key that is not there is refused with its neighbours."""
    key = override.key_or_group
    parent_key, _, name = key.rpartition(".")
    try:
        parent = OmegaConf.select(node, parent_key) if parent_key else node
        known = [str(k) for k in parent] if isinstance(parent, DictConfig) else []
        if name not in known and not override.is_add() and not override.is_force_add():
            known = [k for k in known if k != "hydra"]
            where = parent_key or "a run"
            raise RequestError(
                f"there is no setting {shorten(key)}{did_you_mean(name, known)}; "
                f"{where} has {', '.join(k for k in known if k != '_target_') or 'no settings'}"
            )
        ConfigLoaderImpl._apply_overrides_to_config([override], node)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise RequestError(
            f"{shorten(str(override.input_line))} is wrong: {_first_line(error)}"
        ) from None


def _resolve(node: DictConfig) -> dict[str, Any]:
    """Return the config as plain containers, interpolations resolved."""
    try:
        plain = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        raise RequestError(f"the config does not hold together: {_first_line(error)}") from None
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def _take_options(plain: dict[str, Any]) -> LaunchOptions:
    """Remove what concerns launching from a config and return it."""
    taken = {key: plain.pop(key) for key in list(plain) if key in _LAUNCH_KEYS}
    options = parse_as(LaunchOptions, taken, "")
    if options.trust:
        components.trust(options.trust)
    return options


def _cell(plain: dict[str, Any], overrides: list[Override], *, deep: bool) -> Cell:
    asked = {o.key_or_group for o in overrides}
    protocols = plain.pop("protocols", None)
    _merge_protocol(plain, protocols, asked)
    for optional in ("scheduler", "activation"):
        component = plain.get(optional)
        if isinstance(component, Mapping) and component.get("_target_") is None:
            plain[optional] = None
    run = config.parse(plain)
    if deep:
        run = components.check(run, asked)
    return Cell(run, tuple(str(o.input_line) for o in overrides))


def _merge_protocol(plain: dict[str, Any], protocols: Any, asked: Iterable[str]) -> None:
    """Lay the chosen protocol's settings over the config, except those that the user asked for."""
    protocol = plain.get("protocol", "sound")
    changes = protocols.get(protocol) if isinstance(protocols, Mapping) else None
    for key, value in flatten(changes or {}).items():
        if any(key == a or key.startswith(f"{a}.") for a in asked):
            continue
        *parents, name = key.split(".")
        target = plain
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value


def _touches_components(parsed: list[Override]) -> bool:
    heads = {o.key_or_group.split(".")[0] for o in parsed}
    return bool(heads & {*_COMPONENTS, "experiment", "training", "trust"})


def _show(node: DictConfig, arguments: Any, hydra: DictConfig | None = None) -> str | None:
    """Return what `--cfg job|hydra|all` prints, after the checks; None if it was not asked for."""
    if arguments.cfg is None:
        return None
    copy = node.copy() if arguments.cfg != "hydra" else OmegaConf.create()
    if arguments.cfg != "job":
        with open_dict(copy):
            copy["hydra"] = hydra
    if arguments.package:
        copy = OmegaConf.select(copy, arguments.package)
        if copy is None:
            raise RequestError(
                f"--package {arguments.package}: there is no such part of the config"
            )
    return OmegaConf.to_yaml(copy, resolve=bool(arguments.resolve)).rstrip()


def _override_problem(overrides: list[str], error: Exception) -> str:
    for line in overrides:
        try:
            OverridesParser.create().parse_overrides([line])
        except (HydraException, ValueError, RecursionError):
            return f"{shorten(line)} is no key=value that can be read: {_first_line(error)}"
    return _first_line(error)


def _value_text(override: Override) -> str:
    return str(override.input_line).partition("=")[2]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return shorten(lines[0], 200) if lines else type(error).__name__
