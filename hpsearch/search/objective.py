"""The Optuna objective: suggests hyperparameters, trains a network and returns its value on the validation split."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import TrainingHyperparameters, suggest
from hpsearch.data.dataset import ImageData
from hpsearch.errors import Diverged, Drained, StorageUnavailable
from hpsearch.search.pruning import AshaPruner, PruningCallback
from hpsearch.search.study import check_data, check_direction
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import Checkpoint, checkpoints_of
from hpsearch.storage.tables import by_value, rank
from hpsearch.training.metrics import balanced_interval
from hpsearch.training.run import build_trainer, describe_environment, load_study_data, trial_seed
from hpsearch.training.trainer import EpochResult, Trainer, measure

logger = logging.getLogger(__name__)
_CHECKPOINT_FORMAT = 3
# Where these have these values, checkpoints are as those of versions without them.
_NEWER = {"flip": False, "erase": 0.0, "color_jitter": 0.0, "ema": 0.0, "shear": 0.0, "stem_stride": 2}
_loading = threading.Lock()  # the threads of `n_jobs` share the data


class Objective:
    """Trains the network of a trial and returns the study's metric after the last epoch, to be maximized.

    It is measured on the validation split. In a study of the balanced accuracy, the trial's user attributes `accuracy`
    and `interval` have the accuracy, and the 95% confidence interval of the balanced one.

    Works with plain Optuna: `study.optimize(Objective(definition), n_trials=3)`. The data are loaded at the first
    trial. A trial whose loss is not finite is pruned. If `checkpoints` names a folder, training states are saved there,
    and a retried trial resumes from its last checkpoint. With `n_jobs`, trials have the same values as
    without: they take turns, an epoch at a time. Only processes, such as those of `hpsearch run`, train in parallel.
    """

    def __init__(
        self,
        definition: StudyDefinition,
        data: ImageData | None = None,
        *,
        folder: Path | str | None = None,
        device: torch.device | str = "cpu",
        checkpoints: Folder | Path | str | None = None,
    ) -> None:
        self.definition = definition
        self.fingerprint = definition.fingerprint  # of the study, in checkpoints
        self.checkpoints = checkpoints if isinstance(checkpoints, Folder | None) else Folder(checkpoints)
        self.folder = folder
        self.device = device
        self._data = data and data.to(device)
        self._checked = set[str]()  # names of studies that the data fit

    @property
    def data(self) -> ImageData:
        with _loading:
            if self._data is None:
                self._data = load_study_data(self.definition, self.folder).to(self.device)
        return self._data

    def check_data(self, study: optuna.Study) -> None:
        """Note in the study what its data are, or raise `StudyMismatch` if it was searched on others."""
        if study.study_name not in self._checked:
            check_data(self.definition, study, self.data, stores=True)
            self._checked.add(study.study_name)

    def __call__(self, trial: optuna.Trial, check: Callable[..., None] = lambda **_: None) -> float:
        """Run a trial: load its checkpoint, then train, report, ask the pruner and save, epoch by epoch.

        `check()` is called before each batch, and `check(between_epochs=True)` between epochs. Either may raise to end
        the trial; on `Drained` and `StorageUnavailable`, the training state is saved first. Raises `StudyMismatch` in a
        study that does not maximize, or was searched on other data.
        """
        if isinstance(trial, optuna.Trial):
            check_direction(trial.study)
            self.check_data(trial.study)
        hyperparameters = suggest(trial, self.definition.space)
        _warn_of_ignored(trial)
        trial.set_user_attr("environment", describe_environment(self.device))
        trainer = self._build_trainer(trial, hyperparameters)
        report_and_prune = PruningCallback(trial, trainer.epochs)
        checkpoint = self._open_checkpoint(trial, hyperparameters)
        n_judged = 0  # epochs after which the pruner was asked
        if state := checkpoint and checkpoint.load():
            n_judged = _resume(trial, trainer, state, report_and_prune)
        try:
            while not trainer.is_done:
                result = self._run_epoch(trial, trainer, check)
                report_and_prune(result)
                n_judged = result.epoch
                if checkpoint and trainer.is_done and self._is_among_best(trial, result):
                    checkpoint.write(trainer.state_dict())
                elif checkpoint:
                    checkpoint.write_if_due(trainer.state_dict)
                if not trainer.is_done:
                    check(between_epochs=True)
        except Diverged as error:
            trial.set_user_attr("diverged", str(error))
            raise optuna.TrialPruned(str(error)) from error
        except (Drained, StorageUnavailable):
            if checkpoint:
                checkpoint.write(trainer.state_dict() | {"n_judged": n_judged})
            raise
        if trainer.metric == "balanced_accuracy":
            score = trainer.score or measure(trainer.network, self.data.validation)  # the checkpoint has no score
            trial.set_user_attr("accuracy", score.accuracy)
            trial.set_user_attr("interval", balanced_interval([score]))
        return trainer.results[-1].value

    def _build_trainer(self, trial: optuna.Trial, hyperparameters: TrainingHyperparameters) -> Trainer:
        pruner = trial.study.pruner if isinstance(trial, optuna.Trial) else None
        compared = pruner.rungs if isinstance(pruner, AshaPruner) else ()
        seed, validation = trial_seed(self.definition.study.seed, trial), self.data.validation
        return build_trainer(
            self.definition, self.data, hyperparameters, seed, validation=validation, averaged_after=compared
        )

    def _run_epoch(self, trial: optuna.Trial, trainer: Trainer, check: Callable[..., None]) -> EpochResult:
        """Train an epoch; note in the trial its speed, changes of threads and the averaged weights' metric."""
        is_whole, start = trainer.n_batches == 0, time.perf_counter()
        result = trainer.run_epoch(check)
        if is_whole:
            speed = len(self.data.train) / (time.perf_counter() - start)
            trial.set_user_attr("images_per_second", round(speed))
        environment = trial.user_attrs["environment"]
        if trainer.threads not in ([[1, 0, environment["threads"]]], environment.get("thread_changes")):
            trial.set_user_attr("environment", environment | {"thread_changes": [*trainer.threads]})
        if result.epoch in trainer.averaged:
            _note_averaged(trial, trainer)
        return result

    def _open_checkpoint(self, trial: optuna.Trial, hyperparameters: TrainingHyperparameters) -> Checkpoint | None:
        if self.checkpoints is None:
            return None
        identity = identify_training(self.fingerprint, trial_seed(self.definition.study.seed, trial), hyperparameters)
        return Checkpoint(self.checkpoints, checkpoints_of(trial), identity, self.definition.recovery.checkpoint)

    def _is_among_best(self, trial: optuna.Trial, result: EpochResult) -> bool:
        """Return whether the finished trial ranks among the `recovery.keep` best."""
        trials = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        own = rank(result.value, trial.number)
        return sum(by_value(other) < own for other in trials) < self.definition.recovery.keep


