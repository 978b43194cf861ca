"""What a run is: its settings, their types and ranges, and how they are read and written as YAML.

Nothing here knows Hydra or torch. A config comes either from a command line (`compose`) or from a
run folder (`load`); both end in `parse`, which accepts nothing that it does not know.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from cifar_lab.config.data_config import AugmentationConfig, DatasetConfig, SplitConfig
from cifar_lab.config.schema import (
    OptimizerConfig,
    SchedulerConfig,
    TargetConfig,
    parse_as,
    setting,
    wrong,
)
from cifar_lab.errors import UsageError, first_line, shorten, shorten_path

_NAME = r"\w[\w.+\- ]{0,99}"
_FOLDERS = re.compile(rf"(?!.* (/|$)){_NAME}(/{_NAME}){{0,3}}")
_BEST_FILE = re.compile(
    r"(?!\.|best\.pt$|last\.)"
    r"([\w.+\- =]|\{(model|opt|act|epoch|(acc|lr)(:\.\d\d?[fge])?)\}){1,100}\.pth?"
)


@dataclass(frozen=True)
class StudyConfig:
    """What an experiment reproduces: the report's tag; conf/report has what the report says."""

    report: str | None = setting(None, "the tag of a report; conf/report has its claims")
    title: str | None = setting(None, "a line for tables and figures")
    target_accuracy: float | None = setting(None, "a dashed line in the curves", gt=0, le=1)


@dataclass(frozen=True)
class DropoutConfig:
    """Dropout after convolution blocks and after dense layers; null where the model has none."""

    conv: float | None = setting(None, "share of zeros after poolings; null: no place", ge=0, lt=1)
    dense: float | None = setting(None, "the same after the hidden dense layer", ge=0, lt=1)


@dataclass(frozen=True)
class LookaheadConfig:
    """Slow weights that training returns to after `every` steps of the optimizer; null: none.

    They keep the share decay * (steps done / all steps)**ramp of themselves. The defaults are those
    of airbench94 (Jordan 2024, arXiv:2404.00498); ramp 0 is the Lookahead of Zhang et al. 2019
    (arXiv:1907.08610), whose alpha is 1 - decay.
    """

    every: int | None = setting(None, "steps between two returns; null: no slow weights", ge=1)
    decay: float = setting(0.774, "share of the slow weights that stays, at the end", ge=0, lt=1)
    ramp: float = setting(3.0, "the share grows with this power of the steps; 0: constant", ge=0)


@dataclass(frozen=True)
class TrainingConfig:
    """How long and how the loop trains, and what it records on the way."""

    epochs: int = setting(10, "passes over the training images", ge=0)
    frozen_epochs: int = setting(0, "first epochs in which only the classifier trains", ge=0)
    batch_size: int = setting(128, "images per step; the last of an epoch may be smaller", ge=1)
    label_smoothing: float = setting(0.0, "share of the label that all classes get", ge=0, lt=1)
    class_weights: list[float] | Literal["balanced"] | None = setting(
        None, "weights in the cross-entropy: balanced, or a number for each class"
    )
    ema: float | None = setting(None, "average the weights, with this decay", gt=0, lt=1)
    clip_grad_norm: float | None = setting(None, "scale a step's gradient to this norm", gt=0)
    lookahead: LookaheadConfig = setting(factory=LookaheadConfig)
    compile: bool = setting(False, "true: torch.compile; not faster on the CPUs measured")
    cuda_graph: bool | Literal["auto"] = setting(
        "auto", "true replays each step's passes as a CUDA graph; auto is false so far"
    )
    patience: int | None = setting(None, "stop after so many epochs without improvement", ge=1)
    min_delta: float = setting(0.0, "how much better counts as an improvement", ge=0)
    monitor: Literal["val_accuracy", "val_loss", "val_balanced_accuracy", "val_macro_f1"] = setting(
        "val_accuracy", "the score that decides best.pt, patience, search and ranking"
    )
    print_every: int | None = setting(None, "log a line every so many steps", ge=1, identity=False)
    step_history: bool = setting(False, "keep each step's loss in steps.csv", identity=False)
    checkpoint_minutes: float = setting(
        5.0, "save last.pt this often, and after an epoch where that is cheap", gt=0, identity=False
    )
    keep_last: bool | Literal["auto"] = setting(
        True,
        "keep last.pt for more epochs when finished; auto: if patience ended it",
        identity=False,
    )
    best_file_name: str | None = setting(
        None, 'a second name of best.pt: "{model}_acc{acc:.4f}_lr{lr}.pth"', identity=False
    )

    def check(self, path: str) -> None:
        """Refuse weights of classes that are not above 0, and a name that is no plain file's."""
        weights, name = self.class_weights, self.best_file_name
        if isinstance(weights, list) and not (weights and all(w > 0 for w in weights)):
            raise wrong(f"{path}.class_weights", weights, "balanced or numbers above 0")
        if name is not None and not _BEST_FILE.fullmatch(name):
            fields = "{model}, {acc}, {lr}, {opt}, {act}, {epoch}"
            right = f"a file name of letters, digits and {fields} that ends in .pt or .pth"
            raise wrong(f"{path}.best_file_name", name, right)


