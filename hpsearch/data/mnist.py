"""Downloads MNIST and similar data sets with torchvision, and checks and parses their files."""

import os
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import platformdirs
import torch
from filelock import FileLock
from torch import Tensor

from hpsearch.errors import DataError


def data_folder(folder: Path | str | None = None) -> Path:
    """Return the folder of the data sets: the argument, else HPSEARCH_DATA, else the user's cache folder."""
    chosen = folder or os.environ.get("HPSEARCH_DATA")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("hpsearch")


def find_missing(class_name: str, folder: Path | str | None) -> tuple[list[str], bool]:
    """Return the archives that are missing or corrupt, and whether all files are unpacked.

    Does not download or unpack anything.
    """
    import torchvision

    raw = data_folder(folder) / class_name / "raw"
    resources = [(raw / archive, md5) for archive, md5 in getattr(torchvision.datasets, class_name).resources]
    if all(archive.with_suffix("").exists() for archive, _ in resources):
        return [], True
    is_complete = torchvision.datasets.utils.check_integrity
    return [archive.name for archive, md5 in resources if not is_complete(archive, md5)], False


def read_idx(class_name: str, folder: Path | str | None, n_images: int, *, is_train: bool) -> tuple[Tensor, Tensor]:
    """Read `n_images` images (N, 1, H, W) and their labels; torchvision downloads them if necessary.

    Raises `DataError`.
    """
    root = data_folder(folder)
    raw = root / class_name / "raw"
    part = "train" if is_train else "t10k"
    files = [raw / f"{part}-images-idx3-ubyte", raw / f"{part}-labels-idx1-ubyte"]
    try:
        raw.mkdir(parents=True, exist_ok=True)
        # Other processes must not read half-unpacked files, and stdout is reserved for results.
        with FileLock(raw.parent / ".lock"), redirect_stdout(None):
            _check_unpacked(raw)
            if not all(file.exists() for file in files):
                import torchvision  # takes as long to import as torch

                getattr(torchvision.datasets, class_name)(root, train=is_train, download=True)
        images, labels = (_parse_idx(file.read_bytes()) for file in files)
        if not len(images) == len(labels) == n_images:
            raise ValueError(f"unexpected size: {len(images)} images, {len(labels)} labels")
    except (RuntimeError, OSError, EOFError, zlib.error, ValueError, AssertionError, TypeError) as error:
        # torchvision checks file headers with assertions, and torch raises RuntimeError for truncated data.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"could not load {class_name} from {raw} or download it ({reason}). To work offline, put only its four "
            f"*-ubyte.gz files into that folder, point --data or HPSEARCH_DATA at a folder with {class_name}/raw, "
            'or set data.name = "digits" in the study file (no download)'
        ) from error
    return images.unsqueeze(1), labels.long()


def _parse_idx(content: bytes) -> Tensor:
    """Parse an array of bytes in the IDX format: magic number, sizes, values (http://yann.lecun.com/exdb/mnist)."""
    if content[:3] != b"\0\0\x08" or len(content) < 4:
        raise ValueError("not an IDX file")
    header = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:header], ">i4")
    return torch.from_numpy(np.frombuffer(content[header:], np.uint8).reshape(shape).copy())


def _check_unpacked(raw: Path) -> None:
    """Compare unpacked files with the CRC-32 and length in their archives' trailers (RFC 1952, 2.3.1)."""
    for archive in raw.glob("*.gz"):
        if not archive.with_suffix("").exists():
            continue
        content = archive.with_suffix("").read_bytes()
        trailer = archive.read_bytes()[-8:]
        if (zlib.crc32(content), len(content)) != tuple(int.from_bytes(trailer[i : i + 4], "little") for i in (0, 4)):
            raise ValueError(f"{archive.stem} is corrupt (does not match its archive)")
