"""The steps of a command: on a terminal a bar for each, with the time left; in a pipe lines."""

from contextlib import ExitStack
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from hpsearch.monitor.terminal import can_draw, keys_hidden, terminal_returned
from hpsearch.monitor.text import echo, format_duration


class Steps:
    """A context manager that is called with each step of a command, and shows how far it is on stderr."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
        self._columns = (TextColumn("{task.description}"), BarColumn(), _Count(), _TimeLeft())
        self._bars = Progress(*self._columns, console=self._console, refresh_per_second=4)
        self._is_live = can_draw(self._console)
        self._signals, self._drawn = ExitStack(), ExitStack()
        self._name, self._task = "", TaskID(0)

    def __call__(self, name: str, n_done: int = 0, n_total: int | None = None, *, line: str = "") -> None:
        """Show that `n_done` of `n_total` parts of a step are done; the steps before are. In a pipe, print the line."""
        if not self._is_live:
            return echo(line) if line else None
        if name != self._name:
            self._finish()
            self._name, self._task = name, self._bars.add_task(name, total=n_total)
        return self._bars.update(self._task, completed=n_done, total=n_total)

    def __enter__(self) -> Self:
        if self._is_live:
            self._signals.enter_context(terminal_returned(self._drawn.close, self._draw))
            self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._finish()
        self._drawn.close()
        self._signals.close()

    def _draw(self) -> None:
        if can_draw(self._console):  # not after `bg`
            self._drawn.enter_context(keys_hidden())
            self._drawn.callback(self._bars.stop)
            self._bars.start()

    def _finish(self) -> None:
        for task in self._bars.tasks:
            if not task.finished:
                self._bars.update(task.id, completed=task.total or 1, total=task.total or 1)


class _Count(MofNCompleteColumn):
    """Such as `3/15`; nothing for a step without parts."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total and task.total > 1 else Text()


class _TimeLeft(ProgressColumn):
    """Such as `12 s left`; the time taken at the end, and of a step without parts."""

    def render(self, task: Task) -> Text:
        left, taken = task.time_remaining, task.finished_time or task.elapsed or 0
        return Text(format_duration(taken) if left is None or task.finished else f"{format_duration(left)} left")
