"""The optimizer and the scheduler of a run: a target, its arguments, and settings of our own."""

from typing import Any, ClassVar, Literal

from cifar_lab.config.schema import TargetConfig, parse_as, wrong


class _Component(TargetConfig):
    """A `_target_` and its arguments, and beside them settings that the program reads itself.

    A mapping in the order of config.yaml, so that configs and addresses of earlier runs hold.
    """

    own: ClassVar[dict[str, Any]] = {}
    """The type of each setting that the target does not take."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(cls, handler(TargetConfig))

    @property
    def target(self) -> TargetConfig:
        """What builds the component: `_target_` and its arguments."""
        return {key: value for key, value in self.items() if key not in self.own}

    def check(self, path: str) -> None:
        """Refuse wrong values of our own settings; those of the arguments need the target."""
        for name, kind in self.own.items():
            if name in self:
                parse_as(kind, self[name], f"{path}.{name}")


class OptimizerConfig(_Component):
    """An optimizer; `backbone_lr` is the learning rate of all but the model's classifier."""

    own: ClassVar[dict[str, Any]] = {"backbone_lr": float | None}

    @property
    def backbone_lr(self) -> float | None:
        """The learning rate of all but the model's classifier; None: that of the classifier."""
        return self.get("backbone_lr")

    def check(self, path: str) -> None:
        """Refuse a rate that is no number, or below 0."""
        super().check(path)
        if (self.backbone_lr or 0) < 0:
            raise wrong(f"{path}.backbone_lr", self.backbone_lr, "at least 0")


class SchedulerConfig(_Component):
    """A scheduler: it steps after each batch or epoch, and may watch a column of metrics.csv."""

    own: ClassVar[dict[str, Any]] = {"step": Literal["batch", "epoch"], "monitor": str | None}

    @property
    def step(self) -> str:
        """After what the scheduler steps."""
        return str(self.get("step", "epoch"))

    @property
    def monitor(self) -> str | None:
        """The column of metrics.csv that the scheduler watches."""
        return self.get("monitor")
