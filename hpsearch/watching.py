"""What there is to see of a search while it runs, read from its study, so that every watcher sees all workers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.budget import SEARCHING_STATES, seconds_searched
from hpsearch.definition import StudyDefinition
from hpsearch.evaluation import wilson_interval
from hpsearch.listing import describe_trial, explain_end
from hpsearch.storage import Storage, open_storage
from hpsearch.study import explain_choice, find_best, load_study, summarize

_N_RECENT = 30  # finished trials from which the time left is estimated
_N_LEAST = 3  # of them, before which nothing is said
_N_LISTED = 50  # of finished and of failed trials


@dataclass(frozen=True)
class TrialEvent:
    """What became of a trial; all but "running" are told after the storage has acknowledged it.

    `epoch` is the last one that was reported, `value` its validation accuracy. A trial that another worker has
    taken over is "dropped".
    """

    worker: str
    number: int
    state: Literal["running", "complete", "pruned", "failed", "dropped"]
    epoch: int = 0
    value: float | None = None
    message: str = ""


Emit = Callable[[TrialEvent], None]


@dataclass(frozen=True)
class Scene:
    """A moment of a search.

    `status` is the document of `status --json`. `workers`, `finished` and `failed` are rows, the latest of the last two
    first; `news` are the trials that ended since the moment before, in their order. `seconds` are those searched, and
    `seconds_left` the range that the rest of the budget will probably take, None where nobody can say.
    """

    status: Mapping[str, Any]
    workers: Sequence[Mapping[str, Any]]
    finished: Sequence[Mapping[str, Any]]
    failed: Sequence[Mapping[str, Any]]
    news: Sequence[TrialEvent]
    seconds: float
    seconds_left: tuple[float, float] | None
    is_stopped: bool

    @property
    def n_finished(self) -> int:
        counts = self.status["trials"]
        return int(counts["complete"] + counts["pruned"])

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent: its trials, its minutes, or its target reached."""
        budget, best = self.status["budget"], self.status["best"]
        return bool(
            self.n_finished >= budget["trials"]
            or self.seconds / 60 >= budget.get("minutes", math.inf)
            or (best and best["value"] >= budget.get("target", math.inf))
        )

    def sum_up(self) -> str:
        """How far the search has come, in one line."""
        best = self.status["best"]
        found = f", the best {best['value']:.4f} in trial {best['number']}" if best else ""
        return f"{self.n_finished} of {self.status['budget']['trials']} trials are there{found}"

    def say_next(self, command: str) -> str:
        """How the search goes on, with what follows the verb in `command`."""
        if n_alive := sum(not worker["is_lost"] for worker in self.workers):
            return f"{n_alive} workers go on with it"
        if self.is_over:
            return f"the budget is spent; give it more with: hpsearch extend {command} --trials 20"
        return f"no worker runs; go on with: hpsearch run {command}"


class Watch:
    """Reads a study again and again; only what is new of it comes from the database each time."""

    def __init__(self, definition: StudyDefinition, storage: Storage) -> None:
        self.definition, self.storage = definition, storage
        self.study = load_study(definition, storage)
        self._known: set[int] | None = None  # the numbers of the trials that have ended

    def look(self) -> Scene:
        """The search as it is now; raises `StorageError`."""
        trials = self.study.get_trials(deepcopy=False)
        status = summarize(self.definition, self.study)
        lost = set(self.storage.find_stuck(self.study._study_id))
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        ended = [trial for trial in trials if trial.state.is_finished() and trial.datetime_complete]
        ended.sort(key=lambda trial: (trial.datetime_complete, trial.number), reverse=True)
        finished = [trial for trial in ended if trial.state != TrialState.FAIL]
        now = datetime.now()
        spans = [
            (trial.datetime_start, trial.datetime_complete)
            for trial in trials
            if trial.datetime_start and trial.state in SEARCHING_STATES
        ]
        seconds = seconds_searched(spans, now)
        seconds_left = estimate_seconds_left(
            finished[:_N_RECENT],
            [trial for trial in running if trial._trial_id not in lost],
            status["budget"]["trials"] - len(finished),
            now,
        )
        if seconds_left and "minutes" in status["budget"]:
            most = max(status["budget"]["minutes"] * 60 - seconds, 0.0)
            seconds_left = min(seconds_left[0], most), min(seconds_left[1], most)
        news = [] if self._known is None else [trial for trial in ended if trial.number not in self._known]
        self._known = {trial.number for trial in ended}
        return Scene(
            status=status,
            workers=[_describe_worker(trial, is_lost=trial._trial_id in lost) for trial in running],
            finished=[describe_trial(trial) for trial in finished[:_N_LISTED]],
            failed=[describe_trial(trial) for trial in ended if trial.state == TrialState.FAIL][:_N_LISTED],
            news=[_tell(trial) for trial in reversed(news)],
            seconds=seconds,
            seconds_left=seconds_left,
            is_stopped=bool(self.study.user_attrs.get("stopped")),
        )


