"""Signals become a wish to stop, which is looked at between two batches."""

import signal
import threading
import time
from types import FrameType
from typing import Self

from hpsearch.errors import Drained, Interrupted

_SAME_WISH = 0.5  # seconds within which a repeated signal is the same one


class Drain:
    """A wish to stop: the batch in hand is finished, the trial queued again. A second signal stops at once."""

    def __init__(self) -> None:
        self.event = threading.Event()
        self.error: Drained = Drained()
        self.is_deaf = False
        self._listens_to: tuple[signal.Signals, ...] = ()
        self._since = 0.0

    def listen(self, *signals: signal.Signals) -> Self:
        self._listens_to = signals
        for number in signals:
            signal.signal(number, self._receive)
        return self

    def set(self, error: Drained) -> None:
        self.error, self._since = error, time.monotonic()
        self.event.set()

    def ignore_signals(self) -> None:
        """From now on no signal may interrupt what is done: trials are handed back, then the process exits.

        What Python's own shutdown would make of a signal is ignored as well, where this thread may say so.
        """
        self.is_deaf = True
        if threading.current_thread() is threading.main_thread():
            for number in self._listens_to:
                signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Raise `Drained` or `Interrupted` if somebody wishes to stop."""
        if self.event.is_set():
            raise self.error

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self.is_deaf:
            return
        if self.event.is_set():
            # `timeout` and its like send a signal to the group and to its members: that is one wish, not two.
            if time.monotonic() > self._since + _SAME_WISH:
                raise KeyboardInterrupt
            return
        self.set(Interrupted() if number == signal.SIGINT else Drained())
