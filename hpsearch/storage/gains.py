"""Counts the trials since the last gain beyond chance, for `budget.patience`.

A completed trial is a gain beyond chance if its value exceeds that of the last gain by more than one standard error of
the latter; the first completed trial is one, too. The standard error is that of a share of the validation images.
"""

import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection

from hpsearch.storage import tables

_QUANTILE = 1.96  # standard errors from a value to the end of its 95% confidence interval


class Judged(NamedTuple):
    """A trial that is complete or pruned, and since when, with a time zone.

    A complete one has a `value`, and of a balanced accuracy also the lower end `low` of its 95% confidence interval.
    """

    at: datetime
    number: int
    value: float | None = None
    low: float | None = None

    def error(self, n_images: int) -> float:
        """Return the standard error of the value, measured on `n_images`; 0 if their number is not known."""
        value = self.value or 0.0
        if self.low is not None:
            return max(value - self.low, 0.0) / _QUANTILE
        return math.sqrt(max(value * (1 - value), 0.0) / n_images) if n_images else 0.0


class Progress(NamedTuple):
    """The number of trials judged since the last gain, and the best trial; 0 and None before the first gain."""

    n_since_gain: int = 0
    best: Judged | None = None


@dataclass
class Gains:
    """What is final of the trials up to the id `until`, which have all ended: when, and the records among them."""

    until: int = 0
    moments: list[datetime] = field(default_factory=list)  # sorted
    records: list[Judged] = field(default_factory=list)
    n_images: int = 0


def find_records(trials: Iterable[Judged]) -> list[Judged]:
    """Return the complete trials that were the best one when they ended; of equal ones, the lower number is better.

    Every gain is among them, also among more trials. There are few: about ln n of n trials.
    """
    records: list[Judged] = []
    for trial in sorted(trial for trial in trials if trial.value is not None):
        if not records or tables.rank(trial.value, trial.number) < tables.rank(records[-1].value, records[-1].number):
            records.append(trial)
    return records


def find_gain(records: Sequence[Judged], n_images: int) -> Judged | None:
    """Return the last gain beyond chance among the records, with values measured on `n_images`."""
    gain: Judged | None = None
    for trial in records:
        if gain is None or (trial.value or 0.0) > (gain.value or 0.0) + gain.error(n_images):
            gain = trial
    return gain


def measure_progress(trials: Iterable[Judged], n_images: int, past: Gains | None = None) -> Progress:
    """Return the progress of a search with these trials, in any order, and those of its `past`."""
    latest, past = list(trials), past or Gains()
    records = find_records(chain(past.records, latest))
    gain = find_gain(records, n_images)
    if gain is None:
        return Progress()
    n_past = len(past.moments) - bisect_right(past.moments, gain.at)
    return Progress(n_past + sum(trial.at > gain.at for trial in latest), records[-1])


def read_progress(connection: Connection, study_id: int, past: Gains) -> Progress:
    """Return the progress of a study. Ended trials are read once, and what they tell is then kept in `past`."""
    past.n_images = past.n_images or tables.read_n_validation(connection, study_id)
    rows = tables.read_ends(connection, study_id, past.until)
    n_ended = next((i for i, row in enumerate(rows) if not row.state.is_finished()), len(rows))
    if n_ended:
        ended = [trial for row in rows[:n_ended] if (trial := _judge_row(row))]
        past.until = rows[n_ended - 1].trial_id
        past.moments = sorted([*past.moments, *(trial.at for trial in ended)])
        past.records = find_records(chain(past.records, ended))
    latest = (trial for row in rows[n_ended:] if (trial := _judge_row(row)))
    return measure_progress(latest, past.n_images, past)


def _judge_row(row: Any) -> Judged | None:
    end = row.datetime_complete and row.datetime_complete.replace(tzinfo=UTC)
    return _judge(row.number, row.state, end, row.value, json.loads(row.interval or "[]"))


def judge_trial(trial: FrozenTrial) -> Judged | None:
    """Return when a trial finished, and its value; None if it is not complete or pruned."""
    end = trial.datetime_complete and trial.datetime_complete.astimezone(UTC)
    value = trial.values[0] if trial.values else None
    return _judge(trial.number, trial.state, end, value, trial.user_attrs.get("interval", ()))


def _judge(
    number: int, state: TrialState, end: datetime | None, value: float | None, interval: Sequence[float]
) -> Judged | None:
    if end is None or state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    end = min(end, datetime.now(UTC))  # the worker's clock may have been ahead; later trials are later all the same
    if state == TrialState.PRUNED:
        return Judged(end, number)
    return Judged(end, number, value, interval[0] if interval else None)
