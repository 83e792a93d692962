"""Many image files to pixels in one file of the user's cache folder, read once and shared by all processes."""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any, TypeVar, cast

import joblib
import numpy as np
import platformdirs
import psutil
from filelock import FileLock
from numpy.typing import NDArray

from hpsearch.data.photos import Look, look_at, read_photo
from hpsearch.data.pixels import MappedPixels, remove_unless_used
from hpsearch.errors import DataError

OnRead = Callable[[int, int], None]
Pixels = NDArray[np.uint8]

_VERSION = 1  # of how files become pixels: another one reads all files again
_N_TOGETHER = 64  # files of a task
_KEPT = 30 * 24 * 3600.0  # seconds after which an unused file of the cache is removed
_ABANDONED = 24 * 3600.0  # seconds after which nobody writes a new file any more
_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_SETTLED = 2_000_000_000  # nanoseconds: a file that was changed later than this may change again at the same time
_SPARE = 2**28  # bytes of memory and disk for everything else
_T = TypeVar("_T")
_S = TypeVar("_S")


def look_at_files(folder: Path, names: Sequence[str], on_read: OnRead = lambda n_done, n_total: None) -> list[Look]:
    """Return what `look_at` says of each of these files of a folder; only new and changed ones are read.

    A file counts as unchanged if its size and the times of its last changes are. `on_read` gets the numbers of files
    read and of all.
    """
    index = _index_of(folder)
    known, states = _read_index(index), [_state(f"{folder}/{name}") for name in names]
    looks: dict[str, Look] = {}
    for name, state in zip(names, states, strict=True):
        if state and (entry := known.get(name)) and entry[: len(state)] == list(state):
            looks[name] = Look(*entry[len(state) :])
    new = [name for name in names if name not in looks]
    paths = [folder / name for name in new]
    looks |= dict(zip(new, _in_threads(look_at, paths, on_read, len(names)), strict=True))
    if new or len(known) > len(names):
        settled = time.time_ns() - _SETTLED
        entries = {
            name: [*state, *looks[name]]
            for name, state in zip(names, states, strict=True)
            if state and state[1] < settled and not looks[name].problem
        }
        _write_index(index, entries)
    return [looks[name] for name in names]


def read_photos(files: Sequence[tuple[Path, str]], *, size: tuple[int, int], color: str) -> Iterator[Pixels]:
    """Yield what `read_photo` returns for each file, with the digest that it must have, in order.

    They are read by as many threads as there are cores.
    """

    def read(file: tuple[Path, str]) -> Pixels:
        return read_photo(file[0], size=size, color=color, digest=file[1])

    return _in_threads(read, files)


def store_pixels(
    digests: Sequence[str], image_shape: tuple[int, int, int], read: Callable[[], Iterable[Pixels]]
) -> MappedPixels:
    """Return the pixels of the images with these digests, in a file of the cache folder.

    `read` yields them, shape (C, H, W) each; it is called only if the file is not there. Of several processes, one
    reads. Files that no search has used for 30 days are removed, and if the disk has no room, those that none uses now,
    the oldest first. Raises `DataError` if the file cannot be written.
    """
    folder, shape = cache_folder(), (len(digests), *image_shape)
    key = hashlib.sha256(json.dumps([_VERSION, image_shape, digests]).encode()).hexdigest()[:32]
    file = folder / f"{key}.pixels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            if not file.exists() or file.stat().st_size != math.prod(shape):
                for abandoned in folder.glob(f".new-{key}*"):  # by a process that was killed
                    abandoned.unlink()
                _make_room(folder, math.prod(shape))
                _write(file, (pixels.tobytes() for pixels in read()))
            os.utime(file)
            stored = MappedPixels(file, shape)
            stored.lock()
        _remove_unused(folder)
    except OSError as error:
        advice = "set XDG_CACHE_HOME to a folder that can be written and has space"
        raise DataError(f"cannot keep pixels in {folder}: {error.strerror or error}; {advice}") from error
    return stored


def recall(file: Path, read: Callable[[], _T]) -> _T:
    """Return what `read` returns, a JSON document, which is kept in the cache folder until the file changes."""
    index, state = _index_of(file), _state(str(file))
    entry = _read_index(index).get("")
    if state and entry and entry[:-1] == list(state):
        return cast(_T, entry[-1])
    found = read()
    if state and state == _state(str(file)) and state[1] < time.time_ns() - _SETTLED:
        _write_index(index, {"": [*state, found]})
    return found


def check_space(n_images: int, image_shape: tuple[int, int, int], *, is_scalable: bool = True) -> None:
    """Raise `DataError` if the pixels of so many images fit neither memory nor the disk of the cache folder.

    The message has the largest size that would fit, if the images can be scaled. Pixels that were stored before, those
    of the training part, need no more of the disk.
    """
    folder = cache_folder()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))  # noqa: PTH110 - no error
    n_bytes, (n_channels, height, width) = n_images * math.prod(image_shape), image_shape
    room, what, other = _available_memory(), "of memory", ""
    stored = [size for _, size, _ in _list_pixels(folder)]
    free = shutil.disk_usage(existing).free + sum(stored)
    may_be_stored = any(n_bytes <= 2 * size <= 2 * n_bytes and size % math.prod(image_shape) == 0 for size in stored)
    if free < room and not may_be_stored:
        room, what, other = free, f"in {existing}", ", or set XDG_CACHE_HOME to a folder on a larger disk"
    if n_bytes + _SPARE <= room:
        return
    scale = math.sqrt(max(room - _SPARE, 0) / (n_images * n_channels)) / math.sqrt(height * width)
    fitting = int(min(height, width) * scale) // 8 * 8
    advice = (
        f"size = {fitting} would fit"
        if is_scalable and fitting >= 8
        else f"{'no size would fit: ' * is_scalable}use fewer images"
    )
    needed = f"need {_show_size(n_bytes)}, with {_show_size(_SPARE)} to spare"
    raise DataError(
        f"{n_images:,} images of {height}x{width} pixels {needed}, but only {_show_size(room)} {what} is free; "
        f"{advice}{other}"
    )


