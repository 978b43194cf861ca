"""reproduce: claims beside runs that are there; what it keeps, and what it writes."""

import dataclasses
import functools
import json
import re
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from fixtures import Capture, Patch
from synthetic_runs import history

from cifar_lab import reproduce
from cifar_lab.config.reports import read_report
from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.summary import queued
from cifar_lab.training.preflight import compose_checked

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    """What scripts/update_reproduction defines."""
    return runpy.run_path(str(ROOT / "scripts" / "update_reproduction"))


@functools.cache
def first_cell(*words: str) -> RunConfig:
    return compose_checked(words).runs[0].config


def finished_run(
    folder: Path, *overrides: str, seed: int = 0, protocol: str = "report", **summary: Any
) -> RunDir:
    """A finished run of an experiment's first cell, with the results that are given."""
    first = first_cell(*overrides, f"protocol={protocol}", "device=cpu")
    config = dataclasses.replace(first, seed=seed, output_dir=str(folder))
    run = RunDir.create(config)
    run.rewrite_metrics(history(2, 0.8, validated=bool(config.split.validation)))
    done: dict[str, Any] = {"status": "finished", "epochs": 2, "seconds": 20.0, "commit": "abc123"}
    done |= {"device_name": "cpu (1 thread)"} | summary
    run.write_summary(dataclasses.replace(queued(config), **done))
    return run


def rows_of(text: str) -> dict[str, list[str]]:
    """The cells of each row of the printed table, by the figure's name."""
    lines = (line for line in text.splitlines() if line.startswith("| S"))
    found = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]
    return {cells[0]: cells[1:] for cells in found}


def run_reproduce(capsys: Capture, *words: str) -> str:
    assert reproduce.main([*words, "--dry-run", "--device", "cpu"]) == 0
    return capsys.readouterr().out


def s3(folder: Path, rate: float, accuracies: Sequence[float], **more: Any) -> list[RunDir]:
    line = ("experiment=s3_learning_rate", f"optimizer.lr={rate}")
    return [
        finished_run(folder, *line, seed=seed, test_accuracy_last=a, test_accuracy=a + 0.01, **more)
        for seed, a in enumerate(accuracies)
    ]


def test_a_figure_is_judged_by_every_seed_that_is_there(tmp_path: Path, capsys: Capture) -> None:
    runs = s3(tmp_path, 0.005, [0.50, 0.52, 0.54])
    s3(tmp_path, 0.0001, [0.30])
    s3(tmp_path, 0.005, [0.40], protocol="sound")
    text = run_reproduce(capsys, "S3", "--output-dir", str(tmp_path))
    rows = rows_of(text)
    reported, measured, seeds, protocol, verdict, source = rows["S3-0.005-test"]
    assert (reported, measured, seeds) == ("52.24 %", "52.00 ± 4.97 %", "3")
    assert protocol == "report"
    words = ["S3", "--output-dir", str(tmp_path), "--protocol", "sound"]
    sound = rows_of(run_reproduce(capsys, *words))["S3-0.005-test"]
    assert sound[1:4] == ["41.00 %", "1", "sound"], "it tests the chosen weights"
    assert verdict.startswith("not judged (fitted to the report")
    assert source.startswith("S3, comparison table")
    assert rows["S3-0.01-test"][1:5] == ["–", "0", "report", "not measured yet"]
    # the deviation of 0.005, 2 points, is pooled over the rates: t(0.95, 2) = 2.92
    assert rows["S3-0.0001-test-text"][4].startswith(
        "reproduced (off by 0.00 points, 90 % interval"
    )
    best = rows["S3-best-over-worst"]
    assert best[0] == "more than with optimizer.lr=0.0001"
    assert best[4].startswith("holds (difference +22.00 points, 95 % interval ±9.94 points")
    assert "Guessed in s3_learning_rate: architecture: reading R1" in text
    assert re.search(r"^S3: Of \d+ figures and findings that do not follow from each", text, re.M)
    assert all(str(run.path) in text for run in runs), "every figure can be traced to its runs"


