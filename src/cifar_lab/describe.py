"""Describe a dataset (counts, balance, mean and std, images) and a model (layers, shapes, cost).

It takes what `train` takes, and trains nothing, but for the steps of `--lr-range`.
"""

import argparse
import importlib.util
import json
from pathlib import Path

from cifar_lab import cli
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import json_schema
from cifar_lab.errors import UsageError, missing_extra, shorten


@cli.command
def main(argv: list[str]) -> int:
    """Run `python -m cifar_lab.describe [GROUP=OPTION] [key=value]`."""
    parser = cli.Parser("describe", __doc__, takes_overrides=True)
    parser.add_output("--figure", "where to draw (a .png)", ".png", creates_folder=True)
    parser.add_flag("--lr-range", "train 300 steps with a growing rate, and suggest a rate")
    parser.add("--images", "indices of the training images to draw: 5,27", metavar="I,J,...")
    parser.add_flag("--check-data", "also find near duplicates, and dark, blurred and odd images")
    some = "list all settings, or those of a group or key such as training or optimizer.lr"
    parser.add("--settings", some, nargs="?", const="", metavar="GROUP")
    parser.add_flag("--schema", "print the JSON schema of a run's config.yaml, for editors")
    arguments, rest = parser.parse_known_args(argv)
    if rest and (arguments.schema or arguments.settings is not None):
        option = "--schema" if arguments.schema else "--settings"
        raise UsageError(f"{option} takes nothing else, but there is {shorten(rest[0])}")
    if arguments.schema:
        print(json.dumps(json_schema(RunConfig), indent=2))
        return 0
    if arguments.settings is not None:
        from cifar_lab.config.reference import as_text, find_settings

        print(as_text(find_settings(arguments.settings)))
        return 0
    if arguments.lr_range and arguments.images:
        raise UsageError("--lr-range draws the loss, and --images draws images: leave out one")
    if arguments.check_data and importlib.util.find_spec("cleanvision") is None:
        raise missing_extra("--check-data", "cleanvision", "check")

    from cifar_lab.training.preflight import compose_checked

    request = compose_checked(rest)
    if request.shown is not None:
        print(request.shown)
        return 0
    config = request.runs[0].config
    if len(request.runs) > 1:
        print(f"the first of {len(request.runs)} runs: {' '.join(request.runs[0].overrides)}\n")
    if arguments.lr_range:
        return _lr_range(config, arguments.figure)
    return _describe_run(config, arguments)


def _describe_run(config: RunConfig, arguments: argparse.Namespace) -> int:
    """Print what the model and the dataset of a run are; draw some of its images."""
    from cifar_lab.analysis import description
    from cifar_lab.datasets.store import data_root
    from cifar_lab.figures import style
    from cifar_lab.figures.image_grid import draw_images
    from cifar_lab.training.sanity_checks import check_config
    from cifar_lab.training.splits import load_arrays, make_splits

    path, size = arguments.figure or _default_path(config), config.dataset.training_images
    if size is not None:  # what is wrong is said before anything is read
        description.choose_images(arguments.images, size, config.seed)
    classes = config.dataset.classes
    if classes is not None:  # before the data, which may be unavailable
        print(description.model_text(config, len(classes)), end="\n\n")
    arrays = load_arrays(config.dataset, data_root())
    chosen = description.choose_images(arguments.images, len(arrays.train_labels), config.seed)
    splits = make_splits(arrays, config.dataset, config.split, "cpu")
    if classes is None:
        print(description.model_text(config, len(splits.class_names)), end="\n\n")
    print(description.dataset_text(config, arrays, splits))
    if splits.storage is not None:
        print(splits.storage)
    for warning in (*splits.warnings, *check_config(config, splits)):
        print(f"warning: {warning}")
    if arguments.check_data:
        print("\n".join(description.check_images(config.dataset, arrays)))
    names = config.dataset.display_names or splits.class_names
    titles = [f"{names[int(arrays.train_labels[index])]}\n{index}" for index in chosen]
    style.save(draw_images([arrays.train_images[index] for index in chosen], titles), path)
    print(f"images {', '.join(map(str, chosen))} of the training set: {path}")
    return 0


def _lr_range(config: RunConfig, figure: Path | None) -> int:
    """Run the learning-rate range test; draw it, and print the rates that it suggests."""
    from cifar_lab.analysis.description import range_test
    from cifar_lab.figures import lr_range, style

    path = figure or _default_path(config, "_lr_range")
    test = range_test(config)
    print("\n".join(test.lines()))
    style.save(lr_range.draw(config, test), path)
    print(f"figure: {path}")
    return 0


def _default_path(config: RunConfig, ending: str = "") -> Path:
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in config.dataset.name)[:80]
    path = Path(config.output_dir) / "describe" / f"{name}{ending}.png"
    cli.check_output("output_dir", path, creates_folder=True)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
