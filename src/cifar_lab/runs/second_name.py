"""The second name of best.pt, which tells its scores (S2-10, S2-11)."""

import re
import string

from cifar_lab.config.run_config import RunConfig
from cifar_lab.runs.text import class_name


def second_name(config: RunConfig, epoch: int, val_accuracy: float) -> str | None:
    """Return the name for the weights of an epoch, by `training.best_file_name`."""
    template = config.training.best_file_name
    if template is None:
        return None
    return template.format(**_constants(config), epoch=epoch, acc=val_accuracy)


def second_name_pattern(config: RunConfig) -> str:
    """Return a regular expression for the names of all epochs; without a template none fits."""
    template, constants = config.training.best_file_name, _constants(config)
    if template is None:
        return r"(?!)"
    return "".join(
        re.escape(text) + _field_pattern(field, spec or "", constants)
        for text, field, spec, _ in string.Formatter().parse(template)
    )


def _field_pattern(field: str | None, spec: str, constants: dict[str, str | float]) -> str:
    if field is None:
        return ""
    if field in constants:
        return re.escape(format(constants[field], spec))
    return r"\d+" if field == "epoch" else r"[0-9.e+-]+"


def _constants(config: RunConfig) -> dict[str, str | float]:
    """Return the values that are the same for each epoch."""
    return {
        "model": class_name(config.model),
        "lr": config.optimizer.get("lr", 0.0),
        "opt": class_name(config.optimizer),
        "act": class_name(config.activation),
    }
