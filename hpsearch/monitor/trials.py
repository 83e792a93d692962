"""The trials of a study as rows: described, sorted, with the columns that are wanted, as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unicodedata import normalize

import optuna

from hpsearch.config.validation import did_you_mean
from hpsearch.errors import UsageError
from hpsearch.search.trials import describe_trial

_FORMULA_STARTS = tuple("=+-@")  # what spreadsheets take for a formula, by OWASP's "CSV Injection"
Row = Mapping[str, Any]


def list_trials(study: optuna.Study, state: str | None, sort: str, limit: int | None) -> list[dict[str, Any]]:
    """The rows of `trials`: those in a state, sorted by a column, at most `limit`.

    By value the best comes first, by any other column the least; rows without a value come last.
    """
    rows = [describe_trial(trial) for trial in study.get_trials(deepcopy=False)]
    chosen = [row for row in rows if state in (None, row["state"])]
    if sort == "value":
        # A pruned trial's value is from fewer epochs, so it never stands above a complete one.
        chosen.sort(key=lambda row: (row["state"] != "complete", -(row["value"] or 0.0), row["number"]))
    else:
        cells = {row["number"]: flatten(row).get(sort) for row in chosen}
        chosen.sort(key=lambda row: _sort_key(cells[row["number"]]))
    return chosen[:limit]


def flatten(row: Row) -> dict[str, Any]:
    """The row with a column for each hyperparameter, where the first of the two tables was."""
    flat: dict[str, Any] = {}
    for name, cell in row.items():
        flat |= cell if name == "params" else {name: cell}
    return flat


def list_columns(hyperparameters: Iterable[str]) -> list[str]:
    """The columns of rows that have these hyperparameters."""
    return ["number", "state", "value", "epoch", *hyperparameters, "worker", "seconds", "note"]


def check_columns(known: Sequence[str], names: Sequence[str]) -> None:
    """Raise `UsageError` for a column that is not known."""
    for name in names:
        if name not in known:
            raise UsageError(f"no column '{name}'; {did_you_mean(name, known)}")


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """The columns of the rows as CSV with a heading; each cell is on one line, and no formula to a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        flat = flatten(row)
        writer.writerow([_defuse(flat.get(name)) for name in columns])
    return text.getvalue()


def _defuse(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    line = "".join(character for character in " ".join(cell.split()) if character.isprintable())
    return f"'{line}" if normalize("NFKC", line).startswith(_FORMULA_STARTS) else line  # signs of full width count, too


def _sort_key(cell: Any) -> tuple[bool, bool, Any]:
    is_text = isinstance(cell, str)
    return cell is None, is_text, cell if cell is not None else 0
