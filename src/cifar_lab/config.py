"""What a run is: the typed schema of its config, the strict reading of it, and its address.

Nothing here knows Hydra or torch. A config enters either through `door.compose` (the shell) or
through `load` (a run folder); both end in `parse`, which accepts nothing that it does not know.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
import string
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from cifar_lab.errors import RequestError, did_you_mean

Component = dict[str, Any]
"""A `_target_` (dotted name of a class or function) and its keyword arguments."""

T = TypeVar("T")


def setting(
    default: Any = dataclasses.MISSING,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    identity: bool = True,
    factory: Any = dataclasses.MISSING,
) -> Any:
    """Declare a field with its range and whether it is part of the address of a run."""
    metadata = {"identity": identity, "ge": ge, "gt": gt, "le": le, "lt": lt}
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DatasetConfig:
    """Where the images come from, and the facts about them that hold before anything is loaded."""

    name: str
    source: Component
    image_shape: list[int]
    classes: list[str] | None = None
    train_size: int | None = setting(None, ge=1)
    test_size: int | None = setting(None, ge=1)
    mean: list[float] | None = None
    std: list[float] | None = None
    checksums: dict[str, str] = setting(factory=dict)
    display_names: list[str] | None = setting(None, identity=False)


@dataclass(frozen=True)
class DropoutConfig:
    """Dropout after convolution blocks and after dense layers; null where a model has no place."""

    conv: float | None = setting(None, ge=0, lt=1)
    dense: float | None = setting(None, ge=0, lt=1)


@dataclass(frozen=True)
class AugmentationConfig:
    """Random changes of the training images: padding before a random crop, and a flip.

    `padding_mode`: the padding is black, or reflects the image. `flips`: each image is mirrored at
    random, or in every second epoch (Jordan 2024, arXiv:2404.00498).
    """

    crop_padding: int = setting(0, ge=0, le=64)
    padding_mode: Literal["zeros", "reflect"] = "zeros"
    horizontal_flip: bool = False
    flips: Literal["random", "alternating"] = "random"


@dataclass(frozen=True)
class SplitConfig:
    """Which images validate: a fraction (below 1) or a number, from which official set, and how.

    `method`: `stratified` and `random` draw with `seed`; `tail` takes the last images (S1's
    published code); `numpy` permutes with numpy's RandomState(seed) (S0).
    `sampler`: how an epoch's order is drawn from the training indices; `weighted` and `subset`
    are torch's WeightedRandomSampler and SubsetRandomSampler (S1-06, S1-07).
    """

    validation: float = setting(0.1, ge=0)
    source: Literal["train", "test"] = "train"
    method: Literal["stratified", "random", "tail", "numpy"] = "stratified"
    seed: int = setting(0, ge=0, le=2**32 - 1)
    sampler: Literal["permutation", "weighted", "subset"] = "permutation"


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how the loop trains, and what it notes down on the way."""

    epochs: int = setting(10, ge=0, le=1_000_000)
    batch_size: int = setting(128, ge=1, le=1_000_000)
    label_smoothing: float = setting(0.0, ge=0, lt=1)
    patience: int | None = setting(None, ge=1)
    min_delta: float = setting(0.0, ge=0)
    monitor: Literal["val_accuracy", "val_loss"] = "val_accuracy"
    print_every: int | None = setting(None, ge=1, identity=False)
    step_history: bool = setting(False, identity=False)
    checkpoint_minutes: float = setting(5.0, gt=0, identity=False)
    keep_last: bool = setting(True, identity=False)
    best_file_name: str | None = setting(None, identity=False)
    tensorboard: bool = setting(False, identity=False)