@dataclass(frozen=True)
class EvaluationConfig:
    """Which weights are scored on which images, and whether they are cropped at random (S0-06).

    `views`: what is scored at the end, the image alone, or the mean of its logits over itself and
    its mirror image, or over both of these, unmoved and moved one pixel along either diagonal.
    """

    scored_weights: Literal["best", "last", "averaged"] = setting(
        "best", "best (by training.monitor), last, or averaged (by training.ema)"
    )
    test: Literal["split", "official"] = setting("split", "official: all, even those that validate")
    crop_padding: int = setting(0, "pixels for a random crop of evaluated images (S0)", ge=0, le=64)
    watch_test: bool = setting(False, "also score the test set after each epoch (S3, S4)")
    views: Literal["one", "mirrored", "moved"] = setting(
        "one", "an image alone, or the mean over 2 (mirrored) or 6 (moved) views"
    )
    batch_size: int = setting(128, "images per step; larger is slower on a CPU", ge=1)


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run, as in the `config.yaml` of its folder."""

    dataset: DatasetConfig
    model: TargetConfig
    optimizer: OptimizerConfig
    activation: TargetConfig | None = None
    dropout: DropoutConfig = setting(factory=DropoutConfig)
    scheduler: SchedulerConfig | None = None
    augmentation: AugmentationConfig = setting(factory=AugmentationConfig)
    split: SplitConfig = setting(factory=SplitConfig)
    training: TrainingConfig = setting(factory=TrainingConfig)
    evaluation: EvaluationConfig = setting(factory=EvaluationConfig)
    figures: dict[str, TargetConfig | None] = setting(factory=dict, identity=False)
    tracker: TargetConfig | None = setting(None, identity=False)
    study: StudyConfig = setting(factory=StudyConfig, identity=False)
    seed: int = setting(0, "seeds weights, order, augmentation and dropout", ge=0, le=2**32 - 1)
    device: str = setting("cpu", "auto (the first of cuda, mps, cpu), cuda, cuda:N, mps, cpu")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting(
        "fp32", "number format of the passes, fp16 on GPUs only; auto: docs/performance.md"
    )
    deterministic: bool = setting(False, "true: only algorithms that repeat their bits (CUDA)")
    threads: int | None = setting(None, "CPU threads; null: all", ge=1, le=1024, identity=False)
    protocol: Literal["sound", "report"] = setting(
        "sound", "sound chooses nothing on the test set; report does as the report did"
    )
    continue_from: str | None = setting(
        None, "a finished run's folder: go on with its config and last weights"
    )
    output_dir: str = setting(
        "outputs", "runs go to <output_dir>/<name>/<choices>-<hash>/", identity=False
    )
    name: str = setting("runs", "the folder in output_dir that has these runs", identity=False)
    choices: dict[str, str] = setting(factory=dict, identity=False, meaning="filled in: options")

    def check(self, path: str) -> None:
        """Refuse settings that contradict each other."""
        for key in ("model", "optimizer", "tracker"):
            part = getattr(self, key)
            if part is not None and not isinstance(part.get("_target_"), str):
                raise UsageError(f"{key} has no _target_; choose an option with {key}=OPTION")
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", self.device):
            raise wrong("device", self.device, "auto, cuda, cuda:N, mps or cpu")
        if not _FOLDERS.fullmatch(self.name):
            right = "a folder name of letters, digits, '.', '_' and '-', such as runs"
            raise wrong("name", self.name, right)
        for figure in self.figures:
            check_figure_name(figure)
        if not self.output_dir.strip() or not self.output_dir.isprintable():
            raise wrong("output_dir", self.output_dir, "the name of a folder")
        split, dataset = self.split, self.dataset
        size = dataset.training_images if split.source == "train" else dataset.test_size
        if size is not None:
            split.count(size, f"the {split.source} set of {dataset.name}")
        padding, smallest = self.augmentation.crop_padding, min(dataset.image_shape[1:])
        if self.augmentation.padding_mode == "reflect" and padding >= smallest:
            right = f"less than the image's {smallest} pixels, as padding_mode=reflect needs"
            raise wrong("augmentation.crop_padding", padding, right)
        if self.augmentation.cutout > smallest:
            right = f"at most the image's {smallest} pixels"
            raise wrong("augmentation.cutout", self.augmentation.cutout, right)
        if self.evaluation.scored_weights == "averaged" and self.training.ema is None:
            right = "best or last without training.ema, which averages the weights"
            raise wrong("evaluation.scored_weights", "averaged", right)
        if self.training.ema is not None and self.training.compile:
            raise wrong("training.compile", True, "false with training.ema")
        if self.training.cuda_graph is True and self.training.compile:
            raise wrong("training.cuda_graph", True, "auto or false with training.compile")
        if split.validation == 0 and self.training.patience is not None:
            raise UsageError(
                "training.patience stops on validation, but split.validation is 0; "
                "set split.validation=0.1 or training.patience=null"
            )


_MAX_CHARACTERS = 2**18
_DROPPED = {
    "training": ("tensorboard", "sync_batch_norm"),
    "evaluation": ("views_margin",),
    "study": ("claims", "guessed", "hinges_on"),
}
"""Settings of earlier runs: a tracker now, never used, and what conf/report has."""


def parse(data: Any) -> RunConfig:
    """Turn plain containers into a RunConfig; UsageError names the first thing that is wrong."""
    return parse_as(RunConfig, data, "")


def load(path: Path) -> RunConfig:
    """Read a run folder's config.yaml, checked as strictly as a command line."""
    try:
        if path.exists() and not path.is_file():  # a pipe has no end, and may never begin
            raise ValueError("it is no regular file")
        with path.open(encoding="utf-8") as file:
            data = _read_yaml(file.read(_MAX_CHARACTERS + 1))
    except FileNotFoundError:
        raise UsageError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {first_line(error)}") from None
    for part, keys in _DROPPED.items():
        if isinstance(data, dict) and isinstance(data.get(part), dict):
            data[part] = {key: value for key, value in data[part].items() if key not in keys}
    try:
        return parse(data)
    except (UsageError, RecursionError) as error:  # a list may contain itself
        raise UsageError(f"{shorten_path(path)}: {error}") from None


