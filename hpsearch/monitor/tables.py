"""Tables that fit the console: where the width is short, they leave out columns, never digits."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from hpsearch.monitor.text import format_cell, list_columns, printable
from hpsearch.monitor.trials import flatten

STYLES = {"complete": "green", "pruned": "yellow", "failed": "red"}
_TEXTS = ("state", "worker", "note")
_LEAST = 12  # characters of a column that may be cut


@dataclass(frozen=True)
class Column:
    """A column of a table: its heading, and a cell for each row. Numbers are right-aligned, texts are not.

    Only the cells of a column that `may_be_cut` lose their ends, and it has at least 12 characters.
    """

    heading: str
    cells: Sequence[str | Text]
    is_text: bool = False
    may_be_cut: bool = False

    @property
    def width(self) -> int:
        return max(self.as_text(cell).cell_len for cell in (self.heading, *self.cells))

    @property
    def least_width(self) -> int:
        return min(self.width, max(_LEAST, len(self.heading))) if self.may_be_cut else self.width

    @staticmethod
    def as_text(cell: str | Text) -> Text:
        return cell if isinstance(cell, Text) else Text(printable(cell))


@dataclass(frozen=True)
class FittedTable:
    """A table of the columns that fit the console, and a line below that names the others and says `hint`.

    The columns that do not fit are left out from the right, or follow as another table below if `continues` is set.
    The first column is always shown. The row of the number `emphasized` is bold.
    """

    columns: Sequence[Column]
    hint: str = ""
    continues: bool = False
    emphasized: int | None = None

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> RenderResult:
        table, hidden = self.fit(options)
        yield table
        if hidden and self.continues:
            yield ""
            yield FittedTable([self.columns[0], *hidden], continues=True)
        elif hidden:
            yield Text(describe_hidden(hidden) + self.hint, style="dim")

    def fit(self, options: ConsoleOptions) -> tuple[Table, Sequence[Column]]:
        """Return the table of the columns that fit, and the columns that do not."""
        widths = [column.least_width for column in self.columns]
        gap = 2 if sum(widths) + 2 * (len(widths) - 1) <= options.max_width else 1
        n_shown = len(widths)
        while n_shown > 1 + self.continues and sum(widths[:n_shown]) + gap * (n_shown - 1) > options.max_width:
            n_shown -= 1
        left = max(options.max_width - sum(widths[:n_shown]) - gap * (n_shown - 1), 0)
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, gap - 1, 0, 0), pad_edge=False)
        for column, width in zip(self.columns[:n_shown], widths, strict=False):
            more = min(column.width - width, left)
            left -= more
            table.add_column(
                Text(printable(column.heading)),
                justify="left" if column.is_text else "right",
                width=width + more,
                overflow="crop" if options.ascii_only else "ellipsis",
                no_wrap=True,
            )
        for i, row in enumerate(zip(*(column.cells for column in self.columns[:n_shown]), strict=True)):
            table.add_row(*map(Column.as_text, row), style="bold" if i == self.emphasized else None)
        return table, self.columns[n_shown:]


def tabulate(
    rows: Sequence[Mapping[str, str]],
    texts: Collection[str] = (),
    names: Collection[str] = (),
    emphasized: int | None = None,
) -> FittedTable:
    """Return a table of these rows, which map headings to cells.

    The columns in `texts` and `names` are not right-aligned, and those in `names` may be cut.
    """
    columns = [
        Column(heading, [row[heading] for row in rows], heading in {*texts, *names}, may_be_cut=heading in names)
        for heading in rows[0]
    ]
    return FittedTable(columns, emphasized=emphasized)


def describe_hidden(columns: Sequence[Column]) -> str:
    """Return a text such as `no room for: momentum, dropout`."""
    return f"no room for: {', '.join(dict.fromkeys(printable(column.heading) for column in columns))}"


def tabulate_trials(
    rows: Sequence[Mapping[str, Any]],
    hyperparameters: Iterable[str],
    columns: Sequence[str] = (),
    hint: str = "; see --columns",
) -> FittedTable:
    """Return a table of the rows of `list_trials`, whose headings are the names of its columns.

    By default, it has all columns but `worker`, and a note only if there is one.
    """
    unwanted = ("worker",) if any(row["note"] for row in rows) else ("worker", "note")
    names = columns or [name for name in list_columns(hyperparameters) if name not in unwanted]
    return FittedTable(make_columns([flatten(row) for row in rows], names), hint)


def make_columns(rows: Sequence[Mapping[str, Any]], names: Iterable[str]) -> list[Column]:
    """Return columns of rows that `flatten` returned, or of hyperparameters."""
    return [_make_column(name, [row.get(name) for row in rows]) for name in names]


def _make_column(name: str, values: Sequence[Any]) -> Column:
    texts = [format_cell(value, name) for value in values]
    cells = [Text(text, STYLES.get(text, "")) for text in texts] if name == "state" else texts
    is_text = name in _TEXTS or any(isinstance(value, str) for value in values)
    return Column(name, cells, is_text, may_be_cut=name == "note")
