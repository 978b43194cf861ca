"""Describe a dataset (counts, balance, mean and std, images) and a model (layers, shapes, cost).

It takes what `train` takes, and trains nothing, but for the steps of `--lr-range`.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cifar_lab import cli
from cifar_lab.errors import RunFailed, UsageError, shorten

if TYPE_CHECKING:
    import argparse

    from cifar_lab.config.run_config import RunConfig

LR_STEPS = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.describe [GROUP=OPTION] [key=value]`."""
    return cli.run(_describe, argv)


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "describe",
        "Describe a dataset (counts, balance, mean and std, images) and a model (layers, shapes,\n"
        "parameters, cost). Nothing is trained.",
        takes_overrides=True,
    )
    where = "where to draw (a .png)"
    parser.add_output("--figure", ".png", creates_folder=True, help=where)
    parser.add_argument(
        "--lr-range",
        action="store_true",
        help="train some hundred steps with a growing learning rate instead, draw the loss, and "
        "suggest a rate",
    )
    parser.add_argument(
        "--lr-steps", type=int, metavar="N", help=f"steps of --lr-range (default {LR_STEPS})"
    )
    parser.add_argument(
        "--images", metavar="I,J,...", help="indices of the training images to draw, such as 5,27"
    )
    augmented = "also draw these images as N epochs of training would augment them"
    parser.add_number("--augmented", 0, 20, default=0, help=augmented)
    parser.add_argument(
        "--check-data",
        action="store_true",
        help="also look for near duplicates, and for dark, blurred, odd and empty images",
    )
    parser.add_argument(
        "--settings",
        nargs="?",
        const="",
        metavar="GROUP",
        help="list all settings, or those of a group or key such as training or optimizer.lr",
    )
    parser.add_argument(
        "--schema",
        nargs="?",
        const="",
        metavar="DIR",
        help="print the JSON schema of a run's config.yaml, or write those of conf/ into DIR",
    )
    return parser


def _describe(argv: list[str]) -> int:
    arguments, rest = _parser().parse_known_args(argv)
    if arguments.schema is not None:
        return _print_schema(arguments.schema, rest)
    if arguments.settings is not None:
        return _list_settings(arguments.settings, rest)
    _check_lr_range(arguments)

    from cifar_lab.training.preflight import compose_checked

    request = compose_checked(rest)
    if request.shown is not None:
        print(request.shown)
        return 0
    config = request.runs[0].config
    if len(request.runs) > 1:
        print(f"the first of {len(request.runs)} runs: {' '.join(request.runs[0].overrides)}\n")
    if arguments.lr_range:
        return _lr_range(config, arguments.lr_steps or LR_STEPS, arguments.figure)
    return _describe_run(config, arguments)


def _describe_run(config: "RunConfig", arguments: "argparse.Namespace") -> int:
    """Print what the model and the dataset of a run are; draw some of its images."""
    from cifar_lab.analysis import description
    from cifar_lab.datasets.store import data_root
    from cifar_lab.training.sanity_checks import check_config
    from cifar_lab.training.splits import load_arrays, make_splits

    size = config.dataset.training_images
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
    warnings = check_config(config, splits)
    for warning in (*splits.warnings, *warnings):
        print(f"warning: {warning}")
    if arguments.check_data:
        from cifar_lab.analysis.data_check import check_images

        print("\n".join(check_images(config.dataset, arrays)))
    path = arguments.figure or _default_path(config)
    names = config.dataset.display_names or splits.class_names
    rows = arguments.augmented
    description.draw_chosen(
        arrays, names, chosen, path, description.augmented_images(config, splits, chosen, rows)
    )
    print(f"images {', '.join(map(str, chosen))} of the training set: {path}")
    if rows:
        print(f"below each image: the image as it is augmented in epochs 1 to {rows}")
    return 0


def _check_lr_range(arguments: "argparse.Namespace") -> None:
    """Refuse options that do not go with `--lr-range`, and steps too few or too many."""
    steps = arguments.lr_steps
    if steps is not None and not arguments.lr_range:
        raise UsageError(f"--lr-steps {steps} is for --lr-range, which is missing")
    if steps is not None and not 50 <= steps <= 10_000:
        raise UsageError(f"--lr-steps {steps} is wrong: it must be from 50 to 10,000")
    if arguments.lr_range and (arguments.augmented or arguments.images):
        raise UsageError(
            "--lr-range draws the loss, and --images and --augmented draw images: leave out one"
        )


def _lr_range(config: "RunConfig", steps: int, figure: Path | None) -> int:
    """Run the learning-rate range test; draw it, and print the rate that it suggests."""
    from cifar_lab.analysis.lr_range import LOWEST, check_settings, range_test
    from cifar_lab.figures import lr_range, style

    check_settings(config)
    path = figure or _default_path(config, "_lr_range")
    if figure is None:
        cli.check_output("output_dir", path, (".png",), creates_folder=True)
    test = range_test(config, steps)
    count = len(test.rates)
    if not count:
        raise RunFailed(
            f"the loss is not finite at a learning rate of {LOWEST:g}, in the first step"
        )
    ended = "" if count == steps else f" of {steps}; the loss diverged"
    print(f"learning rate from {test.rates[0]:.2g} to {test.rates[-1]:.2g} in {count} steps{ended}")
    lowest = int(test.smoothed.argmin())
    print(f"lowest smoothed loss: {test.smoothed[lowest]:.4f} at {test.rates[lowest]:.2g}")
    if test.suggestion is None:
        print("no suggestion: the smoothed loss never falls")
    else:
        print(f"suggestion: optimizer.lr={test.suggestion:.2g}, where it falls most steeply")
    picture = lr_range.draw(config, test.rates, test.losses, test.smoothed, test.suggestion)
    style.save(picture, path)
    print(f"figure: {path}")
    return 0


def _print_schema(folder: str, rest: Sequence[str]) -> int:
    import json

    from cifar_lab.config.json_schema import run_schema, write_file_schemas

    if rest or "=" in folder:
        word = shorten(rest[0] if rest else folder)
        raise UsageError(f"--schema takes a folder and nothing else, but there is {word}")
    if folder:
        write_file_schemas(Path(folder))
    else:
        print(json.dumps(run_schema(), indent=2))
    return 0


def _list_settings(wanted: str, rest: Sequence[str]) -> int:
    from cifar_lab.config.reference import as_text, find_sections

    if rest:
        raise UsageError(f"--settings takes nothing else, but there is {shorten(rest[0])}")
    print(as_text(find_sections(wanted)))
    return 0


def _default_path(config: "RunConfig", ending: str = "") -> Path:
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in config.dataset.name)[:80]
    return Path(config.output_dir) / "describe" / f"{name}{ending}.png"


if __name__ == "__main__":
    sys.exit(main())
