"""The live table fits its terminal, whatever there is to show; a pipe gets lines."""

import io
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hpsearch.errors import Interrupted
from hpsearch.monitor.live import LiveView, SnapshotTable, draw_curve
from hpsearch.monitor.status import Snapshot, Watch
from hpsearch.monitor.text import describe_best, format_duration
from hpsearch.search.study import open_study
from hpsearch.search.trials import TrialEvent
from hpsearch.storage.rdb import open_storage
from hpsearch.workers.shutdown import Drain

from ..conftest import fill, make_definition


@pytest.fixture
def watch(tmp_path: Path) -> Watch:
    definition = make_definition(
        f"sqlite:///{tmp_path / 'study.db'}", budget={"trials": 60, "epochs": 10, "failures": 9}
    )
    storage = open_storage(definition.study.storage)
    fill(storage, open_study(definition, storage), 40)
    return Watch(definition)


@pytest.fixture
def snapshot(watch: Watch) -> Snapshot:
    return watch.poll()


def draw(snapshot: Snapshot, width: int, height: int, trouble: str = "", encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, height=height, force_terminal=True, color_system=None)
    console.print(SnapshotTable(snapshot, trouble))
    file.flush()
    assert isinstance(file.buffer, io.BytesIO)
    return file.buffer.getvalue().decode(encoding).splitlines()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (100, 30), (64, 24), (40, 24)])
def test_the_table_fits_the_terminal_and_shows_all_that_matters(snapshot: Snapshot, width: int, height: int) -> None:
    lines = draw(snapshot, width, height)
    assert max(map(len, lines)) <= width
    assert len(lines) < height
    text = " ".join(" ".join(lines).split())
    best = snapshot.status["best"]
    parts = [
        *("small", "31 of 60", "21 complete, 10 pruned, 5 failed, 4 running", " left", "machine-0", "7/10"),
        *(f"{best['value']:.4f} (trial {best['number']})", "trial 33 failed: exception: "),
    ]
    if width > 40:
        parts += ["saved by pruning (", "lr 0.", "40,036", "▁", "ValueError: =trial 33"]
    for part in parts:
        assert part in text
    assert ("no room for: curve, images/s, width, lr" in text) == (width == 40)


def test_each_hyperparameter_has_a_column_and_pruned_trials_say_why(snapshot: Snapshot) -> None:
    lines = draw(snapshot, 120, 30)
    assert [line.split()[-4:-2] for line in lines if line.startswith("trial  state")] == [["width", "lr"]]
    [row] = [row for row in snapshot.workers if row["worker"] == "machine-0"]
    [worker] = [line.split() for line in lines if line.startswith("machine-0")]
    assert worker[-2:] == [str(row["params"]["width"]), f"{row['params']['lr']:.3g}"]
    [pruned] = [line for line in lines if line.lstrip().startswith("35 ")]
    value, threshold = pruned.split("1.5")[1].split(" < ")
    assert float(value) < float(threshold.split()[0])


def test_the_name_of_a_study_is_cut_and_not_the_time(snapshot: Snapshot) -> None:
    status = {**snapshot.status, "study": "a-name-that-is-too-long" * 3}
    [first, *_] = draw(replace(snapshot, status=status, seconds_left=(5400, 100_000)), 64, 24)
    assert re.match(r"a-name-.*… .* 31 of 60  elapsed \d+ s, 1.5 to 27.8 h left$", first)


def test_a_high_terminal_has_room_for_more_trials(snapshot: Snapshot) -> None:
    low, high = (sum("complete  " in line for line in draw(snapshot, 80, height)) for height in (24, 50))
    assert high > low


def test_of_many_workers_as_many_as_fit_are_shown(snapshot: Snapshot) -> None:
    lines = draw(replace(snapshot, workers=[*snapshot.workers] * 16), 80, 24)
    assert len(lines) < 24
    n_shown = sum(line.startswith("machine-") for line in lines)
    assert n_shown >= 3
    assert any(f"and {64 - n_shown} more" in line for line in lines)


def test_a_terminal_without_unicode_gets_ascii(snapshot: Snapshot) -> None:
    lines = draw(snapshot, 80, 24, encoding="ascii")
    assert any(re.search(r"machine-3 .*\| *[_.~=+*#-]{10} ", line) for line in lines)


def test_text_of_a_failure_is_one_line_and_cannot_command_the_terminal(snapshot: Snapshot) -> None:
    row = dict(snapshot.failed[0], note="exception: \x1b[2J\x1b]0;title\x07 [bold]a\nb")
    lines = draw(replace(snapshot, failed=[row]), 120, 24)
    [line] = [line for line in lines if "failed: exception" in line]
    assert line.rstrip() == r"trial 33 failed: exception: \x1b[2J\x1b]0;title\x07 [bold]a b"


def test_why_there_is_nothing_newer_is_told_below(snapshot: Snapshot) -> None:
    assert draw(snapshot, 80, 24, "the storage cannot be reached: locked")[-1].startswith(
        "the storage cannot be reached"
    )


