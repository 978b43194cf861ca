import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixtures import Capture, Folders, Patch
from synthetic_runs import OPTIMIZERS, dataset_config, make_grid, make_run

from cifar_lab import summarize
from cifar_lab.analysis import grouping, ranking, summary, summary_tables, texts
from cifar_lab.analysis.seed_groups import RunCollection
from cifar_lab.errors import UsageError
from cifar_lab.runs.run_dir import RunDir


def collection_of(folder: Path, metric: str | None = None) -> RunCollection:
    collection = grouping.read_collection(folder)
    ranking.rank(collection, metric)
    return collection


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "summary.csv").read_text())))


def run_it(*arguments: str | Path) -> int:
    return summarize.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def grid(tmp_path_factory: Folders) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    make_grid(folder)
    make_run(folder, optimizer="sgd", activation="Tanh", lr=1e-2, seed=3, status="failed")
    make_run(folder, optimizer="adam", activation="Tanh", lr=1e-2, seed=3, status="running")
    assert run_it(folder) == 0
    for name in ("grid.png", "curves.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    return folder


@pytest.fixture(scope="module")
def collection(grid: Path) -> RunCollection:
    """The runs of `grid`, ranked; to read only."""
    return collection_of(grid)


@pytest.fixture(autouse=True)
def no_pictures(grid: Path, monkeypatch: Patch) -> None:
    """Those of `grid` are drawn, before this."""
    monkeypatch.setattr(summarize, "_draw", lambda summary: [])


def test_axes_are_what_differs_within_an_option_and_never_the_seed(
    collection: RunCollection,
) -> None:
    assert collection.axes == ["optimizer", "activation", "optimizer.lr"]
    assert len(collection.groups) == 12
    assert all(len(setting.finished) == 3 for setting in collection.groups)


def test_a_setting_that_one_run_of_an_option_lacks_is_an_axis(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    make_run(tmp_path, optimizer="adam")
    target_config = {"_target_": "torch.optim.Adam", "lr": 1e-3, "weight_decay": 0.01}
    choices = {"model": "convnet", "optimizer": "adam", "activation": "relu"}
    monkeypatch.setitem(OPTIMIZERS, "decayed", target_config)
    make_run(tmp_path, optimizer="decayed", choices=choices)
    collection = collection_of(tmp_path)
    assert collection.axes == ["optimizer.weight_decay"]
    assert {setting.key for setting in collection.groups} == {("–",), ("0.01",)}


def test_a_copy_of_a_run_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    shutil.copytree(run.path, tmp_path / "copied" / run.path.name)
    collection = collection_of(tmp_path)
    assert [len(setting.runs) for setting in collection.groups] == [1]
    assert any("the same run" in note for note in collection.notes)


def test_what_makes_no_other_run_is_no_axis(tmp_path: Path) -> None:
    make_run(tmp_path, seed=0)
    make_run(tmp_path, seed=1, training={"epochs": 5, "print_every": 7}, name="other", threads=2)
    collection = collection_of(tmp_path)
    assert collection.axes == []
    assert [len(setting.finished) for setting in collection.groups] == [2]


def test_protocols_are_one_axis_not_all_that_they_change(tmp_path: Path) -> None:
    make_run(tmp_path)
    report: dict[str, Any] = {"split": {"validation": 0}, "evaluation": {"scored_weights": "last"}}
    make_run(tmp_path, protocol="report", validated=False, **report)
    collection = collection_of(tmp_path)
    assert [collection.axes[i] for i in collection.main_axes] == ["protocol"]


def test_ranking_is_by_validation_and_only_the_best_shows_its_test_score(
    grid: Path, collection: RunCollection
) -> None:
    rows = rows_of(grid)
    by_rank = sorted(rows, key=lambda row: int(row["rank"]))
    scores = [float(row["best_val_accuracy"]) for row in by_rank]
    assert scores == sorted(scores, reverse=True)
    assert [row["test_accuracy"] != "" for row in by_rank] == [True] + [False] * 11
    assert [row["test_loss"] != "" for row in by_rank] == [True] + [False] * 11
    text = (grid / "summary.md").read_text()
    best = by_rank[0]
    shown = f"{100 * float(best['test_accuracy']):.2f}"
    assert f"test accuracy {shown}" in text
    assert "optimizer=adam, activation=ReLU, optimizer.lr=0.01 has the best" in text
    shown = summary_tables.summary_csv(collection, test=True)
    assert all(row["test_accuracy"] for row in csv.DictReader(io.StringIO(shown)))


def test_without_validation_nothing_is_ranked_until_asked(tmp_path: Path, capsys: Capture) -> None:
    report: dict[str, Any] = {"protocol": "report", "split": {"validation": 0}}
    report |= {"study": {"report": "S3"}, "choices": {"experiment": "s3_learning_rate"}}
    for lr in (0.1, 0.01):
        make_run(tmp_path, lr=lr, accuracy=0.5 + lr, validated=False, **report)
    assert run_it(tmp_path) == 0
    for row in rows_of(tmp_path):
        assert row["rank"] == row["chosen"] == row["test_accuracy"] == ""
    said = capsys.readouterr().out
    assert "no validation images were held out (protocol report)" in said
    assert "--metric test_accuracy ranks" in " ".join(said.split())
    assert run_it(tmp_path, "--metric", "test_accuracy") == 0
    ranks = {row["optimizer.lr"]: row["rank"] for row in rows_of(tmp_path)}
    assert ranks == {"0.01": "2", "0.1": "1"}
    assert "chosen on the test images" in (tmp_path / "summary.md").read_text()


def test_datasets_are_ranked_apart(tmp_path: Path) -> None:
    for name in ("cifar10", "mnist"):
        source = {"_target_": f"cifar_lab.datasets.{name}.load"}
        dataset = dataset_config(name=name, source=source)
        for lr in (0.1, 0.01) if name == "mnist" else (0.2, 0.1, 0.01):
            make_run(tmp_path, dataset=dataset, lr=lr, accuracy=0.5 + lr)
    make_run(tmp_path, lr=0.2, accuracy=0.72, seed=1)
    make_run(tmp_path, dataset=dataset_config(name="alone"))
    collection = collection_of(tmp_path)
    ranks = sorted((group.dataset, group.rank) for group in collection.groups)
    assert ranks[1:] == [("cifar10", i) for i in (1, 2, 3)] + [("mnist", 1), ("mnist", 2)]
    assert "for all 1 or 2 differences of a dataset together" in texts.testing_text(collection)
    assert "is chosen among 2 or 3: both" in texts.selection_text(collection)
    assert "(pooled)" in texts.testing_text(collection)  # of CIFAR-10, with its two seeds


def test_every_configuration_says_how_far_it_is_from_the_best(grid: Path, capsys: Capture) -> None:
    assert run_it(grid) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "It is not told apart from" in said or "It is told apart from all others" in said
    assert "together, although the same runs chose the best (Games and Howell 1976)" in said
    assert "over seeds and the 500 validation images together" in said
    assert "chosen among 12: both make it optimistic. The test score has no part in it." in said
    assert "\\" not in said  # no Markdown on the console
    assert f"written to {grid}: summary.csv, summary.md, report.html" in said
    for row in rows_of(grid):
        if row["rank"] != "1":
            low, value, high = (
                float(row[name])
                for name in ("difference_low", "difference_from_best", "difference_high")
            )
            assert low < value < high
            assert (float(row["p_adjusted"]) < 0.05) == (high < 0 or low > 0)
            assert float(row["smallest_shown"]) > (high - low) / 2


def test_a_baseline_takes_the_place_of_the_best(grid: Path) -> None:
    collection = grouping.read_collection(grid)
    ranking.rank(collection, baseline="optimizer=sgd, activation=Tanh, lr=1e-3")
    (reference,) = [group for group in collection.groups if group.is_reference]
    said = texts.best_text(collection, collection.ranking[0])
    assert re.search(
        r"To the baseline: \+\d+\.\d\d ± \d\.\d\d points, better \(p < 0.001\)\.$", said
    )
    assert reference.key == ("sgd", "Tanh", "0.001")
    best = collection.ranking[0].difference
    assert best is not None
    assert best.value > 0
    assert not best.family.chosen
    with pytest.raises(UsageError, match="fits 6 configurations"):
        ranking.rank(collection, baseline="optimizer=sgd")
    collection.axes[2] = "model.widths"
    collection.groups[0].key = ("sgd", "Tanh", "[8, 8]")
    assert collection.select("widths=[8,8], optimizer=sgd") == collection.groups[:1]


def test_seeds_that_show_a_difference(tmp_path: Path, capsys: Capture) -> None:
    for lr in (0.1, 0.01):
        for seed in range(3):
            shift = 0.02 * (seed - 1)
            make_run(tmp_path, lr=lr, seed=seed, accuracy=0.6 + lr + shift, images=2000)
    assert run_it(tmp_path, "--detect", "9") == 0
    said = " ".join(capsys.readouterr().out.partition("Seeds needed")[2].split())
    assert "seeds per configuration would show 9.00 points in four cases of five" in said
    assert "with 4 degrees of freedom" in said
    collection = collection_of(tmp_path, "best_val_loss")
    (line,) = texts.seeds_lines(collection, 1e-5)
    assert "More than 10,000 seeds per configuration would show 0.0000 on the same images" in line


def test_what_is_tied_does_not_hide_what_cannot_be_judged(tmp_path: Path) -> None:
    for lr in (0.1, 0.01):
        for seed in range(3):
            make_run(tmp_path, lr=lr, seed=seed, accuracy=0.7 + 0.01 * seed)
    make_run(tmp_path, lr=0.001, accuracy=0.6, images=300)
    said = texts.conclusion(collection_of(tmp_path))[0]
    assert "It is not told apart from optimizer.lr=0." in said
    assert said.endswith(" 1 other cannot be judged: they were scored on different images.")


def test_main_effects_of_a_full_factorial_are_paired_by_seed(
    grid: Path, collection: RunCollection
) -> None:
    found = ranking.main_effects(collection, "cifar10")
    assert found is not None
    optimizer = found.effects[0]
    assert (optimizer.axis, optimizer.best, optimizer.other) == ("optimizer", "adam", "sgd")
    means: dict[str, list[float]] = {"adam": [], "sgd": []}
    for group in collection.groups:
        means[group.key[0]].append(group.mean("best_val_accuracy") or 0.0)
    expected = np.mean(means["adam"]) - np.mean(means["sgd"])
    assert optimizer.difference.value == pytest.approx(expected)
    assert (found.deviation.paired, found.deviation.degrees) == (True, 22)
    assert [(a, b) for a, b, _ in found.interactions] == [
        ("optimizer", "activation"),
        ("optimizer", "optimizer.lr"),
        ("activation", "optimizer.lr"),
    ]
    assert "optimizer: adam - sgd: +" in (grid / "summary.md").read_text()


def test_a_notebook_shows_the_best_and_the_ranking(collection: RunCollection) -> None:
    whole = summary.Summary(collection, [])
    shown = whole._repr_html_()
    assert shown.startswith("<p>cifar10: optimizer=adam, ")
    assert shown.count("<tr>") == 1 + len(whole.table) == 1 + len(collection.groups)
    assert all(f"<td>{value}</td>" in shown for value in ("1", *collection.ranking[0].key))


def test_a_table_for_a_paper(grid: Path, tmp_path: Path) -> None:
    latex, table, text = (tmp_path / f"table.{ending}" for ending in ("tex", "csv", "md"))
    assert run_it(grid, "--latex", latex, "--csv", table, "--markdown", text) == 0
    lines = latex.read_text().splitlines()
    assert r"\toprule" in lines
    rows = [line for line in lines if line.endswith(r" \\")]
    assert len(rows) == 13
    assert {row.count("&") for row in rows} == {5}
    assert r"$\pm$" in rows[1]
    assert r"validation accuracy (\%) & to the best (points)" in rows[0]
    assert r"95 \% interval" in latex.read_text()
    assert len(table.read_text().splitlines()) == 13
    assert len([line for line in text.read_text().splitlines() if line.startswith("|")]) == 14
    assert "95 % interval" in text.read_text()
    assert run_it(grid, "--csv", table, "--metric", "best_val_loss") == 0
    assert "validation loss" in table.read_text().splitlines()[0]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_sets_the_table_of_a_paper(grid: Path, tmp_path: Path) -> None:
    assert run_it(grid, "--latex", tmp_path / "table.tex") == 0
    begin = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}"
    (tmp_path / "paper.tex").write_text(begin + r"\end{document}")
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in done.stdout
    assert (tmp_path / "paper.pdf").stat().st_size > 10_000


def test_a_narrow_terminal_gets_lines(grid: Path, capsys: Capture, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run_it(grid) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in lines if "/" not in line) <= 80
    assert any(line.startswith("* rank 1; optimizer adam") for line in lines)


def test_classes_of_one_name_keep_their_modules(tmp_path: Path) -> None:
    """Else a legend names two lines alike, and of two curves one is not drawn."""
    for name in ("first.Net", "second.Net"):
        make_run(tmp_path, model={"_target_": name}, choices={"optimizer": "adam"})
    labels = map((collection := collection_of(tmp_path)).short_label, collection.groups)
    assert list(labels) == ["model first.Net", "model second.Net"]


def test_what_a_model_brings_is_no_axis(tmp_path: Path) -> None:
    """Dropout that one model has no place for, and the target of its activation."""
    brought: dict[str, dict[str, Any]] = {
        "convnet": {"dropout": {"conv": 0.25, "dense": 0.5}},
        "two_branch": {"dropout": {"conv": 0.0}, "activation": None},
    }
    for model, settings in brought.items():
        for optimizer in ("sgd", "adam"):
            choices = {"model": model, "optimizer": optimizer, "activation": "relu"}
            make_run(tmp_path, optimizer=optimizer, choices=choices, **settings)
    collection = collection_of(tmp_path)
    assert [collection.axes[i] for i in collection.main_axes] == ["model", "optimizer"]
    assert collection.label(collection.groups[0]) == "model=convnet, optimizer=adam"


def test_what_was_always_changed_together_stays_in_every_name(tmp_path: Path) -> None:
    """Nobody knows which of the two it was: no main effect of one of them."""
    for optimizer, activation in (("sgd", "ReLU"), ("adam", "Tanh")):
        for lr, seed in ((0.1, 0), (0.1, 1), (0.01, 0), (0.01, 1)):
            chosen: dict[str, Any] = {"optimizer": optimizer, "activation": activation, "lr": lr}
            make_run(tmp_path, seed=seed, accuracy=0.6 + 0.01 * seed, **chosen)
    collection = collection_of(tmp_path)
    assert len(collection.main_axes) == 3
    assert ranking.main_effects(collection, "cifar10") is None


def test_scores_that_other_files_contradict_are_replaced_and_named(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    measured = run.read_predictions().accuracy
    change(run, test_accuracy=0.99, best_val_loss=0.01)
    assert run_it(tmp_path, "--test") == 0
    text = (tmp_path / "summary.md").read_text()
    assert "summary.json has validation loss 0.0100, metrics.csv" in text
    assert "summary.json has test accuracy 99.00 %, its stored predictions" in text
    assert f"{100 * measured:.2f} %, which counts" in text
    assert rows_of(tmp_path)[0]["test_accuracy"] == f"{measured:.10g}"


@pytest.mark.parametrize("value", [2.5, -1, 1e308])
def test_numbers_that_no_run_has_are_refused(tmp_path: Path, value: float) -> None:
    kept, run, other = (make_run(tmp_path, seed=seed) for seed in range(3))
    change(run, best_val_accuracy=value)
    lines = other.metrics_file.read_text().splitlines()
    cells = lines[-1].split(",")
    cells[lines[0].split(",").index("val_accuracy")] = str(value)
    other.metrics_file.write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
    assert run_it(tmp_path) == 0
    problems = (tmp_path / "summary.md").read_text().split("## Not readable")[1]
    assert "which no run has" in problems
    assert run.path.name in problems
    assert other.path.name in problems
    assert kept.path.name not in problems


def test_a_figure_never_ends_a_table(tmp_path: Path, monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.undo()
    make_run(tmp_path, summary={"best_val_loss": 1e308})

    def fail(collection: RunCollection) -> Any:
        raise ValueError("no such colour")

    monkeypatch.setitem(summary.PICTURES, "grid", fail)
    assert run_it(tmp_path) == 0
    assert "grid.png is not drawn: ValueError: no such colour" in capsys.readouterr().out
    assert not (tmp_path / "grid.png").exists()
    assert (tmp_path / "effects.png").exists()


def test_unfinished_and_failed_runs_are_listed_with_their_error(grid: Path) -> None:
    text = (grid / "summary.md").read_text().split("## Unfinished and failed")[1]
    assert "the loss is not finite in epoch 3" in text
    assert "interrupted" in text  # it says running, and no process holds its lock
    assert "2 of 5" in text


def change(run: RunDir, **values: object) -> None:
    text = json.dumps(json.loads(run.summary_file.read_text()) | values)
    run.summary_file.write_text(text)


def test_damaged_predictions_cost_their_test_not_the_run(tmp_path: Path) -> None:
    runs = [make_run(tmp_path, lr=lr, accuracy=0.5 + lr) for lr in (0.1, 0.01, 0.001)]
    path = runs[2].predictions_file("validation", "scored")
    path.write_bytes(path.read_bytes()[:-40])
    labels = np.full(500, 77)
    runs[1].write_arrays(
        runs[1].predictions_file("validation", "scored"),
        logits=np.zeros((500, 10), np.float32),
        labels=labels,
        indices=labels,
    )
    assert run_it(tmp_path) == 0
    text = (tmp_path / "summary.md").read_text()
    assert text.count("is damaged") == 2
    assert [row["n"] for row in rows_of(tmp_path)] == ["1", "1", "1"]
    assert "each has one run, and predictions of the same images are not there" in text


def test_names_that_are_markup_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>|`x`\n# [a](b) &amp; *b*"
    for lr in (0.1, 0.01):
        choices = {"model": "convnet", "optimizer": "adam", "activation": evil + str(lr)}
        make_run(tmp_path, lr=lr, choices=choices, summary={"error": evil}, status="failed")
    choices = {"model": "=cmd()", "optimizer": "adam", "activation": "relu"}
    make_run(tmp_path, lr=0.5, choices=choices)
    assert run_it(tmp_path) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "<script" not in text
    assert "\n# [a]" not in text
    tables = [line for line in text.splitlines() if line.startswith("|") and "lr" in line]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in tables} <= {7, 10, 11, 12}
    assert {row["model"] for row in rows_of(tmp_path)} == {"'=cmd()", "convnet"}


def test_links_to_folders_are_not_followed_and_said(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    make_run(elsewhere)
    here = tmp_path / "here"
    make_run(here)
    (here / "linked").symlink_to(elsewhere)
    (here / "summary.csv").symlink_to(elsewhere / "kept.txt")
    (elsewhere / "kept.txt").write_text("kept")
    assert run_it(here) == 0
    assert len(rows_of(here)) == 1
    assert "linked is a link" in (here / "summary.md").read_text()
    assert (elsewhere / "kept.txt").read_text() == "kept"
