"""Formatting and printing of messages, numbers and durations."""

import errno
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import RenderableType

    from hpsearch.search.trials import TrialEvent

_PIPE_WIDTH = 10_000  # nothing is cut off without a terminal


def echo(message: str) -> None:
    """Print a message to stderr. A full disk loses the message but does not end the search."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise


def show(renderable: "RenderableType") -> None:
    """Print data to stdout. In a pipe, lines are neither wrapped nor padded."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console(highlight=False).print(renderable)
    console = Console(width=_PIPE_WIDTH, highlight=False)
    with console.capture() as capture:
        console.print(renderable)
    return print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def trial_line(event: "TrialEvent") -> str:
    """Return a line such as `trial 17 complete 0.9861` or `trial 18 pruned 0.9120 epoch 3`."""
    parts = [f"trial {event.number} {event.state}"]
    if event.state in ("complete", "pruned"):
        parts.append("-" if event.value is None else f"{event.value:.4f}")
    if event.state == "pruned":
        parts.append(f"epoch {event.epoch}")
    return printable(" ".join([*parts, *event.message.split()]))


def printable(text: str) -> str:
    """Return the text on one line with control characters escaped: file names may contain anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def count(n: int, noun: str) -> str:
    """Return a text such as `1 trial` or `1,200 trials`."""
    return f"{n:,} {noun}{'s' * (n != 1)}"


def describe_best(best: Mapping[str, Any] | None, metric: str = "accuracy") -> str:
    """Return a text such as `0.9861 (trial 17)`; `best` is that of `status --json`. Only another metric is named."""
    named = "" if metric == "accuracy" else f"{metric.replace('_', ' ')} "
    return f"{named}{best['value']:.4f} (trial {best['number']})" if best else "no completed trial yet"


def describe_epochs(run: int, saved: int) -> str:
    """Return a text such as `318 trained, 132 saved by pruning (29%)`."""
    return f"{run:,} trained, {saved:,} saved by pruning ({format_percent(saved / max(run + saved, 1), 0)})"


def describe_patience(status: Mapping[str, Any]) -> str:
    """Return a text such as `7 trials since the last gain beyond chance (limit 15)`; "" without a patience."""
    n, patience = status["since_gain"], status["budget"].get("patience")
    return "" if n is None else f"{count(n, 'trial')} since the last gain beyond chance (limit {patience})"


def list_columns(hyperparameters: Iterable[str]) -> list[str]:
    """Return all columns of a study with these hyperparameters."""
    return ["trial", "state", "value", "epoch", *hyperparameters, "worker", "seconds", "note"]


def join_params(params: Mapping[str, Any]) -> str:
    """Return a text such as `depth 3, lr 1.06e-3`."""
    return ", ".join(f"{name} {shorten(value)}" for name, value in params.items())


def shorten(value: Any) -> str:
    """Return a float with three significant digits, such as `0.5` or `2.1e-3`; other values unchanged."""
    if not isinstance(value, float):
        return str(value)
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    if value == 0 or not exponent or -2 <= int(exponent) <= 2:  # no exponent: nan, inf
        return f"{value:.3g}"
    return f"{float(mantissa):g}e{int(exponent)}"


def format_cell(value: Any, column: str = "") -> str:
    """Return a value of that column of the trials as text: values with 4 digits, seconds with 1, None as ""."""
    if value is None:
        return ""
    digits = {"value": 4, "seconds": 1}.get(column)
    return shorten(value) if digits is None else f"{value:.{digits}f}"


def format_percent(share: float, digits: int = 2) -> str:
    """Return a text such as `98.61%`."""
    return f"{share:.{digits}%}"


def format_duration(seconds: float) -> str:
    """Return a text such as `45 s`, `12 min`, `3.5 h`, `2.1 d`."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48)):
        if round(seconds / size) < most:
            return f"{seconds / size:.{int(unit == 'h')}f} {unit}"
    return f"{seconds / 86400:.1f} d"
