"""The trials and the progress of a study as documents and rows: filtered, sorted, with selected columns, as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any
from unicodedata import normalize

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.urls import show_url
from hpsearch.config.validation import did_you_mean
from hpsearch.errors import UsageError
from hpsearch.search.selection import find_trial
from hpsearch.search.study import count_validation
from hpsearch.search.trials import explain_end, find_value, name_state
from hpsearch.storage.budget import measure_trial
from hpsearch.storage.gains import judge_trial, measure_progress
from hpsearch.storage.tables import by_value, count_interruptions, rank

_FORMULA_STARTS = tuple("=+-@")  # see OWASP's "CSV Injection"
Row = Mapping[str, Any]


def describe_interruption(interruption: Mapping[str, Any]) -> str:
    """Return a text such as `killed: no heartbeat for 60 s (worker host-0, epoch 3)`."""
    where = f"worker {interruption['worker']}, epoch {interruption['epoch']}"
    return f"{interruption['kind']}: {interruption['message']} ({where})"


def describe_trial(trial: FrozenTrial) -> dict[str, Any]:
    """Return the row of a trial in `trials --json`."""
    return {
        "number": trial.number,
        "state": name_state(trial),
        "value": find_value(trial) if trial.state.is_finished() else None,
        "epoch": trial.last_step or 0,
        "params": trial.params or trial.system_attrs.get("fixed_params", {}),
        "attempts": count_interruptions(trial) + (trial.state != TrialState.WAITING),
        "worker": trial.user_attrs.get("worker"),
        "seconds": measure_trial(trial),
        "note": explain_end(trial),
    }


def describe_in_full(study: optuna.Study, number: int) -> dict[str, Any]:
    """Return the document of `trials STUDY 17 --json`: a trial's row, times, reports, interruptions and environment.

    Raises `UsageError` if the study has no trial with that number.
    """
    trial = find_trial(study, number)
    attributes, times = trial.user_attrs, (trial.datetime_start, trial.datetime_complete)
    started, ended = (time and time.astimezone().isoformat(timespec="seconds") for time in times)
    return describe_trial(trial) | {
        "metric": study.user_attrs.get("identity", {}).get("study.metric", "accuracy"),
        "accuracy": attributes.get("accuracy"),
        "started": started,
        "ended": ended,
        "reports": {str(epoch): value for epoch, value in sorted(trial.intermediate_values.items())},
        "images_per_second": attributes.get("images_per_second"),
        "interruptions": attributes.get("interruptions", []),
        "resumed_after": attributes.get("resumed_after"),
        "failure": attributes.get("failure"),
        "pruning": attributes.get("pruning") if trial.state == TrialState.PRUNED else None,
        "environment": attributes.get("environment"),
    }


def read_status(
    definition: StudyDefinition, study: optuna.Study, trials: list[FrozenTrial] | None = None
) -> dict[str, Any]:
    """Return the document of `status --json`: trial counts, the best trial, workers, epochs run and saved.

    `since_gain` is the number of trials that `budget.patience` counts, or None without it. Pass `trials` if the study's
    trials are already loaded.
    """
    trials = study.get_trials(deepcopy=False) if trials is None else trials
    of = {state: [trial for trial in trials if trial.state == state] for state in TrialState}
    pruned, full = of[TrialState.PRUNED], definition.budget.epochs
    best = min(of[TrialState.COMPLETE], key=by_value, default=None)
    since_gain = None
    if "patience" in study.user_attrs["budget"]:
        judged = filter(None, map(judge_trial, trials))
        since_gain = measure_progress(judged, count_validation(definition, study)).n_since_gain
    # In older studies, a retried trial includes the epochs of the failed ones that it continues.
    superseded = {number for trial in trials for number in trial.user_attrs.get("attempts", ())}
    return {
        "study": study.study_name,
        "storage": show_url(definition.study.storage),
        "metric": definition.study.metric,
        "budget": study.user_attrs["budget"],
        "trials": {
            "complete": len(of[TrialState.COMPLETE]),
            "pruned": len(pruned),
            "failed": len(of[TrialState.FAIL]),
            "running": len(of[TrialState.RUNNING]),
            "waiting": len(of[TrialState.WAITING]),
        },
        "since_gain": since_gain,
        "best": best and {"number": best.number, "value": best.value, "params": best.params},
        "workers": [
            {"id": trial.user_attrs.get("worker"), "trial": trial.number, "epoch": trial.last_step or 0}
            for trial in of[TrialState.RUNNING]
        ],
        "epochs": {
            "run": sum(trial.last_step or 0 for trial in trials if trial.number not in superseded),
            "saved": sum(full - (trial.last_step or 0) for trial in pruned),
        },
    }


def list_trials(study: optuna.Study, state: str | None, sort: str, limit: int | None) -> list[dict[str, Any]]:
    """Return the rows of the `trials` command: at most `limit` trials in `state`, sorted by a column.

    Sorting by value puts the best trial first; all other columns sort ascending. Rows without a value come last.
    """
    rows = [describe_trial(trial) for trial in study.get_trials(deepcopy=False)]
    chosen = [row for row in rows if state in (None, row["state"])]
    if sort == "value":
        # A pruned trial's value is from fewer epochs, so it ranks below every completed trial.
        chosen.sort(key=lambda row: (row["state"] != "complete", *rank(row["value"], row["number"])))
    else:
        chosen.sort(key=lambda row: _sort_key(flatten(row).get(sort)))
    return chosen[:limit]


def flatten(row: Row) -> dict[str, Any]:
    """Return the row with one column per hyperparameter in place of `params`, and `number` also as `trial`."""
    flat: dict[str, Any] = {"trial": row["number"]}
    for name, cell in row.items():
        flat |= cell if name == "params" else {name: cell}
    return flat


def check_columns(known: Sequence[str], names: Sequence[str]) -> None:
    """Raise `UsageError` for an unknown column. `number`, which `trials --json` prints, is the column `trial`."""
    for name in names:
        if name not in (*known, "number"):
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
    return cell is None, isinstance(cell, str), 0 if cell is None else cell
