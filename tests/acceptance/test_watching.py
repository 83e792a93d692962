"""Watching and steering as users do it: on real terminals, from a second one, while four workers run."""

import json
import re
import subprocess
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest
from optuna.trial import TrialState

from hpsearch.config.definition import load_definition
from hpsearch.monitor.status import Watch
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.rdb import open_storage

from ..conftest import fill
from .commands import HPSEARCH, environment, epochs_of, hpsearch, start, wait_for

StudyFile = Callable[..., Path]


class Terminal:
    """A command on a terminal of its own, and what is on its screen."""

    def __init__(self, *arguments: object, cwd: Path, width: int, height: int) -> None:
        self.screen = pyte.Screen(width, height)
        self.stream = pyte.ByteStream(self.screen)
        self.written = b""
        env = environment(TERM="xterm-256color")
        for name in ("COLUMNS", "LINES"):  # pytest-xdist sets them, and rich believes them
            env.pop(name, None)
        command = [*HPSEARCH, *map(str, arguments)]
        self.process = pexpect.spawn(command[0], command[1:], cwd=cwd, env=env, dimensions=(height, width))
        self.modes = termios.tcgetattr(self.process.child_fd)

    def read(self) -> list[str]:
        """The lines of the screen, after what the command has written was drawn."""
        try:
            while True:
                written = self.process.read_nonblocking(65_536, timeout=0.1)
                self.written += written
                self.stream.feed(written)
        except pexpect.TIMEOUT:
            return list(self.screen.display)

    def wait_for(self, pattern: str) -> list[str]:
        try:
            wait_for(lambda: bool(re.search(pattern, "\n".join(self.read()))), f"{pattern} on the terminal")
        except AssertionError:
            print("\n".join(self.read()))
            raise
        return self.read()

    def resize(self, width: int, height: int) -> None:
        self.screen.resize(height, width)
        self.process.setwinsize(height, width)

    def end(self) -> int:
        self.process.expect(pexpect.EOF, timeout=120)
        self.written += self.process.before
        self.stream.feed(self.process.before)
        modes = termios.tcgetattr(self.process.child_fd)
        self.process.close()
        assert modes == self.modes, "the terminal's modes were changed"
        assert self.written.rfind(b"\x1b[?25h") > self.written.rfind(b"\x1b[?25l"), "the cursor stays hidden"
        return int(self.process.exitstatus)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: object, width: int = 80, height: int = 24) -> Terminal:
        opened.append(Terminal(*arguments, cwd=tmp_path, width=width, height=height))
        return opened[-1]

    yield open_terminal
    for each in opened:
        each.process.close(force=True)


