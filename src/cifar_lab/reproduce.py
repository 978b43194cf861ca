"""Run (or resume) the reports' experiments and set what they report against what is measured."""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cifar_lab import cli
from cifar_lab.config import ClaimConfig, RunConfig, flatten, to_plain
from cifar_lab.errors import RequestError, did_you_mean
from cifar_lab.planning import SweepCell
from cifar_lab.run_dir import RunDir
from cifar_lab.verdicts import Verdict, judge

KEPT = ("config.yaml", "summary.json", "metrics.csv", "classification_report.json")
"""What of a run is kept by --keep: some 10 kB that outlast the machine."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim beside the runs that measure it, under one protocol."""

    experiment: str
    claim: ClaimConfig
    config: RunConfig
    runs: tuple[RunDir, ...]
    values: tuple[float, ...]

    @property
    def verdict(self) -> Verdict:
        """What the rule says."""
        return judge(self.claim, self.config, self.values)


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
    parser.add_argument("--markdown", default=None, help="write the table to this file too")
    return parser


def _reproduce(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.seeds < 1:
        raise RequestError(f"--seeds {arguments.seeds} is wrong: it must be at least 1")
    if not arguments.report and not arguments.list:
        raise RequestError("name a report (S0 to S4), an experiment, or all; --list shows them")
    studies = _studies(arguments)
    if arguments.list:
        print(_listing(studies))
        return 0
    cells = [cell for _, found in studies for cell in found]
    if not cells:
        raise RequestError(f"--only {arguments.only} names no claim of these experiments")
    if not arguments.dry_run:
        _run(cells, arguments)
    rows = list(_rows(studies, arguments.only))
    text = _table(rows)
    print(text)
    if arguments.markdown is not None:
        from cifar_lab.run_dir import write_text

        write_text(Path(arguments.markdown), text + "\n")
    if arguments.keep is not None:
        _keep(rows, Path(arguments.keep))
    return 0


def _studies(arguments: argparse.Namespace) -> list[tuple[str, list[SweepCell]]]:
    """Compose the experiments that were asked for, each with its cells."""
    from cifar_lab import door
    from cifar_lab.planning import sweep_cells

    known = {
        name: door.compose([f"experiment={name}", "--cfg", "job"]).cells[0].config.study.report
        for name in door.options("experiment")
        if name not in ("none", "smoke")
    }
    wanted = _wanted(arguments.report or ["all"], known)
    protocols = ("report", "sound") if arguments.protocol == "both" else (arguments.protocol,)
    seeds = ",".join(str(seed) for seed in range(arguments.seeds))
    studies = []
    for name in wanted:
        found: list[SweepCell] = []
        for protocol in protocols:
            line = [f"experiment={name}", f"protocol={protocol}", f"device={arguments.device}"]
            line += [f"output_dir={arguments.output_dir}", f"seed={seeds}", "-m"]
            if arguments.smoke:
                line += ["training.epochs=1", "training.patience=null", "name=smoke/" + name]
            request = door.compose(line)
            found += sweep_cells(
                [cell.config for cell in request.cells], [cell.overrides for cell in request.cells]
            )
        if arguments.only is not None:
            claims = [c for c in found[0].config.study.claims if _is_asked(c, arguments.only)]
            found = [cell for cell in found if any(_fits(claim, cell.config) for claim in claims)]
        studies.append((name, found))
    return studies


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


def _run(cells: Sequence[SweepCell], arguments: argparse.Namespace) -> None:
    from cifar_lab import sweep
    from cifar_lab.execute import Stop

    jobs: Any = arguments.jobs
    if jobs != "auto":
        try:
            jobs = int(jobs)
        except ValueError:
            raise RequestError(f"--jobs {jobs} is wrong: it must be auto or a number") from None
    with Stop().installed() as stop:
        outcomes = sweep.run_all(
            cells,
            stop=stop,
            jobs=jobs,
            accept_code=arguments.accept_code,
            command=["reproduce", *arguments.report],
        )
        print(sweep.closing_table(outcomes), flush=True)
        sweep.raise_for(outcomes, stop)


def _rows(studies: Sequence[tuple[str, list[SweepCell]]], only: str | None) -> Iterator[Row]:
    from cifar_lab import measures

    for name, cells in studies:
        for claim in cells[0].config.study.claims if cells else ():
            if not _is_asked(claim, only):
                continue
            fitting = [cell for cell in cells if _fits(claim, cell.config)]
            for protocol in dict.fromkeys(cell.config.protocol for cell in fitting):
                chosen = [cell for cell in fitting if cell.config.protocol == protocol]
                runs, values = [], []
                for cell in chosen:
                    if not cell.is_finished():
                        continue
                    run = cell.run
                    value = measures.measure(
                        claim.metric, run, run.read_summary(), run.read_metrics()
                    )
                    if value is not None:
                        runs.append(run)
                        values.append(value)
                yield Row(name, claim, chosen[0].config, tuple(runs), tuple(values))


def _is_asked(claim: ClaimConfig, only: str | None) -> bool:
    return only is None or (claim.id or claim.metric).startswith(only)


def _fits(claim: ClaimConfig, config: RunConfig) -> bool:
    """Whether a run has the settings that a claim speaks of."""
    flat = flatten(to_plain(config))
    return all(flat.get(key) == value for key, value in claim.where.items())


def _table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, the runs of each below it."""
    from cifar_lab.measures import show
    from cifar_lab.significance import interval

    lines = [
        "| figure | reported | measured (95 % interval) | seeds | protocol | verdict | source |",
        "|---|---|---|---|---|---|---|",
    ]
    guessed: dict[str, list[str]] = {}
    folders: dict[str, None] = {}
    for row in rows:
        found = interval(row.values)
        mean, spread = (found.mean, found.half_width) if found else (None, None)
        measured = show(row.claim.metric, mean, spread)
        cells = (
            row.claim.id or row.claim.metric,
            show(row.claim.metric, row.claim.value),
            measured,
            str(len(row.values)),
            row.config.protocol,
            str(row.verdict),
            row.claim.source,
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        guessed[row.experiment] = row.config.study.guessed
        folders.update(dict.fromkeys(f"{run.path}" for run in row.runs))
    for name, guesses in guessed.items():
        if guesses:
            lines += ["", f"Guessed in {name}: {'; '.join(guesses)}."]
    if folders:
        lines += ["", "Measured in:", "", *(f"- `{folder}`" for folder in folders)]
    return "\n".join(lines)


def _listing(studies: Sequence[tuple[str, list[SweepCell]]]) -> str:
    """Return each experiment with its runs, its cost and the time it takes here, by a probe."""
    from cifar_lab import components
    from cifar_lab.describe import trace
    from cifar_lab.planning import Pace, duration, probe, table

    rows = []
    for name, cells in studies:
        config = cells[0].config
        pace = Pace()
        for cell in cells:
            pace.learn(cell)
        if pace.seconds(config) is None:
            pace.note(config, *probe(config))
        seconds = sum(pace.seconds(cell.config) or 0.0 for cell in cells)
        model = components.build_model(config, len(config.dataset.classes or range(10)))
        per_image = sum(layer.multiply_adds for layer in trace(model, config.dataset.image_shape))
        images = (config.dataset.train_size or 0) * sum(c.config.training.epochs for c in cells)
        rows.append(
            (
                config.study.report or "-",
                name,
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
    for row in rows:
        for run in row.runs:
            target = folder / row.experiment / run.path.name
            target.mkdir(parents=True, exist_ok=True)
            for name in KEPT:
                if (run.path / name).exists():
                    shutil.copyfile(run.path / name, target / name)


if __name__ == "__main__":
    sys.exit(main())
