"""A folder for checkpoints and other files of trials: local, or the URL of a store that fsspec supports."""

import errno
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from hpsearch.config.urls import expand_home, is_url
from hpsearch.errors import StorageUnavailable, UsageError

TIMEOUT = 20.0  # seconds for a response of the store; bounds the wait of a worker that is stopped
# Their uploads are atomic, so no rename is needed; a rename would copy the file.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}


class Folder:
    """A folder with files: a local one, or a URL such as `s3://bucket/prefix`.

    Every failure raises `OSError`, whatever the store's package raises. That package takes credentials and endpoints
    from the environment.
    """

    def __init__(self, location: Path | str) -> None:
        self.url = str(location).rstrip("/") or "/"
        local = re.sub(r"^(file|local)://", "", self.url)
        self.path = None if is_url(local) else Path(expand_home(local))

    def __truediv__(self, name: str) -> "Folder":
        return Folder(f"{self.url}/{name}" if name else self.url)

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Folder) and other.url == self.url

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raises `FileNotFoundError` if it does not exist."""
        if self.path:
            return (self.path / name).read_bytes()
        content: bytes = self._ask(lambda: self._store.cat_file(self._at(name)))
        return content

    def write(self, name: str, content: bytes) -> None:
        """Replace the file atomically: if the process is killed, the old or the new file remains complete.

        This holds on a disk (sync and rename) and in object stores; in other stores it depends on their rename. Only
        one process at a time may write the same file.
        """
        if self.path:
            file = self.path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            with replace_file(file) as temporary:
                temporary.write_bytes(content)
        else:
            self._ask(lambda: self._upload(self._at(name), content))

    def remove(self, name: str) -> None:
        """Remove the file, if it exists."""
        if self.path:
            return (self.path / name).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            self._ask(lambda: self._store.rm_file(self._at(name)))
        return None

    def find(self) -> list[str]:
        """Return the sorted relative paths of all files in this folder and its subfolders."""
        if self.path:
            return sorted(str(file.relative_to(self.path)) for file in self.path.rglob("*") if file.is_file())
        try:
            found: list[str] = self._ask(self._list)
        except FileNotFoundError:
            return []
        start = len(self._at()) + 1
        return sorted(path[start:] for path in found)

    def check(self) -> None:
        """Test that a store can be written and read. Does nothing for a local folder.

        Raises `StorageUnavailable` if the store cannot be reached, and `UsageError` if it cannot be used.
        """
        if self.path:
            return
        name, content = f"probe-{uuid.uuid4().hex}", b"hpsearch"
        try:
            self.write(name, content)
            is_same = self.read(name) == content
            self.remove(name)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ETIMEDOUT):
                raise StorageUnavailable(f"cannot reach the artifact store {self}: {error.strerror}") from error
            raise UsageError(f"cannot use the artifact store {self}: {error.strerror}") from error
        if not is_same:
            raise UsageError(f"the artifact store {self} returned different data than was written")

    def _ask(self, call: Callable[[], Any]) -> Any:
        """Return the store's response. Raises `TimeoutError`, an `OSError`, after `TIMEOUT` seconds.

        The stores' packages retry for minutes, in which a worker would not react to a signal to stop.
        """
        answers, errors = list[Any](), list[Exception]()

        def run() -> None:
            try:
                answers.append(call())
            except Exception as error:  # noqa: BLE001 - raised below
                errors.append(error)

        thread = threading.Thread(target=run, name=f"request to {self.url}", daemon=True)
        thread.start()
        thread.join(TIMEOUT)
        if errors:
            raise _to_os_error(errors[0], self.url) from errors[0]
        if not answers:
            raise TimeoutError(errno.ETIMEDOUT, f"no response within {TIMEOUT:.0f} s", self.url)
        return answers[0]

    def _list(self) -> Any:
        self._store.invalidate_cache()
        return self._store.find(self._at())

    def _upload(self, path: str, content: bytes) -> None:
        protocols = self._store.protocol
        if _OBJECT_STORES.intersection([protocols] if isinstance(protocols, str) else protocols):
            self._store.pipe_file(path, content)
            return
        self._store.makedirs(path.rpartition("/")[0], exist_ok=True)
        self._store.pipe_file(f"{path}.tmp", content)
        self._store.mv(f"{path}.tmp", path)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """Return the store and the path of this folder in it."""
        import fsspec

        store, root = fsspec.core.url_to_fs(self.url)
        return store, str(root).rstrip("/")

    @property
    def _store(self) -> Any:
        return self._opened[0]

    def _at(self, name: str = "") -> str:
        return f"{self._opened[1]}/{name}".rstrip("/")

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "path": self.path}  # connections cannot be shared between processes


@contextmanager
def replace_file(file: Path) -> Iterator[Path]:
    """Yield a new, empty file beside the file to write to, which then replaces it in one step; follows links.

    After an error, a kill or a power loss, the old or the new file is complete. No other file is touched.
    """
    file = Path(os.path.realpath(file))
    temporary = file.with_name(f"{file.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(file)
        _sync(file.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _to_os_error(error: Exception, url: str) -> OSError:
    """Convert an error of a store's package, such as botocore, to the `OSError` of its errno.

    The errno is EIO if the store may respond later.
    """
    name, text = type(error).__name__, " ".join(str(getattr(error, "strerror", None) or error).split())
    match error:
        case FileNotFoundError():
            return OSError(errno.ENOENT, text or "no such file", url)
        case PermissionError():
            return OSError(errno.EACCES, text or "permission denied", url)
        case ImportError():
            return OSError(errno.EINVAL, f"missing package: {text}", url)
        case ValueError():
            return OSError(errno.EINVAL, text, url)
    return OSError(errno.EACCES if "Credentials" in name else errno.EIO, f"{name}: {text}", url)
