"""Turn signals into a request to stop, which is checked between batches."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Self

from hpsearch.errors import Drained, Interrupted

_REPEAT_WINDOW = 0.5  # seconds within which a repeated signal counts as the same request
_HANGUP_WINDOW = 100  # milliseconds; the reader of a pipe gets the same SIGHUP, and may end a little later


class Drain:
    """A request to stop: the current batch is finished and the trial re-queued. A second signal stops immediately.

    SIGHUP never counts as the second: a terminal may be closed after Ctrl-C.
    """

    def __init__(self) -> None:
        self.event = threading.Event()
        self.error: Drained = Drained()
        self.ignores_signals = False
        self._signals: tuple[signal.Signals, ...] = ()
        self._since = 0.0
        self._on_request: Callable[[Drained], None] = lambda error: None

    def listen(self, *signals: signal.Signals, on_request: Callable[[Drained], None] = lambda error: None) -> Self:
        """Take signals as requests to stop: by default SIGINT, SIGTERM and, unless under `nohup`, SIGHUP.

        `on_request` is called in the signal handler, at the first of them, with what will be raised.
        """
        self._on_request = on_request
        wanted = signals or (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        is_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._signals = tuple(number for number in wanted if not (number == signal.SIGHUP and is_nohup))
        for number in self._signals:
            signal.signal(number, self._receive)
        return self

    def set(self, error: Drained) -> None:
        self.error, self._since = error, time.monotonic()
        self.event.set()

    def ignore_signals(self) -> None:
        """Ignore signals from now on, even in Python's own shutdown, so that none interrupts the re-queuing."""
        self.ignores_signals = True
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Raise `Drained` or `Interrupted` if a stop was requested."""
        if self.event.is_set():
            raise self.error

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        if self.ignores_signals or (number == signal.SIGHUP and self.event.is_set()):
            return
        if self.event.is_set():
            # `timeout` and similar tools signal both the group and its members: that is one request, not two.
            if time.monotonic() > self._since + _REPEAT_WINDOW:
                raise KeyboardInterrupt
            return
        self.set(Interrupted() if number == signal.SIGINT else Drained())
        self._on_request(self.error)


def _leave_closed_terminal() -> None:
    """If the terminal or the reader of a pipe, such as `tee`, is gone, discard what is printed instead of failing."""
    for stream in (1, 2):
        closed = select.poll()
        closed.register(stream, 0)  # reports errors and hang-ups only
        if closed.poll(_HANGUP_WINDOW):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
