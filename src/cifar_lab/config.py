"""What a run is: its settings and their types, what does not fit, and its address.

Nothing here knows Hydra or torch. A config enters either through `door.compose` (the shell) or
through `load` (a run folder); both end in `parse`, which accepts nothing that it does not know.
"""

import dataclasses
import hashlib
import json
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cifar_lab.errors import RequestError
from cifar_lab.schema import default_of, parse_as, setting, wrong

Component = dict[str, Any]
"""A `_target_` (dotted name of a class or function) and its keyword arguments."""


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

    def check(self, path: str) -> None:
        """Refuse a shape that is none, and statistics and names that do not fit it."""
        shape = self.image_shape
        if len(shape) != 3 or shape[0] not in (1, 3) or not all(1 <= n <= 4096 for n in shape):
            raise wrong(f"{path}.image_shape", shape, "[channels (1 or 3), height, width]")
        for name in ("mean", "std"):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != shape[0]:
                raise wrong(f"{path}.{name}", numbers, f"{shape[0]} numbers, one a channel")
        if self.std is not None and not all(s > 0 for s in self.std):
            raise wrong(f"{path}.std", self.std, "above 0")
        names = self.display_names
        if names and self.classes and len(names) != len(self.classes):
            raise wrong(f"{path}.display_names", names, f"{len(self.classes)} names, one a class")


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
    compile: bool = False
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

    def check(self, path: str) -> None:
        """Refuse a claim of nothing, or of two things."""
        given = [self.value, self.at_least, self.at_most, self.above or None]
        if sum(one is not None for one in given) != 1:
            raise RequestError(
                f"study.claims: {self.id or self.metric} needs one of value, at_least, at_most "
                "and above"
            )


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

    def check(self, path: str) -> None:
        """Refuse settings that do not fit each other."""
        for key in ("model", "optimizer"):
            if not isinstance(getattr(self, key).get("_target_"), str):
                raise RequestError(f"{key} names no _target_; choose one with {key}=OPTION")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise wrong("device", self.device, "auto, cuda, cuda:N, mps or cpu")
        check_name(self.name)
        _check_folder("output_dir", self.output_dir)
        if self.training.best_file_name is not None:
            _check_file_name(self.training.best_file_name)
        split, dataset = self.split, self.dataset
        if split.validation >= 1 and split.validation != int(split.validation):
            raise wrong(
                "split.validation", split.validation, "a fraction below 1 or a whole number"
            )
        size = dataset.train_size if split.source == "train" else dataset.test_size
        if size is not None and split.validation >= size:
            raise wrong(
                "split.validation",
                split.validation,
                f"less than the {size} images of the {split.source} set of {dataset.name}",
            )
        padding, smallest = self.augmentation.crop_padding, min(dataset.image_shape[1:])
        if self.augmentation.padding_mode == "reflect" and padding >= smallest:
            right = f"less than the image's {smallest} pixels, as padding_mode=reflect needs"
            raise wrong("augmentation.crop_padding", padding, right)
        if split.validation == 0 and self.training.patience is not None:
            raise RequestError(
                "training.patience stops on validation, but split.validation is 0; "
                "set split.validation=0.1 or training.patience=null"
            )


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
        if not spec.metadata.get("identity", True) or item == default_of(spec):
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


def check_name(name: str) -> None:
    """Refuse a `name` that is not one or more plain folder names, such as `runs` or `lab/week3`."""
    parts = name.split("/")
    plain = all(
        re.fullmatch(r"[\w][\w.+\- ]{0,99}", p) and not p.endswith(" ") and len(p.encode()) <= 255
        for p in parts
    )
    if not plain or len(name) > 200 or len(parts) > 4:
        raise wrong(
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
        raise wrong(key, folder, "the name of a folder")


def _check_file_name(template: str) -> None:
    """Refuse a template of best.pt's second name that is no plain name of a checkpoint."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise wrong("training.best_file_name", template, f"a template ({error})") from None
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
        raise wrong(
            "training.best_file_name",
            template,
            f"a file name of letters, digits and {fields} that ends in .pt or .pth",
        )
