"""The view of a running search: on a terminal a table, redrawn every second; in a pipe one line per trial."""

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Self

from rich.console import Console, ConsoleOptions, Group, OverflowMethod, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpsearch.errors import Drained, Interrupted, StorageError
from hpsearch.monitor.status import Snapshot, Tally, Watch
from hpsearch.monitor.tables import (
    STYLES,
    Column,
    FittedTable,
    describe_hidden,
    make_columns,
    tabulate,
    tabulate_trials,
)
from hpsearch.monitor.terminal import can_draw, is_in_foreground, keys_hidden, terminal_returned
from hpsearch.monitor.text import (
    count,
    describe_best,
    describe_epochs,
    describe_patience,
    echo,
    format_cell,
    format_duration,
    join_params,
    printable,
)
from hpsearch.search.trials import TrialEvent

_REFRESH = 1.0  # seconds between two polls of the study
_MIN_ROWS = 3  # of each list, even on a low terminal
_MAX_FAILED = 3
_NARROW = 64  # columns that the first line needs
_LEAST_BAR = 8
_CURVE_WIDTH = 12
_NAME_WIDTH = 20  # shows the end of a worker's name, which is its number
_BLOCKS, _ASCII_BLOCKS = "▁▂▃▄▅▆▇█", "_.-~=+*#"


class LiveView:
    """A context manager that shows a search: a table on a terminal, else one line per finished trial.

    The lines come from the events it is called with or, if `follows` is set, from all trials of the study. What it
    shows is a message, on stderr, or, if `follows` is set, the data itself, on stdout.
    """

    def __init__(self, watch: Watch, *, follows: bool = False) -> None:
        self.watch, self.follows = watch, follows
        self.console = Console(stderr=not follows, highlight=False)
        self.is_live = can_draw(self.console)
        self._tally = Tally(watch, gets_all=follows)
        self._running: set[int] = set()  # the trials of which this process gets the events
        self._snapshot: Snapshot | None = None
        self._trouble = self._notice = ""
        self._live, self._size = self._new_live(), self.console.size
        self._error: Exception | None = None
        self._drawing = threading.RLock()  # a signal handler draws, too
        self._ended, self._signals, self._drawn = threading.Event(), ExitStack(), ExitStack()
        self._has_terminal = False
        self._thread = threading.Thread(target=self._follow, name="live view", daemon=True)

    def __call__(self, event: TrialEvent) -> None:
        (self._running.add if event.state == "running" else self._running.discard)(event.number)
        if not self.is_live and event.state != "running":
            echo(self._tally.describe(event))

    def announce_stop(self, error: Drained) -> None:
        """Say at once that the workers were asked to stop. For signal handlers: what they interrupt may be printing."""
        what = f": saving {count(len(self._running), 'running trial')}" if self._running else ""
        hint = " (Ctrl-C again to force)" if isinstance(error, Interrupted) else ""
        self._notice = f"Stopping{what}{hint}"
        if self.is_live:
            self._draw()
        else:
            with suppress(OSError):  # the reader of the pipe may have ended by the same signal
                os.write(2, f"{self._notice}\n".encode())

    def print_finished(self) -> None:
        """In a pipe, print one line for each trial that ended since the last call."""
        if not self.is_live:
            with suppress(StorageError):  # the workers retry as well
                for event in self.watch.poll().news:
                    self(event)

    def __enter__(self) -> Self:
        if self.is_live:
            self._signals.enter_context(terminal_returned(self._release, self._draw))
            self._draw()
        else:
            self._tally.read()
        if self.is_live or self.follows:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._drawing:
            self._ended.set()  # the thread may wait for a locked database, but stops drawing
        self._release()
        self._signals.close()

    def wait(self) -> None:
        """Wait until the search is over. Raises the error that stopped the view, e.g. a closed pipe."""
        self._thread.join()
        if self._error:
            raise self._error

    def _follow(self) -> None:
        try:
            while not self._ended.wait(_REFRESH if self._snapshot or self._trouble else 0):
                try:
                    self._snapshot, self._trouble = self.watch.poll(), ""
                except StorageError as error:  # the workers retry as well
                    if not self._trouble and not self.is_live:
                        echo(str(error))
                    self._trouble = str(error)
                snapshot = self._snapshot
                if self.is_live:
                    self._draw()
                elif snapshot and not self._trouble:
                    for event in snapshot.news:
                        print(self._tally.describe(event), flush=True)
                if self.follows and snapshot and not snapshot.n_alive and (snapshot.is_over or snapshot.is_stopped):
                    return
        except Exception as error:  # noqa: BLE001 - an error of the view must not end the search
            self._error = error

    def _new_live(self) -> Live:
        return Live(console=self.console, auto_refresh=False, transient=not self.follows)

    def _release(self) -> None:
        """Give the terminal back as it was."""
        with self._drawing:
            self._has_terminal = False
            self._drawn.close()

    def _draw(self) -> None:
        with self._drawing:
            if self._ended.is_set() or not is_in_foreground(self.console.file):  # as after `bg`
                return
            if not self._has_terminal:
                self._has_terminal, self._live = True, self._new_live()
                self._drawn.enter_context(keys_hidden())
                self._drawn.callback(lambda: self._live.stop())
                self._live.start()
            if self.console.size != self._size:  # terminals differ in how they reflow the old table
                self._live.stop()
                self.console.clear()
                self._live, self._size = self._new_live(), self.console.size
                self._live.start()
            if self._snapshot:
                is_own = not self.follows
                table: RenderableType = SnapshotTable(self._snapshot, self._trouble, self._notice, is_own=is_own)
            else:
                table = "\n".join(filter(None, (self._notice, self._trouble)))
            self._live.update(table, refresh=True)


@dataclass(frozen=True)
class SnapshotTable:
    """A snapshot as a table that fits the console; `trouble` says why there is no newer one, `notice` what happens now.

    `is_own` is set if this process runs the search; then the table does not report missing workers.
    """

    snapshot: Snapshot
    trouble: str = ""
    notice: str = ""
    is_own: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        snapshot = self.snapshot
        cut: OverflowMethod = "crop" if options.ascii_only else "ellipsis"
        head = _render_head(snapshot, options.max_width, cut, is_own=self.is_own)
        # Two lines above the finished trials, and one each that is blank, names hidden columns, and stays empty.
        n_rows = options.max_height - len(console.render_lines(head, options)) - 5
        n_rows -= bool(self.trouble) + bool(self.notice)
        failed = snapshot.failed[: min(max(n_rows - 11, 1), _MAX_FAILED)]
        n_rows -= len(failed) and len(failed) + 1
        n_workers = min(len(snapshot.workers), max(n_rows // 2, _MIN_ROWS))
        hidden: list[Column] = []
        yield head
        yield ""
        if snapshot.workers:
            blocks = _ASCII_BLOCKS if options.ascii_only else _BLOCKS
            table, more = _tabulate_workers(snapshot, n_workers, blocks).fit(options)
            hidden += more
            yield table
            if len(snapshot.workers) > n_workers:
                yield Text(f"and {len(snapshot.workers) - n_workers} more", style="dim")
            yield ""
            n_rows -= n_workers + 4
        if snapshot.finished:
            rows = snapshot.finished[: max(n_rows, _MIN_ROWS)]
            table, more = tabulate_trials(rows, snapshot.hyperparameters).fit(options)
            hidden += more
            yield table
        if hidden:
            yield _one_line(describe_hidden(hidden), cut, style="dim")
        if failed:
            yield ""
        for row in failed:
            yield _one_line(f"trial {row['number']} failed: {row['note']}", cut, style="red")
        if self.trouble:
            yield _one_line(self.trouble, cut, style="bold red")
        if self.notice:
            yield _one_line(self.notice, cut, style="bold yellow")


def _render_head(snapshot: Snapshot, width: int, cut: OverflowMethod, *, is_own: bool) -> RenderableType:
    status = snapshot.status
    counts, epochs, best = status["trials"], status["epochs"], status["best"]
    n_trials = status["budget"]["trials"]
    name, progress = Text(status["study"], style="bold"), f"{snapshot.n_finished} of {n_trials}"
    time = _format_time_left(snapshot, is_own=is_own)
    is_narrow = width < _NARROW
    head = Table.grid(padding=(0, 2))
    if is_narrow:
        head.add_row("study", name)
        head.add_row("done", Text(f"{progress}, ") + time)
    else:
        name.truncate(width - _LEAST_BAR - len(progress) - time.cell_len - 6, overflow=cut)
        top = Table.grid(padding=(0, 2), expand=True)
        for column in ({}, {"ratio": 1}, {}, {"justify": "right"}):
            top.add_column(no_wrap=True, **column)
        done = min(snapshot.n_finished, n_trials)
        bar = ProgressBar(total=n_trials, completed=done, complete_style="cyan", finished_style="green")
        top.add_row(name, bar, progress, time)
    states = [Text(f"{n} {state}", style=STYLES.get(state, "") if n else "dim") for state, n in counts.items()]
    head.add_row("trials", Text(", ").join(states))
    if not is_narrow:
        head.add_row("epochs", describe_epochs(**epochs))
    if (patience := describe_patience(status)) and not is_narrow:
        head.add_row("patience", patience)
    value = Text(describe_best(best, snapshot.status["metric"]), style="bold green" if best else "")
    if best and not is_narrow:
        value.append(f"  {join_params(best['params'])}", style="not bold default")
    head.add_row("best", value)
    return head if is_narrow else Group(top, head)


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


def _tabulate_workers(snapshot: Snapshot, n_shown: int, blocks: str) -> FittedTable:
    epochs, workers = snapshot.status["budget"]["epochs"], snapshot.workers
    values = [value for worker in workers for value in worker["curve"]]
    ends = (min(values), max(values)) if values else (0.0, 1.0)
    rows = []
    for worker in workers[:n_shown]:
        curve = "not responding" if worker["is_lost"] else draw_curve(worker["curve"], ends, blocks)
        speed = "" if worker["images_per_second"] is None else f"{worker['images_per_second']:,}"
        row = {"worker": worker["worker"][-_NAME_WIDTH:], "trial": str(worker["trial"])}
        row |= {"epoch": f"{worker['epoch']}/{epochs}", "value": format_cell(worker["accuracy"], "value")}
        rows.append(row | {"curve": f"{curve:{_CURVE_WIDTH}}", "images/s": speed})
    chosen = make_columns([worker["params"] for worker in workers[:n_shown]], snapshot.hyperparameters)
    return FittedTable([*tabulate(rows, texts={"worker", "curve"}).columns, *chosen])


def draw_curve(values: Sequence[float], ends: tuple[float, float], blocks: str = _BLOCKS) -> str:
    """Return a sparkline scaled between `ends`, with one block per value; long curves are sampled to fit."""
    low, high = ends
    step = max(len(values) / _CURVE_WIDTH, 1)
    n_shown = min(len(values), _CURVE_WIDTH)
    shown = [values[min(int((i + 1) * step) - 1, len(values) - 1)] for i in range(n_shown)]
    top = len(blocks) - 1
    return "".join(blocks[round((value - low) / ((high - low) or 1) * top)] for value in shown)


def _one_line(text: str, cut: OverflowMethod, style: str) -> Text:
    return Text(printable(" ".join(text.split())), style=style, no_wrap=True, overflow=cut)
