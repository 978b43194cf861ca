"""The model card of an export: what the model is, what it scored, how it is loaded."""

from typing import Any

from cifar_lab.config import run_config
from cifar_lab.config.run_config import RunConfig
from cifar_lab.exports.network import portable
from cifar_lab.runs.metrics import Predictions, binomial_half_width
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import markdown_table

_MATRIX_CLASSES = 20  # a larger confusion matrix is not readable as a table

_INTERVALS = (
    "The interval is that of the accuracy on other images of the same kind; it does not contain "
    "the differences between seeds. The loss is the mean cross-entropy per image."
)


def model_card(run: RunDir, output: str) -> str:
    """Return the README.md of a finished run's exported model, whose `output` is logits or
    probabilities.
    """
    settings, summary = run.read_config(), run.read_summary()
    model = settings.choices.get("model") or settings.model["_target_"].rpartition(".")[2]
    best = summary.scored_weights == "best"
    epoch = summary.best_epoch if best else summary.epochs
    words = settings.training.monitor.replace("val_", "validation ").replace("_", " ")
    chosen = f" which had the best {words}" if best else " the last one"
    parts = [
        _front_matter(settings),
        f"# {model} on {settings.dataset.name}",
        f"An image classifier with {summary.parameters:,} parameters, trained with cifar_lab. The "
        f"weights are those of epoch {epoch},{chosen}.",
        "## Use",
        _usage(settings, run.class_names(), output),
        "## Data",
        _data(settings),
        "## Settings",
        _settings(settings),
        "## Scores",
        _scores(run),
        *_warnings(summary.warnings),
        "## All settings",
        f"```yaml\n{run_config.dump(portable(settings))}```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(settings: RunConfig) -> str:
    return (
        "---\nlibrary_name: cifar_lab\npipeline_tag: image-classification\n"
        f"datasets: [{settings.dataset.name}]\n---"
    )


def _usage(settings: RunConfig, names: list[str], output: str) -> str:
    channels, height, width = settings.dataset.image_shape
    kind = "RGB" if channels == 3 else "gray"
    classes = ", ".join(f"{number}: {_escape(name)}" for number, name in enumerate(names))
    return f"""\
```python
import torch
from cifar_lab.exports.safetensors_file import load_network

model = load_network("model.safetensors")
images = torch.rand(5, {channels}, {height}, {width})  # {kind} pixels in [0, 1]
{output} = model(images)  # (5, {len(names)})
```

The model normalises the images itself. It returns {output}{_note(output)}.

Classes: {classes}."""


def _note(output: str) -> str:
    if output == "logits":
        return "; `logits.softmax(dim=1)` are the probabilities"
    return ", because it ends with a softmax"


def _data(settings: RunConfig) -> str:
    dataset, split = settings.dataset, settings.split
    licence = dataset.licence or "not named in the run's config; ask whoever provides the images"
    held_out = f"{split.validation:g}" if split.validation < 1 else f"{int(split.validation):,}"
    if split.folds is not None:
        held_out = f"fold {split.fold} of {split.folds}"
    lines = [
        f"- Dataset: `{dataset.name}`, images of {' x '.join(map(str, dataset.image_shape))} "
        "(channels, height, width)",
        f"- Licence of the images: {licence}",
        f"- Validation: {held_out} of the {split.source} images"
        if split.validation
        else "- Validation: none",
        f"- Normalisation: mean {dataset.mean or 0}, standard deviation {dataset.std or 1} per "
        "channel, of pixels in [0, 1]",
    ]
    return "\n".join(lines)


def _settings(settings: RunConfig) -> str:
    training = settings.training
    shown: dict[str, Any] = {
        key: settings.choices[key]
        for key in ("model", "activation", "dropout", "augmentation", "optimizer", "scheduler")
        if key in settings.choices
    }
    shown |= {
        "learning rate": settings.optimizer.get("lr"),
        "epochs": training.epochs,
        "batch size": training.batch_size,
        "seed": settings.seed,
        "protocol": settings.protocol,
        "device, precision": f"{settings.device}, {settings.precision}",
    }
    rows = [[name, _escape(str(value))] for name, value in shown.items() if value is not None]
    return markdown_table(["setting", "value"], rows)


def _scores(run: RunDir) -> str:
    rows = []
    for split in ("test", "validation"):
        if split == "validation" and not run.predictions_file(split, "scored").exists():
            continue  # the run has no validation images
        found = run.read_predictions(split)
        half = binomial_half_width(found.accuracy, len(found))
        interval = f"±{100 * half:.2f} points"
        score = f"{found.accuracy:.2%}"
        rows.append([split, f"{len(found):,}", score, interval, f"{found.loss:.4f}"])
    table = markdown_table(["images", "number", "accuracy", "95 % interval", "loss"], rows)
    return (
        f"{table}\n\n{_INTERVALS}\n\n"
        f"{_confusion(run.read_predictions(), [_escape(name) for name in run.class_names()])}"
    )


def _confusion(found: Predictions, labels: list[str]) -> str:
    """Return the confusion matrix of the test images, or its largest errors for many classes."""
    if len(labels) > _MATRIX_CLASSES:
        rows = [
            [labels[label], labels[guess], str(count)]
            for label, guess, count in found.most_confused(_MATRIX_CLASSES)
        ]
        text = "Test images that were confused most often:"
        return f"{text}\n\n{markdown_table(['class', 'predicted as', 'images'], rows)}"
    rows = [
        [f"**{label}**", *map(str, counts), f"{recall:.1%}" if counts.sum() else "-"]
        for label, counts, recall in zip(
            labels, found.confusion_matrix, found.per_class_accuracy, strict=True
        )
    ]
    text = "Confusion matrix of the test images: one row per class, one column per prediction."
    return f"{text}\n\n{markdown_table(['', *labels, 'recall'], rows)}"


def _warnings(warnings: list[str]) -> list[str]:
    if not warnings:
        return []
    return ["## Warnings of the run", "\n".join(f"- {_escape(line)}" for line in warnings)]


def _escape(text: str) -> str:
    """Return text that Markdown shows as it is."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|~" else c for c in text)
