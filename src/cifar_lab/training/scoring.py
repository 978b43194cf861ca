"""From a folder with weights to a model, predictions, reports and the fields of a summary."""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cifar_lab.config import targets
from cifar_lab.config.run_config import EvaluationConfig, RunConfig
from cifar_lab.errors import Damaged, UsageError, first_line
from cifar_lab.figures.reliability import calibration
from cifar_lab.figures.style import Look
from cifar_lab.runs.files import MAX_BYTES, load_checkpoint, write_text
from cifar_lab.runs.metrics import Predictions, Probabilities, best_row
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.training.batches import in_order
from cifar_lab.training.build import check_same_data, load_splits, make_model, normalisation
from cifar_lab.training.console import draw_figures, new_bar
from cifar_lab.training.device import autocast, derive_seed, select_device
from cifar_lab.training.splits import Split, Splits

if TYPE_CHECKING:
    from cifar_lab.datasets.pictures import Fit, Pictures

_TIMES_THE_MODEL = 32  # what a checkpoint may be beside its model: last.pt has 3 to 6 copies of it
_SAMPLES = 8  # images of each kind that a run keeps, to draw
_FEATURES = 2000  # images whose features a run keeps at most, for PCA and t-SNE


def evaluate(
    run: RunDir, *, splits: Splits | None = None, device: str | None = None, features: bool = False
) -> dict[str, Any]:
    """Score a run from its folder alone; write predictions and reports, return summary fields.

    This is the one evaluation: training ends with it, and `cifar_lab.evaluate` calls it. `device`
    replaces the run's own. Features are kept too if a figure of the run needs them or `features` is
    true. Raises UsageError if the folder has no weights yet, Unavailable if its data have changed.
    """
    config = run.own_config()
    device = select_device(device or config.device)
    scored = weights_to_score(run, config)
    if splits is None:
        check_same_data(config.dataset, run.read_summary().dataset, run.path)
        splits = load_splits(config, device)
    model = make_model(config, len(splits.class_names), device)
    tested = splits.official_test if config.evaluation.test == "official" else splits.test

    def score(weights: str, split: Split) -> Predictions:
        load_weights(run, weights, model)
        return predict(model, split, config, f"evaluating the {weights} weights, {split.name}")

    kept = ["last", *["averaged"] * bool(config.training.ema)] if run.last.exists() else []
    results = {weights: score(weights, tested) for weights in dict.fromkeys([*kept, scored])}
    for weights in kept:
        run.write_predictions(results[weights], tested.name, weights)
    test = results[scored]
    run.write_predictions(test, tested.name, "scored")
    if splits.validation is not None:
        validated = score(scored, splits.validation)
        run.write_predictions(validated, splits.validation.name, "scored")
    names = tuple(config.dataset.display_names or splits.class_names)
    _write_reports(run, test, names)
    _write_samples(run, splits, test, config.seed)
    calibrated = calibration(test)
    fields: dict[str, Any] = {
        "scored_weights": scored,
        **{f"test_accuracy_{weights}": results[weights].accuracy for weights in kept},
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "test_size": len(test),
        "expected_calibration_error": calibrated.error if calibrated is not None else None,
        "per_class_accuracy": [
            {"class": name, "accuracy": accuracy}
            for name, accuracy in zip(names, test.per_class_accuracy.tolist(), strict=True)
        ],
        "most_confused": [
            {"label": names[label], "predicted": names[guess], "images": count}
            for label, guess, count in test.most_confused()
        ],
    }
    if features or _needs_features(config):
        load_weights(run, scored, model)
        fields["separation"] = _write_features(run, model, splits.test, config)
    if splits.trained_on:
        others = ~np.isin(test.indices, splits.trained_on)
        fields["test_images_trained_on"] = int((~others).sum())
        if others.any():
            right = test.predicted == test.labels
            fields["test_accuracy_without_them"] = float(right[others].mean())
    return fields


def draw_again(run: RunDir, look: Look | None = None) -> tuple[list[str], list[str]]:
    """Draw the figures of a finished run as its config says now: `draw_figures`.

    What they need is measured again where the folder lacks it: the features for PCA and t-SNE, and
    reports with other names for the classes. Then the run's data have to be there.
    """
    with run.lock():
        config, summary = run.own_config(), run.read_summary()
        no_features = _needs_features(config) and not run.features_file.exists()
        names = config.dataset.display_names
        stale = no_features or (names and summary.class_names != names)
        fields: dict[str, Any] = evaluate(run) if stale else {}
        drawn, warnings = draw_figures(run, look)
        figures = sorted({*summary.figures, *(drawn if look is None else ())})
        run.write_summary(dataclasses.replace(summary, **fields, figures=figures))
    return drawn, warnings


