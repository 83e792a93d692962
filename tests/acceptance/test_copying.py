"""A study is copied by a command that is killed again and again, and is the same on both sides in the end."""

import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from hpsearch.config.definition import load_definition
from hpsearch.errors import StudyNotFound
from hpsearch.search.selection import find_best
from hpsearch.search.study import load_study, open_study
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import artifact_folder, checkpoint_folder
from hpsearch.storage.rdb import open_storage

from ..conftest import fill
from ..search.test_copy import count_rows, create_database, read
from .commands import hpsearch, start

N_KILLS = 10


def test_a_copy_that_is_killed_ten_times_and_repeated_is_equal(
    study_file: Callable[..., Path], postgres_url: str, tmp_path: Path
) -> None:
    file = study_file(budget="trials = 2000\nepochs = 10")
    definition = load_definition(file)
    storage = open_storage(definition.study.storage)
    study = open_study(definition, storage)
    fill(storage, study, 990, n_running=0)
    for width in range(10, 20):
        study.enqueue_trial({"width": width})
    own = checkpoint_folder(definition, study)
    for name in (f"trial-{find_best(study).number}.ckpt", *(f"files/{i}" for i in range(5))):
        own.write(name, random.Random(name).randbytes(100_000))
    artifact_folder(definition).write("trial-5.txt", b"Traceback")
    storage.engine.dispose()
    source, databases = read(definition), iter(range(100))

    def place() -> tuple[str, str]:
        name = f"copy{abs(hash(tmp_path))}_{next(databases)}"
        return create_database(postgres_url, name), str(tmp_path / name)

    def is_whole(to: str, artifacts: str) -> bool:
        """Whether the study is there; it must be whole then, and alone."""
        target = load_definition(file, storage=to, artifacts=artifacts)
        try:
            load_study(target, opened := open_storage(to, must_exist=True))
        except StudyNotFound:
            return False
        opened.engine.dispose()
        assert read(target) == source
        assert (count_rows(target)["studies"], count_rows(target)["trials"]) == (1, 1000)
        there, here = (Folder(each) / "small" for each in (artifacts, definition.study.artifacts))
        assert {name: there.read(name) for name in here.find()} == {name: here.read(name) for name in here.find()}
        return True

    def command(to: str, artifacts: str) -> tuple[str, ...]:
        return ("copy", file.name, "--to", to, "--artifacts-to", artifacts)

    to, artifacts = place()
    began = time.monotonic()
    hpsearch(*command(to, artifacts), cwd=tmp_path)
    seconds = time.monotonic() - began
    assert is_whole(to, artifacts)
    n_rows = count_rows(load_definition(file, storage=to))
    generator = random.Random(0)
    to, artifacts = place()
    for kill in range(N_KILLS):
        process = start(*command(to, artifacts), cwd=tmp_path, log=tmp_path / "log")
        try:
            process.wait(timeout=seconds * (kill + generator.random()) / N_KILLS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if kill < N_KILLS - 1 and is_whole(to, artifacts):
            to, artifacts = place()  # so that the next kill finds something to interrupt
    for _ in range(2):
        assert "verified: source and copy are identical" in hpsearch(*command(to, artifacts), cwd=tmp_path).stderr
        assert is_whole(to, artifacts)
    assert count_rows(load_definition(file, storage=to)) == n_rows