@dataclass(frozen=True)
class EvaluationConfig:
    """Which weights are scored on which images, and whether they are cropped at random (S0-06).

    `views`: what is scored at the end, the image alone, or the mean of its logits over itself and
    its mirror image, or over both of these, unmoved and moved one pixel along either diagonal.
    """

    scored_weights: Literal["best", "last"] = "best"
    test: Literal["split", "official"] = "split"
    crop_padding: int = setting(0, ge=0, le=64)
    watch_test: bool = False
    views: Literal["one", "mirrored", "moved"] = "one"
    batch_size: int = setting(128, ge=1, le=1_000_000)


@dataclass(frozen=True)
class ClaimConfig:
    """What a report says of a metric of ours, where it stands, and of which runs (`where`).

    One of `value` (a figure that it prints), `at_least`, `at_most`, and `above` (it says in words
    that the runs of `where` have more of it than those whose settings differ by `above`; with a
    `name` in it, than those of another experiment). `says` is the report's wording, `suspected` the
    reason to give where the measurement differs.
    """

    metric: str
    source: str
    value: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    above: dict[str, Any] = setting(factory=dict)
    where: dict[str, Any] = setting(factory=dict)
    id: str | None = None
    says: str | None = None
    tolerance: float | None = setting(None, gt=0)
    note: str | None = None
    suspected: str | None = None


@dataclass(frozen=True)
class StudyConfig:
    """What an experiment reproduces: the report's tag, its claims, and what had to be guessed.

    `hinges_on` names the guesses that decide its figures, which then cannot be judged.
    """

    report: str | None = None
    title: str | None = None
    claims: list[ClaimConfig] = setting(factory=list)
    guessed: list[str] = setting(factory=list)
    hinges_on: str | None = None
    target_accuracy: float | None = setting(None, gt=0, le=1)


@dataclass(frozen=True)
class RunConfig:
    """One run, complete: what `config.yaml` in its folder says."""

    dataset: DatasetConfig
    model: Component
    optimizer: Component
    activation: Component | None = None
    dropout: DropoutConfig = setting(factory=DropoutConfig)
    scheduler: Component | None = None
    augmentation: AugmentationConfig = setting(factory=AugmentationConfig)
    split: SplitConfig = setting(factory=SplitConfig)
    training: TrainingConfig = setting(factory=TrainingConfig)
    evaluation: EvaluationConfig = setting(factory=EvaluationConfig)
    figures: dict[str, Component | None] = setting(factory=dict, identity=False)
    study: StudyConfig = setting(factory=StudyConfig, identity=False)
    seed: int = setting(0, ge=0, le=2**32 - 1)
    device: str = "cpu"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    deterministic: bool = False
    threads: int | None = setting(None, ge=1, le=1024, identity=False)
    protocol: Literal["sound", "report"] = "sound"
    continue_from: str | None = None
    output_dir: str = setting("outputs", identity=False)
    name: str = setting("runs", identity=False)
    choices: dict[str, str] = setting(factory=dict, identity=False)


# Arguments that components received after their first release, with the value that leaves the
# meaning as it was: left out of the address, so that a new argument moves no old folder.
LATER_ARGUMENTS: dict[str, dict[str, Any]] = {}

# Arguments of a dataset's source that say how bytes travel, never which bytes.
TRANSPORT_ARGUMENTS = frozenset({"mirrors", "stall_seconds", "patience_minutes", "npm"})

_MAX_NAME = 100
_BEST_FILE_FIELDS = ("model", "acc", "lr", "opt", "act", "epoch")
_FORBIDDEN_IN_NAMES = re.compile(r"[^\w.+\-]")


def parse(data: Any) -> RunConfig:
    """Turn plain containers into a RunConfig; RequestError names the first thing that is wrong."""
    return parse_as(RunConfig, data, "")


def load(path: Path) -> RunConfig:
    """Read a run folder's config.yaml; what it may hold is checked as strictly as the shell's."""
    try:
        data = _read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RequestError(f"{path.parent} is no run folder: it has no {path.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{path} is not valid YAML: {first}") from None
    try:
        return parse(data)
    except RequestError as error:
        raise RequestError(f"{path}: {error}") from None
    except RecursionError:
        raise RequestError(f"{path}: a list or a group of settings holds itself") from None