def _needs_features(config: RunConfig) -> bool:
    return bool({"pca", "tsne"} & {name for name, figure in config.figures.items() if figure})


def weights_to_score(run: RunDir, config: RunConfig) -> str:
    """Return which weights a run is scored with: best, or last if it has no validation images.

    Raises UsageError if they are not there yet, Damaged if those of the best epoch are lost.
    """
    wanted = config.evaluation.scored_weights
    if wanted == "best" and run.best.exists():
        return "best"
    best = best_row(run.read_metrics(), config.training.monitor) if wanted == "best" else None
    if best is not None:
        raise Damaged(
            f"{run.best} is missing: the weights of the best epoch, {best.epoch}, are lost; "
            "rerun=true trains again"
        )
    if not run.last.exists():
        raise UsageError(
            f"{run.path} has no last.pt; train it: python -m cifar_lab.train {run.path}"
        )
    return "last" if wanted == "best" else wanted


def check_scorable(run: RunDir, device: str | None = None) -> None:
    """Raise what `evaluate` would, as far as files and settings tell; nothing is written.

    UsageError for a folder that is no run's, a target that is not allowed, a device that is not
    here and weights that are not there yet; Damaged for lost weights.
    """
    config = run.own_config()
    select_device(device or config.device)
    targets.resolve(config.model["_target_"], "model")
    targets.resolve(config.dataset.source.get("_target_"), "dataset.source")
    weights_to_score(run, config)


def load_weights(run: RunDir, weights: str, model: nn.Module) -> None:
    """Load the best, last or averaged weights into a model; Damaged if they do not fit it.

    The averaged ones are those after the last step, in last.pt.
    """
    path = run.best if weights == "best" else run.last
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    checkpoint = load_checkpoint(path, most=_TIMES_THE_MODEL * own + MAX_BYTES)
    try:
        model.load_state_dict(checkpoint["averaged" if weights == "averaged" else "model"])
    except (RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(
            f"{path} does not hold the weights of the run's model: {first_line(error)}"
        ) from None


def _write_reports(run: RunDir, predictions: Predictions, names: tuple[str, ...]) -> None:
    """Write scikit-learn's classification report, as text and as JSON."""
    from sklearn.metrics import classification_report

    how = {"labels": range(len(names)), "zero_division": 0.0}
    report = functools.partial(
        classification_report, predictions.labels, predictions.predicted, **how
    )
    write_text(run.report_text, report(target_names=names))
    # By number, and then with their names as values: one class may be called `accuracy`.
    by_number = report(target_names=list(map(str, range(len(names)))), output_dict=True)
    rows = [{"class": name, **by_number.pop(str(i))} for i, name in enumerate(names)]
    write_text(run.report_json, json.dumps({"classes": rows, **by_number}, indent=2) + "\n")


def _write_samples(run: RunDir, splits: Splits, test: Predictions, seed: int) -> None:
    """Keep some test images with their logits: random ones, and the most confident mistakes."""
    split, files = splits.official_test, splits.test_files
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
        files=np.array([files[i] if files else "" for i in test.indices[chosen]], dtype=np.str_),
    )


def _write_features(
    run: RunDir, model: Any, split: Split, config: RunConfig
) -> dict[str, float | None]:
    """Keep the features of the first test images for PCA and t-SNE.

    Returns how well they separate the classes.
    """
    part = dataclasses.replace(split, indices=split.indices[:_FEATURES])
    # In the precision of the predictions, so that both speak of the same network.
    plain = EvaluationConfig(batch_size=config.evaluation.batch_size)
    config = dataclasses.replace(config, evaluation=plain)
    kept = predict(model, part, config, outputs=lambda x: model.features(x).float().flatten(1))
    points, classes = kept.logits, kept.labels
    run.write_arrays(run.features_file, features=points, labels=classes, indices=kept.indices)
    if len(points) < 3 or not np.isfinite(points).all():
        return {}
    from cifar_lab.figures.embedding import separation  # late: most runs keep no features

    scores = separation(points, classes)
    return {name: value if np.isfinite(value) else None for name, value in scores.items()}


