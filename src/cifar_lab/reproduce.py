"""Run (or resume) the reports' experiments and set what they report against what is measured."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from cifar_lab import cli
from cifar_lab.analysis import reproduction, verdicts
from cifar_lab.analysis.reproduction import ReportExperiment, Row
from cifar_lab.config import command_line
from cifar_lab.config.identity import address
from cifar_lab.config.reports import read_report
from cifar_lab.config.run_config import RunConfig
from cifar_lab.errors import RunFailed, Unavailable, UsageError, did_you_mean, listing


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.reproduce REPORT...`."""
    return cli.run(_reproduce, argv, trains=True)


def _reproduce(argv: list[str]) -> int:
    parser = cli.Parser("reproduce", __doc__)
    parser.add("report", "a report's tag (S1), an experiment, or all", nargs="*")
    parser.add_number("--seeds", "run seeds 0 to N-1 (default: 1)", 1, 1000, 1)
    parser.add("--only", "only claims whose id starts with this")
    protocols = ("report", "sound")
    parser.add("--protocol", "default: report", choices=protocols, default="report")
    parser.add("--device", "auto, cuda, cuda:N, mps or cpu", default="auto")
    parser.add("--jobs", "runs at a time (default: auto)", default="auto")
    parser.add_number("--jobs-per-gpu", "runs that share a GPU (default: 1)", 1, 64, 1)
    parser.add_output("--output-dir", "where the runs are (outputs)", is_folder=True)
    parser.set_defaults(output_dir=Path("outputs"))
    parser.add("--config-dir", "a folder with experiments and reports of your own", type=cli.path)
    parser.add_flag("--dry-run", "judge what is there, run nothing")
    parser.add_flag("--accept-code", "take results that other code made")
    arguments = parser.parse_args(argv)
    if arguments.jobs != "auto" and not (arguments.jobs.isdecimal() and int(arguments.jobs)):
        raise UsageError(f"--jobs {arguments.jobs} is wrong: it must be auto or a number from 1")
    names = _wanted(arguments.report, arguments.config_dir)
    chosen = {name: getattr(arguments, name) for name in ("protocol", "device", "config_dir")}
    experiments = [read_experiment(name, arguments.output_dir, **chosen) for name in names]
    asked = reproduction.rows(experiments, [], arguments.only)
    if not asked:
        asked_for = f"--only {arguments.only}" if arguments.only else ", ".join(names)
        raise UsageError(f"{asked_for}: no claim speaks of these runs (see `where` in the report)")
    failure: Unavailable | RunFailed | None = None
    if not arguments.dry_run:
        try:
            _run(asked, arguments)
        except (Unavailable, RunFailed) as error:  # the others' figures are shown all the same
            failure = error
    runs = [run for each in experiments for run in reproduction.read_finished(each.folder)]
    rows = reproduction.rows(experiments, runs, arguments.only)
    by_report = reproduction.by_report(rows).items()
    joint = {tag: verdicts.joint([row.verdict for row in of]) for tag, of in by_report}
    parts = [reproduction.table(rows).markdown()]
    parts += [f"{tag}: {text}" for tag, text in joint.items() if text]
    parts += [reproduction.guesses(rows), reproduction.sources(rows)]
    parts += [f"warning: {run.run.path}: {text}" for run in runs for text in run.problems]
    print("\n\n".join(filter(None, parts)))
    if failure is not None:
        raise failure
    return 0


def read_experiment(
    name: str,
    output_dir: Path,
    *,
    protocol: str = "report",
    device: str = "auto",
    config_dir: Path | None = None,
) -> ReportExperiment:
    """Compose an experiment's cells; where seeds are an axis of it, each with the first."""
    from cifar_lab.training.preflight import compose_checked

    line = [f"experiment={name}", f"protocol={protocol}", f"device={device}"]
    line += [f"output_dir={output_dir}", "-m"]
    line += [] if config_dir is None else ["--config-dir", str(config_dir)]
    first: dict[str, RunConfig] = {}
    for run in compose_checked(line).runs:
        first.setdefault(reproduction.recipe(run.config), run.config)
    configs = tuple(first.values())
    return ReportExperiment(name, configs, read_report(configs[0].study.report or "", config_dir))


def _wanted(asked: Sequence[str], config_dir: Path | None) -> list[str]:
    """Return the experiments that tags and names mean; "all" is every one with a report's tag."""
    experiments = command_line.experiments(config_dir)
    known = {name: tag for name, tag in experiments.items() if name not in ("none", "smoke")}
    meant = {name: [name] for name in known}
    for name, tag in known.items():
        for word in (tag, "all") if tag else ():
            meant.setdefault(word, []).append(name)
    every = listing(sorted(meant))
    if not asked:
        raise UsageError(f"name a report (S0 to S4), an experiment, or all; there are {every}")
    for word in asked:
        if word not in meant:
            hint = did_you_mean(word, meant)
            raise UsageError(f"there is no report or experiment {word}{hint}; there are {every}")
    return list(dict.fromkeys(name for word in asked for name in meant[word]))


def _run(asked: Sequence[Row], arguments: argparse.Namespace) -> None:
    """Run what the rows need, or resume it; what is finished stays."""
    from cifar_lab.config.launch import LaunchOptions
    from cifar_lab.sweeps.cell import sweep_cells
    from cifar_lab.sweeps.local import LocalProcesses
    from cifar_lab.sweeps.outcome import closing_table, raise_for
    from cifar_lab.sweeps.pool import run_all
    from cifar_lab.training.loop import Stop

    needed = {reproduction.recipe(config): config for row in asked for config in row.configs}
    configs = [
        dataclasses.replace(config, seed=seed)
        for config in needed.values()
        for seed in range(arguments.seeds)
    ]
    lines = [[f"experiment={config.name}", address(config).name] for config in configs]
    asked_for = {name: getattr(arguments, name) for name in ("jobs_per_gpu", "accept_code")}
    jobs = arguments.jobs if arguments.jobs == "auto" else int(arguments.jobs)
    launcher = LocalProcesses(LaunchOptions(jobs=jobs, **asked_for))
    with Stop().installed() as stop:
        outcomes = run_all(sweep_cells(configs, lines), launcher, stop=stop)
        print(closing_table(outcomes) + "\n", flush=True)
        raise_for(outcomes, stop)


if __name__ == "__main__":
    raise SystemExit(main())