def s0(folder: Path, epochs: int, accuracies: Sequence[float], *overrides: str) -> None:
    """S0's best cell after some epochs, one run for each accuracy; the classes are as accurate."""
    for seed, accuracy in enumerate(accuracies):
        line = ("experiment=s0_optimizer_activation", "optimizer=adam", "activation=leaky_relu")
        words = (*line, f"training.epochs={epochs}", *overrides)
        summary: dict[str, Any] = {"test_accuracy": accuracy, "scored_weights": "last"}
        names = tuple("abcdefghij")
        summary["per_class_accuracy"] = dict.fromkeys(names, accuracy)
        run = finished_run(folder, *words, seed=seed, **summary)
        scores = dict.fromkeys(("precision", "recall", "f1-score", "support"), accuracy)
        run.report_json.write_text(json.dumps(dict.fromkeys(names, scores)), encoding="utf-8")


def test_a_report_without_epochs_is_judged_by_runs_of_several_lengths(
    tmp_path: Path, script: dict[str, Any]
) -> None:
    """With lengths that are too short and too long, both ends are said and drawn."""
    folder = tmp_path / "runs"
    last = "evaluation.scored_weights=last"
    s0(folder, 20, [0.735, 0.740, 0.745])
    continued = [f"continue_from={next(folder.rglob('config.yaml')).parent}", last]
    s0(folder, 8, [0.650, 0.655, 0.660], last)
    s0(folder, 24, [0.752, 0.757, 0.762], *continued)
    s0(folder, 26, [0.760, 0.765, 0.770], *continued)
    s0(folder, 28, [0.850, 0.851, 0.852], *continued)
    s0(folder, 30, [0.760, 0.760], *continued)  # two seeds say nothing
    s0(folder, 32, [0.760, 0.760, 0.760], "optimizer.lr=0.1", last)  # another recipe
    rows = script["read_rows"](folder, ["s0_optimizer_activation"])
    script["write_pages"](rows, tmp_path)
    page = (tmp_path / "reproduction" / "S0.md").read_text(encoding="utf-8")
    by_name = rows_of(page)
    # 24 epochs are nearest; the seeds deviate alike at each length and count once: 2 to 3 df
    assert by_name["S0-accuracy"][1:3] == ["75.70 ± 1.24 %", "3"]
    fits = "fits from 20 to 26 of 8 to 28 epochs"
    assert by_name["S0-accuracy"][3] == "not judged"
    assert f"- **S0-accuracy**: fitted to the report: {fits}; S0, " in page
    assert by_name["S0-cars-precision"][1] == "75.70 ± 1.24 %"
    assert by_name["S0-cars-precision"][3] == "differs"
    assert "- **S0-cars-precision**: off by -20.30 points" in page
    assert f"Its accuracy of 76.00 % {fits}" in page
    assert "](../images/reproduction/s0_optimizer_activation_epochs.png)" in page
    (study,) = script["studies"](rows)
    (axes,) = script["epochs_figure"](study).axes
    (curve,) = axes.lines
    assert list(curve.get_xdata()) == [8, 20, 24, 26, 28]
    assert list(curve.get_ydata()) == pytest.approx([0.655, 0.74, 0.757, 0.765, 0.851])
    band = axes.collections[0].get_paths()[0].vertices
    assert set(band[:, 0]) == {8, 20, 24, 26, 28}
    (reported,) = axes.patches
    ends = (reported.get_y(), reported.get_y() + reported.get_height())
    assert ends == pytest.approx((0.755, 0.765))
    assert axes.get_xlim() == (8, 28)  # the reported band reaches across all lengths


