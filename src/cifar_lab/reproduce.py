"""Run (or resume) the reports' experiments and set what they report against what is measured."""

import argparse
import dataclasses
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cifar_lab import cli, reproduction
from cifar_lab.claims import is_other, speaks_of
from cifar_lab.config import ClaimConfig, RunConfig
from cifar_lab.errors import NotNow, RequestError, RunFailed, did_you_mean
from cifar_lab.reproduction import Row, Study, is_asked

KEPT = ("config.yaml", "summary.json", "metrics.csv", "classification_report.json")
"""What of a run is kept by --keep: some 10 kB that outlast the machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m cifar_lab.reproduce REPORT...`."""
    return cli.run(_reproduce, argv)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="python -m cifar_lab.reproduce", description=__doc__)
    parser.add_argument("report", nargs="*", help="a report's tag (S1), an experiment, or all")
    parser.add_argument("--list", action="store_true", help="show the experiments and their cost")
    parser.add_argument("--seeds", type=int, default=1, help="run seeds 0 to N-1 (default: 1)")
    parser.add_argument("--only", default=None, help="only claims whose id starts with this")
    parser.add_argument(
        "--protocol", choices=("report", "sound", "both"), default="report", help="default: report"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--jobs", default="auto", help="runs at a time (default: auto)")
    parser.add_argument("--output-dir", default="outputs", help="where the runs are")
    parser.add_argument("--smoke", action="store_true", help="one epoch of each run, for CI")
    parser.add_argument("--dry-run", action="store_true", help="judge what is there, run nothing")
    parser.add_argument(
        "--accept-code", action="store_true", help="take results that other code made"
    )
    parser.add_argument("--keep", default=None, help="copy the runs' small files to this folder")
    parser.add_argument(
        "--markdown", default=None, help="write all of it to this file, with pictures"
    )
    return parser


def _reproduce(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.seeds < 1:
        raise RequestError(f"--seeds {arguments.seeds} is wrong: it must be at least 1")
    arguments.jobs = _jobs(arguments.jobs)
    if not arguments.report and not arguments.list:
        raise RequestError("name a report (S0 to S4), an experiment, or all; --list shows them")
    studies = _studies(arguments)
    if arguments.list:
        print(_listing(studies, arguments.jobs))
        return 0
    if not any(is_asked(claim, arguments.only) for claim in _claims(studies)):
        raise RequestError(f"--only {arguments.only} names no claim of these experiments")
    failure: NotNow | RunFailed | None = None
    if not arguments.dry_run:
        try:
            _run(studies, arguments)
        except (NotNow, RunFailed) as error:  # the others' figures are shown all the same
            failure = error
    found = reproduction.rows(studies, reproduction.find(studies), arguments.only)
    print(reproduction.table(found))
    for text in (
        reproduction.guesses(found),
        reproduction.sources(found),
        reproduction.other_code(found),
    ):
        print(f"\n{text}" * bool(text), end="\n" * bool(text))
    if arguments.keep is not None:
        _keep(found, Path(arguments.keep))
    if arguments.markdown is not None:
        _write(found, Path(arguments.markdown), argv)
    if failure is not None:
        raise failure
    return 0


def _studies(arguments: argparse.Namespace) -> list[Study]:
    """Compose the experiments that were asked for, under the protocol to judge and the sound one.

    With --protocol both, each is a study of its own under either.
    """
    from cifar_lab import door

    known = {n: tag for n, tag in door.experiments().items() if n not in ("none", "smoke")}
    chosen = "report" if arguments.protocol == "both" else arguments.protocol
    studies = []
    for name in _wanted(arguments.report or ["all"], known):
        sound = _configs(name, "sound", arguments)
        judged = sound if chosen == "sound" else _configs(name, chosen, arguments)
        studies.append(Study(name, judged, sound))
    if arguments.protocol == "both":
        studies += [Study(study.name, study.sound, study.sound) for study in studies]
    return studies


def _configs(name: str, protocol: str, arguments: argparse.Namespace) -> tuple[RunConfig, ...]:
    """Compose an experiment's cells, with seed 0."""
    from cifar_lab import door

    line = [f"experiment={name}", f"protocol={protocol}", f"device={arguments.device}", "-m"]
    line += [f"output_dir={arguments.output_dir}"]
    if arguments.smoke:
        line += ["training.epochs=1", "training.patience=null", "name=smoke/" + name]
    return tuple(cell.config for cell in door.compose(line).cells)


def _claims(studies: Sequence[Study]) -> list[ClaimConfig]:
    return [claim for study in studies for claim in study.configs[0].study.claims]


def _wanted(asked: Sequence[str], known: dict[str, str | None]) -> list[str]:
    """Return the experiments that tags and names mean; "all" is every one with a report's tag."""
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
            raise RequestError(
                f"there is no report or experiment {word}{did_you_mean(word, names)}; "
                f"there are {', '.join(names)}"
            )
    return list(dict.fromkeys(wanted))


def _run(studies: Sequence[Study], arguments: argparse.Namespace) -> None:
    """Run what the rows need, or resume it; what is finished stays."""
    from cifar_lab import sweep
    from cifar_lab.execute import Stop
    from cifar_lab.planning import sweep_cells

    configs = [
        dataclasses.replace(config, seed=seed)
        for study in studies
        for config in study.configs
        if arguments.only is None or _is_needed(config, studies, arguments.only)
        for seed in range(arguments.seeds)
    ]
    with Stop().installed() as stop:
        outcomes = sweep.run_all(
            sweep_cells(configs, [_label(config) for config in configs]),
            stop=stop,
            jobs=arguments.jobs,
            accept_code=arguments.accept_code,
            command=["reproduce", *arguments.report],
        )
        print(sweep.closing_table(outcomes) + "\n", flush=True)
        sweep.raise_for(outcomes, stop)


def _jobs(asked: str) -> int | Literal["auto"]:
    if asked == "auto":
        return "auto"
    if not asked.isdecimal() or int(asked) < 1:
        raise RequestError(f"--jobs {asked} is wrong: it must be auto or a number from 1")
    return int(asked)


def _is_needed(config: RunConfig, studies: Sequence[Study], only: str) -> bool:
    """Whether a claim that was asked for speaks of runs like this one, or compares with them."""
    return any(
        (speaks_of(claim, config) and one.name == config.name) or is_other(claim, one, config)
        for study in studies
        for claim in study.configs[0].study.claims
        if is_asked(claim, only)
        for one in study.configs
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


def _listing(studies: Sequence[Study], jobs: int | Literal["auto"]) -> str:
    """Return each experiment with its runs, its cost and the time it takes here.

    The time is that of all its runs from nothing, as many at a time as `jobs` means: as finished
    runs took, or by a probe where there is none.
    """
    from cifar_lab import components
    from cifar_lab.describe import trace
    from cifar_lab.planning import duration, sweep_cells, table, timed
    from cifar_lab.sweep import fitting_jobs

    cells_of_studies = [sweep_cells(study.configs) for study in studies]
    every = [cell for cells in cells_of_studies for cell in cells]
    pace, _ = timed(every, beside=every)
    rows = []
    for study, cells in zip(studies, cells_of_studies, strict=True):
        configs = [cell.config for cell in cells]
        config = configs[0]
        seconds = pace.time_left(cells, fitting_jobs(configs, jobs)[0], rerun=True) or 0.0
        model = components.build_model(config, len(config.dataset.classes or range(10)))
        per_image = sum(layer.multiply_adds for layer in trace(model, config.dataset.image_shape))
        epochs = sum(one.training.epochs for one in configs)
        images = (config.dataset.train_size or 0) * epochs
        rows.append(
            (
                config.study.report or "-",
                study.name,
                str(len(cells)),
                f"{per_image / 1e6:,.1f} M",
                f"{3 * per_image * images / 1e12:,.0f} T",
                duration(seconds),
                config.study.title or "",
            )
        )
    header = ("report", "experiment", "runs", "MACs/image", "MACs", "time here", "what")
    return table(header, rows)


def _keep(rows: Sequence[Row], folder: Path) -> None:
    """Copy what the table quotes: config, summary, metrics and report of each run."""
    for run in (found.run for found in reproduction.quoted(rows)):
        target = folder / run.config.name / run.path.name
        target.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            if (run.path / name).exists():
                shutil.copyfile(run.path / name, target / name)


def _write(rows: Sequence[Row], file: Path, argv: Sequence[str]) -> None:
    """Write the document, and its pictures into images/reproduction beside it."""
    from cifar_lab.files import replacing, write_text

    folder = file.parent / "images" / "reproduction"
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in reproduction.draw(rows):
        pictures[name] = f"images/reproduction/{name}.png"
        with replacing(folder / f"{name}.png") as handle:
            figure.savefig(handle, dpi=80, format="png")
    command = shlex.join(["python", "-m", "cifar_lab.reproduce", *argv])
    write_text(file, reproduction.document(rows, pictures, command))


if __name__ == "__main__":
    sys.exit(main())
