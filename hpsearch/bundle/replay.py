"""Re-run a finished trial with its seed, to check that the learning curve is reproduced."""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial

from hpsearch.config.definition import StudyDefinition
from hpsearch.errors import Diverged, NoCompletedTrial
from hpsearch.search.selection import find_trial
from hpsearch.search.study import check_data
from hpsearch.search.trials import name_state
from hpsearch.training.run import build_trainer, describe_environment, load_study_data, trial_seed
from hpsearch.training.trainer import EpochResult


def replay(
    definition: StudyDefinition,
    study: optuna.Study,
    number: int,
    *,
    folder: Path | str | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochResult], None] = lambda result: None,
) -> dict[str, Any]:
    """Re-run a trial with its seed and threads up to its last epoch, and compare the values of its epochs.

    A trial that ran on the CPU is re-run there. The result has `identical`, the `largest_difference` of a value
    (None if there is none to compare), its `epoch`, and `reasons`: what has changed since and may explain a
    difference. Raises `UsageError` if the trial does not exist, `NoCompletedTrial` if it has no finished epoch,
    `DataError`, and `StudyMismatch` for other data than the search had.
    """
    trial = _find_finished(study, number)
    then = trial.user_attrs.get("environment", {})
    device = "cpu" if then.get("device") == "cpu" else device
    before = torch.get_num_threads()
    threads = {(epoch, n_batches): n for epoch, n_batches, n in then.get("thread_changes", ())}
    torch.set_num_threads(then.get("threads", before))
    try:
        now = describe_environment(device)
        images = load_study_data(definition, folder)
        check_data(definition, study, images)
        data = images.to(device)
        seed, hyperparameters = trial_seed(definition.study.seed, trial), definition.space.read(trial.params)
        trainer = build_trainer(definition, data, hyperparameters, seed, validation=data.validation)

        def change_threads() -> None:
            if n_threads := threads.get((len(trainer.results) + 1, trainer.n_batches)):
                torch.set_num_threads(n_threads)

        with suppress(Diverged):
            while len(trainer.results) < (trial.last_step or 0) and not trainer.is_done:
                on_epoch(trainer.run_epoch(change_threads))
    finally:
        torch.set_num_threads(before)
    curve = {result.epoch: result.value for result in trainer.results}
    wanted = dict(sorted(trial.intermediate_values.items()))
    differences = {epoch: abs(curve[epoch] - value) for epoch, value in wanted.items() if epoch in curve}
    epoch, largest = max(differences.items(), key=lambda item: item[1], default=(None, None))
    is_identical = curve == wanted
    return {
        "trial": number,
        "state": name_state(trial),
        "metric": definition.study.metric,
        "epochs": len(wanted),
        "identical": is_identical,
        "largest_difference": largest,
        "epoch": epoch if largest else None,
        "value": wanted[max(wanted)],
        "replayed_value": curve.get(max(wanted)),
        "reasons": [] if is_identical else _explain(then, now),
    }


def _find_finished(study: optuna.Study, number: int) -> FrozenTrial:
    trial = find_trial(study, number)
    if not trial.state.is_finished() or not trial.intermediate_values:
        raise NoCompletedTrial(f"trial {number} has no finished epoch, so there is nothing to reproduce")
    return trial


def _explain(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return possible reasons for a difference: what has changed in the environment."""
    if not then:
        return ["the trial has no environment recorded (older version, or not run by hpsearch)"]
    changed = [name for name in now if then.get(name, now[name]) != now[name]]
    reasons = [f"{name}: was {then[name]}, is now {now[name]}" for name in changed]
    if now["device"] != "cpu":
        reasons.append("GPU arithmetic is not deterministic")
    return reasons or ["no recorded difference; did the data set or hpsearch itself change?"]
