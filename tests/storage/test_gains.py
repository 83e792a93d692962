"""A search ends once many trials in a row have been no better than the last gain, beyond chance."""

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from hpsearch.errors import BudgetInFlight, BudgetSpent
from hpsearch.monitor.status import Watch
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.gains import Gains, Judged, Progress, find_records, judge_trial, measure_progress
from hpsearch.storage.rdb import Storage, open_storage

from ..conftest import make_definition

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed")

START = datetime(2026, 1, 1, tzinfo=UTC)
N_IMAGES = 1000  # a standard error of 0.0095 at 0.9


def judge(*values: float | None) -> list[Judged]:
    """Return trials that ended in this order, a second apart; those without a value were pruned."""
    return [Judged(START + timedelta(seconds=i), i, value) for i, value in enumerate(values)]


def count_since(*values: float | None) -> int:
    return measure_progress(judge(*values), N_IMAGES).n_since_gain


def test_a_gain_exceeds_the_last_one_by_more_than_a_standard_error() -> None:
    assert count_since(0.9) == 0, "the first completed trial is a gain"
    assert count_since(0.9, None, 0.909, 0.5) == 3, "within chance"
    assert count_since(0.9, None, 0.910, 0.5) == 1
    assert count_since(0.9, 0.905, 0.909, 0.913, None) == 1, "small steps add up to a gain"
    assert count_since(1.0, 1.0, 1.0) == 2


def test_trials_without_a_completed_one_use_up_no_patience() -> None:
    assert measure_progress(judge(None, None, None), N_IMAGES) == Progress()
    assert measure_progress([], N_IMAGES) == Progress()


def test_any_better_value_is_a_gain_where_the_number_of_images_is_unknown() -> None:
    assert measure_progress(judge(0.9, 0.9001, 0.9), 0).n_since_gain == 1


def test_the_best_of_equal_trials_is_that_with_the_lower_number_as_in_the_status() -> None:
    first, second = Judged(START, 8, 0.9), Judged(START + timedelta(seconds=1), 7, 0.9)
    assert measure_progress([first, second], N_IMAGES) == Progress(1, second)


def test_the_standard_error_of_a_balanced_accuracy_is_that_of_its_interval() -> None:
    uncertain = Judged(START, 0, 0.9, low=0.86)  # a class of few images: twice the binomial standard error
    later = Judged(START + timedelta(seconds=1), 1, 0.915)
    assert measure_progress([uncertain, later], N_IMAGES).n_since_gain == 1
    assert measure_progress([uncertain._replace(low=None), later], N_IMAGES).n_since_gain == 0


VALUES = st.none() | st.integers(0, 20).map(lambda n: n / 20)


@given(st.lists(st.tuples(VALUES, st.integers(0, 30)), max_size=40), st.integers(0, 40), st.integers(0, 200))
def test_the_past_is_summarized_without_loss_in_whatever_order_trials_end(
    drawn: list[tuple[float | None, int]], n_past: int, n_images: int
) -> None:
    trials = [Judged(START + timedelta(seconds=at), number, value) for number, (value, at) in enumerate(drawn)]
    gain, since, best = None, list[Judged](), None
    for trial in sorted(trials):
        margin = math.sqrt(gain * (1 - gain) / n_images) if gain is not None and n_images else 0.0
        if trial.value is not None and (gain is None or trial.value > gain + margin):
            gain, since, at = trial.value, [], trial.at
        elif gain is not None and trial.at > at:
            since.append(trial)
    if gain is not None:
        best = min((trial for trial in trials if trial.value is not None), key=lambda t: (-(t.value or 0.0), t.number))
    past = Gains(moments=sorted(trial.at for trial in trials[:n_past]), records=find_records(trials[:n_past]))
    assert measure_progress(trials[n_past:], n_images, past) == Progress(len(since), best)
    assert measure_progress(trials, n_images) == Progress(len(since), best)


