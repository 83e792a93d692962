"""A third worker joins a search of two: is the search slower than without it?"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpsearch.config.definition import StudyDefinition, evolve, load_definition, parse_definition
from hpsearch.config.space import suggest
from tests.acceptance.commands import HPSEARCH, environment, wait_for
from tests.benchmark.report import Options, Row, ratios, summarize
from tests.benchmark.searches import has_parameters, seconds_of

_SIZES = {"digits": (45, 15), "mnist-mlp": (8, 2)}  # trials and epochs: about half a minute each


def joining(folder: Path, options: Options) -> list[Row]:
    """The speed of a search that a third worker joins over that of two workers alone, on all cores."""
    rows = []
    for name, (n_trials, epochs) in _SIZES.items():
        definition = define(name, n_trials, epochs)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        shares, speeds = [], []
        for _ in range(options.repeats):
            for joins, measured in seconds.items():
                trials = search(folder, definition, joins=joins)
                measured.append(seconds_of(trials))
                print(f"  {name}, joined: {joins}: {measured[-1]:.1f} s", file=sys.stderr, flush=True)
            theirs = [trial for trial in trials if trial.user_attrs["worker"].endswith("-2")]
            shares.append(len(theirs) / n_trials)
            speeds += [trial.user_attrs["images_per_second"] for trial in theirs]
        rows += [
            summarize(name, "speed with a third worker that joins", "x", ratios(seconds[False], seconds[True]), "1x"),
            summarize(name, "share of the trials that it runs", "", shares),
            *([summarize(name, "its images a second", "", speeds)] if speeds else []),
        ]
    return rows


def define(name: str, n_trials: int, epochs: int) -> StudyDefinition:
    """A study file's search, but of trials that are drawn beforehand and not pruned, so that the work is the same."""
    definition = load_definition(name)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [study.ask() for _ in range(n_trials)]
    for trial in drawn:
        suggest(trial, definition.space)
    definition = evolve(definition, "budget", trials=n_trials, epochs=epochs)
    changes: dict[str, Any] = {"try": [trial.params for trial in drawn], "pruner": {"kind": "none"}}
    return parse_definition(definition.to_tables() | changes)


def search(folder: Path, definition: StudyDefinition, *, joins: bool) -> list[FrozenTrial]:
    """Run the search in a new database with two workers, and with a third once they train; return its trials."""
    file, database = folder / "joining.toml", folder / "joining.db"
    database.unlink(missing_ok=True)
    file.write_text(definition.to_toml())
    arguments = (str(file), "--storage", f"sqlite:///{database}", "--artifacts", str(folder / "artifacts"))
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}
    with subprocess.Popen([*HPSEARCH, "run", *arguments, "--workers", "2"], **quiet) as run:
        if joins:
            wait_for(lambda: has_parameters(database), "the first batch")
            with subprocess.Popen([*HPSEARCH, "worker", *arguments], **quiet):
                pass
    assert run.returncode == 0
    return optuna.load_study(study_name=definition.study.name, storage=f"sqlite:///{database}").trials
