"""Plain Optuna and hpsearch read each other's trials: every state, every kind of parameter, value and attribute.

`storage` relies on Optuna's private API, so this is what a new version of Optuna has to pass.
"""

import warnings
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.engine import make_url

from hpsearch.storage.rdb import Storage, open_storage

INFINITY, NAN = float("inf"), float("nan")
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "int": IntDistribution(1, 9),
    "int_log": IntDistribution(1, 900, log=True),
    "int_step": IntDistribution(0, 8, step=2),
    "float": FloatDistribution(-1.0, 1.0),
    "float_log": FloatDistribution(1e-5, 1e-1, log=True),
    "float_step": FloatDistribution(0.0, 0.6, step=0.2),
    "choice": CategoricalDistribution(("adam", "sgd")),
    "mixed": CategoricalDistribution((True, 3, 0.5, "relu", None)),
}
PARAMS: dict[str, Any] = {
    **{"int": 3, "int_log": 17, "int_step": 4, "float": -0.25, "float_log": 1e-3, "float_step": 0.4},
    **{"choice": "sgd", "mixed": None},
}
REPORTS = {0: 0.75, 1: INFINITY, 2: -INFINITY, 7: NAN, 9: 0.5}
ATTRIBUTES = {"text": "grün", "nested": {"list": [1, 2.5, None, True]}, "empty": {}, "none": None}


def make_trials() -> Iterator[FrozenTrial]:
    for state in TrialState:
        for value in (0.75, INFINITY, -INFINITY) if state == TrialState.COMPLETE else (0.25, None):
            is_done = state in (TrialState.COMPLETE, TrialState.PRUNED)
            trial = create_trial(
                state=state,
                value=value if is_done else None,
                params=PARAMS,
                distributions=DISTRIBUTIONS,
                user_attrs=ATTRIBUTES,
                system_attrs={"fixed_params": {"int": 3}},
                intermediate_values=REPORTS,
            )
            moment = datetime(2026, 7, 1, 12, 30, 15, 250_000)
            trial.datetime_start = None if state == TrialState.WAITING else moment
            trial.datetime_complete = moment.replace(hour=13) if state.is_finished() else None
            yield trial
    yield create_trial(state=TrialState.WAITING)


def facts(trial: FrozenTrial) -> dict[str, Any]:
    """All that is known of a trial, comparable: not a number is equal to itself here."""
    tables = ("params", "distributions", "user_attrs", "system_attrs", "intermediate_values")
    names = ("number", "state", "values", "datetime_start", "datetime_complete")
    sorted_tables = {name: sorted(map(repr, getattr(trial, name).items())) for name in tables}
    return {name: repr(getattr(trial, name)) for name in names} | sorted_tables


@pytest.fixture
def plain(url: str) -> RDBStorage:
    parsed = make_url(url)
    if parsed.get_backend_name() == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    return RDBStorage(parsed.render_as_string(hide_password=False))


def read_all(storage: RDBStorage) -> list[FrozenTrial]:
    return storage.get_all_trials(storage.get_study_id_from_name("both"))


def test_what_plain_optuna_wrote_is_read_the_same(plain: RDBStorage, url: str) -> None:
    study = optuna.create_study(study_name="both", storage=plain)
    written = list(make_trials())
    for trial in written:
        plain.create_new_trial(study._study_id, template_trial=trial)
    storage = open_storage(url)
    read, expected = read_all(storage), read_all(plain)
    assert [trial.state for trial in read] == [trial.state for trial in written]
    assert list(map(facts, read)) == list(map(facts, expected))
    assert [facts(storage.get_trial(trial._trial_id)) for trial in read] == list(map(facts, read))
    for trial, original in zip(read, written, strict=True):
        assert facts(trial) == facts(original) | {"number": repr(trial.number)}
    storage.engine.dispose()


def test_what_a_worker_wrote_plain_optuna_reads_the_same(plain: RDBStorage, url: str) -> None:
    storage = open_storage(url)
    storage.worker = "machine-0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of heartbeats
        study = optuna.create_study(study_name="both", storage=storage, direction="maximize")
        for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING):
            study.enqueue_trial(PARAMS)
            run_trial(study, storage, state)
        infinite = study.ask()
    study.tell(infinite, INFINITY)
    study.enqueue_trial({"int": 2})
    again = open_storage(url)
    trials, expected = read_all(plain), read_all(again)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "FAIL", "RUNNING", "COMPLETE", "WAITING"]
    assert list(map(facts, trials)) == list(map(facts, expected))
    for trial in trials[:4]:
        assert trial.params == PARAMS
        assert trial.distributions == DISTRIBUTIONS
        assert repr(trial.intermediate_values) == repr(REPORTS)
        assert trial.user_attrs.items() >= (ATTRIBUTES | {"worker": "machine-0"}).items()
        assert trial.datetime_start is not None
        assert (trial.datetime_complete is not None) == trial.state.is_finished()
    assert [trial.value for trial in trials] == [0.75, 0.5, None, None, INFINITY, None]
    for opened in (storage, again):
        opened.engine.dispose()


def run_trial(study: optuna.Study, storage: Storage, state: TrialState) -> None:
    trial = study.ask(fixed_distributions=DISTRIBUTIONS)
    for step, value in REPORTS.items():
        trial.report(value, step)
    for name, attribute in ATTRIBUTES.items():
        trial.set_user_attr(name, attribute)
    if state == TrialState.COMPLETE:
        study.tell(trial, 0.75)
    elif state == TrialState.PRUNED:
        study.tell(trial, state=state)  # the last report becomes its value
    elif state == TrialState.FAIL:
        storage.end_attempt(trial._trial_id, 0, "exception", "ValueError: no")
    else:
        storage._buffered[trial._trial_id].is_due_at = 0.0
        storage.flush(trial._trial_id)
