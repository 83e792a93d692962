"""The threshold that is told is the one by which the pruner decides."""

import numpy as np
import optuna
import pytest
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

from hpsearch.search.pruning import PruningCallback, explain_pruning
from hpsearch.search.trials import explain_end
from hpsearch.training.trainer import EpochResult

EPOCHS = 9


@pytest.mark.parametrize(
    "pruner",
    [
        MedianPruner(n_startup_trials=3, n_warmup_steps=1),
        SuccessiveHalvingPruner(min_resource=1, reduction_factor=3),
        HyperbandPruner(min_resource=1, max_resource=EPOCHS, reduction_factor=3),
    ],
    ids=lambda pruner: type(pruner).__name__,
)
def test_a_pruned_trial_is_below_its_threshold_and_the_others_were_not(pruner: BasePruner) -> None:
    generator = np.random.default_rng(0)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    n_pruned = 0
    for _ in range(60):
        trial = study.ask()
        callback = PruningCallback(trial, EPOCHS)
        values = generator.random() * (1 - 0.7 ** np.arange(1, EPOCHS + 1)) + generator.normal(0, 0.02, EPOCHS)
        try:
            for epoch, value in enumerate(values, start=1):
                callback(EpochResult(epoch, 0.0, float(value)))
                if epoch < EPOCHS and not isinstance(pruner, MedianPruner) and "completed_rung_0" in rungs(trial):
                    assert rung_value(trial) >= explain_pruning(trial)["threshold"]
        except optuna.TrialPruned:
            told = study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            pruning = told.user_attrs["pruning"]
            assert pruning["value"] < pruning["threshold"]
            assert pruning["epoch"] == told.last_step
            assert f"{pruning['value']:.4f} < {pruning['threshold']:.4f} (" in explain_end(told)
            n_pruned += 1
        else:
            study.tell(trial, float(values[-1]))
    assert 10 < n_pruned < 60


def rungs(trial: optuna.Trial) -> dict[str, float]:
    return {
        key: value
        for key, value in trial.study._storage.get_trial(trial._trial_id).system_attrs.items()
        if key.startswith("completed_rung_")
    }


def rung_value(trial: optuna.Trial) -> float:
    reached = rungs(trial)
    return reached[max(reached)]


def test_an_unknown_pruner_leaves_the_threshold_out() -> None:
    class Strict(NopPruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return True

    study = optuna.create_study(direction="maximize", pruner=Strict())
    trial = study.ask()
    with pytest.raises(optuna.TrialPruned):
        PruningCallback(trial, EPOCHS)(EpochResult(1, 0.0, 0.5))
    told = study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert told.user_attrs["pruning"] == {"epoch": 1, "value": 0.5}
    assert explain_end(told) == ""
