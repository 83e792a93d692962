"""The command line: exit statuses, one clear message per error, data on stdout and messages on stderr."""

import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from sqlalchemy.exc import OperationalError

from hpsearch import __main__
from hpsearch.bundle.bundle import REQUIRED
from hpsearch.bundle.manifest import write_manifest
from hpsearch.cli import render
from hpsearch.config.definition import load_definition
from hpsearch.monitor import doctor
from hpsearch.monitor.text import echo, trial_line
from hpsearch.search.study import open_study
from hpsearch.search.trials import TrialEvent
from hpsearch.storage import tables
from hpsearch.storage.rdb import open_storage
from hpsearch.training import devices
from hpsearch.workers import cores

from ..conftest import fill

Run = Callable[..., tuple[int, str, str]]
VERBS = (
    *("init", "check", "run", "worker", "stop"),
    *("status", "trials", "add", "dashboard"),
    *("confirm", "export", "predict", "evaluate", "report"),
    *("doctor", "copy"),
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in `tmp_path`; gives its exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hpsearch", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            __main__.main()
        code = caught.value.code
        output = capfd.readouterr()
        return int(code or 0), output.out, output.err

    return call


BAD_ARGUMENTS = [
    (["nonsense"], "no such command 'nonsense'; see: hpsearch -h"),
    (["rnu", "x"], "no such command 'rnu'; did you mean 'run'?"),
    (["--nonsense"], "no such option: --nonsense"),
    (["launch", "small.toml"], "`hpsearch launch` is now `hpsearch run --ray`; see: hpsearch run -h"),
    (["show", "small.toml", "1"], "is now `hpsearch trials`"),
    (["replay", "small.toml", "--trial", "1"], "is now `hpsearch trials --replay`"),
    (["enqueue", "small.toml", "--set", "lr=1e-3"], "is now `hpsearch add`"),
    (["extend", "small.toml", "--trials", "20"], "is now `hpsearch add`"),
    (["backup", "small.toml", "copy.db"], "is now `hpsearch copy --to`"),
    (["run", "small.toml", "--wrokers", "2"], "no such option: --wrokers; did you mean --workers?"),
    (["run", "small.toml", "--workers"], "option '--workers' requires an argument; see: hpsearch run -h"),
    (["run", "small.toml", "--workers", "0"], "--workers: must be a whole number from 1 to 10,000, not 0;"),
    (["run", "small.toml", "--workers", "2000"], "--workers: must be a whole number from 1 to 1,024, not 2000"),
    (["run", "small.toml", "--workers", "two"], "must be a whole number from 1 to 10,000, not two"),
    (["run", "small.toml", "--trials", "-3"], "--trials: must be a whole number of at least 1, not -3;"),
    (["run", "small.toml", "--dashboard=yes"], "option '--dashboard' does not take a value"),
    (["run", "small.toml", "--detach"], "--detach need --ray"),
    (["run", "small.toml", "--gpus-per-worker", "0"], "--detach need --ray"),
    (["run", "small.toml", "--ray=small"], "--ray: must be an address such as head:6379, ray://head:10001 or local,"),
    (["run", "small.toml", "--ray", "http://head:8265"], "not http://head:8265"),
    (["run", "--ray", "smal"], "smal: study file not found"),
    (["run", "small.toml", "--ray", "--cpus-per-worker", "inf"], "must be a number from 0.01 to 1,000, not inf"),
    (["run", "small.toml", "extra"], "extra"),
    (["run", "missing.toml"], "study file not found"),
    (["run", "."], "study file not found"),
    (["run", "broken.toml"], "not valid TOML"),
    (["run", "wrong.toml"], "budget.trials: must be"),
    (["run", "small.toml", "--storage", "nonsense"], "invalid database URL"),
    (["run", "small.toml", "--storage", "mysql://me:secret@host/db"], "use SQLite or PostgreSQL"),
    (["run", "small.toml", "--storage", "sqlite://"], "cannot be shared"),
    (["run", "small.toml", "--storage", "sqlite:////no/such/folder/x.db"], "folder /no/such/folder for"),
    (["worker", "small.toml", "--max-trials", "0"], "--max-trials: must be a whole number of at least 1, not 0;"),
    (["run", "small.toml", "--ray", "--gpus-per-worker", "-1"], "--gpus-per-worker"),
    (
        ["run", "small.toml", "--artifacts", "nonsense://x"],
        "cannot use the artifact store nonsense://x: Protocol not known",
    ),
    (["run", "small.toml", "--artifacts", "s3:///"], "s3:///: bucket or path missing"),
    (["run", "small.toml", "--artifacts", "memory://x"], "memory:// is not shared between processes"),
    (["run", "small.toml", "--ray", "local", "--detach"], "start one with: ray start --head"),
    (["run", "small.toml", "--ray", "--gpus-per-worker", "1.5"], "--gpus-per-worker 1.5: must be a fraction below 1"),
    (["run", "small.toml", "--artifacts", "gs://x"], "cannot use the artifact store gs://x: missing package"),
    (["trials", "small.toml", "--json", "--csv"], "cannot be combined"),
    (["status", "small.toml", "--watch", "--json"], "cannot be combined"),
    (["trials", "small.toml", "1", "--sort", "lr"], "leave them out to show trial 1"),
    (["trials", "small.toml", "1.5"], "TRIAL: must be a whole number of at least 0, not 1.5;"),
    (["trials", "small.toml", "--data", "here"], "need the number of a trial"),
    (["add", "small.toml"], "nothing to add: give a number of trials (--trials 20) or values to try next (lr=1e-3)"),
    (["add", "small.toml", "--trials", "0"], "--trials: must be a whole number of at least 1, not 0;"),
    (["trials", "small.toml", "--state", "done"], "--state: 'done' is not one of 'complete', 'pruned',"),
    (["trials", "small.toml", "--limit", "0"], "--limit: must be a whole number of at least 1, not 0;"),
    (["trials", "small.toml", "--columns", "lr,what"], "unknown column 'what'"),
    (["export", "small.toml", "--trial", "best"], "--trial: must be a whole number of at least 0, not best;"),
    (["confirm", "small.toml", "--top", "0"], "--top: must be a whole number of at least 1, not 0;"),
    (["confirm", "small.toml", "--seeds", "1"], "--seeds: must be a whole number from 2 to 100, not 1;"),
    (["trials", "small.toml", "--replay"], "need the number of a trial"),
    (["dashboard", "small.toml", "--port", "70000"], "--port: must be a whole number from 0 to 65,535, not 70000"),
    (["dashboard", "small.toml", "--host", "0.0.0.0"], "HPSEARCH_TOKEN"),
    (["dashboard", "small.toml", "--token", "short"], "at least 8"),
    (["copy", "small.toml"], "missing option '--to'; see: hpsearch copy -h"),
    (["copy", "small.toml", "--to", "postgresql://me@127.0.0.1:9/x", "--force"], "--force replaces a SQLite file"),
    (["copy", "small.toml", "--to", ""], "invalid database URL"),
    (["copy", "small.toml", "--to", "mysql://me:secret@host/db"], "use SQLite or PostgreSQL"),
    (
        ["copy", "small.toml", "--to", "sqlite:///x.db", "--artifacts-to", "s3://me:secret@b"],
        "must not contain a password",
    ),
    (["init", "mine"], "no example 'mine'; the examples are: digits, mnist-mlp, "),
    (["init", "mine", "--images", "nowhere"], "nowhere: no such folder or file"),
    (["evaluate"], "missing argument 'BUNDLE'"),
    (["predict", "."], ". is not a model folder"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=lambda value: "-".join(value)[:60])
def test_a_wrong_argument_gives_one_clear_message_and_status_2(
    run: Run, study_file: Callable[..., Path], tmp_path: Path, arguments: list[str], message: str
) -> None:
    study_file()
    (tmp_path / "broken.toml").write_text("[search")
    (tmp_path / "wrong.toml").write_text("[budget]\ntrials = 0\n[search]\nwidth = { int = [8, 9] }")
    before = sorted(tmp_path.iterdir())
    code, out, err = run(*arguments)
    err = re.sub(r"^small: (starting .*|connecting to Ray)\n", "", err)
    assert code == 2, err
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert not re.search("secret|Traceback|pydantic|Value error|Input should|hpsearch [^;,]*\b[A-Z]{2}", err)
    assert len(err.splitlines()) == 1, err
    assert sorted(tmp_path.iterdir()) == before, "something was written"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["status", "small.toml"], 1, "no search found"),
        (["trials", "small.toml"], 1, "no search found"),
        (["export", "small.toml"], 1, "no search found"),
        (["confirm", "small.toml"], 1, "no search found"),
        (["trials", "small.toml", "0", "--replay"], 1, "no search found"),
        (["worker", "small.toml"], 1, "no search found"),
        (["run", "small.toml", "--ray", "127.0.0.1:9"], 1, "no response from a Ray cluster at 127.0.0.1:9"),
        (["dashboard", "small.toml"], 1, "no search found"),
        (["copy", "small.toml", "--to", "sqlite:///x.db"], 1, "no search found"),
        (["evaluate", "models/small"], 2, "is not a model folder"),
        (["predict", "models/small", "x.png"], 2, "is not a model folder"),
        (["status", "small.toml", "--storage", "postgresql://me:secret@127.0.0.1:9/db"], 75, "cannot reach"),
    ],
)
def test_what_is_not_there_is_named(
    run: Run, study_file: Callable[..., Path], arguments: list[str], status: int, message: str
) -> None:
    study_file()
    code, out, err = run(*arguments)
    assert (code, out) == (status, "")
    assert message in err
    assert "secret" not in err
    assert len(err.splitlines()) <= 2


