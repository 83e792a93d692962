"""The terminal while something is drawn on it: typed keys are hidden, and it is given back when the process stops."""

import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO

from rich.console import Console


def can_draw(console: Console) -> bool:
    """Return whether the console is a terminal that belongs to this process and can move its cursor."""
    # With FORCE_COLOR set, Rich takes any stream for a terminal.
    is_terminal = console.is_terminal and console.file.isatty() and not console.is_dumb_terminal
    return is_terminal and is_in_foreground(console.file)


def is_in_foreground(stream: IO[str]) -> bool:
    """Return whether this process is in the foreground of the terminal; a background job must not touch it."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:  # no terminal with job control
        return True


@contextmanager
def keys_hidden() -> Iterator[None]:
    """Do not show what is typed, which would move what is drawn; at the end, discard it: nobody saw what it says."""
    if not sys.stdin or not sys.stdin.isatty() or not is_in_foreground(sys.stdin):
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~(termios.ECHO | termios.ECHOCTL), *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal may be closed
            if is_in_foreground(sys.stdin):  # otherwise the shell has set its own modes
                termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)


@contextmanager
def terminal_returned(release: Callable[[], None], resume: Callable[[], None]) -> Iterator[None]:
    """Call `release` before Ctrl-Z stops this process, and `resume` when it continues; let SIGTERM end it in order.

    Signals that are handled or ignored already are left alone.
    """

    def suspend(number: int, _frame: FrameType | None) -> None:
        release()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(signal.Signals(number))  # stops here until SIGCONT
        signal.signal(number, suspend)
        resume()

    def end(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    handlers = {signal.SIGTSTP: suspend, signal.SIGTERM: end}
    is_main = threading.current_thread() is threading.main_thread()
    ours = [number for number in handlers if is_main and signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number in ours:
            if signal.getsignal(number) == handlers[number]:  # `Drain` may have taken it since
                signal.signal(number, signal.SIG_DFL)
