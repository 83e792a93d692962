"""A trial by its number, the best trial, and the confirmed winner."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.errors import NoCompletedTrial, UsageError
from hpsearch.search.study import check_direction
from hpsearch.storage.tables import by_value


def find_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """Return the trial with that number. Raises `UsageError` if there is none."""
    trials = study.get_trials(deepcopy=False)
    if not 0 <= number < len(trials):
        valid = f"valid numbers are 0 to {len(trials) - 1}" if trials else "it has no trials yet"
        raise UsageError(f"study '{study.study_name}' has no trial {number}; {valid}")
    return trials[number]


def find_best(study: optuna.Study, number: int | None = None) -> FrozenTrial:
    """Return the best completed trial, or the completed trial with that number.

    Raises `NoCompletedTrial`, `UsageError` if there is no trial with that number, and `StudyMismatch` if the study does
    not maximize.
    """
    check_direction(study)
    if number is not None:
        find_trial(study, number)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    chosen = [trial for trial in complete if number is None or trial.number == number]
    if not chosen:
        problem = "no completed trial yet" if number is None else f"trial {number} did not complete"
        raise NoCompletedTrial(f"study '{study.study_name}': {problem}; see: hpsearch trials STUDY")
    return min(chosen, key=by_value)


def find_best_few(study: optuna.Study, n: int) -> list[FrozenTrial]:
    """Return the `n` best completed trials with distinct parameters, best first; raises `NoCompletedTrial`."""
    find_best(study)
    different: list[FrozenTrial] = []
    for trial in sorted(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), key=by_value):
        if all(trial.params != other.params for other in different):
            different.append(trial)
    return different[:n]


def find_winner(study: optuna.Study) -> FrozenTrial:
    """Return the winner of `confirm`, or the best trial if there is none; raises `NoCompletedTrial`."""
    confirmation = study.user_attrs.get("confirmation")
    return find_best(study, confirmation and confirmation["winner"])


def confirmed_values(candidate: Mapping[str, Any]) -> list[float]:
    """Return the values of the retrainings of a candidate of `confirm`."""
    values: list[float] = candidate.get("balanced_accuracies", candidate["accuracies"])
    return values


def explain_choice(study: optuna.Study, command: str) -> str:
    """Explain the choice of `find_winner`; `command` holds the arguments of `hpsearch confirm` for this study."""
    winner, best = find_winner(study), find_best(study)
    confirmation = study.user_attrs.get("confirmation")
    if not confirmation:
        return f"trial {winner.number} has the best value; to see whether it was luck, run: hpsearch confirm {command}"
    if best.number not in [candidate["number"] for candidate in confirmation["candidates"]]:
        return (
            f"trial {winner.number} is the confirmed winner; trial {best.number} has a better value now but was "
            f"not compared, so consider: hpsearch confirm {command}"
        )
    return f"trial {winner.number} is the confirmed winner"
