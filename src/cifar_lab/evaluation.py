"""From a folder with weights to predictions, reports and the fields of a summary."""

import json
from typing import Any

import numpy as np
import torch

from cifar_lab import device
from cifar_lab.building import load_splits, make_model, normalisation
from cifar_lab.config import RunConfig
from cifar_lab.data import Split, Splits, in_order
from cifar_lab.errors import RequestError
from cifar_lab.files import write_text
from cifar_lab.metrics import Predictions, separation
from cifar_lab.run_dir import RunDir
from cifar_lab.training import predict

_SAMPLES = 8  # images of each kind that a run keeps, to draw
_FEATURES = 2000  # images whose features a run keeps at most, for PCA and t-SNE


def evaluate(
    run: RunDir, *, splits: Splits | None = None, on: str | None = None, features: bool = False
) -> dict[str, Any]:
    """Score a run from its folder alone; write predictions and reports, return summary fields.

    This is the one evaluation: training ends with it, and `cifar_lab.evaluate` calls it. `on` is
    another device than the run's; `features` are kept too where a figure of the run, or the
    caller, wants them. RequestError if the folder has no weights yet.
    """
    settings = run.own_config()
    where, _ = device.select_device(on or settings.device)
    splits = splits or load_splits(settings, where)
    scored = settings.evaluation.scored_weights
    if scored == "best" and not run.best.exists():
        scored = "last"
    model = make_model(settings, splits, where)

    def predictions(weights: str, split_name: str) -> Predictions:
        split = {
            "validation": splits.validation,
            "test": splits.official_test if settings.evaluation.test == "official" else splits.test,
        }[split_name]
        assert split is not None
        model.load_state_dict(load_weights(run, weights))
        return predict(
            model,
            split,
            normalisation=normalisation(settings),
            batch_size=settings.evaluation.batch_size,
            memory_format=device.memory_format(where),
            precision=settings.precision,
            crop_padding=settings.evaluation.crop_padding,
            crop_seed=device.derive_seed(settings.seed, "evaluation", 0),
            views=settings.evaluation.views,
        )

    fields: dict[str, Any] = {"scored_weights": scored}
    has_last = run.last.exists()
    if has_last:
        last = predictions("last", "test")
        run.write_predictions(last, "test", "last")
        fields["test_accuracy_last"] = last.accuracy
    test = last if has_last and scored == "last" else predictions(scored, "test")
    run.write_predictions(test, "test", "scored")
    if splits.validation is not None:
        run.write_predictions(predictions(scored, "validation"), "validation", "scored")
    names = tuple(settings.dataset.display_names or splits.class_names)
    _write_reports(run, test, names)
    _write_samples(run, splits.official_test, test, settings.seed)
    if features or {"pca", "tsne"} & {name for name, figure in settings.figures.items() if figure}:
        model.load_state_dict(load_weights(run, scored))
        fields["separation"] = _write_features(run, model, splits.test, settings, where)
    fields |= {
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_size": len(test),
        "per_class_accuracy": dict(zip(names, test.per_class_accuracy.tolist(), strict=True)),
        "most_confused": [
            {"label": names[label], "predicted": names[guess], "images": count}
            for label, guess, count in test.most_confused()
        ],
    }
    return fields


def load_weights(run: RunDir, weights: str) -> dict[str, Any]:
    """Return the state of the model in best.pt or last.pt."""
    path = {"best": run.best, "last": run.last}[weights]
    if not path.exists():
        raise RequestError(
            f"{run.path} has no {path.name}; train it: python -m cifar_lab.train {run.path}"
        )
    state: dict[str, Any] = run.read_checkpoint(path)["model"]
    return state


def _write_reports(run: RunDir, predictions: Predictions, names: tuple[str, ...]) -> None:
    """Write scikit-learn's classification report, as text and as JSON."""
    from sklearn.metrics import classification_report

    arguments = {
        "y_true": predictions.labels,
        "y_pred": predictions.predicted,
        "labels": list(range(len(names))),
        "target_names": list(names),
        "zero_division": 0.0,
    }
    write_text(run.report_text, classification_report(**arguments))
    as_dict = classification_report(**arguments, output_dict=True)
    write_text(run.report_json, json.dumps(as_dict, indent=2) + "\n")


def _write_samples(run: RunDir, split: Split, test: Predictions, seed: int) -> None:
    """Keep some test images with their logits: random ones, and the most confident mistakes."""
    random = np.random.default_rng(seed).permutation(len(test))[:_SAMPLES]
    wrong = np.flatnonzero(test.predicted != test.labels)
    confidence = test.probabilities[wrong].max(axis=1)
    worst = wrong[np.argsort(-confidence, kind="stable")[:_SAMPLES]]
    chosen = np.concatenate([random, worst])
    images = split.images[torch.from_numpy(test.indices[chosen]).to(split.images.device)]
    run.write_arrays(
        run.samples_file,
        images=images.cpu().numpy(),
        labels=test.labels[chosen],
        logits=test.logits[chosen],
        indices=test.indices[chosen],
        kind=np.array(["random"] * len(random) + ["worst"] * len(worst)),
    )


def _write_features(
    run: RunDir, model: Any, split: Split, settings: RunConfig, where: str
) -> dict[str, float | None]:
    """Keep the features of the first test images, what PCA and t-SNE see; return how well they
    keep the classes apart.
    """
    part = Split(split.name, split.images, split.labels, split.indices[:_FEATURES])
    features, labels = [], []
    model.eval()
    with torch.inference_mode():
        for images, targets in in_order(
            part,
            batch_size=settings.evaluation.batch_size,
            normalisation=normalisation(settings),
            memory_format=device.memory_format(where),
        ):
            features.append(model.features(images).float().flatten(1).cpu())
            labels.append(targets.cpu())
    found, classes = torch.cat(features).numpy(), torch.cat(labels).numpy()
    run.write_arrays(
        run.features_file, features=found, labels=classes, indices=part.indices.cpu().numpy()
    )
    if len(found) < 3 or not np.isfinite(found).all():
        return {}
    scores = separation(found, classes)
    return {name: value if np.isfinite(value) else None for name, value in scores.items()}