def identify_training(fingerprint: str, seed: int, hyperparameters: TrainingHyperparameters) -> dict[str, Any]:
    """Return the identity of a training in a study, by which its checkpoint is recognized."""
    values = hyperparameters.model_dump()
    chosen = {name: value for name, value in values.items() if name not in _NEWER or value != _NEWER[name]}
    return {"format": _CHECKPOINT_FORMAT, "study": fingerprint, "seed": seed, "hyperparameters": chosen}


def _warn_of_ignored(trial: optuna.Trial) -> None:
    """Warn of values of `study.enqueue_trial` that were not suggested."""
    if not isinstance(trial, optuna.Trial):
        return
    for name in trial.storage.get_trial_system_attrs(trial._trial_id).get("fixed_params", {}):
        if name not in trial.params:
            logger.warning(
                "trial %d: the value of %s that was enqueued is ignored: it is not in [search], or its `when` does "
                "not hold",
                trial.number,
                name,
            )


def _resume(trial: optuna.Trial, trainer: Trainer, state: dict[str, Any], report_and_prune: PruningCallback) -> int:
    """Go on from a training state and report its epochs; return after how many of them the pruner was asked."""
    trainer.load_state_dict(state)
    n_judged = int(state.get("n_judged", len(trainer.results)))
    _note_averaged(trial, trainer)
    for result in trainer.results:
        trial.set_user_attr("resumed_after", result.epoch)
        report = report_and_prune.report if result.epoch <= n_judged else report_and_prune
        report(result)
    return n_judged


def _note_averaged(trial: optuna.Trial, trainer: Trainer) -> None:
    """Tell the pruner the metric of the averaged weights by epoch, unless there is none yet."""
    if trainer.averaged:
        trial.set_user_attr("averaged", {str(epoch): value for epoch, value in trainer.averaged.items()})
