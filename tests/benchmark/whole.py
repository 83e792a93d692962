"""Whole runs of a study file of the repository, by its own commands: how long they take, and what they reach."""

import json
import subprocess
import time
from pathlib import Path

from tests.acceptance.commands import HPSEARCH, environment
from tests.benchmark.report import Options, Row, summarize

_STUDY = Path("studies/mnist-cnn.toml")
_COMMANDS = {"run": (), "confirm": ("--top", "2", "--seeds", "2"), "export": ()}


def whole(folder: Path, options: Options) -> list[Row]:
    """Each run with a seed of its own: 1, 2, ..."""
    return [row for seed in range(1, options.repeats + 1) for row in run_all(folder, seed)]


def run_all(folder: Path, seed: int, study: Path = _STUDY) -> list[Row]:
    """Minutes of each command, and accuracies on the test set, with this seed instead of `seed = 7`."""
    file = folder / f"seed-{seed}.toml"
    file.write_text(study.read_text().replace("seed = 7", f"seed = {seed}"))
    minutes = {command: _time(command, file) for command in _COMMANDS}
    part = f"whole: {study.stem}, seed {seed}"
    rows = [summarize(part, f"{command}: minutes", "", [n]) for command, n in minutes.items()]
    metrics = json.loads((folder / "models" / file.stem / "metrics.json").read_text())
    rows.append(summarize(part, "each network", "%", [100 * n for n in metrics["test_accuracies"]["of_each_seed"]]))
    rows.append(summarize(part, "the exported model", "%", [100 * metrics["test_accuracy"]], "99.70% / 99.75%"))
    rows.append(summarize(part, "all commands: minutes", "", [sum(minutes.values())], "20"))
    return rows


def _time(command: str, file: Path) -> float:
    start = time.perf_counter()
    subprocess.run([*HPSEARCH, command, file.name, *_COMMANDS[command]], cwd=file.parent, check=True, env=environment())
    return (time.perf_counter() - start) / 60
