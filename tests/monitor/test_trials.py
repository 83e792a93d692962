"""Trials as rows: sorted by any column, with the columns that are wanted, as CSV that no spreadsheet executes."""

import csv
import io
from datetime import datetime
from typing import Any

import optuna
import pytest

from hpsearch.errors import UsageError
from hpsearch.monitor.text import list_columns
from hpsearch.monitor.trials import (
    check_columns,
    describe_in_full,
    describe_trial,
    flatten,
    list_trials,
    to_csv,
)
from hpsearch.search.study import open_study
from hpsearch.storage.rdb import open_storage

from ..conftest import fill, make_definition


@pytest.fixture
def study(url: str) -> optuna.Study:
    definition = make_definition(url)
    storage = open_storage(definition.study.storage)
    study = open_study(definition, storage)
    fill(storage, study, 40)
    return study


@pytest.mark.parametrize("column", ["trial", "lr", "width", "epoch", "seconds", "state", "worker", "note"])
def test_rows_are_sorted_by_any_column_and_those_without_it_come_last(study: optuna.Study, column: str) -> None:
    cells = [flatten(row).get(column) for row in list_trials(study, None, column, None)]
    there = [cell for cell in cells if cell is not None]
    assert there == sorted(there)
    assert cells[: len(there)] == there


def test_the_seconds_of_a_trial_are_those_of_all_its_attempts() -> None:
    earlier = {"started": "2026-11-27T10:00:00+00:00", "ended": "2026-11-27T10:00:40.5+00:00"}
    trial = optuna.trial.create_trial(value=0.5, user_attrs={"interruptions": [earlier, earlier]})
    trial.datetime_start = datetime(2026, 11, 27, 12)
    trial.datetime_complete = datetime(2026, 11, 27, 12, 0, 3)
    assert describe_trial(trial)["seconds"] == 84
    assert describe_trial(trial)["attempts"] == 3


def test_by_value_the_best_complete_trial_comes_first(study: optuna.Study) -> None:
    rows = list_trials(study, None, "value", 5)
    assert rows[0]["number"] == study.best_trial.number
    assert [row["state"] for row in rows] == ["complete"] * 5


def test_an_unknown_column_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="unknown column 'widht'; did you mean 'width'"):
        check_columns(list_columns(["width", "lr"]), ["widht"])
    with pytest.raises(UsageError, match=r"unknown column 'loss'; .*trial, state, value, epoch, width, lr, worker"):
        check_columns(list_columns(["width", "lr"]), ["lr", "loss"])


def test_csv_reads_back_as_what_the_trials_are(study: optuna.Study) -> None:
    rows = list_trials(study, None, "number", None)
    columns = list_columns(["width", "lr"])
    read = list(csv.DictReader(io.StringIO(to_csv(rows, columns))))
    assert list(read[0]) == ["trial", "state", "value", "epoch", "width", "lr", "worker", "seconds", "note"]
    assert [int(line["trial"]) for line in read] == list(range(40))
    assert float(read[0]["value"]) == rows[0]["value"]
    assert read[36]["value"] == read[36]["seconds"] == ""


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@SUM(A1)",
        "\t=1",
        "\r=1",
        "  =cmd|' /C calc'!A0",
        "\n=1",
        "\uff1d1+1",
        "\uff20x",
        "\uff0d1",
        "\u200b=1",
        "\x00=1",
    ],
)
def test_no_cell_of_text_begins_like_a_formula_and_numbers_stay_numbers(text: str) -> None:
    row: dict[str, Any] = {"number": 1, "value": -0.5, "params": {"optimizer": text, "lr": -1e-3}, "note": text}
    [line] = csv.DictReader(io.StringIO(to_csv([row], ["number", "value", "optimizer", "lr", "note"]), newline=""))
    harmless = f"'{' '.join(text.split())}".replace("\u200b", "").replace("\x00", "")
    assert line == {"number": "1", "value": "-0.5", "optimizer": harmless, "lr": "-0.001", "note": harmless}


def test_one_trial_is_shown_with_its_reports_times_worker_and_failure(study: optuna.Study) -> None:
    failed, running = describe_in_full(study, 5), describe_in_full(study, 39)
    assert failed["failure"] == {"kind": "exception", "message": "ValueError: =trial 5"}
    assert failed["note"] == "exception: ValueError: =trial 5"
    assert failed["worker"] == "machine-1"
    assert failed["reports"] == {str(step): value for step, value in study.trials[5].intermediate_values.items()}
    assert failed["ended"] > failed["started"]
    assert running["ended"] is None
    assert running["started"] == study.trials[39].datetime_start.astimezone().isoformat(timespec="seconds")  # type: ignore[union-attr]
    assert describe_in_full(study, 2)["pruning"]["epoch"] == 3


@pytest.mark.parametrize("number", [-1, 40])
def test_a_trial_that_is_not_there_is_named(study: optuna.Study, number: int) -> None:
    with pytest.raises(UsageError, match=f"has no trial {number}; valid numbers are 0 to 39"):
        describe_in_full(study, number)
