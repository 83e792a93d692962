"""The real command line, run in processes of its own."""

import atexit
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hpsearch.data.dataset import load_data
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import build_network
from hpsearch.training.trainer import Trainer

HPSEARCH = (sys.executable, "-m", "hpsearch")
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("hpsearch.workers.processes", "hpsearch.bundle.retrain", "hpsearch.cli.app", "torch._dynamo"),
        *("alembic.command", "alembic.script", "sklearn.metrics", "tests.acceptance.faults"),
    ]
)


class Command:
    """A command in a process and a session of its own, used like a `subprocess.Popen`.

    It is forked from a server that has imported torch: on two cores the imports take longer than most commands.
    """

    def __init__(self, *arguments: object, cwd: Path, out: Path, err: Path, **env: str) -> None:
        words = [str(argument) for argument in arguments]
        self._process = _context.Process(target=_run, args=(words, cwd, environment(**env), out, err))
        self._process.start()
        self.pid = self._process.pid or 0
        _started.append(self)

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired("hpsearch", timeout or 0)
        return status

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


_started: list[Command] = []
_spawn = multiprocessing.util.spawnv_passfds


@atexit.register
def _kill_what_failing_tests_left() -> None:
    for command in _started:
        command.kill()


def _run(words: list[str], cwd: Path, env: dict[str, str], out: Path, err: Path) -> None:
    """The command, as `python -m hpsearch` runs it: with these streams, and with the functions that run at exit."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for file, number in ((out, 1), (err, 2)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    sys.argv = ["hpsearch", *words]
    multiprocessing.util.spawnv_passfds = _spawn_or_fork  # type: ignore[assignment]
    from hpsearch.__main__ import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()


def _spawn_or_fork(path: bytes, arguments: list[Any], passed: list[int]) -> int:
    """Start the command's own fork server by a fork, too, since this process has imported what the server would.

    Terminals, `scripts/quickstart`, the notebook and injured commands start it as users do.
    """
    if "forkserver" not in str(arguments[-1]):
        return int(_spawn(path, arguments, passed))
    if pid := os.fork():
        return pid
    status = 1
    try:
        for name in [entry.name for entry in Path("/proc/self/fd").iterdir()]:
            if int(name) > 2 and int(name) not in passed:
                with suppress(OSError):  # the one that listed them is closed already
                    os.close(int(name))
        exec(arguments[-1], {})
    except SystemExit:  # its clients are gone
        status = 0
    finally:
        os._exit(status)


def hpsearch(*arguments: object, cwd: Path, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        command = Command(*arguments, cwd=cwd, out=out, err=err, **env)
        status = command.wait()
        stdout, stderr = (file.read_text() if file.exists() else "" for file in (out, err))
    assert status == expect, f"exit status {status}\n{stdout}\n{stderr}"
    return subprocess.CompletedProcess([*map(str, arguments)], status, stdout, stderr)


def start(*arguments: object, cwd: Path, log: Path) -> Command:
    """Start a command in a session of its own, as a terminal would; what it prints goes to `log`."""
    log.write_bytes(b"")
    return Command(*arguments, cwd=cwd, out=log, err=log)


def run_program(command: list[str], *, cwd: Path, timeout: float, **_: object) -> "subprocess.CompletedProcess[str]":
    """What `subprocess.run` does with `[python, "-W", "ignore", "-c", program, *arguments]`, without the imports."""
    with tempfile.NamedTemporaryFile("r", suffix=".err") as err:
        process = _context.Process(target=_execute, args=(command[4], command[5:], cwd, err.name))
        process.start()
        process.join(timeout)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(command, process.exitcode, "", err.read())


def _execute(program: str, arguments: list[str], cwd: Path, err: str) -> None:
    os.chdir(cwd)
    os.dup2(os.open(err, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    sys.argv = ["-c", *arguments]
    exec(compile(program, "-c", "exec"), {"__name__": "__main__"})


def environment(**changes: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "HPSEARCH_STORAGE"} | changes


def epochs_of(seconds: float) -> int:
    """How many epochs of the small studies take about so long on this machine, however quick it is."""
    return max(1, round(seconds * _epochs_per_second()))


@cache
def _epochs_per_second(n: int = 100) -> float:
    torch.set_num_threads(1)  # as many as a worker has
    data = load_data("digits", validation=200, train=300)
    hyperparameters = Hyperparameters(width=32, lr=1e-3, batch_size=64)
    for epochs in (10, n):  # the first to warm up
        network = build_network("mlp", hyperparameters, data.image_shape, n_classes=10)
        trainer = Trainer(network, data.train, hyperparameters, epochs, validation=data.validation)
        start = time.perf_counter()
        list(trainer)
    return n / (time.perf_counter() - start)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 240) -> None:
    """Poll until the condition holds; fail loudly at the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s in vain for {what}"
        time.sleep(0.05)


def processes_of(session: int) -> list[int]:
    """The living processes of a session, zombies not counted."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, process_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(process_session) == session and state != "Z":
            found.append(int(folder.name))
    return found


def workers_of(process: "Command | subprocess.Popen[bytes]") -> list[int]:
    """The worker processes of a run: the children of the fork server, which is a child of the run."""
    return [pid for server in children(process.pid) for pid in children(server)]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
