"""What is on the disk when the power is cut."""

import os
from collections.abc import Callable
from pathlib import Path
from stat import S_ISREG
from typing import Any

import pytest


@pytest.fixture
def survives_power_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], bool]:
    """Tells whether a file was synced whole before it took its place, and its folder afterwards."""
    log: list[tuple[str, int, int]] = []
    fsync = os.fsync

    def note_sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        log.append(("sync", status.st_ino, status.st_size if S_ISREG(status.st_mode) else 0))
        fsync(descriptor)

    def note_move(name: str) -> Callable[..., None]:
        move = getattr(os, name)

        def call(source: Any, *arguments: Any, **options: Any) -> None:
            log.append(("move", os.lstat(source).st_ino, 0))
            move(source, *arguments, **options)

        return call

    monkeypatch.setattr(os, "fsync", note_sync)
    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, note_move(name))

    def survives(file: Path) -> bool:
        status = file.stat()
        moves = [i for i, (event, inode, _) in enumerate(log) if (event, inode) == ("move", status.st_ino)]
        is_whole = ("sync", status.st_ino, status.st_size) in log[: moves[-1]] if moves else False
        return is_whole and ("sync", file.parent.stat().st_ino, 0) in log[moves[-1] :]

    return survives