def test_what_other_code_made_is_shown_and_said(tmp_path: Path, capsys: Capture) -> None:
    s3(tmp_path, 0.005, [0.50], results_version=99)
    words = ["S3", "--only", "S3-0.005-test", "--output-dir", str(tmp_path), "--device", "cpu"]
    assert reproduce.main(words) == 3
    said = capsys.readouterr()
    assert rows_of(said.out)["S3-0.005-test"][1] == "50.00 %"
    assert "Made by other code than today's: 1 of these 1 runs." in said.out
    assert "1 of 1 cells were left out: made by other code" in said.err
    assert reproduce.main([*words, "--dry-run"]) == 0
    assert "Made by other code" in capsys.readouterr().out


def test_what_is_kept_gives_the_same_table_and_a_page_with_its_picture(
    tmp_path: Path, capsys: Capture, script: dict[str, Any]
) -> None:
    (run, *_) = s3(tmp_path / "runs", 0.005, [0.50, 0.52, 0.54])
    s3(tmp_path / "runs", 0.005, [0.45], protocol="sound")
    s3(tmp_path / "runs", 0.0001, [0.30])
    (run.path / "best.pt").write_bytes(b"weights")
    kept = tmp_path / "kept"
    names = ["s3_learning_rate", "s4_small"]
    script["keep"](script["read_rows"](tmp_path / "runs", names), kept)
    words = ["s3_learning_rate", "--output-dir"]
    first, again = (run_reproduce(capsys, *words, str(tmp_path / f)) for f in ("runs", "kept"))
    assert rows_of(again) == rows_of(first)
    assert not list(kept.rglob("best.pt"))
    configs = [path.read_text() for path in kept.rglob("config.yaml")]
    assert len(configs) == 4
    assert all("output_dir: outputs\n" in text and str(tmp_path) not in text for text in configs)
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "reproduction.md").write_text("a\n<!-- standing -->\n\n<!-- end -->\nb\n")
    script["write_pages"](script["read_rows"](kept, names), docs)
    overview, page, other = (
        (docs / name).read_text()
        for name in ("reproduction.md", "reproduction/S3.md", "reproduction/S4.md")
    )
    assert "| [S3](reproduction/S3.md) |" in overview
    assert "4 runs, 1:20 of training" in overview
    assert rows_of(page)["S3-0.005-test"][:3] == rows_of(first)["S3-0.005-test"][:3]
    for expected in (
        "## s3_learning_rate: CIFAR-10, two gated convolutions",
        "Guessed in s3_learning_rate",
        r"In the report: Fig(a) to Fig\(c): loss and accuracy by epoch",
        "abc123",
    ):
        assert expected in page
    assert "Not measured yet" in other
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", page)
    assert (docs / "reproduction" / picture).stat().st_size > 1000