def _read_yaml(text: str) -> Any:
    # libyaml is six times as fast, which hundreds of runs need, but overflows the stack on deep
    # nesting; and a few aliases of aliases are billions of values.
    if len(re.findall(r"(?:^|[\s,:\[{-])\*\w", text)) > 10:
        raise ValueError("too many aliases")
    lines = text.splitlines()
    shallow = max(map(len, lines), default=0) < 1000 and sum(map(text.count, "[{")) < 1000
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if shallow else yaml.SafeLoader
    return yaml.load(text, Loader=loader)


def dump(config: RunConfig) -> str:
    """Return the config as YAML; `load` reads it back to an equal RunConfig."""
    text: str = yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=100)
    return text


def to_plain(value: Any) -> Any:
    """Return dataclasses as dicts, all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def identity(config: RunConfig) -> dict[str, Any]:
    """Return what makes two runs the same run: identity fields that differ from their default."""
    result = _identity(config)
    if "device" in result:
        result["device"] = result["device"].split(":")[0]
    source = {k: v for k, v in config.dataset.source.items() if k not in TRANSPORT_ARGUMENTS}
    result["dataset"]["source"] = source
    return result


def address(config: RunConfig) -> Path:
    """Return the folder of a run: <output_dir>/<name>/<readable choices>-<8 hex of identity>.

    A pure function of a resolved config (device and precision no longer "auto").
    """
    canonical = json.dumps(identity(config), sort_keys=True, ensure_ascii=True)
    digest = hashlib.sha256(canonical.encode()).hexdigest()[:8]
    parts = [config.dataset.name]
    parts += [
        config.choices[k] for k in ("model", "optimizer", "activation") if k in config.choices
    ]
    if "lr" in config.optimizer:
        parts.append(f"lr{config.optimizer['lr']:g}")
    parts.append(f"seed{config.seed}")
    readable = _FORBIDDEN_IN_NAMES.sub("_", "-".join(parts))[:_MAX_NAME]
    readable = readable.encode()[: 2 * _MAX_NAME].decode(errors="ignore")  # file names are bytes
    return Path(config.output_dir) / config.name / f"{readable}-{digest}"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _identity(value: Any) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for spec in dataclasses.fields(value):
        item = getattr(value, spec.name)
        if not spec.metadata.get("identity", True) or item == _default(spec):
            continue
        if dataclasses.is_dataclass(item):
            nested = _identity(item)
            if nested:
                result[spec.name] = nested
        elif isinstance(item, dict) and "_target_" in item:
            later = LATER_ARGUMENTS.get(item["_target_"], {})
            result[spec.name] = {
                k: to_plain(v) for k, v in item.items() if k not in later or later[k] != v
            }
        else:
            result[spec.name] = to_plain(item)
    return result


def _default(spec: "dataclasses.Field[Any]") -> Any:
    if spec.default is not dataclasses.MISSING:
        return spec.default
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return dataclasses.MISSING


@functools.cache  # half of the time of reading a config
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def parse_as(cls: type[T], data: Any, path: str) -> T:
    """Turn plain containers into a dataclass of settings; `path` is where they stand."""
    where = path or "the config"
    if not isinstance(data, Mapping):
        raise RequestError(f"{where} is {_show(data)}; it must be a group of settings")
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in specs:
            full = f"{path}.{key}" if path else str(key)
            raise RequestError(
                f"there is no setting {shorten(full)}{did_you_mean(str(key), specs)}; "
                f"{where} has {', '.join(specs)}"
            )
    hints = _hints(typing.cast(type, cls))
    values: dict[str, Any] = {}
    for name, spec in specs.items():
        full = f"{path}.{name}" if path else name
        if name not in data:
            if _default(spec) is dataclasses.MISSING:
                raise RequestError(f"{full} is missing; a run needs one")
            continue
        values[name] = convert(hints[name], data[name], full)
        _check_range(spec, values[name], full)
    parsed = cls(**values)
    _check_whole(parsed, path)
    return parsed


def convert(kind: Any, value: Any, path: str) -> Any:
    """Return `value` as `kind` (a type hint of the schema or of a component's signature)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        _check_plain(value, path)
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [k for k in arguments if k is not type(None)]
        for option in kinds:
            try:
                return convert(option, value, path)
            except RequestError as error:
                problem = error
        if len(kinds) == 1:
            raise problem
        raise _wrong(path, value, " or ".join(_describe(k) for k in kinds))
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            options = ", ".join(map(str, arguments))
            guess = did_you_mean(str(value), map(str, arguments))
            raise _wrong(path, value, f"one of {options}", guess)
        return value
    if dataclasses.is_dataclass(kind):
        return parse_as(typing.cast(type, kind), value, path)
    if origin in (list, tuple) or kind in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _wrong(path, value, "a list")
        inner = arguments[0] if arguments else Any
        return [convert(inner, item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict or kind is dict:
        if not isinstance(value, Mapping) or not all(isinstance(k, str) for k in value):
            raise _wrong(path, value, "a group of settings")
        inner = arguments[1] if arguments else Any
        return {k: convert(inner, item, f"{path}.{k}") for k, item in value.items()}
    return _convert_scalar(kind, value, path)


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and number:
        try:
            converted = float(value)
        except OverflowError:
            raise _wrong(path, value, "a number that a float can hold") from None
        if not math.isfinite(converted):
            raise _wrong(path, value, "a finite number")
        return converted
    if kind is int and number and (isinstance(value, int) or value.is_integer()):
        return int(value)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, str):
        return value
    raise _wrong(path, value, _describe(kind))


def _check_plain(value: Any, path: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(path, value, "a finite number")
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise RequestError(f"{path} has the key {_show(key)}; keys must be text")
            _check_plain(item, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{path}[{i}]")
    elif value is not None and not isinstance(value, bool | int | float | str):
        raise _wrong(path, value, "text, a number, a list or a group of settings")


def _check_range(spec: "dataclasses.Field[Any]", value: Any, path: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    bounds = {k: spec.metadata[k] for k in words if spec.metadata.get(k) is not None}
    kept = {
        "ge": lambda b: value >= b,
        "gt": lambda b: value > b,
        "le": lambda b: value <= b,
        "lt": lambda b: value < b,
    }
    if not all(kept[k](bound) for k, bound in bounds.items()):
        rule = " and ".join(f"{words[k]} {bound}" for k, bound in bounds.items())
        raise _wrong(path, value, rule)


def _check_whole(parsed: Any, path: str) -> None:
    if isinstance(parsed, DatasetConfig):
        _check_dataset(parsed, path)
    if isinstance(parsed, RunConfig):
        _check_run(parsed)


def _check_dataset(dataset: DatasetConfig, path: str) -> None:
    shape = dataset.image_shape
    if len(shape) != 3 or shape[0] not in (1, 3) or not all(1 <= n <= 4096 for n in shape):
        raise _wrong(f"{path}.image_shape", shape, "[channels (1 or 3), height, width]")
    for name in ("mean", "std"):
        numbers = getattr(dataset, name)
        if numbers is not None and len(numbers) != shape[0]:
            raise _wrong(f"{path}.{name}", numbers, f"{shape[0]} numbers, one a channel")
    if dataset.std is not None and not all(s > 0 for s in dataset.std):
        raise _wrong(f"{path}.std", dataset.std, "above 0")
    names = dataset.display_names
    if names and dataset.classes and len(names) != len(dataset.classes):
        raise _wrong(f"{path}.display_names", names, f"{len(dataset.classes)} names, one a class")


def _check_run(config: RunConfig) -> None:
    for key in ("model", "optimizer"):
        if not isinstance(getattr(config, key).get("_target_"), str):
            raise RequestError(f"{key} names no _target_; choose one with {key}=OPTION")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", config.device):
        raise _wrong("device", config.device, "auto, cuda, cuda:N, mps or cpu")
    check_name(config.name)
    for claim in config.study.claims:
        given = [claim.value, claim.at_least, claim.at_most, claim.above or None]
        if sum(one is not None for one in given) != 1:
            raise RequestError(
                f"study.claims: {claim.id or claim.metric} needs one of value, at_least, at_most "
                "and above"
            )
    _check_folder("output_dir", config.output_dir)
    if config.training.best_file_name is not None:
        _check_file_name(config.training.best_file_name)
    split, dataset = config.split, config.dataset
    if split.validation >= 1 and split.validation != int(split.validation):
        raise _wrong("split.validation", split.validation, "a fraction below 1 or a whole number")
    size = dataset.train_size if split.source == "train" else dataset.test_size
    if size is not None and split.validation >= size:
        raise _wrong(
            "split.validation",
            split.validation,
            f"less than the {size} images of the {split.source} set of {dataset.name}",
        )
    if split.validation == 0 and config.training.patience is not None:
        raise RequestError(
            "training.patience stops on validation, but split.validation is 0; "
            "set split.validation=0.1 or training.patience=null"
        )


def check_name(name: str) -> None:
    """Refuse a `name` that is not one or more plain folder names, such as `runs` or `lab/week3`."""
    parts = name.split("/")
    plain = all(
        re.fullmatch(r"[\w][\w.+\- ]{0,99}", p) and not p.endswith(" ") and len(p.encode()) <= 255
        for p in parts
    )
    if not plain or len(name) > 200 or len(parts) > 4:
        raise _wrong(
            "name",
            name,
            "a folder name of letters, digits, '.', '_' and '-', such as runs",
        )


def _check_folder(key: str, folder: str) -> None:
    """Refuse what no file system takes as a folder."""
    try:
        fits = all(len(part.encode()) <= 255 for part in Path(folder).parts)
    except UnicodeEncodeError:
        fits = False
    if not folder.strip() or not folder.isprintable() or not fits or len(folder) > 2000:
        raise _wrong(key, folder, "the name of a folder")


def _check_file_name(template: str) -> None:
    """Refuse a template of best.pt's second name that is no plain name of a checkpoint."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise _wrong("training.best_file_name", template, f"a template ({error})") from None
    plain = all(
        (field is None or field in _BEST_FILE_FIELDS)
        and (not spec or (field in ("acc", "lr") and re.fullmatch(r"\.\d{1,2}[fge]", spec)))
        and not conversion
        and re.fullmatch(r"[\w.+\- =]*", text)
        for text, field, spec, conversion in parts
    )
    own = ("best.pt", "last.pt", "last.previous.pt")
    ending = template.endswith((".pt", ".pth")) and not template.startswith(".")
    if not plain or not ending or template in own or len(template.encode()) > 150:
        fields = ", ".join(f"{{{name}}}" for name in _BEST_FILE_FIELDS)
        raise _wrong(
            "training.best_file_name",
            template,
            f"a file name of letters, digits and {fields} that ends in .pt or .pth",
        )


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if kind in names:
        return names[kind]
    origin = typing.get_origin(kind) or kind
    if origin in (list, tuple):
        return "a list"
    if origin is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return "a group of settings" if origin is dict else str(getattr(kind, "__name__", kind))


def _wrong(path: str, value: Any, right: str, guess: str = "") -> RequestError:
    return RequestError(f"{path}={_show(value)} is wrong: it must be {right}{guess}")


def _show(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    except (TypeError, ValueError):
        text = type(value).__name__
    return shorten(text)


def shorten(text: str, length: int = 80) -> str:
    """Return `text` on one line, cut in the middle where it is longer than `length`."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    if len(printable) <= length:
        return printable
    return f"{printable[: length - 20]}...({len(printable)} characters)"