def open_watch(definition: StudyDefinition) -> Watch:
    """A watch of the definition's study; raises `StudyNotFound`, `StudyMismatch` or `StorageError`."""
    recovery = definition.recovery
    url, heartbeat, grace = definition.study.storage, recovery.heartbeat, recovery.grace
    return Watch(definition, open_storage(url, heartbeat=heartbeat, grace=grace, reads_only=True))


def conclude(definition: StudyDefinition, study: optuna.Study, command: str) -> list[str]:
    """What was found, how sure that is, and what to type next, with what follows the verb in `command`."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return ["found: nothing yet, no trial is complete", f"next: hpsearch trials {command}"]
    best, n_images = find_best(study), definition.data.validation
    low, high = wilson_interval(round((best.value or 0.0) * n_images), n_images)
    n_alike, n_others = sum((trial.value or 0.0) >= low for trial in complete) - 1, len(complete) - 1
    sure = f"{n_alike} of the {n_others} other complete trials lie in that interval too"
    if "confirmation" in study.user_attrs:
        sure += f"; {explain_choice(study, command)}"
    return [
        f"found: trial {best.number}, {best.value:.4f} on {n_images:,} validation images "
        f"(95% interval {low:.4f} to {high:.4f})",
        f"sure:  {sure}",
        f"next:  hpsearch confirm {command}  |  hpsearch export {command}",
    ]


def _tell(trial: FrozenTrial) -> TrialEvent:
    worker, epoch = trial.user_attrs.get("worker", "unknown"), trial.last_step or 0
    if trial.state == TrialState.FAIL:
        return TrialEvent(worker, trial.number, "failed", epoch, message=explain_end(trial))
    if trial.state == TrialState.COMPLETE:
        return TrialEvent(worker, trial.number, "complete", epoch, trial.value)
    return TrialEvent(worker, trial.number, "pruned", epoch, trial.value, trial.user_attrs.get("diverged", ""))


def _describe_worker(trial: FrozenTrial, *, is_lost: bool) -> dict[str, Any]:
    reports = trial.intermediate_values
    return {
        "worker": trial.user_attrs.get("worker", "unknown"),
        "trial": trial.number,
        "epoch": trial.last_step or 0,
        "accuracy": reports[max(reports)] if reports else None,
        "curve": [reports[epoch] for epoch in sorted(reports)],
        "images_per_second": trial.user_attrs.get("images_per_second"),
        "params": trial.params,
        "is_lost": is_lost,
    }


def estimate_seconds_left(
    recent: Sequence[FrozenTrial], running: Sequence[FrozenTrial], n_left: int, now: datetime
) -> tuple[float, float] | None:
    """A range that holds the seconds until `n_left` more trials are finished about nineteen times in twenty.

    The trials left are taken to be like the recent finished ones, shared out among as many workers as run now: the sum
    of n_left durations lies within two deviations of its mean, of which one part is the trials' own and the other the
    mean's, known from so few. None without workers or with too few finished trials.
    """
    durations = np.array([trial.duration.total_seconds() for trial in recent if trial.duration])
    if n_left <= 0 or not running or len(durations) < _N_LEAST:
        return None
    mean, deviation, n_workers = durations.mean(), durations.std(ddof=1), min(len(running), n_left)
    ages = [(now - trial.datetime_start).total_seconds() for trial in running if trial.datetime_start]
    begun = sum(min(age, mean) for age in sorted(ages)[:n_workers])
    # Of the last trials each worker has one, and most workers wait for the last of them.
    expected = (n_left * mean - begun) / n_workers + mean * (n_workers - 1) / (2 * n_workers)
    spread = 2 * deviation * math.sqrt(n_left + n_left**2 / len(durations)) / n_workers
    return max(expected - spread, 0.0), expected + spread
