"""Studies are created once, resumed, protected against mixing two searches, and summarized."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hpsearch.bundle.retrain import record_test_use
from hpsearch.errors import DefinitionError, NoCompletedTrial, OwnCodeError, StorageError, StudyMismatch, StudyNotFound
from hpsearch.monitor.trials import list_trials, read_status
from hpsearch.search.selection import find_best
from hpsearch.search.study import check_writable, load_study, open_study, start_study
from hpsearch.storage.rdb import Storage, open_storage
from hpsearch.storage.tables import count_started, read_spent

from ..conftest import SEARCH, make_definition
from ..conftest import fill as write_many


def fill(storage: Storage) -> optuna.Study:
    """Trials: complete 0.8, pruned 0.9 after an epoch, complete 0.85, failed, running in epoch 1, waiting."""
    study = open_study(make_definition(), storage)
    for value, state in ((0.8, "complete"), (0.9, "pruned"), (0.85, "complete"), (0, "fail"), (0.3, "running")):
        trial = study.ask()
        trial.suggest_int("width", 8, 32)
        trial.set_user_attr("worker", "me-0")
        if state == "fail":
            storage.end_attempt(trial._trial_id, 0, "exception", "broken")
            continue
        trial.report(value, 1)
        if state == "complete":
            trial.report(value, 2)
            study.tell(trial, value)
        elif state == "pruned":
            study.tell(trial, state=TrialState.PRUNED)
    study.enqueue_trial({"width": 8})
    return study


pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed")


def test_the_trials_to_try_first_are_queued_once(storage: Storage) -> None:
    definition = make_definition(None, **{"try": [{"width": 9}, {"lr": 0.01}]})
    for _ in range(2):
        study = open_study(definition, storage)
    assert [trial.system_attrs["fixed_params"] for trial in study.trials] == [{"width": 9}, {"lr": 0.01}]


def test_a_network_of_the_users_is_tried_before_its_study_is_created(tmp_path: Path) -> None:
    source = "from torch import nn\ndef build(shape, n, *, depth: int, width: int):\n    return nn.{}\n"
    url, study = f"sqlite:///{tmp_path}/own.db", {"artifacts": str(tmp_path)}

    def start(module: str, **options: Any) -> None:
        (tmp_path / "nets.py").write_text(source.format(module))
        kind = f"{tmp_path}/nets.py:build"
        start_study(make_definition(url, network={"kind": kind}, study=study), **options)

    with pytest.raises(OwnCodeError, match=r"must have shape \(images, classes\) = \(8, 10\), but have \(8, 9\)"):
        start("Sequential(nn.Flatten(), nn.LazyLinear(n - 1))")
    assert optuna.get_all_study_names(open_storage(url)) == []
    start("Sequential(nn.Flatten(), nn.LazyLinear(n))")
    assert optuna.get_all_study_names(open_storage(url)) == ["small"]


def test_a_study_that_is_resumed_keeps_its_id_and_so_its_checkpoints(storage: Storage) -> None:
    ids = {open_study(make_definition(), storage).user_attrs["id"] for _ in range(2)}
    assert len(ids) == 1


def test_a_study_whose_creation_was_killed_is_completed(storage: Storage) -> None:
    definition = make_definition(None, **{"try": [{"width": 9}, {"width": 10}]})
    half = optuna.create_study(study_name="small", storage=storage, direction="maximize")
    half.enqueue_trial({"width": 9})
    study = open_study(definition, storage)
    assert [trial.system_attrs["fixed_params"] for trial in study.trials] == [{"width": 9}, {"width": 10}]


def test_a_changed_search_is_refused_with_the_differing_keys_and_changes_nothing(storage: Storage) -> None:
    study = open_study(make_definition(), storage)
    before = study.user_attrs
    changed = make_definition(budget={"trials": 99, "epochs": 3}, fixed={"depth": 3}, study={"seed": 8})
    with pytest.raises(StudyMismatch) as caught:
        open_study(changed, storage)
    message = str(caught.value)
    assert "budget.epochs: 2 -> 3" in message
    assert "fixed.depth: 2 -> 3" in message
    assert "study.seed: 0 -> 8" in message
    assert "budget.trials" not in message
    assert study.user_attrs == before


def test_a_study_of_an_older_version_opens_with_the_file_that_made_it_or_with_equal_numbers(storage: Storage) -> None:
    search: dict[str, Any] = {"lr": {"float": [0.001, 1.0], "log": True}, "dropout": {"choice": [0, 0.5]}}
    made, equal, other = (
        make_definition(None, search=search, **{"try": [{"lr": lr, "dropout": dropout}]})
        for lr, dropout in ((1, 0), (1.0, 0.0), (0.5, 0))
    )
    study = open_study(made, storage)
    identity = made.identity | {"search.dropout": {"choice": [0, 0.5]}, "try": [{"lr": 1, "dropout": 0}]}
    identity |= {"sampler.kind": "tpe", "sampler.startup": 10, "pruner.kind": "median"}  # the defaults then
    study.set_user_attr("identity", identity)  # as it was written in the file
    study.set_user_attr("fingerprint", "of that")
    for definition in (made, equal):
        assert open_study(definition, storage).user_attrs["fingerprint"] == "of that", "older versions can open it, too"
    with pytest.raises(StudyMismatch, match=r"try: .*'lr': 1\.0.* -> .*'lr': 0\.5") as caught:
        open_study(other, storage)
    assert "search" not in str(caught.value)


def test_the_metric_names_the_values_of_a_study_and_another_one_is_refused(storage: Storage) -> None:
    accuracy = make_definition(None, study={"metric": "accuracy"})
    balanced = make_definition(None, study={"metric": "balanced_accuracy"})
    assert open_study(accuracy, storage).metric_names == ["validation accuracy"]
    with pytest.raises(StudyMismatch, match=r"study\.metric: accuracy -> balanced_accuracy"):
        open_study(balanced, storage)
    other = make_definition(None, study={"name": "other", "metric": "balanced_accuracy"})
    assert open_study(other, storage).metric_names == ["validation balanced accuracy"]
    with pytest.raises(StudyMismatch, match=r"study\.metric: balanced_accuracy -> accuracy"):
        open_study(make_definition(None, study={"name": "other"}), storage)


def test_a_study_with_settings_without_effect_goes_on_but_none_is_created(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = {"lr": {"float": [0.01, 0.1], "when": {"dropout": [0.3]}}, "dropout": {"float": [0.1, 0.4]}}
    definition = make_definition(None, search=search)
    with pytest.raises(DefinitionError, match=r"study 'small': search\.lr\.when\.dropout: .* practically never"):
        open_study(definition, storage)
    assert optuna.get_all_study_names(storage) == []
    with monkeypatch.context() as patch:
        patch.setattr("hpsearch.search.study.check_new", lambda *_: None)  # as in an older version
        open_study(definition, storage)
    open_study(definition, storage)
    assert load_study(definition, storage).user_attrs["fingerprint"] == definition.fingerprint


@pytest.mark.parametrize("directions", [["minimize"], ["maximize", "maximize"]])
def test_a_study_that_does_not_maximize_one_value_is_not_taken(storage: Storage, directions: Any) -> None:
    optuna.create_study(study_name="small", storage=storage, directions=directions)
    for open_it in (open_study, load_study):
        with pytest.raises(StudyMismatch, match="'small' does not maximize one value"):
            open_it(make_definition(), storage)
    with pytest.raises(StudyMismatch, match="does not maximize"):
        find_best(optuna.create_study(directions=directions))


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("budget", {"trials": 9}),
        ("sampler", {"kind": "random"}),
        ("pruner", {"kind": "none"}),
        ("search", SEARCH | {"lr": {"float": [1e-3, 1e-1], "log": True, "prior": 0.02}}),
        ("recovery", {"grace": 99}),
        ("retrain", {"epochs": 9}),
    ],
)
def test_what_does_not_change_the_value_of_a_trial_may_change(
    storage: Storage, section: str, values: dict[str, Any]
) -> None:
    open_study(make_definition(), storage)
    study = open_study(make_definition(None, **{section: values}), storage)
    assert study.user_attrs["budget"]["trials"] == (9 if section == "budget" else 4)


def test_a_study_that_hpsearch_did_not_make_is_left_alone(storage: Storage) -> None:
    foreign = optuna.create_study(study_name="small", storage=storage, direction="maximize")
    foreign.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    with pytest.raises(StudyMismatch, match="trials that hpsearch did not create"):
        open_study(make_definition(), storage)
    assert foreign.user_attrs == {}


def test_a_half_created_study_is_not_worked_on(storage: Storage) -> None:
    optuna.create_study(study_name="small", storage=storage, direction="maximize")
    with pytest.raises(StudyNotFound, match="was only partly created"):
        load_study(make_definition(), storage)


def test_a_missing_study_is_named(storage: Storage) -> None:
    with pytest.raises(StudyNotFound, match="study 'small' not found in"):
        load_study(make_definition(), storage)


def test_the_best_trial_is_complete_and_the_earliest_of_equals(storage: Storage) -> None:
    study = fill(storage)
    assert find_best(study).number == 2
    assert find_best(study, 0).number == 0
    with pytest.raises(NoCompletedTrial, match="trial 1 did not complete"):
        find_best(study, 1)


def test_a_study_without_a_complete_trial_says_so(storage: Storage) -> None:
    with pytest.raises(NoCompletedTrial, match="no completed trial yet"):
        find_best(open_study(make_definition(), storage))


def test_the_summary_has_the_documents_keys_and_counts(storage: Storage) -> None:
    study = fill(storage)
    summary = read_status(make_definition("postgresql://me:secret@host/db"), study)
    assert [*summary] == ["study", "storage", "metric", "budget", "trials", "since_gain", "best", "workers", "epochs"]
    assert "secret" not in summary["storage"]
    assert summary["trials"] == {"complete": 2, "pruned": 1, "failed": 1, "running": 1, "waiting": 1}
    assert summary["best"]["number"] == 2
    assert summary["workers"] == [{"id": "me-0", "trial": 4, "epoch": 1}]
    assert summary["epochs"] == {"run": 6, "saved": 1}


def test_trials_are_listed_by_number_or_the_best_first(storage: Storage) -> None:
    study = fill(storage)
    assert [row["number"] for row in list_trials(study, None, "number", None)] == [0, 1, 2, 3, 4, 5]
    assert [row["number"] for row in list_trials(study, None, "value", 3)] == [2, 0, 1]
    [failed] = list_trials(study, "failed", "number", None)
    assert failed["note"] == "exception: broken"
    [waiting] = list_trials(study, "waiting", "number", None)
    assert waiting["params"] == {"width": 8}


def test_the_epochs_of_a_resumed_trial_count_once(storage: Storage) -> None:
    study = open_study(make_definition(), storage)
    killed = study.ask()
    killed.report(0.5, 1)
    storage.end_attempt(killed._trial_id, 0, "interrupted", "Ctrl-C")
    assert read_status(make_definition("sqlite:///x"), study)["epochs"]["run"] == 1
    resumed = study.ask()
    for epoch in (1, 2):
        resumed.report(0.5, epoch)
    assert read_status(make_definition("sqlite:///x"), study)["epochs"]["run"] == 2


def test_a_study_that_may_only_be_read_is_found_out_and_unchanged(storage: Storage, url: str) -> None:
    definition = make_definition()
    study = open_study(definition, storage)
    before = study.user_attrs
    check_writable(study)
    reading = open_storage(url, reads_only=True)
    with pytest.raises(StorageError, match=r"readonly|read-only"):
        check_writable(load_study(definition, reading))
    reading.engine.dispose()
    assert study.user_attrs == before


def test_readings_of_the_test_set_that_meet_are_all_counted(storage: Storage, url: str) -> None:
    def read_five_times(_: int) -> None:
        own = open_storage(url)
        mine = load_study(make_definition(), own)
        for _ in range(5):
            record_test_use(mine, find_best(mine))
        own.engine.dispose()

    study = fill(storage)
    with ThreadPoolExecutor(4) as pool:
        [*pool.map(read_five_times, range(4))]
    assert len(study.user_attrs["test_reads"]) == 20


def test_what_the_database_counts_is_what_reading_all_trials_gives(storage: Storage) -> None:
    definition = make_definition("sqlite:///x", budget={"trials": 100, "epochs": 10, "failures": 99})
    study = open_study(definition, storage)
    write_many(storage, study, 60)
    study.enqueue_trial({"width": 9})
    stopped = study.get_trials(deepcopy=False)[57]
    storage.end_attempt(stopped._trial_id, 0, "interrupted", "Ctrl-C")
    storage.worker = "me-0"
    for _ in range(2):  # one of them goes on with the interrupted trial
        study.ask()
    study.add_trial(optuna.trial.create_trial(value=study.best_value))  # a later equal is not the best
    counted = read_status(definition, study)
    with storage.engine.connect() as connection:
        spent, n_started = read_spent(connection, study._study_id), count_started(connection, study._study_id)
    trials = counted["trials"]
    assert (spent.running, spent.waiting, spent.fail) == (trials["running"], trials["waiting"], trials["failed"])
    assert spent.n_trials == sum(trials.values())
    assert n_started == trials["complete"] + trials["pruned"] + trials["running"]
    assert counted["best"]["number"] < study.trials[-1].number
    assert trials["failed"] > 5
    assert len(counted["workers"]) == 5