def test_ctrl_c_is_told_in_one_line(run: Run, study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from hpsearch.config import definition

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    study_file()
    monkeypatch.setattr(definition, "load_definition", interrupt)
    assert run("export", "small.toml") == (130, "", "interrupted\n")


def test_a_trial_or_values_can_be_named_without_the_only_study_here(run: Run, study_file: Callable[..., Path]) -> None:
    definition = load_definition(study_file())
    open_study(definition, open_storage(definition.study.storage))
    code, _, err = run("add", "width=9", "lr=0.01", "--trials", "2")
    assert code == 0
    assert "trial 0 queued with width=9, lr=0.01; budget is now " in err
    assert json.loads(run("trials", "0", "--json")[1])["params"] == {"width": 9, "lr": 0.01}
    code, _, err = run("trials", "7")
    assert (code, err.splitlines()[-1]) == (2, "error: study 'small' has no trial 7; valid numbers are 0 to 0")


@pytest.mark.parametrize("verb", ["confirm", "export"])
def test_exporting_without_a_complete_trial_gives_status_4(
    run: Run, study_file: Callable[..., Path], verb: str
) -> None:
    from hpsearch.config.definition import load_definition
    from hpsearch.search.study import open_study
    from hpsearch.storage.rdb import open_storage

    definition = load_definition(study_file())
    open_study(definition, open_storage(definition.study.storage))
    code, _, err = run(verb, "small.toml")
    assert code == 4
    assert "no completed trial yet" in err


def test_copy_and_export_replace_a_file_or_a_model_of_another_study_only_with_force(
    run: Run, study_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(load_definition(study_file()).study.storage)
    fill(storage, open_study(load_definition("small.toml"), storage), 4, n_running=0)
    model = tmp_path / "model"
    model.mkdir()
    for name in REQUIRED:
        (model / name).write_text('{"study": "other"}')
    write_manifest(model)
    for verb in (["copy", "small.toml", "--to", "copy.db"], ["export", "small.toml", "--output", "model"]):
        (tmp_path / "copy.db").write_bytes(b"SQLite format 3\0mine")
        code, _, err = run(*verb)
        assert (code, "replace it with --force" in err) == (2, True), err
    assert (tmp_path / "copy.db").read_bytes() == b"SQLite format 3\0mine"
    assert run("copy", "small.toml", "--to", "copy.db", "--force")[0] == 0
    assert "model is a model folder" in run("copy", "small.toml", "--to", "model/copy.db")[2]
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))  # it ends before the training
    assert "0 MB free" in run("export", "small.toml", "--output", "model", "--force")[2]
    storage.engine.dispose()


