"""Run (or resume) the reports' experiments and set what they report against what is measured."""

import argparse
import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cifar_lab import cli
from cifar_lab.analysis import experiment_list, reproduction
from cifar_lab.analysis.claims import is_other, speaks_of
from cifar_lab.analysis.reproduction import ReportExperiment, Row, is_asked
from cifar_lab.analysis.reproduction_document import (
    document,
    draw,
    full_table,
    guesses,
    other_code,
    sources,
)
from cifar_lab.config import groups
from cifar_lab.config.reports import read_report
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Unavailable, UsageError, did_you_mean

KEPT = ("config.yaml", "summary.json", "metrics.csv", "classification_report.json")
"""What of a run is kept by --keep: some 10 kB that outlast the machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.reproduce REPORT...`."""
    return cli.run(_reproduce, argv, trains=True)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser("reproduce", __doc__)
    parser.add_argument("report", nargs="*", help="a report's tag (S1), an experiment, or all")
    parser.add_argument(
        "--list", action="store_true", help="list the experiments and what is finished of them"
    )
    parser.add_argument(
        "--time",
        action="store_true",
        help="list them with their cost, timed by a few training steps where no run is finished; "
        "this loads the data",
    )
    parser.add_argument("--seeds", type=int, default=1, help="run seeds 0 to N-1 (default: 1)")
    parser.add_argument("--only", default=None, help="only claims whose id starts with this")
    parser.add_argument(
        "--protocol", choices=("report", "sound", "both"), default="report", help="default: report"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--jobs", default="auto", help="runs at a time (default: auto)")
    parser.add_argument(
        "--jobs-per-gpu",
        type=int,
        default=1,
        metavar="N",
        help="runs that share a GPU (default: 1)",
    )
    parser.add_argument(
        "--output-dir", type=cli.path, default=Path("outputs"), help="where the runs are"
    )
    parser.add_argument(
        "--config-dir", type=cli.path, help="a folder with experiments and reports of one's own"
    )
    parser.add_argument("--smoke", action="store_true", help="one epoch of each run, for CI")
    parser.add_argument("--dry-run", action="store_true", help="judge what is there, run nothing")
    parser.add_argument(
        "--accept-code", action="store_true", help="take results that other code made"
    )
    parser.add_argument("--keep", type=cli.path, help="copy the runs' small files to this folder")
    parser.add_argument(
        "--markdown", type=cli.path, help="write all of it to this file, with pictures"
    )
    return parser


def _reproduce(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.seeds < 1:
        raise UsageError(f"--seeds {arguments.seeds} is wrong: it must be at least 1")
    if not 1 <= arguments.jobs_per_gpu <= 64:
        given = arguments.jobs_per_gpu
        raise UsageError(f"--jobs-per-gpu {given} is wrong: it must be a number from 1 to 64")
    arguments.jobs = _jobs(arguments.jobs)
    if not arguments.report and not (arguments.list or arguments.time):
        raise UsageError("name a report (S0 to S4), an experiment, or all; --list shows them")
    for option in ("output_dir", "keep"):
        folder = getattr(arguments, option)
        if folder is not None:
            cli.check_output_folder(f"--{option.replace('_', '-')}", folder)
    if arguments.markdown is not None:
        cli.check_output_file("--markdown", arguments.markdown, creates_folder=True)
    names = _wanted(arguments.report or ["all"], arguments.config_dir)
    if arguments.list and not arguments.time:
        print(experiment_list.listing(names, arguments.output_dir, arguments.config_dir))
        return 0
    experiments = _experiments(names, arguments)
    if arguments.time:
        print(_costs(experiments, arguments.jobs))
        return 0
    claims = (claim for experiment in experiments for claim in experiment.reported.claims)
    if not any(is_asked(claim, arguments.only) for claim in claims):
        raise UsageError(f"--only {arguments.only} names no claim of these experiments")
    failure: Unavailable | RunFailed | None = None
    if not arguments.dry_run:
        try:
            _run(experiments, arguments)
        except (Unavailable, RunFailed) as error:  # the others' figures are shown all the same
            failure = error
    runs = reproduction.read_finished(experiments)
    rows = reproduction.rows(experiments, runs, arguments.only)
    shown = (full_table(rows), guesses(rows), sources(rows), other_code(rows))
    print("\n\n".join(filter(None, shown)))
    if arguments.keep is not None:
        _keep(rows, arguments.keep)
    if arguments.markdown is not None:
        _write(rows, arguments.markdown, argv)
    if failure is not None:
        raise failure
    return 0


def _experiments(names: Sequence[str], arguments: argparse.Namespace) -> list[ReportExperiment]:
    """Compose the experiments that were asked for, under the protocol to judge and the sound one.

    With --protocol both, each counts once under either.
    """
    chosen = "report" if arguments.protocol == "both" else arguments.protocol
    experiments = []
    for name in names:
        sound = _configs(name, "sound", arguments)
        judged = sound if chosen == "sound" else _configs(name, chosen, arguments)
        report = read_report(judged[0].study.report or "", arguments.config_dir)
        experiments.append(ReportExperiment(name, judged, sound, report))
    if arguments.protocol == "both":
        experiments += [dataclasses.replace(one, configs=one.sound) for one in experiments]
    return experiments


def _configs(name: str, protocol: str, arguments: argparse.Namespace) -> tuple[RunConfig, ...]:
    """Compose an experiment's cells, with seed 0."""
    from cifar_lab.training.preflight import compose_checked

    line = [f"experiment={name}", f"protocol={protocol}", f"device={arguments.device}", "-m"]
    line += [f"output_dir={arguments.output_dir}"]
    if arguments.config_dir is not None:
        line += ["--config-dir", str(arguments.config_dir)]
    if arguments.smoke:
        line += ["training.epochs=1", "training.patience=null", "name=smoke/" + name]
    return tuple(run.config for run in compose_checked(line).runs)


def _wanted(asked: Sequence[str], config_dir: Path | None) -> list[str]:
    """Return the experiments that tags and names mean; "all" is every one with a report's tag."""
    experiments = groups.experiments(config_dir)
    known = {name: tag for name, tag in experiments.items() if name not in ("none", "smoke")}
    tags = {tag for tag in known.values() if tag}
    wanted: list[str] = []
    for word in asked:
        if word == "all":
            wanted += [name for name, tag in known.items() if tag]
        elif word in known:
            wanted.append(word)
        elif word in tags:
            wanted += [name for name, tag in known.items() if tag == word]
        else:
            names = sorted({*tags, *known, "all"})
            raise UsageError(
                f"there is no report or experiment {word}{did_you_mean(word, names)}; "
                f"there are {', '.join(names)}"
            )
    return list(dict.fromkeys(wanted))


def _run(experiments: Sequence[ReportExperiment], arguments: argparse.Namespace) -> None:
    """Run what the rows need, or resume it; what is finished stays."""
    from cifar_lab.config.launch import LaunchOptions
    from cifar_lab.sweeps.cell import sweep_cells
    from cifar_lab.sweeps.outcome import closing_table, raise_for
    from cifar_lab.sweeps.pool import run_all
    from cifar_lab.training.signals import Stop

    configs = [
        dataclasses.replace(config, seed=seed)
        for experiment in experiments
        for config in experiment.configs
        if arguments.only is None or _is_needed(config, experiments, arguments.only)
        for seed in range(arguments.seeds)
    ]
    with Stop().installed() as stop:
        outcomes = run_all(
            sweep_cells(configs, [_label(config) for config in configs]),
            LaunchOptions(
                jobs=arguments.jobs,
                jobs_per_gpu=arguments.jobs_per_gpu,
                accept_code=arguments.accept_code,
            ),
            stop=stop,
        )
        print(closing_table(outcomes) + "\n", flush=True)
        raise_for(outcomes, stop)


def _jobs(asked: str) -> int | Literal["auto"]:
    if asked == "auto":
        return "auto"
    if not asked.isdecimal() or int(asked) < 1:
        raise UsageError(f"--jobs {asked} is wrong: it must be auto or a number from 1")
    return int(asked)


def _is_needed(config: RunConfig, experiments: Sequence[ReportExperiment], only: str) -> bool:
    """Whether a claim that was asked for speaks of runs like this one, or compares with them."""
    return any(
        (speaks_of(claim, config) and one.name == config.name) or is_other(claim, one, config)
        for experiment in experiments
        for claim in experiment.reported.claims
        if is_asked(claim, only)
        for one in experiment.configs
        if speaks_of(claim, one)
    )


def _label(config: RunConfig) -> list[str]:
    """Return what the sweep's tables call a cell."""
    rate = config.optimizer.get("lr")
    return [
        f"experiment={config.name}",
        f"protocol={config.protocol}",
        *(f"{group}={config.choices.get(group)}" for group in ("optimizer", "activation")),
        f"optimizer.lr={rate}",
        f"dropout.conv={config.dropout.conv}",
        f"seed={config.seed}",
    ]


def _costs(experiments: Sequence[ReportExperiment], jobs: int | Literal["auto"]) -> str:
    """Return each experiment with its runs, its cost and the time it takes here.

    The time is that of all its runs from nothing, as many at a time as `jobs` means: as finished
    runs took, or by a probe where there is none.
    """
    from cifar_lab.analysis.description import multiply_adds
    from cifar_lab.runs.text import align, duration
    from cifar_lab.sweeps.cell import sweep_cells
    from cifar_lab.sweeps.launcher import fitting_jobs
    from cifar_lab.sweeps.timing import timed

    cells_of_each = [sweep_cells(experiment.configs) for experiment in experiments]
    every = [cell for cells in cells_of_each for cell in cells]
    pace, _ = timed(every, beside=every)
    rows = []
    for experiment, cells in zip(experiments, cells_of_each, strict=True):
        configs = [cell.config for cell in cells]
        config = configs[0]
        seconds = pace.time_left(cells, fitting_jobs(configs, jobs)[0], rerun=True) or 0.0
        per_image = multiply_adds(config, len(config.dataset.classes or range(10)))
        epochs = sum(one.training.epochs for one in configs)
        images = (config.dataset.train_size or 0) * epochs
        rows.append(
            (
                config.study.report or "-",
                experiment.name,
                str(len(cells)),
                f"{per_image / 1e6:,.1f} M",
                f"{3 * per_image * images / 1e12:,.0f} T",
                duration(seconds),
                config.study.title or "",
            )
        )
    header = ("report", "experiment", "runs", "MACs/image", "MACs", "time here", "what")
    return "\n".join(align([header, *rows]))


def _keep(rows: Sequence[Row], folder: Path) -> None:
    """Copy what the table quotes: config, summary, metrics and report of each run."""
    for run in reproduction.quoted(rows):
        target = folder / run.config.name / run.run.path.name
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (run.run.path / name).exists():
                shutil.copyfile(run.run.path / name, target / name)


def _write(rows: Sequence[Row], file: Path, argv: Sequence[str]) -> None:
    """Write the document, and its pictures into images/reproduction beside it."""
    from cifar_lab.runs.files import replacing, write_text

    folder = file.parent / "images" / "reproduction"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in draw(rows):
        pictures[name] = f"images/reproduction/{name}.png"
        with replacing(folder / f"{name}.png") as handle:
            figure.savefig(handle, dpi=80, format="png")
    command = shlex.join(["python", "-m", "cifar_lab.reproduce", *argv])
    write_text(file, document(rows, pictures, command))


if __name__ == "__main__":
    sys.exit(main())
