import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import synthetic_runs
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from synthetic_runs import CLASSES, dataset_config

from cifar_lab.errors import UsageError
from cifar_lab.figures import (
    confusion_matrix,
    curves,
    embedding,
    grid,
    pca,
    per_class,
    reliability,
    samples,
    style,
    tsne,
)
from cifar_lab.figures.embedding import separation
from cifar_lab.runs.files import read_arrays
from cifar_lab.runs.metrics import EpochMetrics, Predictions, StepMetrics
from cifar_lab.runs.run_dir import RunDir


def make_run(folder: Path, summary: dict[str, Any] | None = None, **settings: Any) -> RunDir:
    """Return a run folder that holds a config and a summary, as training would leave them."""
    settings["dataset"] = dataset_config(**settings.get("dataset", {}))
    finished = {"status": "finished", "device": "cpu", **(summary or {})}
    run: RunDir = synthetic_runs.make_run(
        folder, status="queued", lr=1e-3, summary=finished, **{"training": {}, **settings}
    )
    return run


def history(epochs: int, *, seed: int = 0, watched: bool = False) -> list[EpochMetrics]:
    """Return rows whose validation loss rises, at a tenth of the rate, after two thirds."""
    rows = []
    for row in synthetic_runs.history(epochs, 0.8, seed):
        late = max(0.0, row.epoch / max(epochs, 1) - 0.66)
        changes = {"learning_rate": 1e-4 if late else 1e-3, "val_loss": row.val_loss + 3 * late}
        if watched:
            changes |= {"test_loss": row.val_loss, "test_accuracy": row.val_accuracy - 0.02}
        rows.append(dataclasses.replace(row, **changes))
    return rows


def guesses(images: int, classes: int = 10, seed: int = 0, skill: float = 4.0) -> Predictions:
    """Return logits of a net that is right more often than not and mixes up neighbours."""
    draw = np.random.default_rng(seed)
    labels = np.arange(images, dtype=np.int64) % classes
    logits = draw.normal(0, 1.5, (images, classes))
    logits[np.arange(images), labels] += skill
    logits[np.arange(images), (labels + 2) % classes] += skill / 2
    return Predictions(logits.astype(np.float32), labels, np.arange(images, dtype=np.int64))


def write_samples(
    run: RunDir, kinds: Sequence[str], shape: tuple[int, ...] = (3, 32, 32), classes: int = 10
) -> Predictions:
    drawn = guesses(len(kinds), classes, seed=1)
    wrong = np.array(kinds) == "worst"
    drawn.logits[wrong, drawn.labels[wrong]] = -3.0
    shown = dataclasses.replace(drawn, indices=drawn.indices + 100)
    images = np.random.default_rng(0).integers(0, 256, (len(kinds), *shape), dtype=np.uint8)
    arrays = {"images": images, "kind": np.array(kinds, dtype="<U6"), "labels": shown.labels}
    run.write_arrays(run.samples_file, **arrays, logits=shown.logits, indices=shown.indices)
    return shown


def write_features(run: RunDir, images: int, dimensions: int = 64) -> None:
    draw = np.random.default_rng(3)
    labels = np.arange(images) % 10
    centres = draw.normal(0, 4, (10, dimensions))
    features = (centres[labels] + draw.normal(0, 4, (images, dimensions))).astype(np.float32)
    run.write_arrays(run.features_file, features=features, labels=labels, indices=np.arange(images))


