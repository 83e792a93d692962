"""The fork server may be killed and its socket removed: workers that it has forked live on, and new ones start."""

import multiprocessing.util
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from hpsearch.errors import Drained, WorkerError
from hpsearch.workers import forkserver
from hpsearch.workers.forkserver import import_path, start_fork_server
from hpsearch.workers.processes import Processes, ProcessHandle, Send
from hpsearch.workers.shutdown import Drain
from hpsearch.workers.worker import WorkerExit

from ..acceptance.commands import _spawn_or_fork, wait_for


@pytest.fixture(autouse=True)
def _own_fork_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A fork server of this test alone, forked from this process, which has imported what workers need."""
    for name in ("_forkserver_pid", "_forkserver_alive_fd", "_forkserver_address"):
        monkeypatch.setattr(forkserver._server, name, None)
    monkeypatch.setattr(forkserver, "_folders", [])
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", _spawn_or_fork)
    yield
    forkserver._kill_fork_server()
    for folder in forkserver._folders:
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_asked(drain: Drain, send: Send) -> str:
    send("begun")
    drain.event.wait()
    drain.check()
    return "not asked"


def start(executor: Processes, slot: int) -> ProcessHandle:
    """Start a process, and wait until it has begun."""
    handle = executor.start(slot)
    assert receive(executor) == [(handle, "begun")]
    return handle


def receive(executor: Processes) -> list[tuple[ProcessHandle, Any]]:
    """Wait for messages."""
    messages = list[tuple[ProcessHandle, Any]]()
    while not messages:
        messages += executor.wait()
    return messages


def ends(executor: Processes) -> dict[ProcessHandle, Any]:
    """Wait for the ends of all processes."""
    found = dict[ProcessHandle, Any]()
    while executor.running:
        found.update(executor.wait())
    return found


def kill_server() -> None:
    os.kill(forkserver._server._forkserver_pid, signal.SIGKILL)
    os.waitid(os.P_PID, forkserver._server._forkserver_pid, os.WEXITED | os.WNOWAIT)


def test_processes_whose_fork_server_was_killed_are_not_taken_for_dead_and_new_ones_start() -> None:
    executor = Processes(lambda slot: (f"sleeper-{slot}", wait_until_asked))
    handles = [start(executor, 0), start(executor, 1)]
    kill_server()
    for _ in range(3):
        assert list(executor.wait()) == []
    handles.append(start(executor, 2))
    os.kill(handles[0].process.pid, signal.SIGKILL)
    end = WorkerExit("ended with an unknown status, because the fork server was killed", is_dead=True)
    assert receive(executor) == [(handles[0], end)]
    executor.stop()
    assert {handle: type(end.error) for handle, end in ends(executor).items()} == dict.fromkeys(handles[1:], Drained)


def test_no_process_outlives_the_executor_even_if_its_fork_server_was_killed() -> None:
    executor = Processes(lambda slot: ("sleeper", wait_until_asked))
    process = psutil.Process(start(executor, 0).process.pid)
    kill_server()
    executor.kill()
    wait_for(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "the end of the process")


@pytest.mark.parametrize("removed", ["socket", "folder"])
def test_a_cleaner_of_temporary_files_does_not_end_a_search(removed: str) -> None:
    executor = Processes(lambda slot: (f"sleeper-{slot}", wait_until_asked))
    first = start(executor, 0)
    address = Path(forkserver._server._forkserver_address)
    address.unlink() if removed == "socket" else shutil.rmtree(address.parent)
    second = start(executor, 1)
    executor.stop()
    assert {handle: type(end.error) for handle, end in ends(executor).items()} == {first: Drained, second: Drained}


def test_a_socket_is_put_elsewhere_if_tmpdir_is_too_long_for_it_and_tmpdir_is_named_if_there_is_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("scratch-of-job-" * 6)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    start_fork_server()
    assert not forkserver._server._forkserver_address.startswith(str(long))
    forkserver._kill_fork_server()

    def refuse(**_: str) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(forkserver, "_folders", [])
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(WorkerError, match=f"{long}: No space left on device; /tmp: .*check TMPDIR"):
        start_fork_server()


def test_a_closed_terminal_reaches_the_supervisor_alone() -> None:
    executor = Processes(lambda slot: ("sleeper", wait_until_asked))
    handle = start(executor, 0)
    for pid in (handle.process.pid, forkserver._server._forkserver_pid):
        os.kill(pid, signal.SIGHUP)
    assert list(executor.wait()) == []
    executor.stop()
    [end] = ends(executor).values()
    assert type(end.error) is Drained


def test_new_processes_import_what_this_one_can_and_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zipapp.py").write_text("raise SystemExit('this is not the module of the standard library')")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "ours.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as an interactive Python has it
    command = [sys.executable, "-c", "import zipapp, ours"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | import_path(), check=True)


@pytest.mark.parametrize("options", [[], ["-E"]])
def test_the_fork_server_imports_nothing_from_the_current_folder_where_its_processes_work(
    options: list[str], tmp_path: Path
) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('this is not the module of the standard library')")
    program = (
        f"import sys; sys.path[:] = {sys.path}\n"
        "import multiprocessing, os; from hpsearch.workers import forkserver; forkserver._PRELOADED.clear()\n"
        "work = 'import os, sys; assert os.getcwd() not in sys.path; os.mkdir(\\'made\\')'\n"
        "process = multiprocessing.get_context('forkserver').Process(target=exec, args=(work,))\n"
        "sys.path.insert(0, '')\n"  # as in a notebook
        "forkserver.start_process(process); process.join(); assert 'PYTHONSAFEPATH' not in os.environ"
    )
    subprocess.run([sys.executable, *options, "-c", program], cwd=tmp_path, check=True)
    assert (tmp_path / "made").is_dir()


@pytest.mark.parametrize("is_piped", [False, True])
def test_a_closed_terminal_is_a_request_to_stop_after_which_messages_are_lost_and_nothing_else(is_piped: bool) -> None:
    reader, writer = os.pipe()  # to `tee`, which a closed terminal ends, too
    pid, terminal = pty.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            if is_piped:
                os.dup2(writer, 1)
            drain = Drain().listen()
            sys.stdout = os.fdopen(1, "w", closefd=False)  # not that of pytest
            print("listening", flush=True)
            wait_for(drain.event.is_set, "SIGHUP")
            print("nobody reads this", flush=True)
            status = 0 if type(drain.error) is Drained and drain.event.is_set() else 2
        finally:
            os._exit(status)
    os.close(writer)
    assert b"listening" in os.read(reader if is_piped else terminal, 100)
    os.close(reader)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_nohup_makes_a_closed_terminal_no_request_to_stop() -> None:
    program = (
        "import signal; from hpsearch.workers.shutdown import Drain; drain = Drain().listen()\n"
        "signal.raise_signal(signal.SIGHUP); assert not drain.event.is_set()\n"
        "signal.raise_signal(signal.SIGTERM); assert drain.event.is_set()"
    )
    subprocess.run(["nohup", sys.executable, "-c", program], check=True, stdin=subprocess.DEVNULL, capture_output=True)


def test_a_terminal_that_is_closed_after_a_request_to_stop_is_no_second_request() -> None:
    program = (
        "import signal; from hpsearch.workers import shutdown; shutdown._REPEAT_WINDOW = -1.0\n"
        "drain = shutdown.Drain().listen()\n"
        "for number in (signal.SIGINT, signal.SIGHUP): signal.raise_signal(number)\n"
        "try: signal.raise_signal(signal.SIGTERM)\n"
        "except KeyboardInterrupt: assert type(drain.error) is shutdown.Interrupted\n"
        "else: raise SystemExit('a second request')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_process_does_not_run_the_program_again_that_started_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"open({str(tmp_path / 'again')!r}, 'x')")
    program = ModuleType("__main__")
    program.__file__ = str(script)
    start_fork_server()  # has another program
    monkeypatch.setitem(sys.modules, "__main__", program)
    executor = Processes(lambda slot: (f"w{slot}", wait_until_asked))
    start(executor, 0)
    executor.kill()
    assert sys.modules["__main__"] is program
    assert [*tmp_path.iterdir()] == [script]
