"""The steps of a command are bars with the time left on a terminal, and lines in a pipe."""

import io
import re
import sys

import pytest
from rich.console import Console

from hpsearch.monitor import progress
from hpsearch.monitor.progress import Steps


def test_a_pipe_gets_the_lines_of_the_steps_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps() as show_step:
        show_step("loading")
        show_step("training, epochs", 1, 2, line="epoch 1/2")
    assert capsys.readouterr() == ("", "epoch 1/2\n")


def test_a_terminal_gets_a_bar_for_each_step_and_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(progress, "can_draw", lambda _: True)
    monkeypatch.setattr(sys, "stdin", None)
    with Steps() as show_step:
        show_step("loading")
        for n_done in range(3):
            show_step("training, epochs", n_done, 4)
        show_step._bars.refresh()
        assert re.search(r"training, epochs .* 2/4 \d+ s left", file.getvalue())
    loading, training = file.getvalue().rpartition("loading")[2].splitlines()[:2]
    assert re.match(r" .* \d+ s *$", loading)
    assert re.match(r"\S*training, epochs .* 4/4 \d+ s *$", training)
