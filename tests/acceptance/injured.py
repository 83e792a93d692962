"""hpsearch's command line with workers that hurt themselves: `INJURIES=report=0.01,tell=0.05 injured.py run ...`.

Each entry is a point of a worker's life and the chance that it is hit each time the worker comes by:

    ask, report, heartbeat, tell    SIGKILL before, inside or after the storage's transaction
    checkpoint                      SIGKILL while a checkpoint is written, before its renaming or after it
    training                        every other training raises ValueError or MemoryError, or asks torch for 128 TB

Each hit is written to the file INJURIES_LOG first. The supervisor is left alone.
"""

import os
import random
import signal
from collections.abc import Callable
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import Any

CHANCES = {name: float(chance) for name, _, chance in (i.partition("=") for i in os.environ["INJURIES"].split(","))}
METHODS = {
    "_start": "ask",
    "_claim": "ask",
    "_flush": "report",
    "beat": "heartbeat",
    "_end": "tell",
}
chance = random.Random()


def hits(point: str) -> bool:
    if chance.random() >= CHANCES.get(point, 0):
        return False
    with Path(os.environ["INJURIES_LOG"]).open("a") as log:
        log.write(f"{point}\n")
    return True


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def injure_transactions() -> None:
    import sqlalchemy

    from hpsearch.storage.rdb import Storage

    moment = None

    def in_commit(_: object) -> None:
        if moment == "inside":
            die()

    sqlalchemy.event.listen(sqlalchemy.Engine, "commit", in_commit)

    def injured(method: Callable[..., Any], point: str) -> Callable[..., Any]:
        @wraps(method)
        def call(self: Storage, *args: Any, **kwargs: Any) -> Any:
            nonlocal moment
            if hits(point):
                moment = chance.choice(["before", "inside", "after"])
            if moment == "before":
                die()
            answer = method(self, *args, **kwargs)
            if moment:
                die()
            return answer

        return call

    for name, point in METHODS.items():
        setattr(Storage, name, injured(getattr(Storage, name), point))


def injure_checkpoints() -> None:
    from hpsearch.storage import checkpoints

    original = checkpoints.write

    def write(*args: Any) -> None:
        if hits("checkpoint"):
            place, name = chance.choice([(os, "fsync"), (Path, "replace"), (os, "open")])
            setattr(place, name, die)
        original(*args)

    checkpoints.write = write  # type: ignore[assignment]


def injure_trainings() -> None:
    import torch

    from hpsearch.training import run

    original = getattr(run, "Trainer")  # noqa: B009
    pains = cycle(["", "exception", "", "memory", "", "allocation"])

    def build(*args: Any, **options: Any) -> Any:
        match next(pains) if hits("training") else "":
            case "exception":
                raise ValueError("injured")
            case "memory":
                raise MemoryError("injured")
            case "allocation":
                torch.empty(2**45)
        return original(*args, **options)

    setattr(run, "Trainer", build)  # noqa: B010 - imported there, not defined


def seed() -> None:
    chance.seed(f"{os.environ.get('INJURIES_SEED')}-{os.getpid()}")


if __name__ == "__main__":
    from hpsearch.__main__ import main
    from hpsearch.workers import forkserver

    forkserver._PRELOADED.append(Path(__file__).stem)
    main()
else:  # the fork server imports it, from which the workers are forked
    injure_transactions()
    injure_checkpoints()
    injure_trainings()
    os.register_at_fork(after_in_child=seed)
