"""A folder whose files are sealed by a manifest: put in its place whole, and read only if nothing in it has changed."""

import ctypes
import glob
import hashlib
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from hpsearch.errors import BundleError

MANIFEST = "manifest.json"
MAX_BYTES = 2**24  # of a file that holds no weights
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # of Linux' fs.h and fcntl.h

_Name = Annotated[str, StringConstraints(max_length=100)]
_Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_Model = TypeVar("_Model", bound=BaseModel)


class Manifest(BaseModel):
    """`manifest.json`: the SHA-256 of every other file."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format_version: Literal[1]
    sha256: dict[_Name, _Digest] = Field(max_length=100)


class VerifiedFolder:
    """The files that a manifest lists; each is checked whenever it is read, and only the known names can be read.

    Raises `BundleError` naming what is missing, what does not belong here, or what the manifest lists wrongly.
    """

    def __init__(self, path: Path, required: Collection[str], optional: Collection[str] = ()) -> None:
        self.path, known = path, {*required, *optional}
        if not (path / MANIFEST).is_file():
            raise BundleError(f"{path} is not a bundle: it has no {MANIFEST}")
        content = _read(path / MANIFEST, MAX_BYTES)
        self._digests = parse(Manifest, content, path / MANIFEST).sha256
        if content != _dump_manifest(self._digests):
            raise BundleError(f"{path / MANIFEST} is damaged: export it again")
        self.names = sorted(self._digests)
        for name in sorted({entry.name for entry in os.scandir(path)} - {MANIFEST}):
            if name not in known:
                raise BundleError(f"{path} has {name!r}, which does not belong to a bundle; move it away")
            if name not in self._digests:
                raise BundleError(f"{path / name} is not listed in {MANIFEST}")
        for name in sorted({*required, *self.names}):
            if name not in self._digests:
                raise BundleError(f"{path / MANIFEST} does not list {name}")
            if name not in known:
                raise BundleError(f"{path / MANIFEST} lists {name!r}, which is no file of a bundle")

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        """The content of a file; raises `BundleError` if it is missing, a link, too large or not what it was."""
        file = self.path / name
        content = _read(file, max_bytes)
        if hashlib.sha256(content).hexdigest() != self._digests[name]:
            raise BundleError(f"{file} is damaged: its SHA-256 differs from that in {MANIFEST}; export it again")
        return content


def parse(model: type[_Model], content: bytes, file: Path) -> _Model:
    """The document in a JSON file's content; raises `BundleError` with its first mistake."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise BundleError(f"{file} is not understood: {place}{': ' if place else ''}{first['msg']}") from error


def _read(file: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file; a pipe is not waited for and a link is not followed."""
    try:
        mode = file.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise BundleError(f"{file} is {'a link' if stat.S_ISLNK(mode) else 'not a file'}; a bundle has files only")
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise BundleError(f"{file} is missing") from error
    with os.fdopen(descriptor, "rb") as stream:
        n_bytes = os.fstat(descriptor).st_size
        if n_bytes > max_bytes:
            raise BundleError(f"{file} is too large: {n_bytes:,} bytes where at most {max_bytes:,} can be")
        return stream.read(n_bytes + 1)  # one more, lest a file that grows be taken for whole


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files that are in the folder now."""
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / MANIFEST).write_bytes(_dump_manifest(digests))


def _dump_manifest(digests: dict[str, str]) -> bytes:
    return json.dumps({"format_version": 1, "sha256": digests}, indent=2).encode() + b"\n"


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A new, empty folder to be filled, which takes the target's place in one step; an error leaves the target alone.

    What was left beside the target by processes that were killed is removed first.
    """
    _sweep(target)
    with (
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary,
        FileLock(Path(temporary, "lock")),  # held as long as this process lives
    ):
        new = Path(temporary, "new")
        new.mkdir()
        yield new
        _put(new, target)


def _sweep(target: Path) -> None:
    """Remove the folders of which nobody holds the lock; an older bundle that was about to be replaced is put back."""
    for lock in target.parent.glob(f".{glob.escape(target.name)}.????????/lock"):
        try:
            with FileLock(lock, timeout=0):
                if not target.exists() and (lock.parent / "old").is_dir():
                    (lock.parent / "old").rename(target)
                shutil.rmtree(lock.parent, ignore_errors=True)
        except Timeout:
            continue


def _put(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        old = new.with_name("old")
        target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Whether two folders took each other's place, which Linux does in one step."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    return rename is not None and rename(*paths, _RENAME_EXCHANGE) == 0
