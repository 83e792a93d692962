"""A copied study is complete and equal to its source, and the search can continue with it."""

import math
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import psycopg
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial
from sqlalchemy.engine import make_url

from hpsearch import __main__
from hpsearch.config.definition import StudyDefinition, evolve
from hpsearch.data.dataset import ImageData
from hpsearch.errors import Interrupted, StorageError, StorageUnavailable, StudyNotFound, UsageError
from hpsearch.monitor.status import Watch
from hpsearch.search import copy
from hpsearch.search.copy import back_up_study, copy_study
from hpsearch.search.study import enqueue_trial, extend_study, load_study, open_study, stop_study
from hpsearch.storage import transfer
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import Checkpoint, artifact_folder, checkpoint_name
from hpsearch.storage.rdb import Storage, open_storage
from hpsearch.storage.tables import HEARTBEATS, TRIALS
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import Worker

from ..conftest import fill, make_definition

pytestmark = pytest.mark.filterwarnings("ignore:Heartbeat of storage")

DISTRIBUTIONS = {
    "width": IntDistribution(8, 32),
    "lr": FloatDistribution(1e-3, 1e-1, log=True),
    "optimizer": CategoricalDistribution(["adam", "sgd", None, True]),
}
NESTED = {"name": "Ünïcode ☃ 'quoted' \x00", "none": None, "deep": [{"a": [1, 2.5, True]}]}


@pytest.fixture
def definition(url: str, tmp_path: Path) -> StudyDefinition:
    return make_definition(url, study={"artifacts": str(tmp_path / "artifacts")}, pruner={"kind": "none"})


@pytest.fixture
def study(definition: StudyDefinition) -> optuna.Study:
    return open_study(definition, open_storage(definition.study.storage))


def create_database(server: str, name: str) -> str:
    """The URL of a new database."""
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type,unused-ignore]
    return make_url(server).set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def target(definition: StudyDefinition, postgres_url: str, tmp_path: Path) -> StudyDefinition:
    """The study in a new database of the other kind."""
    url = f"sqlite:///{tmp_path / 'other.db'}"
    if definition.study.storage.startswith("sqlite"):
        url = create_database(postgres_url, f"other{abs(hash(tmp_path))}")
    return evolve(definition, "study", storage=url)


def with_artifacts(target: StudyDefinition, place: object) -> StudyDefinition:
    return evolve(target, "study", artifacts=str(place))


def read(definition: StudyDefinition, name: str = "small") -> str:
    """All of a study but its ids, as Optuna itself reads it."""
    storage = open_storage(definition.study.storage)
    study = optuna.load_study(study_name=name, storage=storage)
    lines = [repr((study.directions, study.user_attrs, storage.get_study_system_attrs(study._study_id)))]
    for trial in RDBStorage._get_trials(storage, study._study_id, None, set(), -1):
        parts = {k: v for k, v in vars(trial).items() if k != "_trial_id"}
        lines.append(repr({k: sorted(v.items()) if isinstance(v, dict) else v for k, v in parts.items()}))
    storage.engine.dispose()
    return "\n".join(lines)


def count_rows(definition: StudyDefinition) -> dict[str, int]:
    engine = open_storage(definition.study.storage).engine
    with engine.connect() as connection:
        return {
            name: connection.execute(sqlalchemy.text(f"SELECT count(*) FROM {name}")).scalar_one()
            for name in sqlalchemy.inspect(connection).get_table_names()
        }


def add_every_kind(study: optuna.Study) -> None:
    """Trials in every state, with all that can be stored of one."""
    reports = {1: 0.25, 2: math.inf, 3: -math.inf, 4: math.nan, 70: 0.1 + 0.2}
    params = {"width": 9, "lr": 0.012345678901234567, "optimizer": None}
    for state, value in ((TrialState.COMPLETE, 1 / 3), (TrialState.COMPLETE, math.inf), (TrialState.PRUNED, None)):
        study.add_trial(
            create_trial(
                state=state,
                value=value,
                params=params,
                distributions=DISTRIBUTIONS,
                user_attrs={"worker": "host-0", "nested": NESTED},
                system_attrs={"completed_rung_0": 0.25, "retry_history": [1]},
                intermediate_values=reports,
            )
        )
    study.tell(study.ask(), state=TrialState.FAIL)
    running = study.ask()
    running.report(math.nan, 1)
    study.enqueue_trial({"width": 9, "optimizer": True}, user_attrs={"attempts": [3]})


