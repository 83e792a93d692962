"""Snapshots of a running search, read from the database, so that they include all workers on all machines."""

import math
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from hpsearch.bundle.evaluation import trial_interval
from hpsearch.config.definition import StudyDefinition, load_definition
from hpsearch.errors import (
    DefinitionError,
    HpsearchError,
    StorageError,
    StorageUnavailable,
    StudyMismatch,
    StudyNotFound,
)
from hpsearch.monitor.text import describe_best, join_params, printable, trial_line
from hpsearch.monitor.trials import describe_trial, read_status
from hpsearch.search.selection import explain_choice, find_best
from hpsearch.search.study import count_validation, load_study
from hpsearch.search.trials import TrialEvent, make_event
from hpsearch.storage.budget import find_limit, is_final, measure_trial
from hpsearch.storage.rdb import open_storage
from hpsearch.storage.tables import count_interruptions, rank

_N_RECENT = 40  # finished trials used to estimate the remaining time
_N_DRAWS = 200
_N_LISTED = 50  # finished and failed trials each
_TALLY_SECONDS = 1.0  # between two looks at the trials of other workers


@dataclass(frozen=True)
class Snapshot:
    """The state of a search at one moment.

    `status` is the document of `status --json`. `hyperparameters` are those that the sampler chooses. `workers`,
    `finished` and `failed` are rows, the latter two with the latest first. `news` lists the trials that ended since the
    last snapshot, in order. `seconds` is the time searched; `seconds_left` is the estimated range of the remaining
    time, or None if there is no estimate.
    """

    status: Mapping[str, Any]
    hyperparameters: Sequence[str]
    workers: Sequence[Mapping[str, Any]]
    finished: Sequence[Mapping[str, Any]]
    failed: Sequence[Mapping[str, Any]]
    n_failed: int
    news: Sequence[TrialEvent]
    seconds: float
    seconds_left: tuple[float, float] | None
    is_stopped: bool

    @property
    def n_finished(self) -> int:
        counts = self.status["trials"]
        return int(counts["complete"] + counts["pruned"])

    @property
    def n_alive(self) -> int:
        """Return the number of workers with a running trial and a recent heartbeat."""
        return sum(not worker["is_lost"] for worker in self.workers)

    @property
    def is_over(self) -> bool:
        """Return whether the trials, minutes, failures or patience are used up, or the target is reached."""
        best = self.status["best"] and self.status["best"]["value"]
        trials = self.status["trials"]
        since_gain = 0 if trials["running"] + trials["waiting"] else self.status["since_gain"] or 0  # one may be a gain
        counts = {"n_finished": self.n_finished, "n_failed": self.n_failed, "n_since_gain": since_gain}
        return find_limit(self.status["budget"], best=best, minutes=self.seconds / 60, **counts) is not None

    def describe_progress(self) -> str:
        """Return the progress in one line, such as `12 of 40 trials done, best 0.9812 (trial 7)`."""
        found = f", best {describe_best(self.status['best'])}" if self.status["best"] else ""
        return f"{self.n_finished} of {self.status['budget']['trials']} trials done{found}"

    def suggest_next(self, command: str) -> str:
        """Return how to continue the search; `command` holds the arguments of the suggested command."""
        if self.n_alive:
            return "running workers will pick it up"
        if self.n_finished >= self.status["budget"]["trials"]:
            return f"the budget is used up; add trials with: hpsearch add {command} --trials 20"
        if self.is_over:
            limits = "minutes, target, patience or failures"
            return f"a limit ({limits}) has been reached; raise it in the study file to continue"
        return f"no workers running; start some with: hpsearch run {command}"