def test_trials_that_are_complete_or_pruned_are_judged_at_their_end() -> None:
    def judge_one(state: TrialState, end: datetime | None) -> Judged | None:
        trial = optuna.trial.create_trial(value=0.5)
        trial.number = 0
        trial.state, trial.datetime_start, trial.datetime_complete = state, START - timedelta(hours=1), end
        trial.values = [0.5] if state == TrialState.COMPLETE else None
        return judge_trial(trial)

    assert judge_one(TrialState.COMPLETE, START) == Judged(START, 0, 0.5)
    assert judge_one(TrialState.PRUNED, START) == Judged(START, 0)
    assert judge_one(TrialState.FAIL, START) is None
    assert judge_one(TrialState.RUNNING, None) is None
    assert judge_one(TrialState.WAITING, None) is None


def test_a_gain_of_a_worker_whose_clock_was_ahead_is_not_in_the_future() -> None:
    gain = optuna.trial.create_trial(value=0.9)
    gain.datetime_complete = datetime.now() + timedelta(hours=2)  # local, as Optuna has it
    judged = judge_trial(gain)
    assert judged
    later = [judged._replace(at=datetime.now(UTC) + timedelta(seconds=i), number=i, value=0.5) for i in (1, 2)]
    assert measure_progress([judged, *later], N_IMAGES).n_since_gain == 2


def join(url: str, name: str, **budget: Any) -> tuple[Storage, optuna.Study]:
    definition = make_definition(url, budget={"trials": 99} | budget)
    storage = open_storage(url)
    storage.worker = name
    return storage, load_study(definition, storage)


def test_workers_stop_together_and_wait_for_a_running_trial_that_may_be_a_gain(url: str) -> None:
    study = open_study(make_definition(url, budget={"trials": 99, "patience": 3}), open_storage(url))
    study.set_user_attr("data", {"validation": N_IMAGES})
    mine, theirs = (join(url, name)[1] for name in ("me-0", "me-1"))

    def finish(*values: float | None) -> None:
        for i, value in enumerate(values):
            worker = (mine, theirs)[i % 2]
            worker.tell(worker.ask(), value, TrialState.COMPLETE if value else TrialState.PRUNED)

    finish(None, None, None, None, 0.9, 0.905, None)
    running = theirs.ask()
    finish(0.8)
    for _ in range(2):
        with pytest.raises(BudgetInFlight):
            mine.ask()
    theirs.tell(running, 0.95)
    finish(0.955, None, None)
    watch = Watch(make_definition(url, budget={"trials": 99, "patience": 3}))
    ended = r"^no gain beyond chance in 3 trials \(best 0\.9550 of trial 9\); raise budget\.patience to continue$"
    for worker in (mine, theirs, join(url, "me-2")[1]):  # the last one reads all trials anew
        with pytest.raises(BudgetSpent, match=ended):
            worker.ask()
    assert watch.poll().status["since_gain"] == 3
    assert watch.poll().is_over
    open_study(make_definition(url, budget={"trials": 99, "patience": 4}), open_storage(url))
    finish(0.9)
    with pytest.raises(BudgetSpent, match="in 4 trials"):
        mine.ask()
    open_study(make_definition(url, budget={"trials": 99}), open_storage(url))
    finish(0.9)
    assert watch.poll().status["since_gain"] is None


def test_a_trial_that_waits_is_finished_before_patience_ends_the_search(url: str) -> None:
    definition = make_definition(url, budget={"trials": 99, "patience": 2})
    study = open_study(definition, open_storage(url))
    study.set_user_attr("data", {"validation": N_IMAGES})
    (storage, mine), (_, theirs) = (join(url, name) for name in ("me-0", "me-1"))
    mine.tell(mine.ask(), 0.9)
    interrupted = mine.ask()
    for _ in range(2):
        theirs.tell(theirs.ask(), state=TrialState.PRUNED)
    assert storage.end_attempt(interrupted._trial_id, 0, "interrupted", "stopped")
    assert not Watch(definition).poll().is_over
    study.enqueue_trial({"lr": 0.05})
    again, given = theirs.ask(), mine.ask()
    assert (again.number, given.number) == (interrupted.number, 4)
    with pytest.raises(BudgetInFlight):
        theirs.ask()
    theirs.tell(again, 0.8)
    mine.tell(given, 0.8)
    with pytest.raises(BudgetSpent, match="no gain beyond chance in 4 trials"):
        mine.ask()
    assert Watch(definition).poll().is_over
