"""The model card of an export: what the model is, what it scored, how it is loaded."""

from pathlib import Path
from typing import Any

from cifar_lab.config import run_config
from cifar_lab.exports.network import portable
from cifar_lab.runs.metrics import show_interval
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import render

_GROUPS = ("model", "activation", "dropout", "augmentation", "optimizer", "scheduler")


def model_card(run: RunDir, output: str) -> str:
    """Return the README.md of a finished run's exported model, whose `output` is logits or
    probabilities.
    """
    config, summary, names = run.read_config(), run.read_summary(), run.class_names()
    best = summary.scored_weights == "best"
    words = config.training.monitor.replace("val_", "validation ").replace("_", " ")
    settings: dict[str, Any] = {name: config.choices.get(name) for name in _GROUPS} | {
        "learning rate": config.optimizer.get("lr"),
        "epochs": config.training.epochs,
        "batch size": config.training.batch_size,
        "seed": config.seed,
        "protocol": config.protocol,
        "device, precision": f"{config.device}, {config.precision}",
    }
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
        settings=settings,
        predictions=predictions,
        show_interval=show_interval,
        config=run_config.dump(portable(config)),
    )
