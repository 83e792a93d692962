"""What a part of the benchmark measured, as rows of a table."""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNFAIR = "NOT FAIR"


@dataclass(frozen=True)
class Row:
    """A figure: the median of several runs, the lowest and the highest of them; and what is accepted and wanted.

    Without runs it is a remark, such as one that begins with `UNFAIR`.
    """

    part: str
    what: str
    unit: str = ""
    median: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    goal: str = ""


@dataclass(frozen=True)
class Options:
    """`repeats` runs of each kind, one after the other in turn; MNIST is in `data`, pictures go to `output`."""

    repeats: int
    data: Path
    output: Path


def summarize(part: str, what: str, unit: str, values: Sequence[float], goal: str = "") -> Row:
    return Row(part, what, unit, statistics.median(values), min(values), max(values), len(values), goal)


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """The quotients of runs that were made next to each other."""
    return [a / b for a, b in zip(over, under, strict=True)]


def show(rows: Sequence[Row], file: Path) -> None:
    table = Table("part", "figure", "median", "low", "high", "runs", "accept / want", box=SIMPLE_HEAD, show_edge=False)
    for row in rows:
        figures = ["" if value is None else f"{value:.3g} {row.unit}" for value in (row.median, row.low, row.high)]
        table.add_row(*map(escape, (row.part, row.what, *figures, str(row.n), row.goal)))
    Console(width=140).print(table)
    machine = {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.cpu.get_capabilities().get("num_physical_cores"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    file.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
