"""What a study's reports claim beside what its finished runs measured."""

from dataclasses import dataclass
from typing import Any

from cifar_lab import config as config_module
from cifar_lab import measures
from cifar_lab.cells import Cell, FoundRun, Study, show_value
from cifar_lab.config import ClaimConfig
from cifar_lab.errors import RequestError
from cifar_lab.significance import Interval, interval
from cifar_lab.verdicts import judge


@dataclass(frozen=True)
class Measured:
    """A claim, the cell that it speaks of (none: no run is there), its measurement, a verdict."""

    report: str
    claim: ClaimConfig
    cell: Cell | None
    interval: Interval | None
    verdict: str


def measured(study: Study) -> list[Measured]:
    """Return every claim of the runs below the folder beside the cell that it speaks of."""
    claims: dict[tuple[str, ...], tuple[str, ClaimConfig]] = {}
    holders: dict[tuple[str, ...], list[tuple[Cell, FoundRun]]] = {}
    for cell in study.cells:
        for run in cell.runs:
            for claim in run.config.study.claims:
                key = _key(run, claim)
                claims.setdefault(key, (run.config.study.report or run.config.name, claim))
                if speaks_of(claim, run):
                    holders.setdefault(key, []).append((cell, run))
    rows = []
    for key, (report, claim) in claims.items():
        try:
            measures.check(claim.metric)
        except RequestError as error:
            rows.append(Measured(report, claim, None, None, str(error)))
            continue
        by_cell: dict[int, tuple[Cell, list[FoundRun]]] = {}
        for cell, run in holders.get(key, []):
            by_cell.setdefault(id(cell), (cell, []))[1].append(run)
        if not by_cell:
            rows.append(Measured(report, claim, None, None, "not measured yet"))
        for cell, runs in by_cell.values():
            found = (run.measure(claim.metric) for run in runs if run.finished)
            values = [value for value in found if value is not None]
            verdict = str(judge(claim, runs[0].config, values))
            rows.append(Measured(report, claim, cell, interval(values), verdict))
    return rows


def speaks_of(claim: ClaimConfig, run: FoundRun) -> bool:
    """Whether a run has the settings of the claim's `where`."""
    config = run.config
    flat = config_module.flatten(config_module.to_plain(config))
    return all(key in flat and _same(flat[key], value) for key, value in claim.where.items())


def _same(a: Any, b: Any) -> bool:
    return show_value(a) == show_value(b) or a == b


def _key(run: FoundRun, claim: ClaimConfig) -> tuple[str, ...]:
    study = run.config.study
    where = tuple(f"{key}={show_value(value)}" for key, value in sorted(claim.where.items()))
    return (study.report or "", run.config.name, claim.id or "", claim.metric, claim.source, *where)
