"""The reports' experiments: their settings, their claims, and what a run of them says."""

import functools
import re
from pathlib import Path

import pytest

from cifar_lab import train
from cifar_lab.analysis import run_metrics
from cifar_lab.analysis.reproduction import Candidate, ReportExperiment, match
from cifar_lab.config.reports import Report, read_report
from cifar_lab.config.run_config import RunConfig, flatten, to_plain
from cifar_lab.runs.run_dir import find_runs
from cifar_lab.training.build import build_model
from cifar_lab.training.preflight import compose_checked

CONF = Path(__file__).resolve().parent.parent / "conf"
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
OF_REPORTS = [name for name in EXPERIMENTS if re.match(r"s\d_", name)]
S4_RATES = {1e-2, 5e-3, 1e-3}
# As the reports (or their published code) have it: tag, axes, epochs, batch size, learning rates,
# momentum, weight decay, parameters of the model.
FACTS: dict[str, tuple[str, dict[str, int], int, int, set[float], float, float, int]] = {
    "s0_optimizer_activation": (
        *("S0", {"choices.optimizer": 2, "choices.activation": 2}),
        *(20, 128, {1e-4}, 0, 0, 2_169_770),
    ),
    "s1_dropout": ("S1", {"dropout.conv": 4}, 20, 32, {1e-3}, 0.9, 0, 890_410),
    "s1_dropout_60_epochs": ("S1", {}, 60, 32, {1e-3}, 0.9, 0, 890_410),
    "s1_deep": ("S1", {}, 25, 32, {5e-3}, 0.9, 0, 1_702_186),
    "s1_deep_as_printed": ("S1", {}, 25, 32, {5e-2}, 0.9, 0, 1_702_186),
    "s2_untrained": ("S2", {}, 1, 128, {1e-6}, 0, 0, 1_677_674),
    "s2_fixed_rate": ("S2", {}, 20, 128, {1e-3}, 0, 0, 1_677_674),
    "s2_plateau": ("S2", {}, 50, 128, {1e-2}, 0, 0, 1_677_674),
    "s3_learning_rate": (
        *("S3", {"optimizer.lr": 4}, 30, 128, {5e-3, 1e-2, 1e-4, 1e-3}),
        *(0.9, 5e-4, 47_970),
    ),
    "s3_literal": ("S3", {"optimizer.lr": 3}, 30, 128, {5e-3, 1e-2, 1e-4}, 0.9, 5e-4, 95_020),
    "s4_learning_rate": ("S4", {"optimizer.lr": 3}, 150, 128, S4_RATES, 0.9, 5e-4, 4_491_749),
    "s4_small": ("S4-small", {"optimizer.lr": 3}, 10, 128, S4_RATES, 0.9, 5e-4, 290_933),
}


@functools.cache
def cells(experiment: str, protocol: str = "sound") -> list[RunConfig]:
    request = compose_checked([f"experiment={experiment}", f"protocol={protocol}", "device=cpu"])
    return [cell.config for cell in request.runs]


def test_an_option_that_is_none_of_an_experiments_has_its_own_values() -> None:
    words = ("experiment=airbench_small", "optimizer=adam", "scheduler=cosine", "augmentation=none")
    config = compose_checked([*words, "device=cpu"]).runs[0].config
    assert (config.optimizer["lr"], config.augmentation.crop_padding) == (0.001, 0)


