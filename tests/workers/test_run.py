"""A search in Python does what the command does, and leaves the process of its caller as it was."""

import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import hpsearch
from hpsearch.errors import Interrupted, UsageError
from hpsearch.workers import run as module
from hpsearch.workers.shutdown import Drain

from ..conftest import fill
from ..shapes import write_shapes


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The lines that Optuna's users see."""
    optuna.logging.set_verbosity(optuna.logging.INFO)
    optuna.logging.enable_propagation()
    caplog.set_level("INFO", logger="optuna")
    yield caplog
    optuna.logging.disable_propagation()
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def test_a_search_in_python_returns_the_study_and_logs_each_trial_as_optuna_does(
    study_file: Callable[..., Path], logged: pytest.LogCaptureFixture
) -> None:
    study = hpsearch.run(study_file('[pruner]\nkind = "none"'), n_workers=2, trials=3)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3
    lines = [record.getMessage() for record in logged.records if record.name == "optuna.hpsearch"]
    assert sorted(line.partition(" with")[0] for line in lines) == [f"Trial {number} finished" for number in range(3)]
    assert lines[-1].endswith(f"Best is trial {study.best_trial.number} with value: {study.best_value}.")


def test_ctrl_c_drains_a_search_in_python_and_signals_are_handled_as_before_then(
    study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(definition: object, drain: Drain, *_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)
        drain.ignore_signals()
        drain.check()

    monkeypatch.setattr(module, "run_pool", interrupt)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with pytest.raises(Interrupted):
        hpsearch.run(study_file())
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_search_in_python_may_run_in_a_thread_and_gets_the_options_of_the_command(
    study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "run_pool", lambda definition, drain, *rest, **options: seen.append((rest, options)))
    definition = hpsearch.load_definition(study_file())
    options: dict[str, Any] = {"n_workers": 3, "n_threads": 2, "data": "here"}
    thread = threading.Thread(target=lambda: hpsearch.run(definition, **options))
    thread.start()
    thread.join()
    hpsearch.run(definition)
    [(rest, given), (_, by_default)] = seen
    assert rest == (3,)
    assert (given["n_threads"], given["folder"]) == (2, "here")
    assert by_default["n_threads"] is None, "workers would not give way to one that joins"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_workers": 0}, "n_workers must be at least 1, not 0"),
        ({"n_threads": -1}, "n_threads must be at least 1, not -1"),
        ({"trials": 0}, "trials: must be greater than or equal to 1, but got 0"),
        ({"storage": "mysql://here"}, "mysql"),
    ],
)
def test_a_wrong_argument_of_a_search_in_python_is_named(
    study_file: Callable[..., Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        hpsearch.run(study_file(), **options)


def test_artifacts_of_a_search_in_python_are_as_in_a_study_file(
    study_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(module, "run_pool", lambda definition, *_, **__: seen.append(definition.study.artifacts))
    definition = hpsearch.load_definition(study_file())
    hpsearch.run(definition, artifacts="~/files")
    assert seen == [str(tmp_path / "files")]
    with pytest.raises(UsageError, match="memory:// is not shared between processes"):
        hpsearch.run(definition, artifacts="memory://x")


def test_an_error_of_a_search_in_python_names_the_study_in_what_to_do(study_file: Callable[..., Path]) -> None:
    definition = hpsearch.load_definition(file := study_file())
    storage = hpsearch.open_storage(definition.study.storage)
    fill(storage, hpsearch.open_study(definition, storage), 4, n_running=0)
    with pytest.raises(UsageError, match=rf"to run 1 more: hpsearch add {file} --trials 1"):
        hpsearch.run(file, trials=1)


def test_reading_images_of_ones_own_is_logged_and_can_be_interrupted(
    logged: pytest.LogCaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_shapes(tmp_path / "shapes", 60, size=8)
    file = tmp_path / "own.toml"
    file.write_text('[data]\nfolder = "shapes"\n[search]\nlr = { float = [1e-3, 1e-1] }')
    monkeypatch.setattr(module, "run_pool", lambda *_, **__: None)
    hpsearch.run(file)
    lines = [record.getMessage() for record in logged.records]
    assert {"Checking 60 images of shapes."} < {*lines}
    assert any(line.startswith("Reading ") for line in lines)

    def interrupt(_definition: object, _folder: object, on_read: Callable[[int, int], None]) -> None:
        signal.raise_signal(signal.SIGINT)
        on_read(1, 60)

    monkeypatch.setattr(module, "open_data_set", interrupt)
    with pytest.raises(Interrupted):
        hpsearch.run(file)
