"""A folder with a manifest of checksums: replaced in one step, and read only if what is read has not changed."""

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
from pydantic import BaseModel, Field, StringConstraints, ValidationError

from hpsearch.config.space import Table
from hpsearch.errors import BundleError, UsageError

MANIFEST = "manifest.json"
MAX_BYTES = 2**24  # size limit of files without weights
_BYTECODE = "__pycache__"  # of predict.py where someone imports it; never read
_RENAME_EXCHANGE, _AT_FDCWD = 2, -100  # of Linux' fs.h and fcntl.h

_Name = Annotated[str, StringConstraints(max_length=100)]
_Digest = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
_Model = TypeVar("_Model", bound=BaseModel)


class Manifest(Table):
    """`manifest.json`: the SHA-256 of every other file."""

    format_version: Literal[1]
    sha256: dict[_Name, _Digest] = Field(max_length=100)


class VerifiedFolder:
    """The files listed in a manifest; every read checks the SHA-256, and only known names can be read.

    Raises `BundleError` naming a missing file, an unexpected file, or an entry that must not be in the manifest.
    """

    def __init__(self, path: Path, required: Collection[str], optional: Collection[str] = ()) -> None:
        self.path, known = path, {*required, *optional}
        if not (path / MANIFEST).is_file():
            raise BundleError(f"{path} is not a model folder (no {MANIFEST}); create one with `hpsearch export`")
        content = _read(path / MANIFEST, MAX_BYTES)
        self._digests = parse(Manifest, content, path / MANIFEST).sha256
        if content != _dump_manifest(self._digests):
            raise BundleError(f"{path / MANIFEST} is corrupt; export again")
        self.names = sorted(self._digests)
        for name in sorted({entry.name for entry in os.scandir(path)} - {MANIFEST, _BYTECODE}):
            if name not in known:
                raise BundleError(f"{path} contains an unexpected file: {name}; remove it, or export again")
            if name not in self._digests:
                raise BundleError(f"{path / name} is not listed in {MANIFEST}; was it added after the export?")
        for name in sorted({*required, *self.names}):
            if name not in self._digests:
                raise BundleError(f"{path / MANIFEST} does not list {name}; export again")
            if name not in known:
                raise BundleError(f"{path / MANIFEST} lists an unknown file: {name}")

    def read(self, name: str, max_bytes: int = MAX_BYTES) -> bytes:
        """Return the content of a file; raises `BundleError` if it is missing, a link, too large or modified."""
        content = _read(self.path / name, max_bytes)
        if not self._fits(name, content):
            raise BundleError(f"{self.path / name} was changed after the export (SHA-256 mismatch); export again")
        return content

    def is_original(self, name: str) -> bool:
        """Return whether a file is there as it was written; raises `BundleError` if it is a link or too large."""
        file = self.path / name
        return os.path.lexists(file) and self._fits(name, _read(file, MAX_BYTES))

    def _fits(self, name: str, content: bytes) -> bool:
        return hashlib.sha256(content).hexdigest() == self._digests[name]


def parse(model: type[_Model], content: bytes, file: Path) -> _Model:
    """Validate the content of a JSON file; raises `BundleError` with the first problem."""
    try:
        return model.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(map(str, first["loc"]))
        raise BundleError(f"{file} is invalid: {location}{': ' if location else ''}{first['msg']}") from error


def _read(file: Path, max_bytes: int) -> bytes:
    """Return the bytes of a regular file; never follows a link or blocks on a pipe."""
    try:
        mode = file.lstat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a link" if stat.S_ISLNK(mode) else "not a regular file"
            raise BundleError(f"{file} is {kind}; model folders may contain regular files only")
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError as error:
        raise BundleError(f"{file} is missing") from error
    with os.fdopen(descriptor, "rb") as stream:
        n_bytes = os.fstat(descriptor).st_size
        if n_bytes > max_bytes:
            raise BundleError(f"{file} is too large: {n_bytes:,} bytes, expected at most {max_bytes:,}")
        return stream.read(n_bytes + 1)  # one more byte, so that a growing file fails its checksum


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files currently in the folder."""
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (folder / MANIFEST).write_bytes(_dump_manifest(digests))


def _dump_manifest(digests: dict[str, str]) -> bytes:
    return json.dumps({"format_version": 1, "sha256": digests}, indent=2).encode() + b"\n"


def check_outside(path: Path, option: str) -> None:
    """Raise `UsageError` if the path is in a model folder, which cannot be loaded with other files in it."""
    for folder in path.resolve().parents:
        if (folder / MANIFEST).is_file() and (folder / "model.safetensors").is_file():
            raise UsageError(f"{option} {path}: {folder} is a model folder; choose a place outside of it")


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which then replaces the target in one step; on error the target stays unchanged.

    Temporary folders of killed processes beside the target are removed first.
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
    """Remove temporary folders without a lock holder; restore a target that was being replaced."""
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
    """Swap two folders atomically, which only Linux can do. Returns whether it succeeded."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    paths = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other)
    return rename is not None and rename(*paths, _RENAME_EXCHANGE) == 0
