"""Evaluate past runs from their folders alone."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_lab import cli
from cifar_lab.analysis.load_runs import FoundRun
from cifar_lab.analysis.watching import names
from cifar_lab.figures import embedding, pca, samples, style, tsne
from cifar_lab.runs.files import write_text
from cifar_lab.runs.run_dir import RunDir, without_summaries


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.evaluate RUN_DIR...`."""
    parser = cli.Parser("evaluate", __doc__)
    parser.add("run_dir", "a run folder", nargs="+", type=cli.path)
    parser.add_flag("--ensemble", "score the mean of the runs' probabilities too")
    parser.add("--device", "auto, cuda, cuda:N, mps or cpu")
    parser.add_number("--probabilities", "print those of N random test images", 0, 10_000_000, 0)
    beside = "draw PCA and t-SNE of these runs' features side by side into FOLDER"
    parser.add_output("--side-by-side", beside, is_folder=True)
    mistakes = "write errors.html: N confident mistakes, and of several runs N likely label errors"
    parser.add_number("--errors", mistakes, 1, 1000)
    parser.add_flag("--verify", "exit code 1 if a folder has scores that are not those measured")
    arguments = parser.parse_args(without_summaries(argv))

    from cifar_lab.analysis import ensembles
    from cifar_lab.training.console import draw_figures
    from cifar_lab.training.scoring import check_scorable, evaluate

    runs = [RunDir(folder) for folder in arguments.run_dir]
    if arguments.ensemble or (arguments.errors and len(runs) > 1):
        ensembles.check_members(runs, same_test_set=True)
    beside = arguments.side_by_side
    for run in runs:
        check_scorable(run, arguments.device)
    contradicted = False
    for run in runs:
        summary, problems = run.read_summary(), _contradictions(run)
        with run.lock():
            fields = evaluate(run, device=arguments.device, features=beside is not None)
            problems += _contradictions(run)  # of what is measured now
            drawn, _ = draw_figures(run)
            drawn = sorted({*summary.figures, *drawn})
            run.write_summary(dataclasses.replace(summary, **fields, figures=drawn))
        contradicted |= bool(problems)
        for problem in dict.fromkeys(problems):
            print(f"warning: {run.path}: {problem}", file=sys.stderr)
        calibration = fields["expected_calibration_error"]
        error = "" if calibration is None else f", expected calibration error {calibration:.2%}"
        print(
            f"{run.path}: test accuracy of the {fields['scored_weights']} weights: "
            f"{fields['test_accuracy']:.2%} (error {1 - fields['test_accuracy']:.2%}), "
            f"loss {fields['test_loss']:.4f}{error}, {fields['test_size']:,} images"
        )
        if arguments.probabilities > 0:
            print(samples.probability_text(run, arguments.probabilities))
    if arguments.ensemble:
        mean = ensembles.mean_predictions(runs)
        members = [run.read_predictions().accuracy for run in runs]
        print(
            f"ensemble of {len(runs)} runs: test accuracy {mean.accuracy:.2%} (error "
            f"{1 - mean.accuracy:.2%}), loss {mean.loss:.4f}, {len(mean):,} images; its members: "
            f"mean {sum(members) / len(members):.2%}, from {min(members):.2%} to {max(members):.2%}"
        )
    if arguments.errors:
        print(f"mistakes: {_write_errors(runs, arguments.errors)}")
    if beside is not None:
        _side_by_side(runs, beside)
    return int(contradicted and arguments.verify)


def _contradictions(run: RunDir) -> list[str]:
    """Return which scores in summary.json are not those of the run's other files."""
    found = FoundRun(run)
    found.check_scores()
    return found.problems


def _write_errors(runs: Sequence[RunDir], count: int) -> Path:
    """Write the page of mistakes into the run's folder, or that of all runs; return its path."""
    import torch

    from cifar_lab.analysis.ensembles import error_page
    from cifar_lab.training.build import load_splits

    splits = load_splits(runs[0].own_config(), "cpu")
    images = splits.official_test.images
    path = runs[0].errors_page
    if len(runs) > 1:
        path = Path(os.path.commonpath([run.path.resolve().parent for run in runs])) / path.name
    page = error_page(
        runs, lambda index: images[torch.tensor([index])][0].numpy(), count, splits.test_files
    )
    write_text(path, page)
    return path


def _side_by_side(runs: Sequence[RunDir], folder: Path) -> None:
    """Draw the features of several runs beside each other, to compare trained and untrained."""
    named = names([run.path.resolve() for run in runs])  # what differs between them
    titles = []
    for run in runs:
        summary = run.read_summary()
        epochs = summary.best_epoch if summary.scored_weights == "best" else summary.epochs
        titles.append(f"{named[run.path.resolve()]}, epoch {epochs}")
    for name, title, method in (("pca", "PCA", pca.project), ("tsne", "t-SNE", tsne.project)):
        path = folder / f"{name}.png"
        style.save(embedding.panels(runs, titles, title, method), path)
        print(f"figure: {path}")


if __name__ == "__main__":
    raise SystemExit(main())
