"""Progress bars of a run on a terminal: one for training, one for validation, as in S2's log."""

import sys
from types import TracebackType
from typing import Any

from cifar_lab.training import Progress


class Bars:
    """Shows what `fit` yields; silent when standard error is no terminal and no notebook."""

    def __init__(self, epochs: int) -> None:
        self._epochs = epochs
        self._bar: Any = None
        self._key: tuple[int, str] | None = None
        self._silent = not sys.stderr.isatty() and "ipykernel" not in sys.modules

    def __enter__(self) -> "Bars":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def show(self, progress: Progress) -> None:
        """Move the bar of the phase; a finished epoch closes it."""
        if self._silent:
            return
        if progress.kind == "epoch":
            self._close()
            return
        key = (progress.epoch, progress.phase)
        if key != self._key:
            self._close()
            self._open(progress)
            self._key = key
        self._bar.set_postfix(
            acc=f"{progress.accuracy:.4f}", loss=f"{progress.loss:.4f}", refresh=False
        )
        self._bar.update(progress.step - self._bar.n)

    def _open(self, progress: Progress) -> None:
        from tqdm.auto import tqdm

        short = "train" if progress.phase == "train" else "valid"
        self._bar = tqdm(
            total=progress.steps,
            initial=progress.step,  # a resumed epoch does not start at 0
            desc=f"{progress.epoch}/{self._epochs} {short} progress",
            unit="step",
            leave=False,
            dynamic_ncols=True,
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._key = None, None
