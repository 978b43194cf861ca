"""Settings of what an experiment reproduces."""

from dataclasses import dataclass

from cifar_lab.config.schema import setting


@dataclass(frozen=True)
class StudyConfig:
    """What an experiment reproduces: the report's tag; conf/report has what the report says."""

    report: str | None = None
    title: str | None = None
    target_accuracy: float | None = setting(None, gt=0, le=1)