def test_the_curves_have_what_a_report_prints(tmp_path: Path, script: dict[str, Any]) -> None:
    s3(tmp_path, 0.005, [0.50, 0.52])
    s3(tmp_path, 0.0001, [0.30])
    s3(tmp_path, 0.0001, [0.50], protocol="sound")
    rows = script["read_rows"](tmp_path, ["s3_learning_rate"])
    (legend,) = script["curves_of"](rows).legends
    shown = [text.get_text() for text in legend.get_texts()]
    assert shown == ["lr 0.0001 (n = 1)", "lr 0.005 (n = 2)"]
    points = script["reported_points"](rows, rows[0].experiment)
    assert ("lr 0.005", "test_accuracy", 30.0, 0.5224) in points


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["S9"], "there is no report or experiment S9"),
        (["s3_learning_rat"], "did you mean s3_learning_rate"),
        (["S3", "--only", "S4"], "--only S4: no claim speaks of these runs (see `where` in"),
        (["S3", "--seeds", "0"], "--seeds 0 is wrong: it must be from 1 to 1,000"),
        (["S3", "--jobs", "many"], "--jobs many is wrong: it must be auto or a number"),
        (["S3", "--jobs", "0"], "--jobs 0 is wrong: it must be auto or a number from 1"),
        ([], "name a report (S0 to S4), an experiment, or all"),
    ],
)
def test_a_wrong_request_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: Capture
) -> None:
    assert reproduce.main([*words, "--output-dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_the_pages_are_what_the_kept_results_give(
    tmp_path: Path, monkeypatch: Patch, script: dict[str, Any]
) -> None:
    monkeypatch.chdir(ROOT)
    shutil.copy(ROOT / "docs" / "reproduction.md", tmp_path)
    script["write_pages"](script["read_rows"](Path("docs/results")), tmp_path)
    for written in tmp_path.rglob("*.md"):
        page = ROOT / "docs" / written.relative_to(tmp_path)
        assert written.read_text() == page.read_text(), page.name


PAPER = (
    "about: A paper.\n"
    "experiments: {mine: {guessed: [the seed], claims: [\n"
    "  {id: S9-1, metric: test_accuracy_last, value: 0.9, source: table 1,\n"
    "   where: {optimizer: adam}, margin: {size: 0.1, reason: made up}}]}}\n"
)


def own_report(folder: Path) -> list[str]:
    """An experiment and a report of one's own, and the words that reproduce them."""
    for group in ("experiment", "report"):
        (folder / group).mkdir()
    (folder / "experiment" / "mine.yaml").write_text(
        "# @package _global_\n"
        "defaults: [override /dataset: digits, override /dropout: none, override /figures: none]\n"
        "name: mine\n"
        "model: {widths: [4, 4], hidden: 8}\n"
        "training: {epochs: 1, batch_size: 256}\n"
        "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n"  # one configuration
        "study: {report: paper}\n"
    )
    (folder / "report" / "paper.yaml").write_text(PAPER)
    read_report.cache_clear()
    return ["paper", "--config-dir", str(folder), "--output-dir", str(folder / "runs")]


def test_reports_and_experiments_of_ones_own_are_found(tmp_path: Path, capsys: Capture) -> None:
    words = own_report(tmp_path)
    finished_run(tmp_path / "runs", "experiment=mine", *words[1:3], test_accuracy_last=0.95)
    text = run_reproduce(capsys, *words)
    assert text.count("S9-1") == 1
    row = rows_of(text)["S9-1"]
    assert row[:4] == ["90.00 %", "95.00 %", "1", "report"]
    assert row[4].startswith("inconclusive (runs that are single or all equal")
    assert "paper: Of" not in text  # one figure is no family
    assert "Guessed in mine: the seed." in text
    assert reproduce.main(["mine"]) == 2
    assert "there is no report or experiment mine" in capsys.readouterr().err
    for right, wrong, said in (
        ("_last", "_lest", "no metric test_accuracy_lest (did you mean test_accuracy_last?)"),
        ("0.9", "90", "S9-1: 90 is no test_accuracy_last: 0 to 1"),
        ("optimizer:", "optimiser:", "S9-1: `where` fits no configuration of mine"),
        ("value: 0.9", "above: {optimizer: sgd}", "must fit one configuration, and fits none"),
    ):
        read_report.cache_clear()
        (tmp_path / "report" / "paper.yaml").write_text(PAPER.replace(right, wrong))
        assert reproduce.main([*words, "--dry-run"]) == 2
        captured = capsys.readouterr()
        assert said in captured.err
        assert (captured.err.count("\n"), captured.out) == (1, "")


@pytest.mark.slow
def test_what_is_missing_is_trained_and_seeds_are_added(tmp_path: Path, capsys: Capture) -> None:
    words = [*own_report(tmp_path), "--device", "cpu"]
    assert reproduce.main(words) == 0
    assert rows_of(capsys.readouterr().out)["S9-1"][2] == "1"
    written = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("summary.json")}
    assert reproduce.main([*words, "--seeds", "2"]) == 0
    assert rows_of(capsys.readouterr().out)["S9-1"][2] == "2"
    assert all(path.stat().st_mtime_ns == at for path, at in written.items())
    assert len(list(tmp_path.rglob("summary.json"))) == 2
