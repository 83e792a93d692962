"""Many workers, each a process of its own, share one PostgreSQL as it is installed."""

import optuna
import pytest
from optuna.trial import TrialState

from hpsearch.storage.rdb import open_storage
from tests.benchmark import many


@pytest.mark.parametrize("new_url", ["postgresql"], indirect=True)
def test_sixty_four_workers_run_exactly_the_budget(url: str) -> None:
    figures = many.run(url, n_workers=64, n_trials=150)  # raises if one of them ends with an error
    storage = open_storage(url)
    trials = optuna.load_study(study_name="many", storage=storage).trials
    storage.engine.dispose()
    assert [trial.number for trial in trials] == list(range(150))
    assert {trial.state for trial in trials} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert figures["beyond the budget", "trials"] == 0