def test_a_copy_has_all_that_can_be_read_of_a_study(
    definition: StudyDefinition, study: optuna.Study, target: StudyDefinition
) -> None:
    fill(open_storage(definition.study.storage), study, 40, n_running=0)
    add_every_kind(study)
    enqueue_trial(definition, study, ["width=8"])
    extend_study(definition, study, 5)
    stop_study(study)
    study.set_user_attr("confirmation", {"winner": 3, "candidates": [{"number": 3, "values": [0.5, 0.25]}]})
    study.set_user_attr("nested", NESTED)
    copied = copy_study(definition, target)
    assert read(target) == read(definition)
    assert copied.n_trials == 47
    assert copied.n_reports == sum(len(trial.intermediate_values) for trial in study.trials)
    again = load_study(target, open_storage(target.study.storage))
    assert math.isnan(again.trials[40].intermediate_values[4])
    assert [list(trial.params) for trial in again.trials] == [list(trial.params) for trial in study.trials]
    assert again.trials[46].system_attrs["fixed_params"] == {"width": 8}


def test_other_studies_are_neither_copied_nor_touched(
    definition: StudyDefinition, study: optuna.Study, target: StudyDefinition
) -> None:
    others = {}
    for place, name, n_trials in ((definition, "neighbour", 3), (target, "resident", 7)):
        storage = open_storage(place.study.storage)
        fill(storage, open_study(evolve(place, "study", name=name), storage), n_trials, n_running=0)
        others[name] = read(place, name)
    fill(open_storage(definition.study.storage), study, 20, n_running=0)
    copy_study(definition, target)
    assert read(target) == read(definition)
    for place, name in ((definition, "neighbour"), (target, "resident")):
        assert read(place, name) == others[name]
    names = optuna.get_all_study_names(open_storage(target.study.storage))
    assert sorted(names) == ["resident", "small"]


def test_a_repeated_copy_writes_nothing(
    definition: StudyDefinition, study: optuna.Study, target: StudyDefinition
) -> None:
    fill(open_storage(definition.study.storage), study, 20, n_running=0)
    first = copy_study(definition, target)
    n_rows = count_rows(target)
    second = copy_study(definition, target)
    assert (first.was_there, second.was_there) == (False, True)
    assert count_rows(target) == n_rows
    assert copy_study(target, definition) == second


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda study: study.enqueue_trial({"width": 9}), "number of trials: 12 in the source, 13 in the target"),
        (
            lambda study: study.set_user_attr("note", "mine"),
            "user_attrs note: absent in the source, mine in the target",
        ),
        (
            lambda study: study._storage.set_trial_user_attr(study.trials[11]._trial_id, "worker", "me"),
            "trial 11 user_attrs worker: you in the source, me in the target",
        ),
        (
            lambda study: study._storage.set_trial_intermediate_value(study.trials[11]._trial_id, 2, math.nan),
            "trial 11 intermediate_values 2: 0.5 in the source, nan in the target",
        ),
    ],
    ids=["trials", "study", "attribute", "report"],
)
def test_a_study_of_the_name_that_differs_is_left_alone(
    definition: StudyDefinition,
    study: optuna.Study,
    target: StudyDefinition,
    change: Callable[[optuna.Study], None],
    difference: str,
) -> None:
    fill(open_storage(definition.study.storage), study, 11, n_running=0)
    trial = study.ask()  # by a worker that is dead
    trial.set_user_attr("worker", "you")
    trial.report(0.5, 2)
    copy_study(definition, target)
    change(load_study(target, open_storage(target.study.storage)))
    changed = read(target)
    with pytest.raises(UsageError, match="already has a different study 'small'") as caught:
        copy_study(definition, with_artifacts(target, "memory://nothing"))
    assert f"({difference})" in str(caught.value)
    assert "delete it there: optuna delete-study --study-name small" in str(caught.value)
    assert read(target) == changed


def test_a_study_whose_workers_are_alive_is_not_copied(
    definition: StudyDefinition, study: optuna.Study, target: StudyDefinition
) -> None:
    fill(open_storage(definition.study.storage), study, 9, n_running=4)
    with pytest.raises(UsageError, match="'small' has 4 running trials; stop it first: hpsearch stop STUDY"):
        copy_study(definition, target)
    with pytest.raises(StudyNotFound):
        open_storage(target.study.storage, must_exist=True)


