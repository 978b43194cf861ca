"""Draw the figures of finished runs again: other ones, in another format, size or language."""

from pathlib import Path

import yaml

from cifar_lab import cli
from cifar_lab.errors import RunFailed, UsageError, first_line, shorten_path
from cifar_lab.figures.style import Look
from cifar_lab.runs.run_dir import RunDir, without_summaries
from cifar_lab.track import finished_runs


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.draw RUN_DIR... [figures=OPTION] [figures.NAME.KEY=VALUE]`."""
    parser = cli.Parser("draw", __doc__)
    parser.usage = "%(prog)s RUN_DIR... [figures=OPTION] [figures.NAME.KEY=VALUE ...] [options]"
    parser.add("words", "run folders, or folders of them; then settings of figures", nargs="+")
    parser.add("--format", "png", choices=("png", "pdf", "svg"), default="png")
    parser.add_number("--dpi", "dots per inch of a png (150)", 10, 2400, 150)
    parser.add_number("--width", "inches; a paper's column has 3.3", 1.0, 100.0)
    parser.add_number("--font-size", "points (9)", 2.0, 72.0)
    parser.add("--labels", "YAML: lines of `word: word to show`", type=cli.path, metavar="FILE")
    arguments = parser.parse_intermixed_args(without_summaries(argv))
    keys = r"figures[.=]|dataset\.display_names="
    takes = "figures=OPTION, figures.NAME.KEY=VALUE and dataset.display_names=[...]"
    folders, settings = cli.folders_and_settings(arguments.words, "draw", keys, takes)
    shown_as = {} if arguments.labels is None else _labels(arguments.labels)

    from cifar_lab.config.compose import compose
    from cifar_lab.training.scoring import draw_again

    runs, problems = finished_runs(folders)
    look = Look(arguments.format, arguments.dpi, arguments.width, arguments.font_size, shown_as)
    if settings:
        configs = [compose([str(run.path), *settings]).runs[0].config for run in runs]
        runs = [RunDir.create(config, run.path) for run, config in zip(runs, configs, strict=True)]
    for run in runs:
        drawn, failed = draw_again(run, None if look == Look() else look)
        problems += failed
        for name in drawn:
            print(run.figures / f"{name}.{look.format}")
        if not drawn and not failed:
            print(f"{run.path} names no figures: figures=standard draws the usual ones")
    if problems:
        raise RunFailed(problems[0])
    return 0


def _labels(path: Path) -> dict[str, str]:
    """Return the words of a file and what to show for them."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--labels {shorten_path(path)}: {first_line(error)}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--labels {shorten_path(path)} is wrong: its lines are `word: shown`")
    return {str(word): str(shown) for word, shown in content.items()}


if __name__ == "__main__":
    raise SystemExit(main())