class Watch:
    """A read-only watch of a study. Each poll reads only changes from the database.

    Raises `StudyNotFound`, `StudyMismatch` or `StorageError`.
    """

    def __init__(self, definition: StudyDefinition) -> None:
        heartbeat, grace = definition.recovery.heartbeat, definition.recovery.grace
        self.definition = definition
        self.storage = open_storage(definition.study.storage, heartbeat=heartbeat, grace=grace, reads_only=True)
        self.study = load_study(definition, self.storage)
        self._known: set[tuple[Any, ...]] | None = None  # the attempts that have ended

    def poll(self) -> Snapshot:
        """Return the current snapshot. Raises `StorageError`."""
        trials = self.study.get_trials(deepcopy=False)
        status = read_status(self.definition, self.study, trials)
        stale = set(self.storage.find_stale(self.study._study_id))
        running = [trial for trial in trials if trial.state == TrialState.RUNNING]
        ended = [trial for trial in trials if trial.state.is_finished() and trial.datetime_complete]
        now = datetime.now(UTC)
        ended.sort(key=lambda trial: ((trial.datetime_complete or now).timestamp(), trial.number), reverse=True)
        finished = [trial for trial in ended if trial.state != TrialState.FAIL]
        failed = [
            trial for trial in ended if trial.state == TrialState.FAIL and is_final(trial.user_attrs.get("failure", {}))
        ]
        seconds = self.storage.seconds_searched(self.study._study_id)
        budget, n_left = status["budget"], status["budget"]["trials"] - len(finished)
        alive = [trial for trial in running if trial._trial_id not in stale]
        seconds_left = estimate_seconds_left(finished[:_N_RECENT], alive, n_left, now)
        if seconds_left and status["since_gain"] is not None:
            n_least = min(n_left, max(budget["patience"] - status["since_gain"], 1))  # if there is no further gain
            least = estimate_seconds_left(finished[:_N_RECENT], alive, n_least, now) or seconds_left
            seconds_left = min(least[0], seconds_left[0]), seconds_left[1]
        if seconds_left and "minutes" in budget:
            most = max(budget["minutes"] * 60 - seconds, 0.0)
            seconds_left = min(seconds_left[0], most), min(seconds_left[1], most)
        requeued = [trial for trial in trials if trial.state == TrialState.WAITING and count_interruptions(trial)]
        attempts = {(trial.number, count_interruptions(trial), trial.state): trial for trial in [*ended, *requeued]}
        news = [] if self._known is None else [trial for key, trial in attempts.items() if key not in self._known]
        self._known = {*attempts}
        return Snapshot(
            status=status,
            hyperparameters=list(self.definition.search),
            workers=sorted(
                (_describe_worker(trial, is_lost=trial._trial_id in stale) for trial in running),
                key=lambda row: (row["worker"], row["trial"]),
            ),
            finished=[describe_trial(trial) for trial in finished[:_N_LISTED]],
            failed=[describe_trial(trial) for trial in failed[:_N_LISTED]],
            n_failed=len(failed),
            news=[make_event(trial) for trial in reversed(news)],
            seconds=seconds,
            seconds_left=seconds_left,
            is_stopped=bool(self.study.user_attrs.get("stopped")),
        )


def describe_state(study: str) -> str:
    """Return the state of a study by the name of its file, such as `12/30 trials, best 0.9721`. Creates nothing."""
    try:
        snapshot = Watch(load_definition(study)).poll()
    except StudyNotFound:
        return "not started"
    except StudyMismatch:
        return "its file was changed after the search had started"
    except DefinitionError:
        return f"its file has errors; see: hpsearch check {shlex.quote(study)}"
    except StorageUnavailable:
        return "its database cannot be reached"
    except HpsearchError as error:
        return str(error).partition("\n")[0]
    status = snapshot.status
    best = f", best {status['best']['value']:.4f}" if status["best"] else ""
    return f"{snapshot.n_finished}/{status['budget']['trials']} trials{best}"


class Tally:
    """Counts the finished trials of a study for the lines of a pipe, each of which tells the progress.

    Those of the workers whose events it gets are counted with their own line. Unless it gets the events of all, those
    of other workers are read from the database, at most once a second.
    """

    def __init__(self, watch: Watch, *, gets_all: bool) -> None:
        self._watch, self._gets_all, self._next_read = watch, gets_all, 0.0
        self._n_trials = watch.definition.budget.trials
        self._workers: set[str] = set()
        self._values: dict[int, float | None] = {}  # of the finished trials, by number; None if pruned

    def read(self) -> None:
        """Count the trials of other workers; not if the database cannot be read, which is no reason to end a search."""
        self._next_read = time.monotonic() + _TALLY_SECONDS
        with suppress(StorageError):
            self._n_trials = self._watch.study.user_attrs["budget"]["trials"]
            states = (TrialState.COMPLETE, TrialState.PRUNED)
            for trial in self._watch.study.get_trials(deepcopy=False, states=states):
                if trial.user_attrs.get("worker") not in self._workers:
                    self._add(make_event(trial))

    def describe(self, event: TrialEvent) -> str:
        """Return the line of a trial that ended: result, progress, best trial, time, hyperparameters."""
        self._workers.add(event.worker)
        line, now = trial_line(event), time.strftime("%H:%M:%S")
        if event.state not in ("complete", "pruned"):
            return f"{line}  {now}"
        if not self._gets_all and time.monotonic() >= self._next_read:
            self.read()
        self._add(event)
        complete = [(number, value) for number, value in self._values.items() if value is not None]
        number, value = min(complete, key=lambda trial: rank(trial[1], trial[0]), default=(0, None))
        best = f"best {describe_best({'value': value, 'number': number})}" if complete else describe_best(None)
        params = printable(join_params(event.params))
        return f"{line}  {len(self._values)}/{self._n_trials}  {best}  {now}  {params}".rstrip()

    def _add(self, event: TrialEvent) -> None:
        self._values[event.number] = event.value if event.state == "complete" else None