def check_drawn(figure: Figure) -> None:
    """Draw as a PNG: nothing is outside the figure, and nothing is left blank."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=50, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
    box = figure.get_tightbbox()
    width, height = figure.get_size_inches()
    assert min(box.x0, box.y0, width - box.x1, height - box.y1) > -0.02, f"cut off: {box}"


def legend_texts(owner: Axes | Figure) -> list[str]:
    legend = owner.get_legend() if isinstance(owner, Axes) else owner.legends[0]
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def cell_texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_curves_show_what_the_rows_say_and_mark_the_best_epoch(tmp_path: Path) -> None:
    study = {"target_accuracy": 0.7}
    run = make_run(tmp_path, {"best_epoch": 6}, study=study)
    rows = history(9)
    run.rewrite_metrics(rows)
    figure = curves.draw(run, learning_rate=False)
    check_drawn(figure)
    loss, accuracy = figure.axes
    assert loss.get_ylabel() == "loss (nats per image)"
    assert [axes.get_xlabel() for axes in (loss, accuracy)] == ["epoch", "epoch"]
    training = next(line for line in loss.lines if line.get_label() == "training")
    assert list(np.asarray(training.get_ydata())) == [row.train_loss for row in rows]
    stars: list[Any] = [line for line in accuracy.lines if line.get_marker() == "*"]
    assert [(line.get_xdata(), line.get_ydata()) for line in stars] == [
        ([6], [rows[5].val_accuracy])
    ]
    assert legend_texts(accuracy) == [
        "training",
        "validation",
        f"best epoch 6: {100 * (rows[5].val_accuracy or 0):.2f} %",
        "target 70 %",
    ]
    target = next(line for line in accuracy.lines if line.get_label() == "target 70 %")
    assert set(np.asarray(target.get_ydata())) == {0.7}
    assert all("%" in label.get_text() for label in accuracy.get_yticklabels())


@pytest.mark.parametrize("epochs", [0, 1, 300])
def test_curves_of_any_length(tmp_path: Path, epochs: int) -> None:
    run = make_run(tmp_path)
    run.rewrite_metrics(history(epochs))
    figure = curves.draw(run)
    check_drawn(figure)
    loss = figure.axes[0]
    if epochs == 0:
        assert cell_texts(loss) == ["no epoch has finished yet"]
    if epochs == 1:
        assert loss.lines[0].get_marker() == "o"
    if epochs == 300:  # the learning rate has a panel only where it changes
        assert loss.get_xlim()[1] > epochs
        assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log"]
    assert len(figure.axes) == (3 if epochs == 300 else 2)


def test_steps_stand_inside_their_epochs_and_keep_their_mean(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    run.rewrite_metrics(history(2))
    losses = np.linspace(2.0, 1.0, 6000).tolist()
    run.rewrite_steps([StepMetrics(1 + i // 3000, i + 1, x, 0.5) for i, x in enumerate(losses)])
    panel = curves.draw(run).axes[0]
    assert panel.get_xlim()[0] == 0
    line = panel.lines[0]
    positions, values = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    assert line.get_label() == "training steps"
    assert len(values) == curves.MOST_POINTS
    assert values.mean() == pytest.approx(np.mean(losses))
    assert positions.min() > 0
    assert positions.max() == pytest.approx(2, abs=0.01)
    assert (np.diff(positions) > 0).all()
    assert "training steps" not in legend_texts(curves.draw(run, steps=False).axes[0])


def test_many_runs_are_told_apart_and_named_outside(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=i) for i in range(10)]
    for i, run in enumerate(runs[:-1]):
        run.rewrite_metrics(history(6, seed=i))
    figure = curves.bands({f"lr {i} $x$": [run] for i, run in enumerate(runs)})
    check_drawn(figure)
    texts = legend_texts(figure)
    assert len(texts) == 10
    assert texts[-1].endswith("(n = 0)")
    assert len({str(style.line_style(i)) for i in range(27)}) == 27
    first, ninth = (figure.axes[0].lines[i] for i in (0, 8))
    assert first.get_color() == ninth.get_color()
    assert first.get_linestyle() != ninth.get_linestyle()


def test_bands_reach_from_the_lowest_to_the_highest_seed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, seed=i) for i in range(4)]
    for i, length in enumerate((6, 5, 6)):
        runs[i].rewrite_metrics(history(length, seed=i))
    figure = curves.bands({"adam": runs, "nothing yet": runs[3:]})
    check_drawn(figure)
    assert legend_texts(figure) == ["adam (n = 3)", "nothing yet (n = 0)"]
    axes = next(axes for axes in figure.axes if "Validation acc" in axes.get_title(loc="left"))
    values = np.array([[row.val_accuracy for row in run.read_metrics()[:5]] for run in runs[:3]])
    assert np.asarray(axes.lines[0].get_ydata()) == pytest.approx(values.mean(axis=0))
    edges = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert edges[:, 1].max() == pytest.approx(values.max())
    rests = [line.get_xdata() for line in axes.lines[1:3]]  # of the runs that trained for longer
    assert [list(np.asarray(rest)) for rest in rests] == [[5, 6], [5, 6]]


def test_numbers_of_a_search_are_places_on_an_axis_and_those_of_a_grid_are_squares() -> None:
    rates = [f"{10 ** -(1 + i / 7):.16f}" for i in range(20)]
    squares = [grid.Square((rate, "sgd"), 0.5 + i / 100) for i, rate in enumerate(rates)]
    axes = ["optimizer.lr", "optimizer"]
    check_drawn(figure := grid.draw(grid.Sweep(axes, [rates, ["sgd"]], squares, "accuracy")))
    (panel,) = figure.axes
    assert panel.get_xscale() == "log"
    assert legend_texts(figure) == ["sgd"]
    few = grid.draw(grid.Sweep(axes, [rates[:4], ["sgd"]], squares[:4], "accuracy"))
    assert len(few.axes[0].images) == 1
    order = [["a_very_long_model_name", "another_network"], ["relu", "tanh"]]
    pairs = [grid.Square((m, a), 70.5, (69.25, 71.75), 2) for m in order[0] for a in order[1]]
    named = grid.draw(grid.Sweep(["model", "activation"], order, pairs, "accuracy"))
    check_drawn(named)
    boxes = [text.get_window_extent() for text in named.axes[0].texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    alike = grid.Square(("a", "b"), 1234.0, None, 3)  # runs of one value have no interval
    figure = grid.draw(grid.Sweep(["model", "activation"], [["a"], ["b"]], [alike], "loss"))
    assert cell_texts(figure.axes[0]) == ["1234"]
    assert "mean of n = 3 runs ·" in figure.get_suptitle()


def test_confusion_matrix_writes_every_count_and_every_share_but_zeros(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    predictions = guesses(1000)
    run.write_predictions(predictions, "test", "scored")
    figure = confusion_matrix.draw(run)
    check_drawn(figure)
    counts, shares = figure.axes[:2]
    assert len(confusion_matrix.draw(run, normalise="rows").axes) == 2  # a panel and its scale
    assert [axes.get_title(loc="left") for axes in (counts, shares)] == [
        "Images",
        "Share of the true class (%)",
    ]
    matrix = predictions.confusion_matrix
    assert (matrix == 0).any()
    assert [int(text) for text in cell_texts(counts)] == matrix[matrix > 0].tolist()
    written = np.zeros((10, 10))
    written[matrix > 0] = [float(text) for text in cell_texts(shares)]
    assert written.sum(axis=1) == pytest.approx(100, abs=0.5)
    assert [label.get_text() for label in counts.get_yticklabels()] == CLASSES
    assert (counts.get_xlabel(), counts.get_ylabel()) == ("predicted class", "true class")
    for image in (counts.images[0], shares.images[0]):
        dark = to_hex(image.axes.texts[0].get_color())  # the diagonal's first cell is full
        assert dark == "#ffffff"


def test_many_classes_have_names_but_no_numbers(tmp_path: Path) -> None:
    names = [f"kind number {i}" for i in range(30)]
    run = make_run(tmp_path, dataset={"classes": names})
    run.write_predictions(guesses(500, 30), "test", "scored")
    figure = confusion_matrix.draw(run, normalise="none")
    check_drawn(figure)
    assert not figure.axes[0].texts
    assert len(figure.axes[0].get_yticklabels()) == 30
    check_drawn(per_class.draw(run))


def test_samples_show_images_and_all_their_probabilities(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shown = write_samples(run, ["worst", "random", "random", "random", "worst"], (1, 96, 64))
    figure = samples.draw(run)
    check_drawn(figure)
    random_part, worst_part = figure.subfigs
    assert [part.get_suptitle() for part in figure.subfigs] == [
        "Drawn at random",
        "The most confident mistakes",
    ]
    assert sum(len(axes.images) for axes in random_part.axes) == 3
    assert sum(len(axes.images) for axes in worst_part.axes) == 2
    bars = [patch.get_width() for patch in random_part.axes[1].patches]  # type: ignore[attr-defined]
    assert bars == pytest.approx(shown.probabilities[1])
    less = samples.draw(run, random_count=0, mistake_count=1)
    assert [sum(len(axes.images) for axes in part.axes) for part in less.subfigs] == [1]
    marked = [text.get_text() for text in random_part.axes[1].texts]
    assert [i for i, text in enumerate(marked) if "◀" in text] == [shown.predicted[1]]
    for axes in worst_part.axes[::2]:
        assert not axes.images or axes.get_title(loc="left").startswith("✗")
        frame = axes.spines["left"].get_edgecolor()
        assert not axes.images or to_hex(frame) == style.VERMILLION.lower()
    surest = [max(p.get_width() for p in worst_part.axes[i].patches) for i in (1, 3)]  # type: ignore[attr-defined]
    assert surest == sorted(surest, reverse=True)


def test_probability_text_is_s1s_figure_10(tmp_path: Path) -> None:
    short = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    run = make_run(tmp_path, dataset={"display_names": short})
    shown = write_samples(run, ["random"] * 5)
    text = samples.probability_text(run, count=2)
    assert text.startswith("labels: ('plane', 'car', 'bird',")
    assert "image 100, plane:" in text
    vectors = [block.split("[")[1].split("]")[0].split(",") for block in text.split("prob =")[1:]]
    assert len(vectors) == 2
    for i, vector in enumerate(vectors):
        cells = [cell.strip() for cell in vector]
        assert [k for k, cell in enumerate(cells) if cell.startswith("**")] == [shown.predicted[i]]
        numbers = [float(cell.strip("*")) for cell in cells]
        assert numbers == pytest.approx(shown.probabilities[i], rel=1e-4)


def test_pca_is_scikit_learns(tmp_path: Path) -> None:
    from sklearn.decomposition import PCA

    run = make_run(tmp_path)
    write_features(run, 300)
    features = read_arrays(run.features_file)["features"]
    reference = PCA(n_components=2, svd_solver="full").fit(features)
    expected = reference.transform(features)
    points, *_ = pca.project(features)
    for column in (0, 1):
        sign = np.sign(points[:, column] @ expected[:, column])
        assert sign * points[:, column] == pytest.approx(expected[:, column], abs=1e-2)
    share = 100 * reference.explained_variance_ratio_[0]
    figure = pca.draw(run)
    check_drawn(figure)
    assert figure.axes[0].get_xlabel() == f"component 1 ({share:.1f} % of the variance)"
    assert legend_texts(figure) == CLASSES
    axes = figure.axes[0]
    for text, dots in zip(axes.texts, axes.collections, strict=True):  # names stand in their class
        place = axes.transData.inverted().transform(axes.transAxes.transform(text.get_position()))
        assert place == pytest.approx(np.median(np.asarray(dots.get_offsets()), axis=0), abs=2)
    drawn = sum(len(np.asarray(c.get_offsets())) for c in figure.axes[0].collections)
    assert drawn == 300


@pytest.mark.slow
def test_tsne_is_the_same_twice_and_follows_its_seed_and_perplexity(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_features(run, 120, dimensions=70)
    features, labels = embedding.read_sample(run, 120, 0)
    first, again = (tsne.project(features, 0, 10.0)[0] for _ in range(2))
    assert (first == again).all()
    assert not (first == tsne.project(features, 0, 20.0)[0]).all()
    assert separation(first, labels)["knn_accuracy"] > 0.8


def test_a_tie_of_neighbours_goes_to_the_class_of_the_nearest() -> None:
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(300, 2)), rng.integers(0, 4, 300)
    right = 0
    for i, point in enumerate(points):
        near = labels[np.argsort(np.linalg.norm(points - point, axis=1))[1:6]].tolist()
        right += max(near, key=lambda label: (near.count(label), -near.index(label))) == labels[i]
    assert separation(points, labels)["knn_accuracy"] == pytest.approx(right / 300)


def test_names_that_are_long_strange_or_missing(tmp_path: Path) -> None:
    names = ["a$b$", "x_1^{2", "two\nlines", "Ограничение" * 5, "<&>", "%s", "{}", "\\frac"]
    names += ["$", "z"]
    run = make_run(tmp_path, dataset={"classes": names})
    run.write_predictions(guesses(200), "test", "scored")
    write_samples(run, ["random"] * 2 + ["worst"] * 2)
    write_features(run, 60)
    for draw in (per_class.draw, samples.draw, pca.draw):
        check_drawn(draw(run))
    nameless = make_run(tmp_path, dataset={"classes": None})
    assert style.plain_names(nameless, 3) == ["0", "1", "2"]


def test_a_missing_file_is_said_with_the_way_to_make_it(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    read_files = (confusion_matrix, samples, per_class, reliability, pca, tsne)
    for draw in (module.draw for module in read_files):
        with pytest.raises(UsageError, match=r"cifar_lab\.evaluate"):
            draw(run)