def _read_yaml(text: str) -> Any:
    # A few aliases of aliases are billions of values. libyaml is six times as fast, which hundreds
    # of runs need, but overflows the stack where Python's reader raises RecursionError, and reads
    # no surrogates, which stand for the bytes of a name that is not UTF-8.
    if len(text) > _MAX_CHARACTERS or len(re.findall(r"(?:^|[\s,:\[{-])\*\w", text)) > 10:
        raise ValueError("it is larger than that of any run, or has too many aliases")
    plain = sum(map(text.count, ("[", "{", "- ", "? "))) < 1000 and "\\uD" not in text
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if plain else yaml.SafeLoader
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


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested dicts as one dict with dotted keys."""
    if not isinstance(value, Mapping) or not value:
        return {prefix: value} if prefix else {}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def check_figure_name(name: str) -> None:
    """Refuse a name of a figure that could lead out of a run's folder."""
    if not re.fullmatch(_NAME, name):
        right = "a figure has a file name of letters, digits, '.', '_' and '-', such as curves"
        raise UsageError(f"figures.{shorten(name)} is wrong: {right}")


def merge(old: Any, new: Any) -> Any:
    """Return `new` in place of `old`; of two dicts, what `new` has, and else what `old` has."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return new
    return old | {key: merge(old.get(key), value) for key, value in new.items()}