def status(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(hpsearch("status", "small.toml", "--json", cwd=folder).stdout)
    return document


def test_a_run_on_a_terminal_shows_its_workers_fits_after_resizing_and_leaves_it_clean(
    study_file: StudyFile, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    study_file(budget=f"trials = 99\nepochs = {epochs_of(10)}", body='[pruner]\nkind = "none"')
    run = terminal("run", "small.toml", "--workers", 2)
    lines = run.wait_for(r"(?m)^\S+-1 +\d+ +[1-9]\d*/\d+ +0\.\d{4} +[▁▂▃▄▅▆▇█]{3,} +[\d,]+")
    assert lines[0].rstrip() == "small: starting 2 workers (1 thread each)"
    assert re.match(r"small +\S+ +\d+ of 99 .*elapsed ", lines[1])
    run.process.send("typed\nwhile it runs\n")
    assert any(re.match(r"\S+-0 +\d+ +\d+/\d+", line) for line in lines)
    run.resize(200, 50)
    lines = run.wait_for(r"small +\S{100,} +\d+ of 99")
    assert any(re.match("worker .* images/s  width +lr", line) for line in lines)
    run.resize(50, 16)
    run.wait_for(r"^study +small +\ndone +\d+ of 99, ")
    assert not any("typed" in line or "while" in line for line in run.read())
    run.process.sendintr()
    assert run.end() == 130
    assert b"Stopping: saving 2 running trials" in run.written
    lines = [line.rstrip() for line in run.screen.display if line.strip()]
    assert len(lines) == 2
    assert re.match(r"\d+ of 99 trials done", lines[0])
    assert lines[1] == "Interrupted; run the same command to continue."
    counts = status(tmp_path)["trials"]
    assert (counts["failed"], counts["running"], counts["waiting"]) == (0, 0, 2)


def test_a_finished_run_on_a_terminal_ends_with_what_was_found_and_the_next_command(
    study_file: StudyFile, terminal: Callable[..., Terminal]
) -> None:
    study_file(budget="trials = 3\nepochs = 2")
    run = terminal("run", "small.toml", "--workers", 1, width=200, height=50)
    assert run.end() == 0
    text = "\n".join(line.rstrip() for line in run.screen.display)
    assert "best:  trial" in text
    assert "next:  hpsearch confirm small.toml  |  hpsearch export small.toml" in text
    assert "worker  trial" not in text


def test_a_watched_study_shows_its_failures_and_thresholds_until_ctrl_c(
    study_file: StudyFile, terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    study_file(budget="trials = 99\nepochs = 10\nfailures = 9")
    definition = load_definition(tmp_path / "small.toml")
    storage = open_storage(definition.study.storage)
    fill(storage, open_study(definition, storage), 40)
    watch = terminal("status", "small.toml", "--watch")
    lines = watch.wait_for("trial 33 failed: exception: ValueError: =trial 33")
    assert any(re.match(r" +35 +pruned +0\.\d{4} +9 .* 0\.\d{4} < 0\.\d{4} \(med", line) for line in lines)
    watch.process.sendintr()
    assert watch.end() == 130
    assert watch.screen.display[0].startswith("small"), "the last table stays"


def test_a_watched_study_gives_a_pipe_the_lines_of_a_run_elsewhere(study_file: StudyFile, tmp_path: Path) -> None:
    study_file(budget="trials = 6\nepochs = 2")
    definition = load_definition(tmp_path / "small.toml")
    open_study(definition, open_storage(definition.study.storage))
    command = [*HPSEARCH, "status", "small.toml", "--watch"]
    watch = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = hpsearch("run", "small.toml", "--workers", 2, cwd=tmp_path)
    out, err = watch.communicate(timeout=120)
    assert watch.returncode == 0
    told = [line for line in run.stderr.splitlines() if line.startswith("trial ")]
    assert len(told) == 6
    results = [{line.partition("  ")[0] for line in lines} for lines in (out.splitlines(), told)]
    assert results[0] <= results[1]  # it may have come late to the first
    assert "best:  trial" in err


def test_stop_and_add_steer_four_workers_and_the_budget_stays_exact(study_file: StudyFile, tmp_path: Path) -> None:
    study_file(
        budget=f"trials = 4\nepochs = {epochs_of(4)}",
        body=f'[pruner]\nkind = "none"\n[study]\nstorage = "sqlite:///{tmp_path / "small.db"}"',
    )
    definition = load_definition(tmp_path / "small.toml")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "small.toml").write_text((tmp_path / "small.toml").read_text())
    open_study(definition, open_storage(definition.study.storage))
    watch = Watch(definition)
    worker = start("worker", "small.toml", cwd=tmp_path / "elsewhere", log=tmp_path / "worker.log")
    run = start("run", "small.toml", "--workers", 3, cwd=tmp_path, log=tmp_path / "run.log")
    try:
        wait_for(lambda: watch.poll().n_alive == 4, "four running trials")
        told = hpsearch("add", "small.toml", "lr=0.0123", "width=17", cwd=tmp_path).stderr
        assert re.match(r"trial \d+ queued with lr=0.0123, width=17; running workers will pick it up\n", told)
        assert "budget is now 6 trials" in hpsearch("add", "small.toml", "--trials", 2, cwd=tmp_path).stderr
        stopped = hpsearch("stop", "small.toml", cwd=tmp_path).stderr
        assert re.search(r"stopped: \d of 6 trials done.*; resume with: hpsearch run small.toml\n", stopped)
        assert (run.wait(60), worker.wait(60)) == (75, 75)
    finally:
        for process in (run, worker):
            process.kill()
    for log in ("run.log", "worker.log"):
        last = (tmp_path / log).read_text().splitlines()[-1]
        assert last == "The study was stopped; resume it with: hpsearch run small.toml"
    counts = status(tmp_path)["trials"]
    assert counts["running"] == 0
    assert counts["waiting"] >= 1
    waiting = json.loads(hpsearch("trials", "small.toml", "--state", "waiting", "--json", cwd=tmp_path).stdout)
    interrupted = [row["number"] for row in waiting if row["note"]]
    assert {row["note"] for row in waiting} <= {"interrupted: worker stopped", ""}
    late = hpsearch("worker", "small.toml", cwd=tmp_path, expect=75).stderr
    assert "The study was stopped" in late

    run = start("run", "small.toml", "--workers", 4, cwd=tmp_path, log=tmp_path / "again.log")
    try:
        wait_for(lambda: watch.poll().n_alive > 0, "the search to go on")
        assert "budget is now 7 trials" in hpsearch("add", "small.toml", "--trials", 1, cwd=tmp_path).stderr
        assert run.wait(120) == 0
    finally:
        run.kill()
    document = status(tmp_path)
    assert document["budget"]["trials"] == 7
    assert document["trials"] == {"complete": 7, "pruned": 0, "failed": 0, "running": 0, "waiting": 0}
    trials = load_study(definition, open_storage(definition.study.storage)).trials
    finished = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    assert {"lr": 0.0123, "width": 17} in [trial.params for trial in finished]
    assert [trial.number for trial in finished if "interruptions" in trial.user_attrs] == interrupted
