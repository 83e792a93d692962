"""Pruners decide as Optuna's do, and the threshold that is told is the one by which they decided."""

from collections.abc import Callable

import numpy as np
import optuna
import pytest
from optuna.pruners import BasePruner, HyperbandPruner, NopPruner, SuccessiveHalvingPruner
from optuna.trial import FrozenTrial, TrialState

from hpsearch.monitor.trials import describe_trial
from hpsearch.search.pruning import AshaPruner, MedianPruner, PruningCallback, find_rungs
from hpsearch.search.trials import explain_end, find_value, make_event
from hpsearch.training.trainer import EpochResult

EPOCHS = 18
PAIRS: dict[str, tuple[Callable[[], BasePruner], Callable[[], BasePruner]]] = {
    "median": (lambda: MedianPruner(3), lambda: optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=1)),
    "asha": (
        lambda: AshaPruner(EPOCHS),
        lambda: SuccessiveHalvingPruner(min_resource=EPOCHS // 9, reduction_factor=3),
    ),
}


def search(pruner: BasePruner, seed: int) -> list[FrozenTrial]:
    """Trials with random learning curves, four at a time; with 100 validation images, accuracies are often equal."""
    generator = np.random.default_rng(seed)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for _ in range(15):
        curves = {}
        for trial in [study.ask() for _ in range(4)]:
            curve = generator.random() * (1 - 0.8 ** np.arange(1, EPOCHS + 1)) + generator.normal(0, 0.03, EPOCHS)
            curves[trial.number] = trial, PruningCallback(trial, EPOCHS), curve.round(2)
        for epoch in range(1, EPOCHS + 1):
            for number, (trial, callback, curve) in list(curves.items()):
                try:
                    callback(EpochResult(epoch, 0.0, float(curve[epoch - 1])))
                except optuna.TrialPruned:
                    study.tell(trial, state=TrialState.PRUNED)
                    del curves[number]
        for trial, _, curve in curves.values():
            study.tell(trial, float(curve[-1]))
    return study.trials


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", PAIRS)
def test_a_pruner_decides_as_optunas_own_does(kind: str, seed: int) -> None:
    ours, optunas = ([(t.state, t.intermediate_values) for t in search(make(), seed)] for make in PAIRS[kind])
    assert ours == optunas
    assert 10 < sum(state == TrialState.PRUNED for state, _ in ours) < 60


def test_a_pruner_of_two_studies_compares_only_the_trials_of_each() -> None:
    pruner = AshaPruner(EPOCHS)
    search(pruner, 0)
    assert [t.last_step for t in search(pruner, 1)] == [t.last_step for t in search(AshaPruner(EPOCHS), 1)]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_pruned_trial_says_that_it_is_below_its_threshold(kind: str) -> None:
    pruned = [trial for trial in search(PAIRS[kind][0](), 0) if trial.state == TrialState.PRUNED]
    for trial in pruned:
        reason = trial.user_attrs["pruning"]
        assert reason["value"] < reason["threshold"]
        assert reason["epoch"] == trial.last_step
        assert f"{reason['value']:.4f} < {reason['threshold']:.4f} ({reason['rule']})" in explain_end(trial)
        shown = {find_value(trial), make_event(trial).value, describe_trial(trial)["value"]}
        assert shown == {reason["value"]}, "a row does not contradict itself"
        assert explain_end(trial).startswith("best ") == (reason["value"] != trial.value)
    assert {trial.user_attrs["pruning"]["rule"].split()[0] for trial in pruned} == {
        "median" if kind == "median" else "top"
    }


@pytest.mark.parametrize(
    ("epochs", "rungs"), [(1, []), (2, [1]), (4, [1]), (6, [1, 2]), (9, [1, 3]), (15, [2, 5]), (100, [11, 33])]
)
def test_trials_are_compared_after_a_ninth_and_a_third_of_their_epochs(epochs: int, rungs: list[int]) -> None:
    assert find_rungs(epochs) == rungs


def report_averaged(study: optuna.Study, epoch: int, value: float, averaged: float | None) -> optuna.Trial:
    trial = study.ask()
    if averaged is not None:
        trial.set_user_attr("averaged", {str(epoch): averaged})
    trial.report(value, epoch)
    return trial


def test_a_trial_whose_averaged_weights_were_compared_says_so_and_keeps_its_own_value() -> None:
    study = optuna.create_study(direction="maximize", pruner=AshaPruner(EPOCHS))
    for value, averaged in ((0.97, 0.98), (0.95, 0.96)):
        report_averaged(study, 6, value, averaged)
    trial = report_averaged(study, 2, 0.9, 0.91)
    trial.set_user_attr("averaged", {"2": 0.91, "6": 0.97})
    with pytest.raises(optuna.TrialPruned):
        PruningCallback(trial, EPOCHS)(EpochResult(6, 0.0, 0.99))
    study.tell(trial, state=TrialState.PRUNED)
    pruned = study.trials[2]
    assert explain_end(pruned) == "averaged 0.9700 < 0.9800 (top 1 of 3 trials) at epoch 6"
    assert {find_value(pruned), make_event(pruned).value, describe_trial(pruned)["value"]} == {0.99}


def test_averaged_weights_are_compared_with_none_but_averaged_weights() -> None:
    """The trials of older versions have none; their own weights are better at first, and worse later."""
    study = optuna.create_study(direction="maximize", pruner=AshaPruner(EPOCHS))
    for value in (0.8, 0.9):
        report_averaged(study, 2, value, None)
    assert not report_averaged(study, 2, 0.5, 0.6).should_prune(), "it is the first with averaged weights"
    assert report_averaged(study, 2, 0.95, 0.5).should_prune()
    assert report_averaged(study, 2, 0.7, None).should_prune()
    rules = [reason["rule"] for reason in study.pruner.reasons.values()]  # type: ignore[attr-defined]
    assert rules == ["top 1 of 2 trials", "top 1 of 3 trials"]


def test_the_threshold_of_hyperband_and_of_other_pruners_is_left_out() -> None:
    class Strict(NopPruner):
        def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
            return True

    for pruner in (Strict(), HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=3)):
        pruned = [trial for trial in search(pruner, 0) if trial.state == TrialState.PRUNED]
        assert pruned
        for trial in pruned:
            epoch = trial.last_step
            assert epoch is not None
            assert trial.user_attrs["pruning"] == {"epoch": epoch, "value": trial.intermediate_values[epoch]}
            assert explain_end(trial) == ""


def test_what_a_trial_has_reported_before_it_was_interrupted_is_not_reported_again(
    recwarn: pytest.WarningsRecorder,
) -> None:
    study = optuna.create_study(direction="maximize", pruner=NopPruner())
    first = study.ask()
    PruningCallback(first, EPOCHS)(EpochResult(1, 0.0, 0.5))
    again = PruningCallback(optuna.Trial(study, first._trial_id), EPOCHS)
    again(EpochResult(1, 0.0, 0.5))
    again(EpochResult(2, 0.0, 0.6))
    assert study.trials[0].intermediate_values == {1: 0.5, 2: 0.6}
    assert len(recwarn) == 0
