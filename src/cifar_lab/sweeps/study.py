"""A study of Optuna in its journal file: opened, repaired, checked against a search, asked."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cifar_lab.config.launch import Dimension, SearchOptions
from cifar_lab.errors import Damaged, UsageError, first_line, missing_extra, shorten

log = logging.getLogger("cifar_lab")

CONFIRMED = "confirmed"
"""What a study notes of the runs with fresh seeds: the trial's number, their folders by seed."""

_SEEDS = "seeds"
_MONITOR = "monitor"  # noted where it is not val_accuracy


def open_study(options: SearchOptions, folder: Path, monitor: str = "val_accuracy") -> Any:
    """Return the study of a journal file, made where there is none; Damaged if it is not whole.

    A new one minimizes the score that the runs `monitor` if it is a loss, and maximizes it if not.
    """
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError:
        raise missing_extra("search=optuna", "Optuna", "search") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruners: dict[str, Any] = {
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
        "none": optuna.pruners.NopPruner,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{options.study}.journal"
    if path.is_symlink():  # in a stranger's folder it could lead to any file
        raise Damaged(f"{path} is not a file of its own; choose another search.study")
    _repair(path)
    try:
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path))),
            study_name=options.study,
            direction="minimize" if monitor == "val_loss" else "maximize",
            pruner=pruners[options.pruner](),
            load_if_exists=True,
        )
        study.get_trials(deepcopy=False)
    except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        raise Damaged(
            f"{path} is damaged: {first_line(error)}; move it away or choose another search.study "
            "(the runs of its trials stay as they are)"
        ) from None
    return study


def monitored(study: Any) -> str:
    """Return the score by which the trials of a study are compared."""
    monitor: str = study.user_attrs.get(_MONITOR, "val_accuracy")
    return monitor


def check_study(
    study: Any, space: Mapping[str, Any], options: SearchOptions, monitor: str = "val_accuracy"
) -> None:
    """Refuse what cannot go on in the same study: other choices, seeds or another score."""
    from optuna.distributions import check_distribution_compatibility

    def refused(reason: str) -> UsageError:
        return UsageError(
            f"search.study={options.study} was begun with {reason}: choose another search.study"
        )

    trials = study.get_trials(deepcopy=False)
    if monitored(study) != monitor:
        minimizes = study.direction.name == "MINIMIZE"
        if trials or minimizes != (monitor == "val_loss"):
            raise refused(f"training.monitor={monitored(study)}, which cannot become {monitor}")
        study.set_user_attr(_MONITOR, monitor)
    seeds = study.user_attrs.get(_SEEDS, 1 if trials else None)
    if seeds not in (None, options.seeds):
        raise refused(
            f"search.seeds={seeds}, and means of {options.seeds} cannot be compared with its trials"
        )
    for trial in trials:
        for key, distribution in space.items():
            before = trial.distributions.get(key, distribution)
            try:
                check_distribution_compatibility(before, distribution)
            except ValueError:
                texts = shorten(_shown(before)), shorten(_shown(distribution))
                raise refused(f"{key} from {texts[0]}, which cannot become {texts[1]}") from None
    if seeds is None:
        study.set_user_attr(_SEEDS, options.seeds)


def suggest(
    study: Any, trial: Any, space: Mapping[str, Any], options: SearchOptions
) -> dict[str, str]:
    """Return the values of a trial as one types them; those that it does not have yet are drawn.

    Each is drawn by a sampler of its own, seeded by search.seed, the trial's number and the axis,
    so that a search that was killed at any moment tries what an undisturbed one would have tried.
    """
    import optuna

    samplers = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}
    values = {}
    for axis, (key, distribution) in enumerate(space.items()):
        sequence = np.random.SeedSequence([options.seed, trial.number, axis])
        study.sampler = samplers[options.sampler](seed=int(sequence.generate_state(1)[0]))
        value = _drawn(trial, key, distribution)
        values[key] = repr(value) if isinstance(value, float) else str(value)
    return values


def open_trials(study: Any) -> list[Any]:
    """Return the trials that an earlier search left open, as `ask` returned them then.

    Optuna has no public name for a trial's id; tests/test_search.py says when this one breaks.
    """
    from optuna.trial import Trial, TrialState

    running = study.get_trials(states=[TrialState.RUNNING])
    return [Trial(study, frozen._trial_id) for frozen in running]


def distributions(space: Sequence[Dimension]) -> dict[str, Any]:
    """Return Optuna's distribution of each axis of a search."""
    return {dimension.key: _distribution(dimension) for dimension in space}


def _distribution(dimension: Dimension) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    low, high, log_scale = dimension.low, dimension.high, dimension.log
    if dimension.choices:
        return CategoricalDistribution(list(dimension.choices))
    if dimension.whole:
        step = 1 if log_scale else int(dimension.step or 1)
        return IntDistribution(int(low), int(high), log=log_scale, step=step)
    return FloatDistribution(low, high, log=log_scale, step=None if log_scale else dimension.step)


def _drawn(trial: Any, key: str, distribution: Any) -> object:
    kind = type(distribution).__name__
    if kind == "CategoricalDistribution":
        return trial.suggest_categorical(key, distribution.choices)
    draw = trial.suggest_int if kind == "IntDistribution" else trial.suggest_float
    low, high = distribution.low, distribution.high
    return draw(key, low, high, step=distribution.step, log=distribution.log)


def _shown(distribution: Any) -> str:
    choices = getattr(distribution, "choices", None)
    if choices is not None:
        return ",".join(map(str, choices))
    return f"({distribution.low:g} to {distribution.high:g}{', log' * distribution.log})"


def _repair(path: Path) -> None:
    """Remove a last line that was cut short, to which Optuna would append the next one."""
    from optuna.storages.journal import JournalFileSymlinkLock

    if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
        return
    lock = JournalFileSymlinkLock(str(path))
    lock.acquire()  # another search may be writing
    try:
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
            log.warning("warning: the last line of %s was cut short and was removed", path)
    finally:
        lock.release()