def summarize_search(watch: Watch, command: str) -> list[str]:
    """Return lines with the best trial, how certain it is, and the next commands; `command` holds their arguments."""
    definition, study, snapshot = watch.definition, watch.study, watch.poll()
    if not snapshot.is_over:  # stopped, or extended at the last moment
        watch_others = f"other workers are still running; watch them with: hpsearch status {command} --watch"
        advice = watch_others if snapshot.n_alive else snapshot.suggest_next(command)
        return [snapshot.describe_progress(), f"next: {advice}"]
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not complete:
        return [f"result: no trial completed; see: hpsearch trials {command}"]
    best, n_images = find_best(study), count_validation(definition, study)
    low, high = trial_interval(best, n_images)
    metric = "" if definition.study.metric == "accuracy" else f"{definition.study.metric_title} "
    n_alike, n_others = sum((trial.value or 0.0) >= low for trial in complete) - 1, len(complete) - 1
    tied = f"{n_alike} of the other {n_others} completed trials lie in that interval"
    if n_others == 1:
        tied = f"the other completed trial {'lies' if n_alike else 'does not lie'} in that interval"
    elif not n_others:
        tied = "no other completed trial to compare with"
    if "confirmation" in study.user_attrs:
        tied += f"; {explain_choice(study, command)}"
    elif n_alike and n_others:
        tied += ": it may be luck"
    return [
        f"best:  trial {best.number}: {metric}{best.value:.4f} on {n_images:,} validation images "
        f"(95% CI {low:.4f} to {high:.4f})",
        f"tied:  {tied}",
        f"next:  hpsearch confirm {command}  |  hpsearch export {command}",
    ]


def _describe_worker(trial: FrozenTrial, *, is_lost: bool) -> dict[str, Any]:
    curve = [value for _, value in sorted(trial.intermediate_values.items())]
    return {
        "worker": trial.user_attrs.get("worker", "unknown"),
        "trial": trial.number,
        "epoch": trial.last_step or 0,
        "accuracy": curve[-1] if curve else None,
        "curve": curve,
        "images_per_second": trial.user_attrs.get("images_per_second"),
        "params": trial.params,
        "is_lost": is_lost,
    }


def estimate_seconds_left(
    recent: Sequence[FrozenTrial], running: Sequence[FrozenTrial], n_left: int, now: datetime
) -> tuple[float, float] | None:
    """Return the 95% range of the seconds until `n_left` more trials are finished, or None if the data are too few.

    The rest of the search is simulated many times. The duration of each trial is drawn from a bootstrap sample of the
    recent ones, a new trial starts as soon as a worker is free, and a running trial lasts longer than its current age.
    An estimate needs at least one worker, three recent trials, and two recent trials per worker.
    """
    durations = np.array([seconds for trial in recent if (seconds := measure_trial(trial))])
    n_workers = min(len(running), n_left)
    if n_workers < 1 or len(durations) < max(3, 2 * len(running)):
        return None
    generator = np.random.default_rng(0)  # fixed, so that the range does not flicker
    samples = generator.choice(durations, (_N_DRAWS, len(durations)))
    ages = sorted(measure_trial(trial, now) or 0.0 for trial in running)
    free = np.stack([_draw_rest(generator, durations, age) for age in ages[-n_workers:]], axis=1)
    n_last = min(n_left - n_workers, 4 * n_workers)  # simulated one by one; the trials before keep all workers busy
    n_before = n_left - n_workers - n_last
    noise = generator.standard_normal(_N_DRAWS) * samples.std(axis=1) * math.sqrt(n_before)
    free += ((n_before * samples.mean(axis=1) + noise) / n_workers)[:, None]
    every = np.arange(_N_DRAWS)
    for _ in range(n_last):
        free[every, free.argmin(axis=1)] += samples[every, generator.integers(len(durations), size=_N_DRAWS)]
    low, high = np.percentile(free.max(axis=1), [2.5, 97.5])
    return float(low), float(high)


def _draw_rest(generator: np.random.Generator, durations: np.ndarray[Any, Any], age: float) -> np.ndarray[Any, Any]:
    """Return the remaining seconds of a trial of that age; at most the age again if no recent trial took longer."""
    longer = durations[durations > age]
    return generator.choice(longer, _N_DRAWS) - age if len(longer) else generator.uniform(0, age, _N_DRAWS)
