"""`scripts/chaos`: every fault at full size, and a table with a line for each."""

import argparse
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import optuna
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from tests.acceptance import faults


class Fault(NamedTuple):
    """A fault, and how often (or for how many seconds) it is injected in full and in short."""

    name: str
    inject: Callable[[Path, int, random.Random], str]
    full: int
    short: int


FAULTS = (
    Fault("kill", faults.kill_workers, 200, 6),
    Fault("supervisor", faults.kill_supervisor, 5, 1),
    Fault("sigterm", faults.drain, 50, 4),
    Fault("sigstop", faults.stop_and_continue, 20, 1),
    Fault("claim", faults.claim, 500, 40),
    Fault("reap", faults.reap, 100, 20),
    Fault("lock", faults.lock, 60, 6),
    Fault("disk", faults.fill_disk, 20, 1),
    Fault("postgresql", faults.restart_postgresql, 20, 2),
    Fault("checkpoint", faults.damage_checkpoints, 1000, 100),
    Fault("training", faults.fail_trainings, 60, 20),
    Fault("budget", faults.come_and_go, 100, 12),
    Fault("export", faults.kill_exports, 50, 2),
    Fault("refuse", faults.refuse, 1, 1),
)


def main() -> int:
    """The exit status: 0 if every promise held."""
    parser = argparse.ArgumentParser(prog="scripts/chaos", description="Inject faults into real searches.")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (default: 0)")
    parser.add_argument("--short", action="store_true", help="the short form that the tests run")
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"of {', '.join(fault.name for fault in FAULTS)}")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", "Heartbeat of storage is supposed to be used with Study.optimize")
    if unknown := {*options.faults} - {fault.name for fault in FAULTS}:
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    table = Table("fault", "", "seen", "seconds", box=SIMPLE_HEAD, show_edge=False)
    broken = 0
    for fault in FAULTS:
        if not options.faults or fault.name in options.faults:
            start = time.monotonic()
            verdict, seen = inject(fault, options.seed, fault.short if options.short else fault.full)
            broken += verdict == "BROKEN"
            print(f"{fault.name}: {verdict}: {seen}", file=sys.stderr, flush=True)
            table.add_row(fault.name, verdict, seen, f"{time.monotonic() - start:.0f}")
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)
    return 1 if broken else 0


def inject(fault: Fault, seed: int, size: int) -> tuple[str, str]:
    """Whether the promises held, and what was seen."""
    with tempfile.TemporaryDirectory(prefix=f"chaos-{fault.name}-", ignore_cleanup_errors=True) as folder:
        try:
            return "held", fault.inject(Path(folder), size, random.Random(f"{seed}-{fault.name}"))
        except faults.Impossible as reason:
            return "skipped", str(reason)
        except Exception as error:  # noqa: BLE001 - whatever it is, the promise is not shown to hold
            traceback.print_exc()
            return "BROKEN", " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