def _show_size(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.0f} MB" if n_bytes < 1e9 else f"{n_bytes / 1e9:,.1f} GB"


def _available_memory() -> int:
    """Return the free bytes of memory: at most what the container or batch job allows in which this process runs."""
    return min([psutil.virtual_memory().available, *_list_free_of_groups()])


def _list_free_of_groups(process: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Yield the free bytes of each control group of a process that has a limit: man 7 cgroups."""
    with suppress(OSError):
        for line in process.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                top = _CONTROL_GROUPS / controllers
                names = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
                group = top / path.lstrip("/")
                for each in (group, *group.parents):
                    if each.is_relative_to(top):
                        yield from _measure_group(each, *names)


def _measure_group(group: Path, limit: str, usage: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # it has no limit
        most, used = (int((group / f"memory.{name}").read_text(encoding="ascii")) for name in (limit, usage))
        counts = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        cached = sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file"))  # the kernel gives it back
        yield max(most - used + cached, 0)


def _in_threads(
    function: Callable[[_S], _T],
    items: Sequence[_S],
    on_read: OnRead = lambda n_done, n_total: None,
    n_total: int = 0,
) -> Iterator[_T]:
    """Yield the results in order. Decoding and hashing run in parallel, since they release Python's lock.

    At most a few tasks are ahead of the results that were taken, so that memory is bounded.
    """
    n_done, n_threads, is_stopped = n_total - len(items), int(joblib.cpu_count()), Event()

    def run(part: Sequence[_S]) -> list[_T]:
        return [function(item) for item in part if not is_stopped.is_set()]

    parts = (items[start : start + _N_TOGETHER] for start in range(0, len(items), _N_TOGETHER))
    pool = ThreadPoolExecutor(n_threads)
    try:
        tasks = deque(pool.submit(run, part) for part in islice(parts, 4 * n_threads))
        while tasks:
            results = tasks.popleft().result()
            tasks.extend(pool.submit(run, part) for part in islice(parts, 1))
            n_done += len(results)
            on_read(n_done, n_total)
            yield from results
    finally:
        is_stopped.set()
        pool.shutdown(cancel_futures=True)


def cache_folder() -> Path:
    """Return the folder of the user's cache for own images, which may not exist yet. Raises `DataError`."""
    try:
        return platformdirs.user_cache_path("hpsearch").expanduser() / "images"
    except RuntimeError as error:
        raise DataError("no home folder found for the cache; set HOME or XDG_CACHE_HOME") from error


def _state(file: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(file)  # noqa: PTH116 - a Path takes longer than the call
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _index_of(path: Path) -> Path:
    """Return the file that remembers what was seen in a folder or file by this version."""
    return cache_folder() / f"index-{hashlib.sha256(os.fsencode(f'{_VERSION}:{path}')).hexdigest()[:32]}"


def _read_index(file: Path) -> dict[str, list[Any]]:
    """Return the entries of an index; a damaged one is as good as none."""
    with suppress(OSError):  # it may be another user's
        os.utime(file)
    try:
        entries: dict[str, list[Any]] = json.loads(zlib.decompress(file.read_bytes()))
    except (OSError, zlib.error, ValueError):
        return {}
    return entries


def _write_index(file: Path, entries: dict[str, list[Any]]) -> None:
    with suppress(OSError):  # without it, all files are read again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, [zlib.compress(json.dumps(entries).encode(), 1)])


def _write(file: Path, parts: Iterable[bytes]) -> None:
    """Write a file that appears complete or not at all."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".new-{file.name}-", delete=False) as new:
        try:
            for part in parts:
                new.write(part)
            new.flush()
            os.fsync(new.fileno())
            os.replace(new.name, file)  # noqa: PTH105
        except BaseException:
            os.unlink(new.name)  # noqa: PTH108
            raise


def _remove_unused(folder: Path) -> None:
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # another process removes them, too
            age = time.time() - file.stat().st_mtime
            if age > (_ABANDONED if file.name.startswith(".new-") else _KEPT):
                remove_unless_used(file)


def _make_room(folder: Path, n_bytes: int) -> None:
    """Remove pixels that no process uses, the oldest first, until the disk has room. Raises `OSError` if it has not."""
    for _, _, file in _list_pixels(folder):
        if shutil.disk_usage(folder).free >= n_bytes + _SPARE:
            return
        remove_unless_used(file)
    if shutil.disk_usage(folder).free < n_bytes:
        raise OSError(errno.ENOSPC, f"{n_bytes / 1e9:.1f} GB do not fit on the disk")


def _list_pixels(folder: Path) -> list[tuple[float, int, Path]]:
    """Return time of last use, size and path of the files of pixels, the oldest first."""
    found = []
    for file in folder.glob("*.pixels"):
        with suppress(FileNotFoundError):  # another process removes them, too
            status = file.stat()
            found.append((status.st_mtime, status.st_size, file))
    return sorted(found)
