"""Checks the budget of a study in the transaction that starts a trial, so that it is exact.

Other transactions that start trials of the study wait until this one ends.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

from sqlalchemy import Connection

from hpsearch.errors import BudgetInFlight, BudgetSpent, Stopped, TooManyFailures
from hpsearch.storage import tables

Span = tuple[datetime, datetime]


@dataclass
class SearchTime:
    """The time spans of the trials up to the id `until`, which have all ended, so that the spans are final."""

    until: int = 0
    spans: list[Span] = field(default_factory=list)


def admit(connection: Connection, study_id: int, searched: SearchTime) -> int:
    """Return the number of trials of the study if the budget allows another trial to run.

    Otherwise raises `BudgetSpent` or `TooManyFailures`, which are final; `Stopped`, final until the study is run again;
    or `BudgetInFlight` if running trials may use up the rest of the budget. Raises `KeyError` for an unknown study.
    """
    tables.lock_study(connection, study_id)
    spent = tables.read_spent(connection, study_id)  # a new statement sees the latest commits
    budget: dict[str, Any] = json.loads(spent.budget or "{}")
    n_trials = spent.n_trials or 0
    n_finished = n_trials - spent.running - spent.waiting - spent.fail
    best = tables.read_best_value(connection, study_id, budget["target"]) if "target" in budget else None
    minutes = read_seconds_searched(connection, study_id, searched) / 60 if "minutes" in budget else 0.0
    failures: list[dict[str, Any]] = []
    if spent.fail >= budget.get("failures", math.inf):
        failures = [failure for failure in tables.read_failures(connection, study_id) if is_final(failure)]
    match find_limit(budget, n_finished=n_finished, best=best, minutes=minutes, n_failed=len(failures)):
        case "trials":
            limit = budget["trials"]
            raise BudgetSpent(f"all {limit} trials are finished; add more with: hpsearch extend STUDY --trials N")
        case "target":
            raise BudgetSpent(f"target reached: best value {best:.4f} >= {budget['target']}")
        case "minutes":
            raise BudgetSpent(f"time limit reached ({minutes:.1f} min); raise budget.minutes to continue")
        case "failures":
            last = f"{failures[-1].get('kind', 'unknown')}: {failures[-1].get('message', '')}"
            raise TooManyFailures(
                f"{len(failures)} trials failed, most recently: {' '.join(last.split())}; fix the cause, then raise "
                "budget.failures to continue"
            )
    if json.loads(spent.stopped or "false"):
        raise Stopped
    if "trials" in budget and n_finished + spent.running >= budget["trials"]:
        raise BudgetInFlight
    return int(n_trials)


def find_limit(
    budget: Mapping[str, Any], *, n_finished: int, best: float | None, minutes: float, n_failed: int
) -> str | None:
    """Return the limit of the budget that is reached: "trials", "target", "minutes" or "failures"; else None."""
    reached = {"trials": n_finished, "target": best, "minutes": minutes, "failures": n_failed}
    limits = ((name, value) for name, value in reached.items() if name in budget and value is not None)
    return next((name for name, value in limits if value >= budget[name]), None)


def is_final(failure: Mapping[str, Any]) -> bool:
    """Return whether a failure counts; in older studies, a trial that failed may have been retried as another one."""
    return not failure.get("retried")


def seconds_searched(spans: Iterable[Span]) -> float:
    """Return the seconds in which at least one trial ran, from the starts and ends of their attempts."""
    return sum((end - start).total_seconds() for start, end in _merge(spans))


def _merge(spans: Iterable[Span]) -> list[Span]:
    """Merge overlapping spans, so that the result has none."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(merged.pop()[1], end)
        merged.append((start, max(start, end)))
    return merged


def read_seconds_searched(connection: Connection, study_id: int, searched: SearchTime) -> float:
    """Return the seconds in which at least one trial ran; a running trial counts until its last heartbeat.

    Ended trials are read once, and then cached in `searched`.
    """
    rows = tables.read_times(connection, study_id, searched.until)
    now, database_now = datetime.now(UTC), tables.read_clock(connection).replace(tzinfo=None)
    spans = [_spans_of(row, now, database_now) for row in rows]
    seconds = seconds_searched(chain(searched.spans, *spans))
    n_ended = next((i for i, row in enumerate(rows) if not row.state.is_finished()), len(rows))
    if n_ended:
        searched.until = rows[n_ended - 1].trial_id
        searched.spans = _merge(chain(searched.spans, *spans[:n_ended]))
    return seconds


def _spans_of(row: Any, now: datetime, database_now: datetime) -> list[Span]:
    """Return the start and end of each attempt at a trial, with time zones."""
    earlier = json.loads(row.interruptions or "[]")
    spans = [(datetime.fromisoformat(each["started"]), datetime.fromisoformat(each["ended"])) for each in earlier]
    if row.datetime_start:
        silence = max(database_now - (row.heartbeat or database_now), timedelta())
        end = row.datetime_complete.replace(tzinfo=UTC) if row.datetime_complete else now - silence
        spans.append((row.datetime_start.replace(tzinfo=UTC), end))
    return spans