def predict(
    model: nn.Module,
    split: Split,
    config: RunConfig,
    shown: str | None = None,
    *,
    outputs: Callable[[Tensor], Tensor] | None = None,
) -> Predictions:
    """Return the logits of a split's images in evaluation mode, in the split's order.

    A bar that is called `shown` says how many are done. `outputs` takes the place of the model's
    logits: its features (B, D).
    """
    model.eval()
    crop_seed = derive_seed(config.seed, "evaluation", 0)
    bar = new_bar(total=len(split), desc=shown, unit="image", disable=shown is None)
    logits, done = torch.empty(0), 0
    with torch.inference_mode(), autocast(str(split.device), config.precision):
        for images, _ in in_order(
            split, config.evaluation, normalisation(config), crop_seed=crop_seed
        ):
            part = mean_logits(outputs or model, images, config.evaluation.views)
            if done == 0:
                # One array for all: small results kept beside large activations fragment glibc's
                # heap, which grew by 40 kB per image.
                logits = torch.empty((len(split), *part.shape[1:]), device=part.device)
            logits[done : done + len(part)] = part
            done += len(part)
            bar.update(len(part))
    bar.close()
    labels = split.labels.index_select(0, split.indices.to(split.labels.device))
    return Predictions(logits.cpu().numpy(), labels.cpu().numpy(), split.indices.numpy())


def mean_logits(model: Callable[[Tensor], Tensor], images: Tensor, views: str) -> Tensor:
    """Return the logits (B, C) of float images (B, C, H, W), averaged over views of each image.

    `one` is the image alone, `mirrored` the image and its mirror image. `moved` gives half of the
    weight to these two, and the other half to both shifted by one pixel along the diagonal in
    either direction, with a reflected border: the six views of airbench94 (Jordan 2024,
    arXiv:2404.00498).
    """

    def both(shifted: Tensor) -> Tensor:
        direct, mirrored = model(shifted), model(shifted.flip(-1))
        if images.device.type != "cpu":  # on a CPU, half precision stays as kept results have it
            direct, mirrored = direct.float(), mirrored.float()
        return (direct + mirrored) / 2

    if views == "one":
        return model(images)
    if views == "mirrored":
        return both(images)
    padded = functional.pad(images, [1] * 4, mode="reflect")
    moved = both(padded[..., :-2, :-2]) + both(padded[..., 2:, 2:])
    return both(images) / 2 + moved / 4


# --- a past run as a classifier -------------------------------------------------------------------


def load_model(run: RunDir, *, device: str = "cpu") -> nn.Module:
    """Return a run's model on a device, in evaluation mode, with the weights that were scored.

    It takes images that are normalised with the dataset's mean and std. Raises UsageError if there
    are no weights yet.
    """
    config = run.read_config()
    num_classes = len(run.class_names())
    if num_classes == 0:  # the classes of a folder of images are known once it was evaluated
        raise UsageError(
            f"{run.path} does not name its classes yet; finish the run first: "
            f"python -m cifar_lab.train {run.path}"
        )
    weights = weights_to_score(run, config)
    model = make_model(config, num_classes, device)
    load_weights(run, weights, model)
    return model.eval()


def probabilities(
    run: RunDir, pictures: "Pictures", *, device: str | None = None, fit: "Fit | None" = None
) -> Probabilities:
    """Return the probability of each class for each picture, (N, C).

    Logits are averaged over the run's `evaluation.views`. `device` and `fit`, which says how a
    picture is brought to the model's size, replace the run's own. Raises UsageError for the first
    picture that cannot be read, before a model is built.
    """
    from cifar_lab.datasets.pictures import Preparation, to_pixels  # training reads no pictures

    config = run.read_config()
    dataset = config.dataset
    prepared = Preparation(dataset.image_shape, fit or dataset.fit, dataset.max_megapixels)
    pixels = torch.from_numpy(to_pixels(pictures, prepared))
    device = select_device(device or config.device)
    model = load_model(run, device=device)
    if not len(pixels):
        return np.empty((0, len(run.class_names())))
    unknown = torch.zeros(len(pixels), dtype=torch.int64, device=device)
    split = Split("pictures", pixels.to(device), unknown, indices=torch.arange(len(pixels)))
    evaluation = dataclasses.replace(config.evaluation, crop_padding=0)
    plain = dataclasses.replace(config, evaluation=evaluation, precision="fp32")
    return predict(model, split, plain).class_probabilities