@pytest.mark.parametrize("experiment", OF_REPORTS)
def test_settings_are_the_reports(experiment: str) -> None:
    report, axes, epochs, batch_size, rates, momentum, weight_decay, parameters = FACTS[experiment]
    runs = cells(experiment)
    flat = [flatten(to_plain(run)) for run in runs]
    expected = 1
    for key, count in axes.items():
        assert len({row[key] for row in flat}) == count, key
        expected *= count
    assert len(runs) == expected
    assert {run.study.report for run in runs} == {report}
    assert {run.training.epochs for run in runs} == {epochs}
    assert {run.training.batch_size for run in runs} == {batch_size}
    assert {run.optimizer["lr"] for run in runs} == rates
    assert {run.optimizer.get("momentum", momentum) for run in runs} == {momentum}
    assert {run.optimizer["weight_decay"] for run in runs} == {weight_decay}
    assert {run.precision for run in runs} == {"fp32"}
    model = build_model(runs[0], 10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert {run.name for run in runs} == {experiment}
    assert read_report(runs[0].study.report or "").experiments[experiment].guessed


@pytest.mark.parametrize("experiment", OF_REPORTS)
def test_sound_chooses_nothing_on_the_test_set(experiment: str) -> None:
    for run in cells(experiment):
        assert run.protocol == "sound"
        assert run.split.source == "train"
        assert run.split.validation > 0
        assert run.evaluation.scored_weights == "best"
        assert run.evaluation.crop_padding == 0
        assert not run.evaluation.watch_test
        assert not run.model.get("softmax_output", False)


@pytest.mark.parametrize("experiment", OF_REPORTS)
def test_report_does_what_the_report_did(experiment: str) -> None:
    report = FACTS[experiment][0]
    for run in cells(experiment, "report"):
        assert run.protocol == "report"
        if report == "S0":
            assert run.split.source == "test"
            assert (run.split.method, run.split.seed) == ("numpy", 42)
            assert run.evaluation.crop_padding == 4
            assert run.evaluation.test == "official"
            assert run.split.validation * 10000 == 8000
        if report == "S1":  # range(1, n), the last weights, the last images
            assert run.training.epochs == FACTS[experiment][2] - 1
            assert run.evaluation.scored_weights == "last"
            assert (run.split.method, run.split.validation) == ("tail", 1000)
        if report == "S2":
            assert run.split.validation == 12000
            assert run.evaluation.scored_weights == "best"
        if report in ("S3", "S4", "S4-small"):
            assert run.split.validation == 0
            assert run.evaluation.watch_test
            assert run.evaluation.scored_weights == "last"
        if report in ("S4", "S4-small"):
            assert run.model["softmax_output"]
            assert run.training.step_history


@pytest.mark.parametrize("experiment", OF_REPORTS)
def test_claims_are_measures_of_cells_that_are_there(experiment: str) -> None:
    runs = cells(experiment)
    claims = read_report(runs[0].study.report or "").experiments[experiment].claims
    assert len({claim.id for claim in claims}) == len(claims)
    flat = [flatten(to_plain(run)) for run in runs]
    for claim in claims:
        run_metrics.check(claim.metric)
        assert claim.id, claim
        tag, _, _ = str(runs[0].study.report).partition("-")
        assert claim.source.startswith(tag), claim.id
        fitting = [row for row in flat if all(row[k] == v for k, v in claim.where.items())]
        assert len(fitting) == 1, claim.id
        if claim.above:
            others = cells(claim.above["name"]) if "name" in claim.above else []
            described = ReportExperiment(experiment, tuple(runs), Report())
            every = [Candidate(described, config) for config in (*runs, *others)]
            (compared,) = filter(None, (match(claim, each, every) for each in every[: len(runs)]))
            assert len({str(each.config) for each in compared}) == 1, claim.id


def test_the_grid_that_was_asked_for_has_three_axes() -> None:
    runs = cells("grid_lr_optimizer_activation")
    axes = [
        {run.optimizer["lr"] for run in runs},
        {run.choices["optimizer"] for run in runs},
        {run.choices["activation"] for run in runs},
    ]
    assert min(map(len, axes)) >= 2
    assert len(runs) == len(axes[0]) * len(axes[1]) * len(axes[2])


@pytest.mark.slow
def test_a_run_speaks_as_in_s2(tmp_path: Path) -> None:
    """S2's third setting in small, such that no epoch after the first counts as better."""
    overrides = [
        *("experiment=s2_plateau", "dataset=digits", "dataset.mean=null", "dataset.std=null"),
        *("model.widths=[4,8]", "model.hidden=16", "split.validation=0.2", "figures=none"),
        *("scheduler.threshold=10", "training.min_delta=1", "device=cpu"),
        *("training.print_every=5", "training.step_history=true", f"output_dir={tmp_path}"),
    ]
    assert train.main(overrides) == 0
    (run,) = find_runs(tmp_path)
    summary, log = run.read_summary(), run.log_file.read_text(encoding="utf-8")
    # S2: best epoch 23, reduced after 27, stopped at 28; here the best is 1
    named = run.path / (
        f"model_ConvNet_acc{summary.best_val_accuracy:.4f}_lr0.01_SGD_"
        f"epoch{summary.best_epoch}_ReLU.pth"
    )
    assert named.read_bytes() == run.best.read_bytes()
    for line in (
        "Training model ConvNet with learning rate: 0.01, optimizer: SGD and activation function: "
        "ReLU",
        "Epoch 1/50",
        "Epoch 00005: reducing learning rate of group 0 to 1.0000e-03.",
        "Early stopping triggered at epoch 6. No significant improvement in the validation metric "
        "for 5 epochs.",
        f"Best model saved to {named}",
    ):
        assert line in log.splitlines()
    for pattern, count in (
        ("splits verified disjoint: train 1,150.*", 1),
        (r"train loss: \d\.\d{4} accuracy: \d+\.\d\d%", 6),
        (r"valid loss: \d\.\d{4} accuracy: \d+\.\d\d%", 6),
        (r"epoch: 1, steps: [05], train_loss: \d\.\d{3}, running_acc: \d+\.\d %", 2),
        (rf"ConvNet *\| *{summary.best_val_accuracy:.4f} *\|.*\| *{summary.best_epoch} *", 1),
    ):
        assert len(re.findall(f"^{pattern}$", log, re.MULTILINE)) == count, pattern
    assert (summary.epochs, summary.stopped_early) == (6, True)
    rates = [row.learning_rate for row in run.read_metrics()]
    assert rates == pytest.approx([0.01] * 5 + [0.001])
    batches = [step for step in run.read_steps() if step.epoch == 1]
    sizes = [128] * 8 + [1150 - 128 * 8]
    mean = sum(step.loss * size for step, size in zip(batches, sizes, strict=True)) / 1150
    assert mean == pytest.approx(run.read_metrics()[0].train_loss, rel=1e-5)
