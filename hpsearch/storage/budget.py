"""Checks the budget of a study in the transaction that starts a trial, so that it is exact.

Other transactions that start trials of the study wait until this one ends.
"""

import json
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
    if "trials" in budget and n_finished >= budget["trials"]:
        limit = budget["trials"]
        raise BudgetSpent(f"all {limit} trials are finished; add more with: hpsearch extend STUDY --trials N")
    if "target" in budget and (best := tables.read_best_value(connection, study_id, budget["target"])) is not None:
        raise BudgetSpent(f"target reached: best value {best:.4f} >= {budget['target']}")
    if "minutes" in budget and (minutes := _minutes_searched(connection, study_id, searched)) >= budget["minutes"]:
        raise BudgetSpent(f"time limit reached ({minutes:.1f} min); raise budget.minutes to continue")
    if "failures" in budget and spent.fail >= budget["failures"]:
        failures = _explain_failures(connection, study_id)
        if len(failures) >= budget["failures"]:
            raise TooManyFailures(
                f"{len(failures)} trials failed, most recently: {failures[-1]}; fix the cause, then raise "
                "budget.failures to continue"
            )
    if json.loads(spent.stopped or "false"):
        raise Stopped
    if "trials" in budget and n_finished + spent.running >= budget["trials"]:
        raise BudgetInFlight
    return int(n_trials)


def spans_of(
    interruptions: Iterable[Mapping[str, Any]], start: datetime | None, end: datetime | None
) -> list[tuple[datetime, Any]]:
    """Return the start and end of each attempt at a trial, with time zones.

    `start` and `end` are those of the current attempt; None if it has not started or is still running.
    """
    times = [(datetime.fromisoformat(each["started"]), datetime.fromisoformat(each["ended"])) for each in interruptions]
    return [*times, *([(start, end)] if start else [])]


def seconds_searched(spans: Iterable[tuple[datetime, datetime | None]], now: datetime) -> float:
    """Return the seconds in which at least one trial ran; `spans` are their starts and ends, None if still running."""
    merged = _merge((start, complete or now) for start, complete in spans)
    return sum((end - start).total_seconds() for start, end in merged)


def _merge(spans: Iterable[Span]) -> list[Span]:
    """Merge overlapping spans, so that the result has none."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            start, end = merged[-1][0], max(merged.pop()[1], end)
        merged.append((start, max(start, end)))
    return merged


def _minutes_searched(connection: Connection, study_id: int, searched: SearchTime) -> float:
    """Return the minutes in which at least one trial ran; a running trial counts until its last heartbeat.

    Ended trials are read once, and then cached in `searched`.
    """
    rows = tables.read_times(connection, study_id, searched.until)
    now, database_now = datetime.now(UTC), tables.read_clock(connection).replace(tzinfo=None)
    spans = [
        spans_of(
            json.loads(row.interruptions or "[]"),
            row.datetime_start and row.datetime_start.replace(tzinfo=UTC),
            row.datetime_complete.replace(tzinfo=UTC)
            if row.datetime_complete
            else now - _age(row.heartbeat, database_now),
        )
        for row in rows
    ]
    seconds = seconds_searched(chain(searched.spans, *spans), now)
    n_ended = next((i for i, row in enumerate(rows) if not row.state.is_finished()), len(rows))
    if n_ended:
        searched.until = rows[n_ended - 1].trial_id
        searched.spans = _merge(chain(searched.spans, *spans[:n_ended]))
    return seconds / 60


def _age(heartbeat: datetime | None, database_now: datetime) -> timedelta:
    return max(database_now - heartbeat, timedelta()) if heartbeat else timedelta()


def _explain_failures(connection: Connection, study_id: int) -> list[str]:
    """Return one line `kind: message` for each failed trial, in the order of trials.

    Older studies also have failed trials that were retried under a new number; those do not count.
    """
    failures = tables.read_failures(connection, study_id)
    return [
        " ".join(f"{failure.get('kind', 'unknown')}: {failure.get('message', '')}".split())
        for failure in failures
        if not failure.get("retried")
    ]
