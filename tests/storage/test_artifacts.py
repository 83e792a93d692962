"""A folder on a disk, in memory and on a real S3 server: files are complete or absent, and errors are OSErrors."""

import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from hpsearch.errors import CheckpointError, UsageError
from hpsearch.storage import checkpoints
from hpsearch.storage.artifacts import Folder, replace_file
from hpsearch.storage.checkpoints import Checkpoint, checkpoint_name


@pytest.fixture(params=["disk", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A new, empty folder of each kind."""
    if request.param == "disk":
        return Folder(tmp_path / "artifacts")
    if request.param == "memory":
        return Folder(f"memory://{tmp_path.name}")
    return Folder(f"{request.getfixturevalue('bucket')}/{tmp_path.name}")


def test_files_are_written_read_found_replaced_and_removed(folder: Folder) -> None:
    assert folder.find() == []
    folder.check()
    assert folder.find() == []
    folder.write("a.txt", b"first")
    folder.write("a.txt", b"second")
    (folder / "id").write("b.ckpt", bytes(100_000))
    assert folder.find() == ["a.txt", "id/b.ckpt"]
    assert folder.read("a.txt") == b"second"
    assert folder.read("id/b.ckpt") == bytes(100_000)
    folder.remove("a.txt")
    folder.remove("a.txt")
    assert folder.find() == ["id/b.ckpt"]
    with pytest.raises(FileNotFoundError):
        folder.read("a.txt")


def test_a_file_survives_a_power_loss(tmp_path: Path, survives_power_loss: Callable[[Path], bool]) -> None:
    for content in (b"first", bytes(100_000)):
        Folder(tmp_path).write("id/trial-0.ckpt", content)
        assert survives_power_loss(tmp_path / "id" / "trial-0.ckpt")


def test_files_of_another_process_are_seen_at_once(bucket: str, tmp_path: Path) -> None:
    mine = Folder(f"{bucket}/{tmp_path.name}")
    assert mine.find() == []
    program = f"from hpsearch.storage.artifacts import Folder; Folder({mine.url!r}).write('a.txt', b'theirs')"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert mine.find() == ["a.txt"]
    assert mine.read("a.txt") == b"theirs"


def test_a_trial_resumes_elsewhere_from_its_checkpoint(folder: Folder) -> None:
    Checkpoint(folder, [checkpoint_name(0)], {"lr": 0.1}).write({"epoch": 3})
    elsewhere = pickle.loads(pickle.dumps(folder))
    retry = Checkpoint(elsewhere, [checkpoint_name(0), checkpoint_name(4)], {"lr": 0.1})
    assert retry.load() == {"epoch": 3}
    retry.write({"epoch": 4})
    assert folder.find() == ["trial-0.ckpt", "trial-4.ckpt"]


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], lambda content: b"", lambda content: content + b"x"]
)
def test_a_partial_upload_is_detected(
    folder: Folder, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    Checkpoint(folder, [checkpoint_name(0)], {}).write({"epoch": 3})
    folder.write("trial-0.ckpt", damage(folder.read("trial-0.ckpt")))
    with pytest.raises(CheckpointError, match="is corrupt"):
        checkpoints.read(folder, "trial-0.ckpt")
    assert Checkpoint(folder, [checkpoint_name(0), checkpoint_name(4)], {}).load() is None
    assert f"{folder}/trial-0.ckpt is corrupt" in caplog.text


def test_a_store_without_atomic_uploads_renames_the_complete_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's own local file system stands for stores like SFTP, which write in place."""
    folder = Folder(f"simplecache::file://{tmp_path}/files")
    assert folder.path is None
    folder._opened = fsspec.filesystem("local"), f"{tmp_path}/files"
    folder.write("a.txt", b"first")
    store = type(fsspec.filesystem("local"))
    monkeypatch.setattr(store, "mv", lambda *_: (_ for _ in ()).throw(ConnectionResetError("the line is dead")))
    with pytest.raises(OSError, match="the line is dead"):
        folder.write("a.txt", b"second")
    assert folder.read("a.txt") == b"first"


def test_an_unusable_store_is_reported_with_the_reason(
    bucket: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for url, reason in {
        "s3://no-such-bucket/x": "s3://no-such-bucket/x: The specified bucket does not exist",
        "nonsense://x": "cannot use the artifact store nonsense://x: Protocol not known: nonsense",
        "gs://bucket/x": "cannot use the artifact store gs://bucket/x: missing package: Please install gcsfs",
    }.items():
        with pytest.raises(UsageError, match=reason):
            Folder(url).check()
    Checkpoint(Folder("s3://no-such-bucket/x"), [checkpoint_name(0)], {}).write({})
    assert "cannot write a checkpoint to s3://no-such-bucket/x/trial-0.ckpt (The specified bucket" in caplog.text


def test_a_file_url_is_a_folder_of_this_machine(tmp_path: Path) -> None:
    Folder(f"file://{tmp_path}/x").write("a.txt", b"")
    assert (tmp_path / "x" / "a.txt").exists()


def test_a_store_that_does_not_respond_times_out(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts connections but never responds."""
    program = (
        "from hpsearch import errors; from hpsearch.storage import artifacts; artifacts.TIMEOUT = 1.0\n"
        "try: artifacts.Folder('s3://silent/x').check()\n"
        "except errors.StorageUnavailable as error: print(error)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        asked = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert asked.stdout == "cannot reach the artifact store s3://silent/x: no response within 1 s\n"


def test_a_failing_store_is_retried_less_and_less_often_until_it_works_again(bucket: str, tmp_path: Path) -> None:
    kept = Checkpoint(Folder("s3://no-such-bucket/x"), [checkpoint_name(0)], {}, interval=5)

    def tries_after(seconds: float) -> bool:
        kept._written = time.monotonic() - seconds
        before = kept._written
        kept.write_if_due(lambda: {"after": seconds})
        return kept._written != before

    assert [tries_after(seconds) for seconds in (4, 6, 9, 11, 19)] == [False, True, False, True, False]
    kept.folder = Folder(tmp_path)
    assert [tries_after(seconds) for seconds in (19, 21, 4, 6)] == [False, True, False, True]
    assert checkpoints.read(kept.folder, kept.name)["state"] == {"after": 6}


def test_a_file_is_replaced_without_touching_others_and_where_a_link_leads(tmp_path: Path) -> None:
    for name in ("report.html", "report.html.tmp", "real.html"):
        (tmp_path / name).write_text("old")
    (tmp_path / "link.html").symlink_to("real.html")
    for name in ("report.html", "link.html"):
        with replace_file(tmp_path / name) as temporary:
            temporary.write_text("new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {
        "report.html": "new",
        "report.html.tmp": "old",
        "link.html": "new",
        "real.html": "new",
    }
    assert (tmp_path / "link.html").is_symlink()


def test_a_file_that_cannot_be_written_remains_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(IsADirectoryError), replace_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half") and tmp_path.read_text()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("a.txt", "old")]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Folder("~/files").write("note", b"here")
    assert (tmp_path / "files" / "note").read_bytes() == b"here"
