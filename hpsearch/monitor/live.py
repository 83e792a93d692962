"""The view of a running search: on a terminal a table, redrawn every second; in a pipe one line per trial."""

import os
import sys
import termios
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO, Any, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, OverflowMethod, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpsearch.errors import StorageError
from hpsearch.monitor.status import Snapshot, Watch
from hpsearch.monitor.text import (
    count,
    describe_best,
    describe_epochs,
    echo,
    format_cell,
    format_duration,
    join_params,
    printable,
    trial_line,
)
from hpsearch.search.trials import TrialEvent

_REFRESH = 1.0  # seconds between two polls of the study
_MIN_ROWS = 3  # of each list, even on a low terminal
_MAX_FAILED = 3
_WIDE = 120  # columns from which the workers' hyperparameters fit
_CURVE_WIDTH = 12
_NAME_WIDTH = 20  # shows the end of a worker's name, which is its number
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
_RIGHT = {"justify": "right"}
_STYLES = {"complete": "green", "pruned": "yellow", "failed": "red"}


class LiveView:
    """A context manager that shows a search: a table on a terminal, else one line per finished trial.

    The lines come from the events it is called with or, if `follows` is set, from all trials of the study. What it
    shows is a message, on stderr, or, if `follows` is set, the data itself, on stdout.
    """

    def __init__(self, watch: Watch, *, follows: bool = False) -> None:
        self.watch, self.follows = watch, follows
        self.console = console = Console(stderr=not follows, highlight=False)
        # With FORCE_COLOR set, Rich takes any stream for a terminal.
        is_terminal = console.is_terminal and console.file.isatty() and not console.is_dumb_terminal
        self.is_live = is_terminal and _is_in_foreground(console.file)
        self._live, self._size = self._new_live(), console.size
        self._error: Exception | None = None
        self._drawing = threading.Lock()
        self._ended, self._restores = threading.Event(), ExitStack()
        self._thread = threading.Thread(target=self._follow, name="live view", daemon=True)

    def __call__(self, event: TrialEvent) -> None:
        if not self.is_live and event.state != "running":
            echo(trial_line(event))

    def start(self, n_workers: int) -> None:
        """In a pipe, print the progress before the first worker starts."""
        if not self.is_live:
            snapshot = self.watch.poll()
            n_trials = snapshot.status["budget"]["trials"]
            echo(f"{snapshot.n_finished} of {n_trials} trials done; starting {count(n_workers, 'worker')}")

    def print_finished(self) -> None:
        """In a pipe, print one line for each trial that ended since the last call."""
        if not self.is_live:
            with suppress(StorageError):  # the workers retry as well
                for event in self.watch.poll().news:
                    self(event)

    def __enter__(self) -> Self:
        if self.is_live:
            self._restores.enter_context(_no_echo_of_control_keys())
            self._restores.callback(lambda: self._live.stop())
            self._live.start()
        if self.is_live or self.follows:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._drawing:
            self._ended.set()  # the thread may wait for a locked database, but stops drawing
        self._restores.close()

    def wait(self) -> None:
        """Wait until the search is over. Raises the error that stopped the view, e.g. a closed pipe."""
        self._thread.join()
        if self._error:
            raise self._error

    def _follow(self) -> None:
        snapshot, trouble = None, ""
        try:
            while not self._ended.wait(_REFRESH if snapshot or trouble else 0):
                try:
                    snapshot, trouble = self.watch.poll(), ""
                except StorageError as error:  # the workers retry as well
                    if not trouble and not self.is_live:
                        echo(str(error))
                    trouble = str(error)
                if self.is_live:
                    self._draw(SnapshotTable(snapshot, trouble, is_own=not self.follows) if snapshot else trouble)
                elif snapshot and not trouble:
                    for event in snapshot.news:
                        print(trial_line(event), flush=True)
                if self.follows and snapshot and not snapshot.n_alive and (snapshot.is_over or snapshot.is_stopped):
                    return
        except Exception as error:  # noqa: BLE001 - an error of the view must not end the search
            self._error = error

    def _new_live(self) -> Live:
        return Live(console=self.console, auto_refresh=False, transient=not self.follows)

    def _draw(self, table: "SnapshotTable | str") -> None:
        with self._drawing:
            if self._ended.is_set():
                return
            if self.console.size != self._size:  # terminals differ in how they reflow the old table
                self._live.stop()
                self.console.clear()
                self._live, self._size = self._new_live(), self.console.size
                self._live.start()
            self._live.update(table, refresh=True)


def _is_in_foreground(stream: IO[str]) -> bool:
    """Return whether this process is in the foreground of the terminal; a background job must not touch it."""
    try:
        return os.tcgetpgrp(stream.fileno()) == os.getpgrp()
    except OSError:  # no terminal with job control
        return True


@contextmanager
def _no_echo_of_control_keys() -> Iterator[None]:
    """Hide the `^C` that a terminal echoes at the cursor: it would move the table by a line."""
    if not sys.stdin or not sys.stdin.isatty() or not _is_in_foreground(sys.stdin):
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before[:3], before[3] & ~termios.ECHOCTL, *before[4:]]
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal may be closed
            if _is_in_foreground(sys.stdin):  # otherwise the shell has set its own modes
                termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


@dataclass(frozen=True)
class SnapshotTable:
    """A snapshot as a table that fits the console; `trouble` says why there is no newer one.

    `is_own` is set if this process runs the search; then the table does not report missing workers.
    """

    snapshot: Snapshot
    trouble: str = ""
    is_own: bool = False

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot, width = self.snapshot, options.max_width
        cut: OverflowMethod = "crop" if options.ascii_only else "ellipsis"
        n_failed = min(len(snapshot.failed), _MAX_FAILED)
        n_rows = options.max_height - 10 - (n_failed and n_failed + 1) - bool(self.trouble)
        n_workers = min(len(snapshot.workers), max(n_rows // 2, _MIN_ROWS))
        yield _render_head(snapshot, is_own=self.is_own)
        yield ""
        if snapshot.workers:
            blocks = _ASCII_BLOCKS if options.ascii_only else _BLOCKS
            yield _render_workers(snapshot, n_workers, blocks, cut, is_wide=width >= _WIDE)
            yield ""
            n_rows -= n_workers + 3
        if snapshot.finished:
            yield _render_finished(snapshot.finished[: max(n_rows, _MIN_ROWS)], cut, is_wide=width >= _WIDE)
        if n_failed:
            yield ""
        for row in snapshot.failed[:n_failed]:
            yield _one_line(f"trial {row['number']} failed: {row['note']}", cut, style="red")
        if self.trouble:
            yield _one_line(self.trouble, cut, style="bold red")


def _render_head(snapshot: Snapshot, *, is_own: bool) -> RenderableType:
    status = snapshot.status
    counts, epochs, best = status["trials"], status["epochs"], status["best"]
    n_trials = status["budget"]["trials"]
    top = Table.grid(padding=(0, 2), expand=True)
    for column in ({}, {"ratio": 1}, {}, {"justify": "right"}):
        top.add_column(no_wrap=True, **column)
    done = min(snapshot.n_finished, n_trials)
    bar = ProgressBar(total=n_trials, completed=done, complete_style="cyan", finished_style="green")
    top.add_row(
        Text(status["study"], style="bold"),
        bar,
        f"{snapshot.n_finished} of {n_trials}",
        _format_time_left(snapshot, is_own=is_own),
    )
    head = Table.grid(padding=(0, 2))
    states = [Text(f"{n} {state}", style=_STYLES.get(state, "") if n else "dim") for state, n in counts.items()]
    head.add_row("trials", Text(", ").join(states))
    head.add_row("epochs", describe_epochs(**epochs))
    value = Text(describe_best(best), style="bold green" if best else "")
    if best:
        value.append(f"  {join_params(best['params'])}", style="not bold default")
    head.add_row("best", value)
    return Group(top, head)


def _format_time_left(snapshot: Snapshot, *, is_own: bool) -> Text:
    spent = f"elapsed {format_duration(snapshot.seconds)}"
    if snapshot.is_over:
        return Text(spent)
    if snapshot.is_stopped:
        return Text(f"{spent}, stopped", style="yellow")
    if not snapshot.n_alive and not is_own:
        return Text(f"{spent}, no workers running", style="yellow")
    return Text(f"{spent}, {_format_range(*snapshot.seconds_left)} left" if snapshot.seconds_left else spent)


def _format_range(low: float, high: float) -> str:
    (low_number, low_unit), (high_number, high_unit) = (format_duration(seconds).split() for seconds in (low, high))
    if low_unit != high_unit:
        return f"{low_number} {low_unit} to {high_number} {high_unit}"
    return f"{high_number} {high_unit}" if low_number == high_number else f"{low_number} to {high_number} {high_unit}"


def _render_workers(snapshot: Snapshot, n_shown: int, blocks: str, cut: OverflowMethod, *, is_wide: bool) -> Table:
    epochs, workers = snapshot.status["budget"]["epochs"], snapshot.workers
    columns: dict[str, dict[str, Any]] = {"worker": {}, "trial": _RIGHT, "epoch": _RIGHT, "val. acc.": _RIGHT}
    columns |= {"curve": {"min_width": _CURVE_WIDTH}, "images/s": _RIGHT}
    columns |= {"params": {"ratio": 1, "overflow": cut}} if is_wide else {}
    table = _new_table(columns, expand=is_wide)
    values = [value for worker in workers for value in worker["curve"]]
    ends = (min(values), max(values)) if values else (0.0, 1.0)
    for worker in workers[:n_shown]:
        name, epoch = printable(worker["worker"][-_NAME_WIDTH:]), f"{worker['epoch']}/{epochs}"
        curve = "not responding" if worker["is_lost"] else draw_curve(worker["curve"], ends, blocks)
        speed = "" if worker["images_per_second"] is None else f"{worker['images_per_second']:,}"
        accuracy, params = format_cell(worker["accuracy"], "value"), Text(join_params(worker["params"]), style="dim")
        row: list[str | Text] = [Text(name), str(worker["trial"]), epoch, accuracy, curve, speed]
        table.add_row(*row, *([params] if is_wide else []))
    if len(workers) > n_shown:
        table.add_row(f"and {len(workers) - n_shown} more", style="dim")
    return table


def draw_curve(values: Sequence[float], ends: tuple[float, float], blocks: str = _BLOCKS) -> str:
    """Return a sparkline scaled between `ends`, with one block per value; long curves are sampled to fit."""
    low, high = ends
    step = max(len(values) / _CURVE_WIDTH, 1)
    n_shown = min(len(values), _CURVE_WIDTH)
    shown = [values[min(int((i + 1) * step) - 1, len(values) - 1)] for i in range(n_shown)]
    top = len(blocks) - 1
    return "".join(blocks[round((value - low) / ((high - low) or 1) * top)] for value in shown)


def _render_finished(rows: Sequence[Mapping[str, Any]], cut: OverflowMethod, *, is_wide: bool) -> Table:
    columns: dict[str, dict[str, Any]] = {"trial": _RIGHT, "state": {}, "val. acc.": _RIGHT, "epochs": _RIGHT}
    columns |= {"time (s)": _RIGHT} if is_wide else {}
    table = _new_table(columns | {"": {"ratio": 1, "overflow": cut}}, expand=True)
    for row in rows:
        names = ("value", "epoch", *(["seconds"] if is_wide else []))
        note = Text(printable(row["note"])) if row["note"] else Text(join_params(row["params"]), style="dim")
        state = Text(row["state"], style=_STYLES[row["state"]])
        table.add_row(str(row["number"]), state, *(format_cell(row[name], name) for name in names), note)
    return table


def _new_table(columns: Mapping[str, dict[str, Any]], *, expand: bool) -> Table:
    """Return a table without rows; `columns` maps each heading to the options of its column."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), expand=expand)
    for heading, settings in columns.items():
        table.add_column(heading, no_wrap=True, **settings)
    return table


def _one_line(text: str, cut: OverflowMethod, style: str) -> Text:
    return Text(printable(" ".join(text.split())), style=style, no_wrap=True, overflow=cut)