def test_a_sqlite_study_is_copied_to_a_file_with_its_files_while_workers_are_alive(tmp_path: Path) -> None:
    definition = make_definition(f"sqlite:///{tmp_path / 'study.db'}", study={"artifacts": str(tmp_path / "here")})
    study = open_study(definition, storage := open_storage(definition.study.storage))
    fill(storage, study, 30, n_running=4)
    needed = put(definition, study)
    target = with_artifacts(
        evolve(definition, "study", storage=f"sqlite:///{tmp_path / 'copy.db'}"), tmp_path / "there"
    )
    copied = back_up_study(definition, target)
    assert (copied.n_trials, copied.n_files_copied) == (30, len(needed))
    assert read(target) == read(definition)
    assert set(artifact_folder(target).find()) == set(needed)
    with pytest.raises(
        UsageError, match=r"copy\.db already exists; choose another file name, or replace it with --force"
    ):
        back_up_study(definition, with_artifacts(target, tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()
    assert back_up_study(definition, target, force=True).n_files_there == len(needed)


def test_a_study_that_changes_while_it_is_copied_is_not_written(
    definition: StudyDefinition, study: optuna.Study, target: StudyDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_rows = transfer.read_study_rows

    def add_a_trial(*arguments: Any) -> Any:
        study.enqueue_trial({"width": 9})
        return read_rows(*arguments)

    monkeypatch.setattr(transfer, "read_study_rows", add_a_trial)
    with pytest.raises(StorageError, match="changed during the copy, so nothing was written"):
        copy_study(definition, target)
    assert count_rows(target)["studies"] == count_rows(target)["trials"] == 0
    monkeypatch.undo()
    copy_study(definition, target)
    assert read(target) == read(definition)


def test_the_rows_of_a_source_are_those_of_one_moment(postgres_url: str, tmp_path: Path) -> None:
    url = create_database(postgres_url, f"moment{abs(hash(tmp_path))}")  # in SQLite a reader keeps others from writing
    study = open_study(make_definition(url), open_storage(url))
    source = open_storage(url, reads_only=True)

    def add_a_trial(*_: object) -> None:
        study.enqueue_trial({"width": 9})

    sqlalchemy.event.listen(source.engine, "after_execute", add_a_trial, once=True)
    assert transfer.read_study_rows(source, "small")[TRIALS] == []
    assert len(transfer.read_study_rows(source, "small")[TRIALS]) == 1


def test_a_copy_that_is_not_equal_is_told(
    definition: StudyDefinition, study: optuna.Study, target: StudyDefinition, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(open_storage(definition.study.storage), study, 9, n_running=0)
    read_rows = transfer.read_study_rows

    def lose_a_report(storage: Storage, name: str) -> Any:
        rows = read_rows(storage, name)
        table = next(table for table in rows if table.name == "trial_intermediate_values")
        rows[table].pop()
        return rows

    for module in (copy, transfer):
        monkeypatch.setattr(module, "read_study_rows", lose_a_report)
    with pytest.raises(
        StorageError, match=r"\(trial 8 intermediate_values \d+: 0\.\d+ in the source, absent in the target\)"
    ):
        copy_study(definition, target)


def test_the_database_of_the_study_is_no_place_for_its_copy(
    definition: StudyDefinition, study: optuna.Study, tmp_path: Path
) -> None:
    url = make_url(definition.study.storage)
    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "")
        (tmp_path / "link.db").symlink_to(file)
        spellings = [
            url,
            url.set(database=f"{file.parent}/../{file.parent.name}/{file.name}"),
            url.set(database=f"{tmp_path}/link.db"),
        ]
    else:
        spellings = [url, url.set(password="any"), url.update_query_dict({"host": f"{url.query['host']}/."})]
    for spelling in spellings:
        target = evolve(definition, "study", storage=spelling.render_as_string(hide_password=False))
        with pytest.raises(UsageError, match="source and target are the same database"):
            copy_study(definition, target)


def test_only_a_whole_study_of_the_definition_is_copied(definition: StudyDefinition, target: StudyDefinition) -> None:
    storage = open_storage(definition.study.storage)
    with pytest.raises(StudyNotFound, match="study 'small' not found"):
        copy_study(definition, target)
    optuna.create_study(study_name="small", storage=storage, direction="maximize")
    with pytest.raises(StudyNotFound, match="only partly created"):
        copy_study(definition, target)
    with pytest.raises(StudyNotFound):
        open_storage(target.study.storage, must_exist=True)


def test_a_database_out_of_reach_is_told_without_its_password(definition: StudyDefinition, study: optuna.Study) -> None:
    target = evolve(definition, "study", storage="postgresql://me:secret@127.0.0.1:9/db")
    with pytest.raises(StorageUnavailable, match="cannot reach the database") as caught:
        copy_study(definition, target)
    assert "secret" not in str(caught.value)


def test_a_stuck_trial_is_re_queued_in_the_copy_after_a_grace_period(
    definition: StudyDefinition, study: optuna.Study, target: StudyDefinition
) -> None:
    source = open_storage(definition.study.storage)
    fill(source, study, 9, n_running=1)
    long_ago = sqlalchemy.update(HEARTBEATS).values(heartbeat=datetime(2026, 1, 1))
    with source.engine.begin() as connection:
        connection.execute(long_ago)
    copy_study(definition, target)
    storage = open_storage(target.study.storage)
    assert Watch(target).poll().n_alive == 0
    copied = load_study(target, storage)
    assert storage.reap(copied._study_id, retries=2) == [], "its heartbeat begins now"
    with storage.engine.begin() as connection:
        connection.execute(long_ago)
    assert len(storage.reap(copied._study_id, retries=2)) == 1
    assert copied.trials[-1].state == TrialState.WAITING


def put(definition: StudyDefinition, study: optuna.Study) -> dict[str, bytes]:
    """Write files of every kind; gives those that are to be copied."""
    own = str(study.user_attrs["id"])
    best = sorted((trial for trial in study.trials if trial.values), key=lambda trial: -trial.values[0])
    best = [trial for trial in best if trial.state == TrialState.COMPLETE]
    needed = {
        f"{own}/{checkpoint_name(best[0].number)}": b"best",
        f"{own}/files/0b1c": b"\x00" * 1000,
        "trial-5.txt": b"Traceback",
    }
    unneeded = {
        f"{own}/{checkpoint_name(best[-1].number)}": b"worst",
        f"{own}/{checkpoint_name(best[0].number)}.tmp": b"torn",
        f"other/{checkpoint_name(best[0].number)}": b"of another database",
        "trial-1000.txt": b"of another database",
    }
    for name, content in (needed | unneeded).items():
        artifact_folder(definition).write(name, content)
    return needed


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_the_files_that_are_needed_go_with_the_study(
    definition: StudyDefinition, study: optuna.Study, target: StudyDefinition, tmp_path: Path, kind: str
) -> None:
    target = with_artifacts(target, f"memory://{tmp_path.name}/there" if kind == "memory" else tmp_path / "there")
    fill(open_storage(definition.study.storage), study, 30, n_running=0)
    needed = put(definition, study)
    folder = artifact_folder(target)
    folder.write("trial-5.txt", needed["trial-5.txt"])
    copied = copy_study(definition, target)
    assert (copied.n_files_copied, copied.n_files_there) == (2, 1)
    assert {name: folder.read(name) for name in folder.find()} == needed
    checkpoint = next(name for name in needed if name.endswith(".ckpt"))
    folder.write(checkpoint, b"damaged")
    copied = copy_study(definition, target)
    assert (copied.n_files_copied, copied.n_files_there) == (1, 2)
    assert folder.read(checkpoint) == needed[checkpoint]
    folder.write("trial-5.txt", b"of another study")
    with pytest.raises(UsageError, match=r"trial-5.txt is there and differs; choose another --artifacts-to"):
        copy_study(definition, target)
    assert folder.read("trial-5.txt") == b"of another study"


def test_a_study_appears_after_its_files(
    definition: StudyDefinition,
    study: optuna.Study,
    target: StudyDefinition,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = with_artifacts(target, tmp_path / "there")
    fill(open_storage(definition.study.storage), study, 30, n_running=0)
    put(definition, study)
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda folder, name, content: write(folder, name, content[:-1]))
    with pytest.raises(StorageError, match=r"there/small/\w+/files/0b1c was not written correctly"):
        copy_study(definition, target)
    assert count_rows(target)["studies"] == 0
    with pytest.raises(UsageError, match="returned different data"):
        copy_study(definition, with_artifacts(target, f"memory://{tmp_path.name}"))


def test_a_search_goes_on_in_the_copy_where_it_was(
    definition: StudyDefinition,
    study: optuna.Study,
    target: StudyDefinition,
    digits: ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    definition, target = (
        evolve(each, "budget", epochs=4) for each in (definition, with_artifacts(target, tmp_path / "there"))
    )
    definition, target = (evolve(each, "study", name="other") for each in (definition, target))
    study = open_study(definition, open_storage(definition.study.storage))
    enqueue_trial(definition, study, ["width=9"])
    enqueue_trial(definition, study, ["width=10"])
    drain, storage = Drain(), open_storage(definition.study.storage)
    report = storage.set_trial_intermediate_value

    def stop_in_trial_one(trial_id: int, step: int, value: float) -> None:
        report(trial_id, step, value)
        if (storage.get_trial(trial_id).number, step) == (1, 2):
            drain.set(Interrupted())

    monkeypatch.setattr(storage, "set_trial_intermediate_value", stop_in_trial_one)
    with pytest.raises(Interrupted):
        Worker(definition, storage, 0, drain, data=digits, emit=lambda _: None).run()
    copy_study(definition, target)
    shutil.rmtree(tmp_path / "artifacts")
    states: list[Any] = []
    load = Checkpoint.load

    def note(checkpoint: Checkpoint) -> Any:
        states.append(load(checkpoint))
        return states[-1]

    monkeypatch.setattr(Checkpoint, "load", note)
    opened = open_storage(target.study.storage)
    copied = open_study(target, opened)
    Worker(target, opened, opened.join(copied._study_id), Drain(), data=digits, emit=lambda _: None).run()
    assert [len(state["results"]) for state in states if state] == [2]
    finished = [trial for trial in copied.trials if trial.state == TrialState.COMPLETE]
    assert len(finished) == definition.budget.trials
    interrupted = copied.trials[1]
    assert (interrupted.params["width"], len(interrupted.user_attrs["interruptions"])) == (10, 1)
    assert list(interrupted.intermediate_values) == [1, 2, 3, 4]
    assert [trial.number for trial in copied.trials] == list(range(4))
    assert len(load_study(definition, open_storage(definition.study.storage)).trials) == 2, "the source is as it was"


def test_the_command_says_what_to_set_and_no_password(
    study_file: Callable[..., Path],
    postgres_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from hpsearch.config.definition import load_definition

    definition = load_definition(study_file())
    study = open_study(definition, open_storage(definition.study.storage))
    fill(open_storage(definition.study.storage), study, 1200, epochs=2, n_running=0)
    monkeypatch.chdir(tmp_path)
    url = make_url(create_database(postgres_url, f"told{abs(hash(tmp_path))}")).set(password="secret")
    place = url.render_as_string(hide_password=False)

    def call(*arguments: str) -> list[str]:
        monkeypatch.setattr("sys.argv", ["hpsearch", "copy", "small.toml", "--to", place, *arguments])
        with pytest.raises(SystemExit) as caught:
            __main__.main()
        out, err = capfd.readouterr()
        assert (caught.value.code or 0, out) == (0, "")
        assert "secret" not in err
        warning, *lines = err.splitlines()
        assert "can read the password in --to" in warning
        return lines

    first = call()
    assert first[0].startswith("small copied to postgresql://postgres:***@")
    assert first[0].endswith(": 1,200 trials, 2,057 epoch results")
    assert first[1] == "verified: source and copy are identical"
    assert first[2].startswith(f"files: not copied, still in {tmp_path}/artifacts; ")
    assert first[3].startswith("next:  HPSEARCH_STORAGE='postgresql://postgres:***@")
    assert first[3].endswith("hpsearch run small.toml")
    assert first[4].startswith(f"note:  the original in sqlite:///{tmp_path}/small.db is unchanged")
    second = call("--artifacts-to", "there")
    assert second[0].startswith("small was already in postgresql://")
    assert second[1] == first[1]
    assert second[2] == f"files: 0 copied to {tmp_path}/there, 0 already there"
    assert f" HPSEARCH_ARTIFACTS={tmp_path}/there hpsearch run small.toml" in second[3]
