"""Classify pictures of any size with past runs: a table of the most probable classes.

Several runs, such as the seeds or folds of a setting, answer with the mean of their probabilities.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from cifar_lab import cli
from cifar_lab.config.command_line import is_run_folder
from cifar_lab.datasets import pictures as intake
from cifar_lab.errors import RunFailed, UsageError, shorten_path
from cifar_lab.figures.image_grid import write_labelled
from cifar_lab.runs.files import write_text
from cifar_lab.runs.metrics import Probabilities
from cifar_lab.runs.run_dir import RunDir
from cifar_lab.runs.text import Table, align, one_line


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.predict RUN_DIR... IMAGE...`."""
    parser = cli.Parser("predict", __doc__)
    parser.add("run_dir", "a run folder; of several, the mean probabilities", type=cli.path)
    what = "a picture, or a folder of them or of class folders; broken ones are left out"
    parser.add("image", what, nargs="+", type=cli.path)
    parser.add_number("--top", "classes shown (3)", 1, 1000, 3)
    fits = ("crop", "resize", "pad")
    parser.add("--fit", "how a picture gets the model's size; default: the run's way", choices=fits)
    parser.add("--device", "auto, cuda, cuda:N, mps or cpu")
    parser.add_output("--csv", "write every class's probability to a table", ".csv")
    parser.add_output("--save", "write the pictures with their classes", is_folder=True)
    arguments = parser.parse_args(argv)

    from PIL import Image

    from cifar_lab.analysis.ensembles import mean_probabilities

    paths = list(arguments.image)
    runs = [RunDir(arguments.run_dir)]
    while paths and is_run_folder(str(paths[0])):
        runs.append(RunDir(paths.pop(0)))
    if not paths:
        raise UsageError("there is no picture after the run folders; see --help")
    paths, broken = _readable(paths, runs[0], arguments.fit)
    if arguments.save and arguments.save.resolve() in {path.parent.resolve() for path in paths}:
        raise UsageError(f"--save {arguments.save} holds the pictures themselves: name another")
    rows = mean_probabilities(runs, paths, device=arguments.device, fit=arguments.fit)
    names = runs[0].class_names()
    print(table(paths, rows, names, arguments.top))
    best = [(names[row.argmax()], float(row.max())) for row in rows]
    if arguments.csv is not None:
        cells = [[str(p), *b, *row] for p, b, row in zip(paths, best, rows.tolist(), strict=True)]
        write_text(arguments.csv, Table(("picture", "class", "probability", *names), cells).csv())
        print(f"table: {arguments.csv}")
    if arguments.save is not None:
        texts = [f"{name} {probability:.1%}" for name, probability in best]
        Image.MAX_IMAGE_PIXELS = None  # each was decoded above, within dataset.max_megapixels
        opened = (Image.open(path, formats=intake.FORMATS) for path in paths)
        pictures = (intake.eight_bits(picture)[0] for picture in opened)
        write_labelled(zip(paths, pictures, texts, strict=True), arguments.save)
        print(f"pictures: {arguments.save}")
    if broken:
        left_out = f"{len(broken):,} of {len(broken) + len(paths):,} pictures were left out"
        raise RunFailed(f"{left_out}: {broken[0]}")
    return 0


def _readable(
    given: Sequence[Path], run: RunDir, fit: intake.Fit | None
) -> tuple[list[Path], list[str]]:
    """Return the pictures that were given or are in a folder, and why others of it are not.

    A folder is read as in training: hidden files and what is no picture are left out, with a
    warning. Raises UsageError if no picture can be read.
    """
    dataset = run.read_config().dataset
    prepared = intake.Preparation(dataset.image_shape, fit or dataset.fit, dataset.max_megapixels)
    readable: list[Path] = []
    broken: list[str] = []
    for path in given:
        if not path.is_dir():  # named by the user: the classifier refuses it if it is broken
            readable.append(path)
            continue
        pictures, warnings = intake.find_pictures(path)
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)
        for picture, decoded in zip(pictures, intake.decode_files(pictures, prepared), strict=True):
            if isinstance(decoded, intake.Unreadable):
                broken.append(intake.cannot_be_read(picture, str(decoded)))
            else:
                readable.append(picture)
    if not readable:
        raise UsageError(broken[0])
    return readable, broken


def table(paths: Sequence[Path], rows: Probabilities, names: Sequence[str], top: int) -> str:
    """Return a line for each picture and each of its `top` most probable classes."""
    lines = [("picture", "class", "probability")]
    for path, row in zip(paths, rows, strict=True):
        for rank, label in enumerate((-row).argsort(kind="stable")[:top]):
            name = "" if rank else shorten_path(path, 1000)
            lines.append((name, one_line(names[int(label)]), f"{100 * row[label]:.2f} %"))
    return "\n".join(align(lines, right={2}))


if __name__ == "__main__":
    raise SystemExit(main())
