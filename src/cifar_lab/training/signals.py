"""SIGINT, SIGTERM and SIGHUP during a run: they stop it where its state can be saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from cifar_lab.errors import Stopped
from cifar_lab.training.loop import Progress


class Stop:
    """Receives SIGINT, SIGTERM and, when a terminal is closed, SIGHUP.

    Inside `graceful` a signal waits until training checks `is_wanted`; elsewhere it raises Stopped
    at once. A second signal always raises Stopped at once.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._graceful = False

    @contextlib.contextmanager
    def installed(self) -> Iterator["Stop"]:
        """Handle the signals of this process while the block runs.

        SIGHUP stays ignored if it is, as under nohup. Python delivers signals to its main thread
        only: in another thread nothing is handled.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
        if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
            numbers.append(hang_up)
        before = {number: signal.signal(number, self._receive) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                # None: installed by a program around Python, which cannot be asked for it.
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def graceful(self) -> Iterator[None]:
        """Let a signal wait until `is_wanted` is called."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def is_wanted(self, progress: Progress) -> bool:
        """Whether training is to stop where `fit` is now."""
        return self.signal is not None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self.signal is not None
        self.signal = number
        if again or not self._graceful:
            raise Stopped(number)
