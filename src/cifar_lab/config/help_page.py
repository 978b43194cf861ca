"""The help page of `train`: read from conf/, without Hydra and without composing anything."""

import argparse
import functools
import textwrap
from pathlib import Path

from cifar_lab.config.command_line import make_parser
from cifar_lab.config.groups import default_options, default_settings, find_options
from cifar_lab.config.launch import LaunchOptions
from cifar_lab.config.run_config import RunConfig
from cifar_lab.config.schema import as_typed, find_field

_WIDTH = 100

_USAGE = "python -m cifar_lab.train [RUN_DIR | FILE.yaml] [GROUP=OPTION ...] [KEY=VALUE ...] [-m]"

_INTRODUCTION = """\
Trains and evaluates one run, or with -m (or an experiment that is a grid) many. A run is one option
of each group and single values that are changed. RUN_DIR is the folder of a past run: it continues,
or with changes it is the start of another run. FILE.yaml is the config.yaml of somebody's run."""

_MOST_USED = (
    *("optimizer.lr", "training.epochs", "training.batch_size", "training.patience", "seed"),
    *("device", "output_dir", "name", "plan", "rerun"),
)

_EXAMPLES = """
Examples:
  one small run, without a download
    python -m cifar_lab.train dataset=digits
  choices of your own
    python -m cifar_lab.train model=convnet_deep optimizer=sgd optimizer.lr=0.01 training.epochs=30
  a grid of six runs
    python -m cifar_lab.train optimizer=adam,sgd seed=0,1,2 -m"""


def help_page(config_dir: str | None = None) -> str:
    """Return the page: flags, groups with their options, the settings used most and examples."""
    options = find_options(config_dir)
    groups = dict.fromkeys(["dataset", *default_options(), *sorted(options)])
    parser = make_parser()
    shell = "print shell completion, to be evaluated (also zsh, fish)"
    parser.add_argument("-sc", metavar="install=bash", help=shell)
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
    parser.add_argument("-h", "--help", action="store_true", help="print this page and exit")
    parser.usage, parser.description = _USAGE, _INTRODUCTION
    form = argparse.RawDescriptionHelpFormatter
    parser.formatter_class = functools.partial(form, width=_WIDTH, max_help_position=30)
    lines = [
        "Groups and their options (* is the default):",
        *(_options(group, options[group]) for group in groups if group in options),
        "\nThe settings used most, with their defaults (--cfg job prints all settings):",
        *map(_setting, _MOST_USED),
        _EXAMPLES,
    ]
    parser.epilog = "\n".join(lines)
    return parser.format_help().rstrip()


def _options(group: str, options: dict[str, Path]) -> str:
    # Each dataset names the augmentation that suits it.
    default = None if group == "augmentation" else default_options().get(group)
    words = ", ".join(f"{option}*" if option == default else option for option in options)
    if group == "augmentation":
        words += " (the default depends on the dataset)"
    start = f"  {group:14} "
    return textwrap.fill(words, _WIDTH, initial_indent=start, subsequent_indent=" " * len(start))


def _setting(key: str) -> str:
    field = find_field(RunConfig, key) or find_field(LaunchOptions, key)
    # the optimizer's arguments are no fields
    meaning = field[0].metadata["description"] if field else "the learning rate"
    return f"  {f'{key}={as_typed(default_settings()[key])}':26}{meaning}"
