"""The best trial, the confirmed winner, and how often the test set was read."""

from datetime import UTC, datetime

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpsearch.errors import NoCompletedTrial
from hpsearch.search.study import change_attribute


def find_best(study: optuna.Study, number: int | None = None) -> FrozenTrial:
    """The best complete trial, or the complete trial of that number; raises `NoCompletedTrial`."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    chosen = [trial for trial in complete if number is None or trial.number == number]
    if not chosen:
        which = "no trial is complete yet" if number is None else f"trial {number} is not complete"
        raise NoCompletedTrial(f"study '{study.study_name}': {which}; see: hpsearch trials STUDY")
    return min(chosen, key=by_value)


def find_best_few(study: optuna.Study, n: int) -> list[FrozenTrial]:
    """The `n` best complete trials that differ in their parameters, the best first; raises `NoCompletedTrial`."""
    find_best(study)
    different: list[FrozenTrial] = []
    for trial in sorted(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)), key=by_value):
        if all(trial.params != other.params for other in different):
            different.append(trial)
    return different[:n]


def find_winner(study: optuna.Study) -> FrozenTrial:
    """The trial that `confirm` has chosen, else the best one; raises `NoCompletedTrial`."""
    confirmation = study.user_attrs.get("confirmation")
    return find_best(study, confirmation and confirmation["winner"])


def explain_choice(study: optuna.Study, command: str) -> str:
    """Why `find_winner` takes the trial that it takes; `command` is what follows the verb to confirm it."""
    winner, best = find_winner(study), find_best(study)
    confirmation = study.user_attrs.get("confirmation")
    if not confirmation:
        return f"trial {winner.number} has the best value; whether that was luck is told by: hpsearch confirm {command}"
    if best.number not in [candidate["number"] for candidate in confirmation["candidates"]]:
        return (
            f"trial {winner.number} is the confirmed winner, but trial {best.number}, whose value is the best now, was "
            f"not compared; do so with: hpsearch confirm {command}"
        )
    return f"trial {winner.number} is the confirmed winner"


def count_test_reading(study: optuna.Study, trial: FrozenTrial) -> int:
    """How many exports have read the test set for this study, after this one was written down."""
    reading = {"at": datetime.now(UTC).isoformat(timespec="seconds"), "trial": trial.number}
    return len(change_attribute(study, "test_reads", lambda readings: [*(readings or ()), reading]))


def by_value(trial: FrozenTrial) -> tuple[float, int]:
    """Sorts the best trial first, and the earlier of equals before the later."""
    return -(trial.value or 0.0), trial.number