def test_the_head_says_whether_the_search_continues(snapshot: Snapshot) -> None:
    assert "no workers running" in draw(replace(snapshot, workers=[]), 80, 24)[0]
    assert "stopped" in draw(replace(snapshot, is_stopped=True), 80, 24)[0]
    for low, high, told in (
        *((170, 301, "3 to 5 min"), (5, 25, "5 to 25 s")),
        *((0, 20, "0 to 20 s"), (40, 120, "40 s to 2 min")),
    ):
        assert f", {told} left" in draw(replace(snapshot, seconds_left=(low, high)), 80, 24)[0]
    assert ", 5 min left" in draw(replace(snapshot, seconds_left=(290, 301)), 80, 24)[0]
    over = replace(snapshot, status={**snapshot.status, "budget": {"trials": 31, "epochs": 10}})
    assert re.search(r"elapsed \d+ \w+$", draw(over, 80, 24)[0].rstrip())


def test_a_curve_has_a_block_for_each_value_or_for_the_last_of_several() -> None:
    assert draw_curve([], (0, 1)) == ""
    assert draw_curve([0.5], (0.5, 0.5)) == "▁"
    assert draw_curve([0, 0.5, 1], (0, 1)) == "▁▅█"
    long = draw_curve([i / 99 for i in range(100)], (0, 1))
    assert len(long) == 12
    assert long[-1] == "█"
    assert list(long) == sorted(long)


def test_durations_are_told_in_the_unit_that_suits_them() -> None:
    assert [format_duration(s) for s in (0, 89, 91, 5_000, 5_401, 100_000, 172_801)] == [
        *("0 s", "89 s", "2 min", "83 min", "1.5 h", "27.8 h", "2.0 d"),
    ]


def test_a_pipe_gets_a_line_for_each_trial_that_ended_and_nothing_else(
    watch: Watch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = describe_best(watch.poll().status["best"])
    with LiveView(watch) as view:
        view(TrialEvent("w", 40, "running"))
        view(TrialEvent("w", 40, "complete", 2, 0.5, params={"depth": 2, "lr": 0.01}))
        view(TrialEvent("w", 41, "pruned", 2, 0.99))
        view(TrialEvent("w", 42, "complete", 2, 0.999))
        view(TrialEvent("w", 43, "failed", message="exception: a"))
    out, err = capsys.readouterr()
    lines = re.sub(r"\d\d:\d\d:\d\d", "TIME", err).splitlines()
    assert (out, lines) == (
        "",
        [
            f"trial 40 complete 0.5000  32/60  best {best}  TIME  depth 2, lr 0.01",
            f"trial 41 pruned 0.9900 epoch 2  33/60  best {best}  TIME",
            "trial 42 complete 0.9990  34/60  best 0.9990 (trial 42)  TIME",
            "trial 43 failed exception: a  TIME",
        ],
    )


def test_a_line_counts_what_other_workers_finished(watch: Watch, capsys: pytest.CaptureFixture[str]) -> None:
    study = open_study(watch.definition, open_storage(watch.definition.study.storage))
    with LiveView(watch) as view:
        view(TrialEvent("w", 40, "complete", 2, 0.5))
        study.tell(36, 1.0)
        view._tally.read()
        view(TrialEvent("w", 41, "complete", 2, 0.5))
    assert "  34/60  best 1.0000 (trial 36)  " in capsys.readouterr().err.splitlines()[1]


def test_a_request_to_stop_is_answered_at_once(watch: Watch, capfd: pytest.CaptureFixture[str]) -> None:
    with LiveView(watch) as view:
        view(TrialEvent("w", 3, "running"))
        view(TrialEvent("v", 4, "running"))
        drain = Drain().listen(signal.SIGUSR1, on_request=view.announce_stop)
        signal.raise_signal(signal.SIGUSR1)
        view.announce_stop(Interrupted())
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    stopping = "Stopping: saving 2 running trials"
    assert drain.event.is_set()
    assert capfd.readouterr().err.splitlines() == [stopping, f"{stopping} (Ctrl-C again to force)"]


def test_a_pipe_that_follows_a_study_gets_the_lines_of_all_its_workers(
    watch: Watch, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.monitor.live._REFRESH", 0.01)
    storage = open_storage(watch.definition.study.storage)
    study = open_study(watch.definition, storage)
    study.set_user_attr("budget", {"trials": 35, "epochs": 10})
    watch.poll()
    with LiveView(watch, follows=True) as view:
        for number in (36, 38, 37, 39):
            study.tell(number, number / 100)
        view.wait()
    lines = capsys.readouterr().out.splitlines()
    assert [line[:24] for line in lines] == [f"trial {number} complete 0.{number}00" for number in (36, 38, 37, 39)]
    assert [line.split()[4] for line in lines] == ["32/35", "33/35", "34/35", "35/35"]


def test_a_pipe_that_was_closed_ends_the_watch(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.monitor.live._REFRESH", 0.01)
    watch.poll()
    open_study(watch.definition, open_storage(watch.definition.study.storage)).tell(36, 0.5)
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", closefd=False))
    with LiveView(watch, follows=True) as view, pytest.raises(BrokenPipeError):
        view.wait()
