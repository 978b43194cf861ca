"""What a study's reports claim beside what its finished runs measured."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cifar_lab import config as config_module
from cifar_lab import measures
from cifar_lab.cells import Cell, FoundRun, Study, show_value
from cifar_lab.config import ClaimConfig, RunConfig
from cifar_lab.errors import RequestError
from cifar_lab.significance import Interval, interval
from cifar_lab.verdicts import judge


@dataclass(frozen=True)
class Measured:
    """A claim, the cell that it speaks of (none: no run is there), its measurement, a verdict.

    `off`: measured minus reported, or minus the runs that the claim compares with.
    """

    report: str
    claim: ClaimConfig
    cell: Cell | None
    interval: Interval | None
    verdict: str
    off: float | None = None


def measured(study: Study) -> list[Measured]:
    """Return every claim of the runs below the folder beside the cell that it speaks of."""
    claims: dict[tuple[str, ...], tuple[str, ClaimConfig]] = {}
    holders: dict[tuple[str, ...], list[tuple[Cell, FoundRun]]] = {}
    for cell in study.cells:
        for run in cell.runs:
            for claim in run.config.study.claims:
                key = _key(run, claim)
                claims.setdefault(key, (run.config.study.report or run.config.name, claim))
                if speaks_of(claim, run.config):
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
            values = _values(claim, runs)
            settings = runs[0].config
            others = _values(
                claim, [run for run in study.runs if is_other(claim, settings, run.config)]
            )
            verdict = str(judge(claim, settings, values, others))
            off = off_by(claim, values, others)
            rows.append(Measured(report, claim, cell, interval(values), verdict, off))
    return rows


def speaks_of(claim: ClaimConfig, config: RunConfig) -> bool:
    """Whether a run has the settings of the claim's `where`."""
    return _fits(config, claim.where)


def is_other(claim: ClaimConfig, config: RunConfig, other: RunConfig) -> bool:
    """Whether `other` is a run that the claim's `above` compares those like `config` with."""
    if not claim.above:
        return False
    same = {} if "name" in claim.above else {"name": config.name, **claim.where}
    return _fits(other, {"protocol": config.protocol, **same, **claim.above})


def off_by(claim: ClaimConfig, values: Sequence[float], others: Sequence[float]) -> float | None:
    """Return measured minus reported, or minus the others' mean; None where there is nothing."""
    found, compared = interval(values), interval(others)
    if found is None:
        return None
    if claim.above:
        return found.mean - compared.mean if compared else None
    return None if claim.value is None else found.mean - claim.value


def reported(claim: ClaimConfig) -> str:
    """Return what the report says: a figure, a bound, or what it compares with."""
    if claim.above:
        return f"more than with {show_settings(claim.above)}"
    for words, value in (("at least ", claim.at_least), ("at most ", claim.at_most)):
        if value is not None:
            return words + measures.show(claim.metric, value)
    return measures.show(claim.metric, claim.value)


def show_settings(where: Mapping[str, Any]) -> str:
    """Return settings as the shell takes them: `optimizer=adam, optimizer.lr=0.001`."""
    return ", ".join(
        f"{key.removeprefix('choices.')}={show_value(value)}" for key, value in where.items()
    )


def _values(claim: ClaimConfig, runs: Sequence[FoundRun]) -> list[float]:
    found = (run.measure(claim.metric) for run in runs if run.finished)
    return [value for value in found if value is not None]


def _fits(config: RunConfig, where: Mapping[str, Any]) -> bool:
    flat = config_module.flatten(config_module.to_plain(config))
    return all(key in flat and _same(flat[key], value) for key, value in where.items())


def _same(a: Any, b: Any) -> bool:
    return show_value(a) == show_value(b) or a == b


def _key(run: FoundRun, claim: ClaimConfig) -> tuple[str, ...]:
    study = run.config.study
    where = tuple(f"{key}={show_value(value)}" for key, value in sorted(claim.where.items()))
    return (study.report or "", run.config.name, claim.id or "", claim.metric, claim.source, *where)
