"""Train image classifiers, and know which differences are real."""

from typing import TYPE_CHECKING, Any

from cifar_lab.errors import RunFailed, Unavailable, UsageError
from cifar_lab.version import __version__

if TYPE_CHECKING:
    from cifar_lab.api import Run, Runs, compose, load_run, load_runs, run, sweep

__all__ = ["RunFailed", "Unavailable", "UsageError", "__version__"]
__all__ += ["Run", "Runs", "compose", "load_run", "load_runs", "run", "sweep"]


def __getattr__(name: str) -> Any:
    """Import the API when it is first used: a command that does not use it stays fast."""
    if name in __all__:
        from cifar_lab import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
