"""How messages, numbers and durations are printed."""

import errno
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType

from hpsearch.search.trials import TrialEvent

_WIDTH_OF_A_PIPE = 10_000  # nothing is cut off where no terminal sets a width


def echo(message: str) -> None:
    """Talk goes to stderr; where that is a file on a full disk, it is lost, since the search must not end by it."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def show(renderable: RenderableType) -> None:
    """Data goes to stdout; in a pipe lines are as long as they are, without blanks at their ends."""
    if sys.stdout.isatty():
        return Console(highlight=False).print(renderable)
    console = Console(width=_WIDTH_OF_A_PIPE, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def stderr_console() -> Console:
    """The console that talk goes to."""
    return Console(stderr=True, highlight=False)


def trial_line(event: "TrialEvent") -> str:
    """`trial 17 complete 0.9861`, `trial 18 pruned 0.9120 epoch 3`, `trial 19 failed exception: ...`."""
    parts = [f"trial {event.number} {event.state}"]
    if event.state in ("complete", "pruned"):
        parts.append("-" if event.value is None else f"{event.value:.4f}")
    if event.state == "pruned":
        parts.append(f"epoch {event.epoch}")
    return printable(" ".join([*parts, *event.message.split()]))


def printable(text: str) -> str:
    """The text on one line, escaped where a terminal would obey it: file names may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def join_params(params: Mapping[str, Any]) -> str:
    """`depth 3, lr 0.00106`."""
    return ", ".join(f"{name} {shorten(value)}" for name, value in params.items())


def shorten(value: Any) -> str:
    """A number with three digits that count; anything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.1 d`."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if round(seconds / size) < most:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} d"
