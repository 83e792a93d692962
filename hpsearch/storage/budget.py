"""Checks the budget of a study in the transaction that starts a trial, so that it is exact.

Other transactions that start trials of the study wait until this one ends.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any

from optuna.trial import FrozenTrial
from sqlalchemy import Connection

from hpsearch.errors import BudgetInFlight, BudgetSpent, Stopped, TooManyFailures
from hpsearch.storage import tables
from hpsearch.storage.gains import Gains, Progress, read_progress

Span = tuple[datetime, datetime]


@dataclass
class SearchTime:
    """The time spans of the trials up to the id `until`, which have all ended, so that the spans are final."""

    until: int = 0
    spans: list[Span] = field(default_factory=list)


@dataclass
class Past:
    """What the ended trials of a study tell, so that they are read once."""

    time: SearchTime = field(default_factory=SearchTime)
    gains: Gains = field(default_factory=Gains)


def admit(connection: Connection, study_id: int, past: Past, *, is_new: bool) -> int:
    """Return the number of trials of the study if the budget allows another trial to run.

    Otherwise raises `BudgetSpent` or `TooManyFailures`, which are final; `Stopped`, final until the study is run again;
    or `BudgetInFlight` if running trials may use up the rest of the budget. Where patience is exhausted, trials that
    run or wait may still make a gain. So those that wait are admitted and a new one is not, and it is final once there
    are none. Raises `KeyError` for an unknown study.
    """
    tables.lock_study(connection, study_id)
    spent = tables.read_spent(connection, study_id)  # a new statement sees the latest commits
    budget: dict[str, Any] = json.loads(spent.budget or "{}")
    n_trials = spent.n_trials or 0
    n_finished = n_trials - spent.running - spent.waiting - spent.fail
    best = tables.read_best_value(connection, study_id, budget["target"]) if "target" in budget else None
    minutes = read_seconds_searched(connection, study_id, past.time) / 60 if "minutes" in budget else 0.0
    failures: list[dict[str, Any]] = []
    if spent.fail >= budget.get("failures", math.inf):
        failures = [failure for failure in tables.read_failures(connection, study_id) if is_final(failure)]
    n_since, leader = read_progress(connection, study_id, past.gains) if "patience" in budget else Progress()
    counts = {"n_finished": n_finished, "n_failed": len(failures), "n_since_gain": n_since}
    limit = find_limit(budget, best=best, minutes=minutes, **counts)
    match limit:
        case "trials":
            raise BudgetSpent(
                f"all {budget['trials']} trials are finished; add more with: hpsearch add STUDY --trials 20"
            )
        case "target":
            raise BudgetSpent(f"target reached: best value {best:.4f} >= {budget['target']}")
        case "minutes":
            raise BudgetSpent(f"time limit reached ({minutes:.1f} min); raise budget.minutes to continue")
        case "patience" if leader and not spent.running + spent.waiting:
            raise BudgetSpent(
                f"no gain beyond chance in {n_since} trials (best {leader.value:.4f} of trial {leader.number}); "
                "raise budget.patience to continue"
            )
        case "failures":
            last = f"{failures[-1].get('kind', 'unknown')}: {failures[-1].get('message', '')}"
            raise TooManyFailures(
                f"{len(failures)} trials failed, most recently: {' '.join(last.split())}; fix the cause, then raise "
                "budget.failures to continue"
            )
    if json.loads(spent.stopped or "false"):
        raise Stopped
    has_room = "trials" not in budget or n_finished + spent.running < budget["trials"]
    if not has_room or (limit == "patience" and (is_new or not spent.waiting)):
        raise BudgetInFlight
    return int(n_trials)


def find_limit(
    budget: Mapping[str, Any],
    *,
    n_finished: int,
    best: float | None,
    minutes: float,
    n_failed: int,
    n_since_gain: int,
) -> str | None:
    """Return the limit of the budget that is reached: trials, target, minutes, failures or patience; else None.

    That of patience ends the search only once no trial runs or waits, because each may make a gain.
    """
    reached = {"trials": n_finished, "target": best, "minutes": minutes, "failures": n_failed, "patience": n_since_gain}
    limits = ((name, value) for name, value in reached.items() if name in budget and value is not None)
    return next((name for name, value in limits if value >= budget[name]), None)


def is_final(failure: Mapping[str, Any]) -> bool:
    """Return whether a failure counts; in older studies, a trial that failed may have been retried as another one."""
    return not failure.get("retried")


def _spans_of(
    interruptions: Iterable[Mapping[str, Any]], pauses: Iterable[Sequence[str]], start: datetime | None, end: datetime
) -> Iterator[Span]:
    """Yield the start and end of each span in which an attempt at a trial ran, with time zones.

    `pauses`, `start` and `end` are those of the current attempt; `start` is None if there is none.
    """
    attempts: list[Mapping[str, Any]] = [*interruptions]
    if start:
        attempts.append({"started": start.isoformat(), "pauses": pauses, "ended": end.isoformat()})
    for attempt in attempts:
        texts = [attempt["started"], *chain.from_iterable(attempt.get("pauses", ())), attempt["ended"]]
        times = [datetime.fromisoformat(text) for text in texts]
        yield from zip(times[::2], times[1::2], strict=True)


def _spans_of_row(row: Any, now: datetime, database_now: datetime) -> Iterator[Span]:
    start, end, heartbeat = row.datetime_start, row.datetime_complete, row.heartbeat
    last_seen = now - (database_now - heartbeat) if heartbeat else now
    interruptions, pauses = (json.loads(text or "[]") for text in (row.interruptions, row.pauses))
    return _spans_of(
        interruptions, pauses, start and start.replace(tzinfo=UTC), end.replace(tzinfo=UTC) if end else last_seen
    )


def measure_trial(trial: FrozenTrial, now: datetime | None = None) -> float | None:
    """Return the seconds in which all attempts at a trial ran, the current one until its end or `now`, without pauses.

    None if it has neither. `now` is local time or has a time zone. Like Optuna, a trial has local times, which summer
    time makes jump.
    """
    if trial.datetime_start is None or (trial.datetime_complete or now) is None:
        return None
    return sum(max(end - start, timedelta()).total_seconds() for start, end in _spans_of_trial(trial, now))


def measure_search(trials: Iterable[FrozenTrial]) -> float:
    """Return the seconds in which at least one of the trials ran, without pauses; of running ones, earlier attempts."""
    return seconds_searched(span for trial in trials for span in _spans_of_trial(trial))


def _spans_of_trial(trial: FrozenTrial, now: datetime | None = None) -> Iterator[Span]:
    """Yield the start and end of each span in which an attempt ran, the current one until its end or `now`, if any."""
    start, end = trial.datetime_start, trial.datetime_complete or now
    interruptions, pauses = (trial.user_attrs.get(name, ()) for name in ("interruptions", "pauses"))
    begun, ended = (start.astimezone(UTC), end.astimezone(UTC)) if start and end else (None, datetime.now(UTC))
    return _spans_of(interruptions, pauses, begun, ended)


def seconds_searched(spans: Iterable[Span]) -> float:
    """Return the seconds in which at least one trial ran, from the starts and ends of their attempts."""
    return sum((end - start).total_seconds() for start, end in _merge(spans))


def _merge(spans: Iterable[Span]) -> list[Span]:
    """Merge overlapping spans, so that the result has none."""
    # A span of a machine whose clock was ahead also covers what others train until then, which is not counted twice.
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
    spans = [[*_spans_of_row(row, now, database_now)] for row in rows]
    seconds = seconds_searched(chain(searched.spans, *spans))
    n_ended = next((i for i, row in enumerate(rows) if not row.state.is_finished()), len(rows))
    if n_ended:
        searched.until = rows[n_ended - 1].trial_id
        searched.spans = _merge(chain(searched.spans, *spans[:n_ended]))
    return seconds
