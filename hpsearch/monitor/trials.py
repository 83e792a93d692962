"""The trials of a study as rows: filtered, sorted, with selected columns, as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from unicodedata import normalize

import optuna

from hpsearch.config.validation import did_you_mean
from hpsearch.errors import UsageError
from hpsearch.search.trials import describe_trial

_FORMULA_STARTS = tuple("=+-@")  # see OWASP's "CSV Injection"
Row = Mapping[str, Any]


def list_trials(study: optuna.Study, state: str | None, sort: str, limit: int | None) -> list[dict[str, Any]]:
    """Return the rows of the `trials` command: at most `limit` trials in `state`, sorted by a column.

    Sorting by value puts the best trial first; all other columns sort ascending. Rows without a value come last.
    """
    rows = [describe_trial(trial) for trial in study.get_trials(deepcopy=False)]
    chosen = [row for row in rows if state in (None, row["state"])]
    if sort == "value":
        # A pruned trial's value is from fewer epochs, so it ranks below every completed trial.
        chosen.sort(key=lambda row: (row["state"] != "complete", -(row["value"] or 0.0), row["number"]))
    else:
        cells = {row["number"]: flatten(row).get(sort) for row in chosen}
        chosen.sort(key=lambda row: _sort_key(cells[row["number"]]))
    return chosen[:limit]


def flatten(row: Row) -> dict[str, Any]:
    """Return the row with one column per hyperparameter in place of `params`."""
    flat: dict[str, Any] = {}
    for name, cell in row.items():
        flat |= cell if name == "params" else {name: cell}
    return flat


def list_columns(hyperparameters: Iterable[str]) -> list[str]:
    """Return all columns of a study with these hyperparameters."""
    return ["number", "state", "value", "epoch", *hyperparameters, "worker", "seconds", "note"]


def check_columns(known: Sequence[str], names: Sequence[str]) -> None:
    """Raise `UsageError` for an unknown column."""
    for name in names:
        if name not in known:
            raise UsageError(f"unknown column '{name}'; {did_you_mean(name, known)}")


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """Return the rows as CSV with a header; each cell is on one line, with formulas escaped for spreadsheets."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        flat = flatten(row)
        writer.writerow([_escape(flat.get(name)) for name in columns])
    return text.getvalue()


def _escape(cell: Any) -> Any:
    if not isinstance(cell, str):
        return cell
    line = "".join(character for character in " ".join(cell.split()) if character.isprintable())
    return f"'{line}" if normalize("NFKC", line).startswith(_FORMULA_STARTS) else line  # also full-width signs


def _sort_key(cell: Any) -> tuple[bool, bool, Any]:
    is_text = isinstance(cell, str)
    return cell is None, is_text, cell if cell is not None else 0