def test_without_a_study_a_command_takes_the_only_one_here_else_lists_all_with_their_state(
    run: Run, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    advice = "error: no study file here or in studies/; write one with: hpsearch init digits\n"
    assert run("run") == run("check") == (2, "", advice)
    storage = open_storage(load_definition(study_file()).study.storage)
    study = open_study(load_definition("small"), storage)
    fill(storage, study, 4, n_running=0)
    storage.engine.dispose()
    code, out, err = run("status")
    assert (code, err) == (0, "study small, the only one here (small.toml)\n")
    assert "study     small" in out
    assert run("check")[0] == 0
    (tmp_path / "empty.toml").write_text("[search]")
    (tmp_path / "new.toml").write_text((tmp_path / "small.toml").read_text())
    assert run("run") == (
        *(2, ""),
        "error: which study? Name one, such as: hpsearch run empty\n"
        "  empty  its file has errors; see: hpsearch check empty\n"
        "  new    not started\n"
        f"  small  4/4 trials, best {study.best_value:.4f}\n",
    )


def test_init_lists_the_examples_and_what_it_writes_can_be_checked(run: Run, tmp_path: Path) -> None:
    code, out, err = run("init")
    assert [line.split("  ")[0] for line in out.splitlines()] == ["digits", "mnist-mlp", "mnist-cnn", "mnist-resnet"]
    advice = "next: hpsearch init digits, or for your own images: hpsearch init flowers --images ~/flowers\n"
    assert (code, err) == (0, advice)
    assert "digits: packaged example" in run("check", "digits")[2]
    assert run("init", "digits")[::2] == (0, "wrote digits.toml; change it as you like\nnext: hpsearch run digits\n")
    assert run("check", "digits")[::2] == (0, "")
    assert run("init", "digits")[0] == 2


def test_check_shows_the_built_in_priors_that_a_search_uses(run: Run, study_file: Callable[..., Path]) -> None:
    study_file()
    shown = run("check", "small")[1].splitlines()
    assert "width = {int = [8, 32]} # built-in prior: 29" in shown
    assert "lr = {float = [0.001, 0.1], log = true} # built-in prior: 1e-3" in shown
    study_file("[sampler]\nprior = false")
    assert "built-in prior" not in run("check", "small")[1]


def test_check_tries_a_network_of_the_users_and_its_conversion(run: Run, study_file: Callable[..., Path]) -> None:
    study_file('[network]\nkind = "nets.py:build"')
    source = """\
from torch import nn
class Net(nn.Sequential):
    def forward(self, images):
        return super().forward(images.view({}, -1))
def build(image_shape, n_classes, *, depth: int, width: int):
    return Net(nn.Linear(28 * 28, n_classes))
"""
    Path("nets.py").write_text(source.format(7))
    code, out, err = run("check", "small")
    assert (code, out) == (1, "")
    assert err.startswith("error: nets.py:4: RuntimeError: ")
    Path("nets.py").write_text(source.format("len(images)"))
    code, out, err = run("check", "small")
    assert (code, out) == (1, "")
    assert err.startswith("error: nets.py:build: torch.export cannot convert it")
    Path("nets.py").write_text(source.format("images.shape[0]"))
    assert run("check", "small")[::2] == (0, "")


def test_a_changed_study_file_gives_status_2_and_names_the_keys(run: Run, study_file: Callable[..., Path]) -> None:
    from hpsearch.config.definition import load_definition
    from hpsearch.search.study import open_study
    from hpsearch.storage.rdb import open_storage

    file = study_file()
    definition = load_definition(file)
    open_study(definition, open_storage(definition.study.storage))
    file.write_text(file.read_text().replace("depth = 2", "depth = 3"))
    code, _, err = run("run", "small.toml")
    assert code == 2
    assert "fixed.depth: 2 -> 3" in err


def test_the_unexpected_is_one_message_too(
    run: Run, study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study_file()

    def surprise(*_: object, **__: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("hpsearch.config.definition.load_definition", surprise)
    code, out, err = run("status", "small.toml")
    assert (code, out) == (1, "")
    assert err.startswith("error: internal error: KeyError: 'surprise'")
    assert "Traceback" not in err


def test_check_prints_the_resolved_study_which_checks_again(
    run: Run, study_file: Callable[..., Path], tmp_path: Path
) -> None:
    study_file("[[try]]\nwidth = 9")
    code, out, err = run("check", "small.toml")
    assert (code, err) == (0, "")
    (tmp_path / "again.toml").write_text(out)
    assert run("check", "again.toml")[1] == out
    document = json.loads(run("check", "small.toml", "--json")[1])
    assert document["try"] == [{"width": 9}]
    assert document["recovery"] == {"heartbeat": 10, "grace": 60, "retries": 2, "checkpoint": 5.0, "keep": 3}
    assert json.loads(run("check", "--schema")[1])["title"] == "StudyDefinition"


def test_the_doctor_shows_what_is_wrong_or_was_fixed_and_all_on_request(
    run: Run, study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study_file()
    findings = [
        doctor.Finding("study", True, "'small'"),
        doctor.Finding("data", False, "gone; start with: hpsearch run STUDY"),
        doctor.Finding("trials", True, "fixed: 1"),
    ]
    monkeypatch.setattr(doctor, "run_checks", lambda *_, **__: iter(findings))
    code, out, err = run("doctor", "small.toml")
    assert (code, out.splitlines()) == (
        1,
        ["FIX  data    gone; start with: hpsearch run small.toml", "ok   trials  fixed: 1"],
    )
    assert err == "small: checking\nsmall: 2 of 3 checks are ok; see all with --verbose\n"
    assert len(run("doctor", "small.toml", "--verbose")[1].splitlines()) == 3
    assert len(json.loads(run("doctor", "small.toml", "--json")[1])) == 3
    del findings[1:]
    assert run("doctor", "small.toml")[:2] == (0, "")


def test_the_summary_of_a_run_waits_for_a_storage_that_is_away(
    run: Run, study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study_file()
    failures, original = [1], tables.read_trials

    def away_once(*arguments: Any, **options: Any) -> Any:
        if failures:
            failures.pop()
            raise OperationalError("SELECT", {}, Exception("terminating connection due to administrator command"))
        return original(*arguments, **options)

    def spend_the_budget(*_: object, **__: object) -> str:
        monkeypatch.setattr(tables, "read_trials", away_once)
        return "all trials are finished"

    monkeypatch.setattr("hpsearch.workers.processes.run_pool", spend_the_budget)
    code, out, err = run("run", "small.toml", "--workers", "1")
    assert (code, failures) == (0, [])
    assert "done: all trials are finished" in err
    assert out == ""


def test_no_output_shows_the_password_of_the_storage(
    run: Run, study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study_file()
    url = "postgresql://me:secret@127.0.0.1:9/db?sslpassword=secret"
    monkeypatch.setattr("hpsearch.workers.processes.run_pool", lambda *_, **__: "the study has its trials")
    monkeypatch.setattr("hpsearch.cli.options.print_status", lambda *_, **__: None)
    for arguments in (["run", "small.toml", "--storage", url], ["status", "small.toml", "--storage", url]):
        assert "secret" not in "".join(map(str, run(*arguments)))
    monkeypatch.setenv("HPSEARCH_STORAGE", url)
    for arguments in (["check", "small.toml"], ["check", "small.toml", "--json"]):
        assert "secret" not in "".join(map(str, run(*arguments)))


@pytest.mark.parametrize("verb", [*VERBS, "trials --json", "status --watch"])
def test_no_traceback_and_no_log_shows_the_password_of_the_storage(
    run: Run,
    study_file: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    study_file()
    monkeypatch.setenv("HPSEARCH_STORAGE", "postgresql://me:s3cr3t@127.0.0.1:9/db?sslpassword=s3cr3t")
    more = {
        "add": ["width=9", "--trials", "2"],
        "predict": ["x.png"],
        "copy": ["--to", "postgresql://me:s3cr3t@127.0.0.1:9/other?sslpassword=s3cr3t"],
    }
    words = [*verb.split(), "small.toml", *more.get(verb, []), "--debug"]
    monkeypatch.setattr(sys, "argv", ["hpsearch", *words])
    with caplog.at_level("DEBUG"), pytest.raises(BaseException) as caught:
        __main__.main()
    shown = "".join(traceback.format_exception(caught.value)) + caplog.text + "".join(capfd.readouterr())
    assert "s3cr3t" not in shown
    if verb not in ("init", "check", "evaluate", "predict", "doctor"):
        assert "cannot reach the database" in shown


def test_a_password_on_the_command_line_is_warned_about_once(run: Run, study_file: Callable[..., Path]) -> None:
    study_file()
    err = run("status", "small.toml", "--storage", "postgresql://me:secret@127.0.0.1:9/db")[2]
    assert err.count("HPSEARCH_STORAGE, PGPASSWORD or ~/.pgpass") == 1
    assert "PGPASSWORD" not in run("status", "small.toml", "--storage", "postgresql://me@127.0.0.1:9/db")[2]


def test_a_run_can_open_its_dashboard_in_a_browser(
    run: Run, study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    study_file()
    opened: list[str] = []
    monkeypatch.setattr("hpsearch.workers.processes.run_pool", lambda *_, **__: "the study has its trials")
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(Path(urlsplit(url).path).read_text()))
    code, _, err = run("run", "small.toml", "--open")
    assert code == 0
    address = err.splitlines()[1].removeprefix("Optuna dashboard, read-only; it ends with the search: ")
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/dashboard/studies/1\?token=\S{22}", address)
    [page] = opened
    assert f"url={address}" in page


def test_every_mistake_of_a_study_file_is_on_a_line_of_its_own(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[budget]\ntrials = 0\nepoch = 3\n[search]\nwidht = { int = [9, 8] }")
    code, _, err = run("check", "bad.toml")
    assert code == 2
    assert len([line for line in err.splitlines() if "bad.toml: " in line]) == 4


def test_a_traceback_is_shown_only_with_debug(study_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    study_file()
    monkeypatch.setattr(sys, "argv", ["hpsearch", "status", "missing.toml", "--debug"])
    from hpsearch.errors import DefinitionError

    with pytest.raises(DefinitionError):
        __main__.main()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full, the disk that is always full")
def test_messages_to_a_full_disk_end_nothing_but_a_closed_pipe_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.open("/dev/full", os.O_WRONLY), "w", closefd=False))
    echo("trial 3 complete 0.9")
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stderr", os.fdopen(writer, "w", closefd=False))
    with pytest.raises(BrokenPipeError):
        echo("trial 3 complete 0.9")


def test_python_m_imports_no_file_of_the_current_folder(tmp_path: Path) -> None:
    for name in ("enum", "random", "optuna", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('this file is the user's')")
    command = [sys.executable, "-m", "hpsearch", "status", "missing.toml"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert "missing.toml: study file not found" in process.stderr


def test_closed_standard_streams_end_no_command(study_file: Callable[..., Path]) -> None:
    file = study_file()
    definition = load_definition(file)
    open_study(definition, open_storage(definition.study.storage))
    command = ["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-m", "hpsearch", "trials", str(file)]
    for options in ([], ["--csv"]):
        subprocess.run([*command, *options], check=True)


def test_standard_streams_that_were_closed_are_open_in_new_processes_too() -> None:
    look = "for number in 0 1 2; do test -e /proc/self/fd/$number || exit 3; done"
    program = (
        "import subprocess; from hpsearch import __main__; __main__._open_standard_streams()\n"
        f"subprocess.run(['bash', '-c', '{look}'], check=True)"
    )
    subprocess.run(["bash", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program], check=True)


def test_help_and_errors_have_words_even_if_python_drops_docstrings() -> None:
    program = (
        "import sys; from hpsearch import __main__, errors\n"
        "print(errors.Drained())\n"
        "sys.argv = ['hpsearch', 'status', '--help']; __main__.main()"
    )
    command = [sys.executable, "-OO", "-c", program]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "Stopped before the budget was used up; run the same command to continue." in told
    assert "Show progress" in told


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_fits_a_terminal_with_no_description_cut_off_or_wrapped(
    run: Run, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    pages = {}
    for columns in (80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        code, pages[columns], _ = run(*verb.split(), "-h")
        assert code == 0
    narrow, wide = (pages[columns].splitlines() for columns in (80, 200))
    assert len(narrow) < 24, "the prompt has the last line"
    assert max(map(len, narrow)) < 80
    rows = [line for line in narrow if re.match(r"  \S.{,22}  \S| {10}[a-z]+  ", line)]
    assert set(rows) <= set(wide)
    assert all(len(re.split(r"\s{2,}", row.strip())[-1]) <= 50 for row in rows)
    assert "..." not in pages[80].partition("\n")[2].replace("A,B,...", "").replace("lr, ...", "")
    assert run(*verb.split(), "--help")[1] == pages[200]
    if verb:
        assert f"Example: hpsearch {verb} " in pages[80]
    else:
        assert re.findall(r"^(?:  [a-z]+ +| {10})([a-z]+)  ", pages[80], re.MULTILINE) == [*VERBS]
        assert re.findall(r"^  ([a-z]+) ", pages[80], re.MULTILINE) == ["search", "watch", "result", "upkeep"]


def test_version_is_told_and_without_a_command_the_help(run: Run) -> None:
    assert run("--version")[1].startswith("hpsearch 0.")
    code, _, err = run()
    assert code == 2
    assert err == run("-h")[1]


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("hpsearch sta", ["status"]),
        ("hpsearch status sm", ["small", "small.toml"]),
        ("hpsearch status ot", ["other/else.toml"]),
        ("hpsearch trials small --state p", ["pruned"]),
        ("hpsearch trials small --col", ["--columns"]),
        ("hpsearch trials small --columns lr,w", ["lr,width", "lr,worker"]),
        ("hpsearch run mnist", ["mnist-cnn", "mnist-mlp", "mnist-resnet"]),
    ],
)
def test_bash_completes_verbs_options_studies_and_columns_without_waiting_for_torch(
    study_file: Callable[..., Path], tmp_path: Path, typed: str, offered: list[str]
) -> None:
    study_file()
    for place in ("studies/small.toml", "other/else.toml"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text("[search]")
    (tmp_path / "other" / "settings.toml").touch()
    for slow in ("torch", "optuna"):
        (tmp_path / f"{slow}.py").write_text("raise SystemExit('imported')")
    script = (
        'eval "$(_HPSEARCH_COMPLETE=source_bash hpsearch)"\n'
        f"COMP_WORDS=({typed}); COMP_CWORD={len(typed.split()) - 1}; _hpsearch_completion hpsearch\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    imports = ":".join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PATH": path, "PYTHONPATH": imports}
    process = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert process.stdout.split() == offered


def test_verbs_that_train_nothing_do_not_wait_for_torch(study_file: Callable[..., Path]) -> None:
    file = study_file()
    definition = load_definition(file)
    open_study(definition, open_storage(definition.study.storage))
    for arguments in (["--help"], *([verb, str(file)] for verb in ("check", "status", "trials", "stop"))):
        program = (
            "import sys; from hpsearch import __main__\n"
            f"sys.argv = ['hpsearch', *{arguments!r}]\n"
            "try: __main__.main()\n"
            "finally: assert not {'torch', 'torchvision', 'sklearn', 'matplotlib'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (TrialEvent("w", 17, "complete", 9, 0.98612), "trial 17 complete 0.9861"),
        (TrialEvent("w", 18, "pruned", 3, 0.912), "trial 18 pruned 0.9120 epoch 3"),
        (TrialEvent("w", 19, "failed", message="exception: a\nb"), "trial 19 failed exception: a b"),
        (TrialEvent("w", 20, "pruned", 0, None, "the loss is nan"), "trial 20 pruned - epoch 0 the loss is nan"),
    ],
)
def test_a_finished_trial_is_one_line(event: TrialEvent, line: str) -> None:
    assert trial_line(event) == line


def test_a_worker_creates_the_study_where_it_is_asked_to(run: Run, study_file: Callable[..., Path]) -> None:
    study_file(budget="trials = 2\nepochs = 1")
    code, _, err = run("worker", "small.toml", "--create")
    assert code == 0, err
    assert err.count(" complete 0.") == 2
    study_file(budget="trials = 1\nepochs = 1")
    code, _, err = run("worker", "small.toml", "--create")
    assert "all 2 trials are finished" in err, "the budget of a study that is there stays"


@pytest.mark.parametrize(
    ("n_workers", "n_threads", "share"),
    [
        (1, None, "first worker on 2 cores: 2 threads"),
        (2, None, "second worker on 2 cores: 1 thread"),
        (2, 4, "second worker on 2 cores: 4 threads"),
        (
            *(3, None),
            "third worker on 2 cores: it will not speed up the search; it waits until another one ends "
            "(--threads 1 starts it now)",
        ),
        (3, 1, "third worker on 2 cores: it will not speed up the search; 1 thread"),
        (12, 1, "worker 12 on 2 cores: it will not speed up the search; 1 thread"),
    ],
)
def test_a_worker_says_what_it_brings(
    monkeypatch: pytest.MonkeyPatch, n_workers: int, n_threads: int | None, share: str
) -> None:
    for module in (render, devices, cores):
        monkeypatch.setattr(module, "count_cores", lambda: 2)
    monkeypatch.setattr(cores, "may_have_gpu", lambda: False)
    assert render.describe_share(n_workers, n_threads) == share
