"""A finished trial run again from its seed, to see whether it gives the same learning curve."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import suggest
from hpsearch.errors import Diverged, NoCompletedTrial
from hpsearch.search.trials import name_state
from hpsearch.training.devices import tune_malloc
from hpsearch.training.run import describe_environment, load_study_data, train_from_seed, trial_seed
from hpsearch.training.trainer import EpochResult


class _Reached(Exception):
    """The epoch in which the trial ended is reached."""


def replay(
    definition: StudyDefinition,
    study: optuna.Study,
    number: int,
    *,
    folder: Path | str | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[EpochResult], None] = lambda result: None,
) -> dict[str, Any]:
    """Whether the trial's training gives the same validation accuracies again, and if not by how much they differ.

    It is run on the training split from the trial's seed, with the number of threads that it had, up to its last
    epoch, and on the CPU if it was. The document has `identical`, the `largest_difference` of an accuracy (None where
    none can be compared) and its `epoch`, and in `reasons` what is different from then and may explain it. Raises
    `NoCompletedTrial` where the trial is not there or has not finished an epoch, and `DataError`.
    """
    trial = _find_finished(study, number)
    then = trial.user_attrs.get("environment", {})
    device = "cpu" if then.get("device") == "cpu" else device
    before = torch.get_num_threads()
    torch.set_num_threads(then.get("threads", before))
    tune_malloc()
    try:
        curve, now = _train_again(definition, trial, folder, device, on_epoch), describe_environment(device)
    finally:
        torch.set_num_threads(before)
    wanted = dict(sorted(trial.intermediate_values.items()))
    differences = {epoch: abs(curve[epoch] - value) for epoch, value in wanted.items() if epoch in curve}
    epoch, largest = max(differences.items(), key=lambda item: item[1], default=(None, None))
    is_identical = curve == wanted
    return {
        "trial": number,
        "state": name_state(trial),
        "epochs": len(wanted),
        "identical": is_identical,
        "largest_difference": largest,
        "epoch": epoch if largest else None,
        "value": wanted[max(wanted)],
        "replayed_value": curve.get(max(wanted)),
        "reasons": [] if is_identical else _explain(then, now),
    }


def _find_finished(study: optuna.Study, number: int) -> FrozenTrial:
    found = [trial for trial in study.get_trials(deepcopy=False) if trial.number == number]
    if not found:
        raise NoCompletedTrial(f"study '{study.study_name}' has no trial {number}; see: hpsearch trials STUDY")
    [trial] = found
    if not trial.state.is_finished() or not trial.intermediate_values:
        raise NoCompletedTrial(f"trial {number} has not finished an epoch, so there is nothing to compare with")
    return trial


def _train_again(
    definition: StudyDefinition,
    trial: FrozenTrial,
    folder: Path | str | None,
    device: torch.device | str,
    on_epoch: Callable[[EpochResult], None],
) -> dict[int, float]:
    """The validation accuracy after each epoch that the trial has reported, or until the training diverges."""
    curve: dict[int, float] = {}

    def keep(result: EpochResult) -> None:
        on_epoch(result)
        curve[result.epoch] = result.accuracy or 0.0
        if result.epoch == trial.last_step:
            raise _Reached

    data = load_study_data(definition, folder).to(device)
    seed = trial_seed(definition.study.seed, trial)
    try:
        hyperparameters = suggest(trial, definition.space)
        train_from_seed(definition, data, hyperparameters, seed, validation=data.validation, callbacks=[keep])
    except (_Reached, Diverged):
        return curve
    return curve


def _explain(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What was different when the trial ran, in words."""
    if not then:
        return ["the trial did not note its environment: it was run by an earlier version, or not by hpsearch"]
    reasons = [f"{name}: {then[name]} then, {now[name]} now" for name in now if then.get(name, now[name]) != now[name]]
    if now["device"] != "cpu":
        reasons.append("a GPU adds up numbers in an order that varies")
    return reasons or ["nothing that was noted is different: was the data set or hpsearch itself changed?"]
