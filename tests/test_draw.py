"""Figures of finished runs, drawn again: by `draw`, and by the line that trained the run."""

import logging
from pathlib import Path

import matplotlib
from fixtures import Capture, CaptureLog
from tiny_runs import RICH, TINY

from cifar_lab import draw, train
from cifar_lab.figures import style
from cifar_lab.runs.run_dir import RunDir

CURVES = "figures.curves={_target_:cifar_lab.figures.curves.draw}"


def test_other_figures_in_another_format_size_and_language(
    finished: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    labels = tmp_path / "labels.yaml"
    labels.write_text("epoch: Epoche\naccuracy: Genauigkeit\nacc: wrong\n")
    line = [str(finished.path), CURVES, "--format", "svg", "--labels", str(labels)]
    assert draw.main([*line, "--width", "5", "--font-size", "8"]) == 0
    path = finished.figures / "curves.svg"
    assert str(path) in capsys.readouterr().out
    text = path.read_text()
    assert 'width="360pt"' in text
    assert "<!-- Genauigkeit -->" in text
    assert "<!-- Epoche -->" in text
    assert finished.read_config().figures["curves"] is not None
    assert finished.read_summary().figures == ["pca"], "those that are PNG"
    assert draw.main([str(finished.path.parent)]) == 0
    assert RunDir(finished.path).read_summary().figures == ["curves", "pca"]


def test_a_run_without_figures_says_what_can_be_drawn(finished: RunDir, capsys: Capture) -> None:
    assert draw.main([str(finished.path), "figures=none"]) == 0
    assert "names no figures: figures=standard draws" in capsys.readouterr().out


def test_in_a_narrow_figure_panels_stand_below_each_other() -> None:
    figure = style.new_figure(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    style.Look(width=3.3).apply(figure)
    assert left.get_position().y0 > right.get_position().y1
    assert figure.get_size_inches()[1] > 5


def test_features_that_a_figure_needs_are_measured_again(finished: RunDir) -> None:
    finished.features_file.unlink()
    assert draw.main([str(finished.path), "figures.pca.sample_size=20"]) == 0
    assert finished.features_file.exists()


def test_the_same_train_line_draws_what_changed_and_names_what_cannot_change(
    finished: RunDir, tmp_path: Path, capsys: Capture
) -> None:
    run, weights = finished, finished.best.read_bytes()
    line = [*TINY, *RICH, f"output_dir={tmp_path / 'outputs'}"]
    assert train.main([*line, CURVES, "training.keep_last=false", "jobs=2"]) == 0
    printed = capsys.readouterr().out
    assert "is finished, and training.keep_last=false cannot be applied to it" in printed
    assert f"drawn again: {run.figures} (curves, pca)" in printed
    assert (run.figures / "curves.png").exists()
    assert run.last.exists()
    assert run.best.read_bytes() == weights
    assert train.main(line) == 0
    assert "cannot be applied" not in capsys.readouterr().out
    assert train.main([*line, "tracker=tensorboard"]) == 0
    assert "`cifar_lab.track` sends it as it is" in capsys.readouterr().out
    assert RunDir(run.path).read_config().training.keep_last


def test_a_matplotlibrc_with_tex_and_letters_that_no_font_has(
    tmp_path: Path, caplog: CaptureLog
) -> None:
    with matplotlib.rc_context({"text.usetex": True}), caplog.at_level(logging.WARNING):
        figure = style.new_figure(3.0, 2.0)
        axes = figure.subplots()
        style.dress(axes, "50 % of \ue123_#", "猫", "y")
        style.save(figure, tmp_path / "x.png")
        style.save(figure, tmp_path / "x.pdf")
    assert b"/Type3" not in (tmp_path / "x.pdf").read_bytes()
    (record,) = [r.message for r in caplog.records if "x.png" in r.message]
    assert record.startswith("warning: no font here has characters of x.png: ")
