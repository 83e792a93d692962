"""The real command line, run in processes of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from hpsearch.config.space import Hyperparameters
from hpsearch.data.dataset import load_data
from hpsearch.training.networks import build_network
from hpsearch.training.trainer import train

HPSEARCH = (sys.executable, "-m", "hpsearch")


def hpsearch(*arguments: object, cwd: Path, expect: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit status."""
    process = subprocess.run(
        [*HPSEARCH, *map(str, arguments)], cwd=cwd, env=environment(**env), capture_output=True, text=True, check=False
    )
    assert process.returncode == expect, f"exit status {process.returncode}\n{process.stdout}\n{process.stderr}"
    return process


def start(*arguments: object, cwd: Path, log: Path) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own, as a terminal would; its stderr goes to `log`."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*HPSEARCH, *map(str, arguments)],
            cwd=cwd,
            env=environment(),
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )


def environment(**changes: str) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "HPSEARCH_STORAGE"} | changes


def epochs_of(seconds: float) -> int:
    """How many epochs of the small studies take about so long on this machine, however quick it is."""
    return max(1, round(seconds * _epochs_per_second()))


@cache
def _epochs_per_second(n: int = 100) -> float:
    data = load_data("digits", validation=200, train=300)
    hyperparameters = Hyperparameters(width=32, lr=1e-3, batch_size=64)
    for epochs in (10, n):  # the first to warm up
        network = build_network("mlp", hyperparameters, data.image_shape, n_classes=10)
        start = time.perf_counter()
        train(network, data.train, hyperparameters, epochs, validation=data.validation)
    return n / (time.perf_counter() - start)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 90) -> None:
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


def workers_of(process: "subprocess.Popen[bytes]") -> list[int]:
    """The worker processes of a run: the children of the fork server, which is a child of the run."""
    return [pid for server in children(process.pid) for pid in children(server)]


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []
