"""The model card of an export: what the model is, what it scored, how it is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cifar_lab.config import run_config
from cifar_lab.config.run_config import RunConfig
from cifar_lab.exports.network import portable
from cifar_lab.runs.metrics import Predictions, show_interval
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import Table, markdown, markdown_table, render

_MATRIX_CLASSES = 20  # a larger confusion matrix is not readable as a table
_GROUPS = ("model", "activation", "dropout", "augmentation", "optimizer", "scheduler")


def model_card(run: RunDir, output: str) -> str:
    """Return the README.md of a finished run's exported model, whose `output` is logits or
    probabilities.
    """
    config, summary, names = run.read_config(), run.read_summary(), run.class_names()
    best = summary.scored_weights == "best"
    words = config.training.monitor.replace("val_", "validation ").replace("_", " ")
    predictions = {"test": run.read_predictions()}
    if run.predictions_file("validation", "scored").exists():
        predictions["validation"] = run.read_predictions("validation")
    return render(
        Path(__file__).with_name("model_card.md"),
        model=config.choices.get("model") or config.model["_target_"].rpartition(".")[2],
        epoch=summary.best_epoch if best else summary.epochs,
        chosen=f" which had the best {words}" if best else " the last one",
        summary=summary,
        dataset=config.dataset,
        names=names,
        output=output,
        split=config.split,
        settings=_settings(config),
        scores=_scores(predictions),
        confusion=_confusion(predictions["test"], [markdown(name) for name in names]),
        config=run_config.dump(portable(config)),
    )


def _settings(config: RunConfig) -> Table:
    training = config.training
    shown: dict[str, Any] = {name: config.choices.get(name) for name in _GROUPS} | {
        "learning rate": config.optimizer.get("lr"),
        "epochs": training.epochs,
        "batch size": training.batch_size,
        "seed": config.seed,
        "protocol": config.protocol,
        "device, precision": f"{config.device}, {config.precision}",
    }
    rows = [[name, str(value)] for name, value in shown.items() if value is not None]
    return Table(["setting", "value"], rows)


def _scores(predictions: dict[str, Predictions]) -> Table:
    rows = []
    for split, stored in predictions.items():
        interval = show_interval(stored.accuracy, len(stored)).removeprefix("95 % interval ")
        score = f"{stored.accuracy:.2%}"
        rows.append([split, f"{len(stored):,}", score, interval, f"{stored.loss:.4f}"])
    return Table(["images", "number", "accuracy", "95 % interval", "loss"], rows)


def _confusion(stored: Predictions, labels: Sequence[str]) -> str:
    """Return the confusion matrix of the test images, or its largest errors for many classes."""
    if len(labels) > _MATRIX_CLASSES:
        text, header = "Test images that were confused most often:", ["class", "predicted as"]
        most = stored.most_confused(_MATRIX_CLASSES)
        rows = [[labels[label], labels[guess], str(count)] for label, guess, count in most]
        return f"{text}\n\n{markdown_table([*header, 'images'], rows)}"
    text = "Confusion matrix of the test images: one row per class, one column per prediction."
    recalls = [f"{recall:.1%}" for recall in stored.per_class_accuracy]
    rows = [
        [f"**{label}**", *map(str, counts), recall if counts.sum() else "-"]
        for label, counts, recall in zip(labels, stored.confusion_matrix, recalls, strict=True)
    ]
    return f"{text}\n\n{markdown_table(['', *labels, 'recall'], rows)}"
