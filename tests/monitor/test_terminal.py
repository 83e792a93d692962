"""A terminal on which something is drawn does not show what is typed, and gets its modes back however that ends."""

import os
import shutil
import signal
import sys
import termios
from pathlib import Path

import pexpect
import pytest

from ..acceptance.commands import children

PROGRAM = """
import time
from contextlib import ExitStack
from hpsearch.monitor.terminal import keys_hidden, terminal_returned

hidden = ExitStack()
def hide():
    hidden.enter_context(keys_hidden())
    print("hidden", flush=True)

with terminal_returned(hidden.close, hide), hidden:
    hide()
    time.sleep(600)
"""


@pytest.mark.skipif(shutil.which("dash") is None, reason="bash itself restores the modes of a terminal")
def test_a_terminal_has_its_modes_back_after_ctrl_z_and_after_sigterm_and_nothing_typed_is_left(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    env = {"PS1": "ready> ", "PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "TERM": "dumb"}
    shell = pexpect.spawn("dash", ["-i"], env=env, cwd=tmp_path, timeout=120)

    def shows_keys() -> bool:
        return bool(termios.tcgetattr(shell.child_fd)[3] & termios.ECHO)

    shell.expect("ready> ")
    shell.sendline(f"{sys.executable} program.py")
    shell.expect("hidden")
    assert not shows_keys()
    shell.send("\x1a")
    shell.expect("Stopped.*ready> ")
    assert shows_keys()
    shell.sendline("fg")
    shell.expect("hidden")
    assert not shows_keys()
    shell.send("echo typed\n")
    [program] = children(shell.pid)
    os.kill(program, signal.SIGTERM)
    shell.expect("ready> ")
    assert shows_keys()
    shell.sendline("echo status $?")
    shell.expect("status 143")
    assert b"typed" not in shell.before
    shell.close(force=True)
