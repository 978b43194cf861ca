"""Every number of docs/reproduction, computed again: by scipy and statsmodels, from plain files.

Nothing of cifar_lab is imported. The rule is written down a second time, from its description in
the document, so that a slip in one of the two shows.
"""

import csv
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

pytestmark = pytest.mark.slow  # all kept runs are read

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    page.stem: page.read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs" / "reproduction").glob("S*.md"))
}
SEEDS = 1000


class Run:
    """A kept run, read with the standard library."""

    def __init__(self, path: Path) -> None:
        self.config = yaml.safe_load((path / "config.yaml").read_text())
        self.summary = json.loads((path / "summary.json").read_text())
        with (path / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        self.rows = [{k: float(v) for k, v in row.items() if v} for row in rows]
        report = path / "classification_report.json"
        self.classes = json.loads(report.read_text()) if report.exists() else {}
        self.seed, self.epochs = self.config["seed"], self.config["training"]["epochs"]
        self.protocol = self.config["protocol"]

    def value(self, name: str) -> float | None:
        kind, *numbers = name.split(":")
        names = list(self.summary["per_class_accuracy"])
        recalls = [self.classes[n]["recall"] for n in names]
        by_name: dict[str, Callable[[], float | None]] = {
            "seconds_per_epoch": lambda: float(np.mean([row["seconds"] for row in self.rows])),
            "best_val_loss_epoch": lambda: self.summary["diagnosis"].get("best_val_loss_epoch"),
            "feature_knn_accuracy": lambda: self.summary["separation"].get("knn_accuracy"),
            "val_accuracy_from": lambda: float(
                np.mean([r["val_accuracy"] for r in self.rows if r["epoch"] >= int(numbers[0])])
            ),
            "reduction_to": lambda: next(
                (r["epoch"] - 1 for r in self.rows if r["learning_rate"] < 1.01e-4), None
            ),
            "recall_gap": lambda: (
                min(r for i, r in enumerate(recalls) if i not in (3, 5))
                - max(recalls[3], recalls[5])
            ),
            "macro_f1": lambda: float(np.mean([self.classes[n]["f1-score"] for n in names])),
        }
        if kind in by_name:
            return by_name[kind]()
        if match := re.fullmatch(r"(first|final)_(.+)", kind):
            return self.rows[0 if match[1] == "first" else -1].get(match[2])
        if match := re.fullmatch(r"(fall|rise)_(.+)", kind):
            change = self.rows[-1][match[2]] - self.rows[0][match[2]]
            return change if match[1] == "rise" else -change
        if match := re.fullmatch(r"(class|macro)_(precision|recall|f1)", kind):
            scores = [self.classes[n]["f1-score" if match[2] == "f1" else match[2]] for n in names]
            return scores[int(numbers[0])] if match[1] == "class" else float(np.mean(scores))
        found: float | None = self.summary[kind]
        return found

    def at(self, key: str) -> Any:
        return functools.reduce(lambda part, name: part[name], key.split("."), self.config)

    def fits(self, where: dict[str, Any]) -> bool:
        return all(self.at(key) == wanted for key, wanted in where.items())


@functools.cache
def report_of(tag: str) -> dict[str, Any]:
    report: dict[str, Any] = yaml.safe_load((ROOT / f"conf/report/{tag}.yaml").read_text())
    return report


@functools.cache
def runs_of(experiment: str) -> list[Run]:
    folder = ROOT / "docs/results" / experiment
    return [Run(path.parent) for path in folder.glob("*/summary.json")]


def section(page: str, name: str) -> str:
    return PAGES[page].split(f"\n## {name}:", 1)[1].split("\n## ")[0]


def cells(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("| S"):
            yield [cell.strip().replace("\\", "") for cell in line.strip("| ").split(" | ")]


def numbers_in(text: str) -> list[tuple[float, float]]:
    """Each number of a text with half a unit of its last digit."""
    found = re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?", text.replace("−", "-"))
    return [
        (float(n.replace(",", "")), 0.5 * 10.0 ** -len(n.partition(".")[2]) + 1e-9) for n in found
    ]


def check(text: str, expected: Sequence[float], where: str) -> None:
    shown = numbers_in(text)
    assert len(shown) == len(expected), (where, text, expected)
    for (number, half), wanted in zip(shown, expected, strict=True):
        assert abs(number - wanted) <= half, (where, text, expected)


def spread(groups: Sequence[dict[Any, float]]) -> tuple[float, float] | None:
    """Variance and degrees of freedom of values (by unit) about the means of their groups.

    Sums of squares of a two-way table, written out: within groups, and of the units' totals.
    """
    within, totals, count = 0.0, dict[Any, float](), 0
    table: dict[tuple[Any, Any], float] = {}
    for group in groups:
        if len(set(group.values())) < 2:
            continue
        mean = sum(group.values()) / max(len(group), 1)
        count += max(len(group) - 1, 0)
        for unit, value in group.items():
            within += (value - mean) ** 2
            totals[unit] = totals.get(unit, 0.0) + value - mean
            for other in group:
                table[unit, other] = table.get((unit, other), 0.0) + (unit == other)
                table[unit, other] -= 1 / len(group)
    if not count:
        return None
    together = sum(value**2 for value in table.values())
    variance = within / count
    r = 0.0
    if together > count + 1e-9:
        crossed = sum(total**2 for total in totals.values()) / variance
        r = float(np.clip((crossed - count) / (together - count), 0, 1))
    return variance, count**2 / (count * (1 - r**2) + together * r**2)


class Study:
    """An experiment of a report with its runs, its pools and, of S0, its lengths."""

    def __init__(self, tag: str, name: str) -> None:
        self.report, self.name = report_of(tag), name
        self.experiment = self.report["experiments"][name]
        self.claims = {claim["id"]: claim for claim in self.experiment["claims"]}
        self.fitted_to = self.experiment.get("epochs_fitted_to")

    def of(self, name: str, where: dict[str, Any], protocol: str = "report") -> list[Run]:
        if self.fitted_to:
            return self.lengths[self.nearest]
        found = [run for run in runs_of(name) if run.protocol == protocol and run.fits(where)]
        return sorted(found, key=lambda run: run.seed)

    @functools.cached_property
    def lengths(self) -> dict[int, list[Run]]:
        where = self.claims[self.fitted_to]["where"]
        found: dict[int, dict[int, Run]] = {}
        for run in runs_of(self.name):
            last = run.summary["scored_weights"] == "last"
            if run.protocol == "report" and run.fits(where) and last:
                found.setdefault(run.epochs, {})[run.seed] = run
        return {e: [s[i] for i in sorted(s)] for e, s in sorted(found.items()) if len(s) > 2}

    @functools.cached_property
    def nearest(self) -> int:
        claim = self.claims[self.fitted_to]
        off = {
            e: np.mean(measured(runs, claim)) - claim["value"] for e, runs in self.lengths.items()
        }
        return min(off, key=lambda epochs: abs(off[epochs]))

    def groups(self, claim: dict[str, Any]) -> list[dict[Any, float]]:
        """The runs by which a deviation is estimated: lengths, a pool, or the claim's own."""
        if self.fitted_to:
            return [
                {run.seed: measured([run], claim)[0] for run in runs}
                for runs in self.lengths.values()
            ]
        pool, own = self.experiment.get("pool"), dict[Any, list[Run]]()
        if not pool:
            own[0] = self.of(self.name, claim.get("where", {}))
        pooled = {
            n: e for n, e in self.report["experiments"].items() if pool and e.get("pool") == pool
        }
        axes = {key for e in pooled.values() for c in e["claims"] for key in c["where"]}
        for name in pooled:
            for run in (run for run in runs_of(name) if run.protocol == "report"):
                own.setdefault((name, *(run.at(axis) for axis in sorted(axes))), []).append(run)
        return [
            {(key, i): value for i, value in enumerate(measured(runs, claim))}
            for key, runs in own.items()
        ]


def measured(runs: Sequence[Run], claim: dict[str, Any]) -> list[float]:
    values = [run.value(claim["metric"]) for run in runs]
    return [value for value in values if value is not None]


def points(claim: dict[str, Any]) -> float:
    fraction = re.search("accuracy|precision|recall|f1", claim["metric"])
    return 100.0 if fraction else 1.0


@functools.cache
def judged(tag: str, name: str, claim_id: str) -> tuple[str, list[float], float, float]:
    """The word, the numbers of its reason in their order, and the two p values."""
    study = Study(tag, name)
    claim = study.claims[claim_id]
    runs = study.of(name, claim.get("where", {}))
    values, unit = measured(runs, claim), points(claim)
    if not values:
        return "not measured yet", [], 1, 1
    if claim_id == study.fitted_to or "not_judged" in claim:
        return "not judged", [], 1, 1
    if claim["metric"].startswith("reduction") and len(values) < len(runs):
        return "inconclusive", [len(runs) - len(values), len(runs)], 1, 1
    pooled, others = spread(study.groups(claim)), list[float]()
    if above := claim.get("above"):
        same = {} if "name" in above else claim.get("where", {})
        where = {k: v for k, v in {**same, **above}.items() if k != "name"}
        theirs = study.of(above.get("name", name), where)
        others = measured(theirs, claim)
        if "value" in claim:
            by_seed = dict(zip([r.seed for r in theirs], others, strict=True))
            values = [
                v - by_seed[r.seed] for r, v in zip(runs, values, strict=True) if r.seed in by_seed
            ]
            pooled = spread([dict(enumerate(values))])
    if pooled is None:
        return "inconclusive", [], 1, 1
    (variance, df), n = pooled, len(values)
    if "value" in claim:
        return figure(claim, float(np.mean(values)) - claim["value"], variance, df, n, unit)
    if others:
        off, se2 = float(np.mean(values) - np.mean(others)), variance * (1 / n + 1 / len(others))
        n = min(n, len(others))
        if not study.experiment.get("pool"):
            welch = stats.ttest_ind(values, others, equal_var=False)
            df, se2 = float(welch.df), (off / float(welch.statistic)) ** 2
    else:
        sign = 1 if "at_least" in claim else -1
        off = sign * (float(np.mean(values)) - claim["at_least" if sign > 0 else "at_most"])
        se2 = variance / n
    return words(off, se2, df, n, unit)


def figure(
    claim: dict[str, Any], off: float, variance: float, df: float, n: int, unit: float
) -> tuple[str, list[float], float, float]:
    margin, rounding = claim["margin"]["size"], claim.get("rounding", 0.0)

    def intervals(m: int) -> tuple[float, float]:
        degrees = df * m / n
        mean = stats.t.ppf(0.95, degrees) * np.sqrt(variance / m)
        return float(mean), float(stats.t.ppf(0.975, degrees) * np.sqrt(variance * (1 + 1 / m)))

    def word(m: int) -> str:
        mean, single = intervals(m)
        if abs(off) + mean <= margin + rounding:
            return "reproduced"
        return "differs" if abs(off) - rounding > max(margin, single) else "inconclusive"

    said, (mean, single) = word(n), intervals(n)
    expected = [unit * off, 90, unit * mean, unit * (margin + rounding)]
    expected += [] if said == "reproduced" else [unit * single]
    expected += [n, df]
    if said == "inconclusive":
        seeds = next((m for m in range(n, SEEDS + 1) if word(m) != "inconclusive"), None)
        expected += [seeds] if seeds else [] if abs(off) - rounding >= margin else [SEEDS]
    sides = [(margin + rounding - side * off) / np.sqrt(variance / n) for side in (1, -1)]
    same = max(float(stats.t.sf(side, df)) for side in sides)
    apart = max(abs(off) - rounding, 0) / np.sqrt(variance * (1 + 1 / n))
    return said, expected, same, float(2 * stats.t.sf(apart, df))


def words(
    off: float, se2: float, df: float, n: int, unit: float
) -> tuple[str, list[float], float, float]:
    def half(m: int) -> float:
        return float(stats.t.ppf(0.975, df * m / n) * np.sqrt(se2 * n / m))

    said = "inconclusive" if abs(off) <= half(n) else "holds" if off > 0 else "contradicted"
    expected = [unit * off, 95, unit * half(n), n, df]
    if said == "inconclusive":
        expected.append(next((m for m in range(n, SEEDS + 1) if abs(off) > half(m)), SEEDS))
    p = float(2 * stats.t.sf(abs(off) / np.sqrt(se2), df))
    return said, expected, *((p, 1.0) if off > 0 else (1.0, p))


def experiments() -> list[tuple[str, str]]:
    tags = {
        name: tag
        for tag in (path.stem for path in (ROOT / "conf" / "report").glob("*.yaml"))
        for name in report_of(tag)["experiments"]
    }
    return [(tags[n], n) for text in PAGES.values() for n in re.findall(r"\n## (\w+):", text)]


@pytest.mark.parametrize(("tag", "name"), experiments())
def test_every_row_is_what_the_kept_runs_give(tag: str, name: str) -> None:
    text = section(tag[:2], name)
    study = Study(tag, name)
    if "Not measured yet" in text:
        assert all(run.summary["status"] != "finished" for run in runs_of(name))
        return
    rows = {row[0]: row[1:] for row in cells(text) if row[0] in study.claims}
    assert list(rows) == list(study.claims), "every claim has a row"
    reasons = dict(re.findall(r"^- \*\*(S[^*]+)\*\*: (.*)$", text, re.MULTILINE))
    for claim_id, (reported, shown, n, verdict) in rows.items():
        claim, unit = study.claims[claim_id], points(study.claims[claim_id])
        runs = study.of(name, claim.get("where", {}))
        values = measured(runs, claim)
        if "value" in claim and "above" in claim:
            above = dict(claim["above"])
            others = study.of(above.pop("name", name), above)
            by_seed = {run.seed: run.value(claim["metric"]) or 0.0 for run in others}
            values = [v - by_seed[r.seed] for r, v in zip(runs, values, strict=True)]
        printed = next((claim[k] for k in ("value", "at_least", "at_most") if k in claim), None)
        if printed is not None:
            check(reported.partition(" over ")[0], [unit * printed], claim_id)
        assert int(n) == len(values)
        if len(values) == 1:
            check(shown, [unit * values[0]], claim_id)
        elif len(values) == 2:
            check(shown, [unit * v for v in sorted(values)], claim_id)
        elif values:
            mean = float(np.mean(values))
            half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
            check(shown, [unit * mean, unit * half] if "±" in shown else [unit * mean], claim_id)
        word, expected, _, _ = judged(tag, name, claim_id)
        assert verdict == word, claim_id
        if expected:
            reason = reasons[claim_id].partition("; ")[0]
            check(re.sub(r"as the report's.*", "", reason), expected, claim_id)


@pytest.mark.parametrize("tag", ["S0", "S1", "S2", "S3"])
def test_the_joint_sentence_is_holms(tag: str) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    names = [name for other, name in experiments() if other == tag]
    claims = [(name, claim) for name in names for claim in Study(tag, name).claims]
    found = [judged(tag, name, claim) for name, claim in claims]
    found = [each for each in found if each[0] not in ("not judged", "not measured yet")]
    said = [each[0] for each in found]
    expected: list[float] = [len(found)]
    kinds = (("reproduced", "holds"), ("differs", "contradicted"))
    for word in (*kinds[0], *kinds[1], "inconclusive"):
        expected += [said.count(word)] if word in said else []
    for index, kind in enumerate(kinds):
        rejected = multitest.multipletests([each[2 + index] for each in found], method="holm")[0]
        remain = sum(word in kind and bool(r) for word, r in zip(said, rejected, strict=True))
        total = sum(word in kind for word in said)
        expected += [remain, total] if total else []
    (sentence,) = re.findall(r"^Of \d+ figures.*$", PAGES[tag], re.MULTILINE)
    check(sentence, expected, tag)


def test_the_study_of_the_epochs_is_a_random_effect_of_the_seed() -> None:
    """S0's variance and degrees of freedom, and at which lengths one more run may give 0.76."""
    anova = pytest.importorskip("statsmodels.stats.anova")
    formula = pytest.importorskip("statsmodels.formula.api")
    pandas = pytest.importorskip("pandas")
    study = Study("S0", "s0_optimizer_activation")
    claim = study.claims["S0-accuracy"]
    found = spread(study.groups(claim))
    assert found is not None
    variance, df = found
    runs = [run for members in study.lengths.values() for run in members]
    rows = [
        (run.epochs, run.seed, value)
        for run, value in zip(runs, measured(runs, claim), strict=True)
    ]
    data = pandas.DataFrame(rows, columns=["epochs", "seed", "y"])
    seeds, lengths = len(set(data["seed"])), len(set(data["epochs"]))
    if len(runs) == seeds * lengths:  # balanced: the classical analysis of variance
        squares = anova.anova_lm(formula.ols("y ~ C(epochs) + C(seed)", data).fit())["mean_sq"]
        parts = [squares["C(seed)"] / lengths, squares["Residual"] * (lengths - 1) / lengths]
        counts = [seeds - 1, (seeds - 1) * (lengths - 1)]
        assert variance == pytest.approx(sum(parts))
        freedom = sum(parts) ** 2 / sum(p**2 / c for p, c in zip(parts, counts, strict=True))
        assert df == pytest.approx(freedom)
    fitting = []
    for epochs, runs in study.lengths.items():
        values = measured(runs, claim)
        single = stats.t.ppf(0.975, df) * np.sqrt(variance * (1 + 1 / len(values)))
        if abs(np.mean(values) - claim["value"]) <= single + claim["rounding"]:
            fitting.append(epochs)
    (sentence,) = re.findall(r"^The report does not say how many.*$", PAGES["S0"], re.MULTILINE)
    tried = list(study.lengths)
    ends = f"{tried[0]} to {tried[-1]}"
    where = f"fits from {fitting[0]} to {fitting[-1]} of {ends}"
    if fitting == tried:
        where = f"fits at every length tried, {ends} epochs"
    assert where in sentence
    assert f"{df:.3g} degrees of freedom" in sentence
    assert f"nearest at {study.nearest} epochs" in sentence


def test_how_each_report_stands_is_counted_from_the_pages() -> None:
    overview = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[(S\d)\]\S+ +\| (.+) \|$", overview, re.MULTILINE)
    assert [tag for tag, _ in rows] == list(PAGES)
    kinds = (("reproduced", "holds"), ("differs", "contradicted"), "inconclusive", "not judged")
    for tag, counts in rows:
        verdicts = [row[4] for row in cells(PAGES[tag]) if len(row) == 5]
        found = [sum(verdict.startswith(kind) for verdict in verdicts) for kind in kinds]
        assert [int(cell) for cell in counts.split("|")[:4]] == found, tag


def test_what_needs_no_training_is_in_the_kept_files() -> None:
    """S0's supports and weighted averages, S4's steps; tests/test_describe.py has S1's pixels."""
    for run in runs_of("s0_optimizer_activation"):
        names = list(run.summary["per_class_accuracy"])
        assert [run.classes[name]["support"] for name in names] == [1000] * 10
        for kind in ("precision", "recall", "f1-score"):
            averages = [run.classes[f"{which} avg"][kind] for which in ("weighted", "macro")]
            assert averages[0] == pytest.approx(averages[1])
    for run in runs_of("s4_small"):
        batch = run.config["training"]["batch_size"]
        images = run.rows[0]["seconds"] * run.rows[0]["images_per_second"]
        assert (-(-round(images, -3) // batch), -(-run.summary["test_size"] // batch)) == (391, 79)
