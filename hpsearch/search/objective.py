"""The Optuna objective: suggests hyperparameters, trains a network and returns its validation accuracy."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import torch
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition
from hpsearch.config.space import Hyperparameters, suggest
from hpsearch.data.dataset import ImageData
from hpsearch.errors import Diverged
from hpsearch.search.pruning import PruningCallback
from hpsearch.search.selection import by_value
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import Checkpoint
from hpsearch.training.run import describe_environment, load_study_data, train_from_seed, trial_seed
from hpsearch.training.trainer import Callback, EpochResult, read_results

_CHECKPOINT_FORMAT = 2


class Objective:
    """Trains the network of a trial and returns the validation accuracy after the last epoch, to be maximized.

    Works with plain Optuna: `study.optimize(Objective(definition), n_trials=3)`. The data are loaded at the first
    trial. A trial whose loss is not finite is pruned. `before_batch` may raise to end the training. `callbacks` are
    called after each epoch, before the pruner is asked. If `checkpoints` names a folder, training states are saved
    there, and a retried trial resumes from its last checkpoint.
    """

    def __init__(
        self,
        definition: StudyDefinition,
        data: ImageData | None = None,
        *,
        folder: Path | str | None = None,
        device: torch.device | str = "cpu",
        before_batch: Callable[[], None] = lambda: None,
        callbacks: Sequence[Callback] = (),
        checkpoints: Folder | Path | str | None = None,
    ) -> None:
        self.definition = definition
        self.checkpoints = checkpoints if isinstance(checkpoints, Folder | None) else Folder(checkpoints)
        self.folder = folder
        self.device = device
        self.before_batch = before_batch
        self.callbacks = tuple(callbacks)
        self._data = data and data.to(device)

    @property
    def data(self) -> ImageData:
        if self._data is None:
            self._data = load_study_data(self.definition, self.folder).to(self.device)
        return self._data

    def __call__(self, trial: optuna.Trial) -> float:
        hyperparameters = suggest(trial, self.definition.space)
        seed = trial_seed(self.definition.study.seed, trial)
        trial.set_user_attr("environment", describe_environment(self.device))
        pruning = PruningCallback(trial, self.definition.budget.epochs)
        checkpoint = self._open_checkpoint(trial, hyperparameters)
        resumed = checkpoint.load() if checkpoint else None
        for result in read_results(resumed) if resumed else ():
            pruning.report(result)
            trial.set_user_attr("resumed_after", result.epoch)
        try:
            _, result = train_from_seed(
                self.definition,
                self.data,
                hyperparameters,
                seed,
                validation=self.data.validation,
                callbacks=(
                    SpeedCallback(trial, len(self.data.train), skips_one=bool(resumed and resumed["n_batches"])),
                    *self.callbacks,
                    pruning,
                    lambda result: self._force_checkpoint_if_best(trial, result, checkpoint),
                ),
                before_batch=self.before_batch,
                checkpoint=checkpoint,
                resumed=resumed,
            )
        except Diverged as error:
            trial.set_user_attr("diverged", str(error))
            raise optuna.TrialPruned(str(error)) from error
        return result.value

    def _open_checkpoint(self, trial: optuna.Trial, hyperparameters: Hyperparameters) -> Checkpoint | None:
        if self.checkpoints is None:
            return None
        identity = {
            "format": _CHECKPOINT_FORMAT,
            "study": self.definition.fingerprint,
            "seed": trial_seed(self.definition.study.seed, trial),
            "hyperparameters": hyperparameters.model_dump(),
        }
        earlier = trial.user_attrs.get("attempts", ())
        return Checkpoint(self.checkpoints, trial.number, identity, earlier, self.definition.recovery.checkpoint)

    def _force_checkpoint_if_best(
        self, trial: optuna.Trial, result: EpochResult, checkpoint: Checkpoint | None
    ) -> None:
        """Make the next checkpoint unconditional if the trial ranks among the `recovery.keep` best."""
        if checkpoint and result.epoch == self.definition.budget.epochs:
            trials = trial.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            own = (-result.value, trial.number)
            if sum(by_value(other) < own for other in trials) < self.definition.recovery.keep:
                checkpoint.write_always()


class SpeedCallback:
    """Stores the images per second of the last epoch, including validation.

    `skips_one` ignores the first epoch, which a resumed trial trains only partly.
    """

    def __init__(self, trial: optuna.Trial, n_images: int, *, skips_one: bool = False) -> None:
        self.trial, self.n_images, self.skips_one, self.since = trial, n_images, skips_one, time.perf_counter()

    def __call__(self, _result: EpochResult) -> None:
        now = time.perf_counter()
        if not self.skips_one:
            self.trial.set_user_attr("images_per_second", round(self.n_images / (now - self.since)))
        self.skips_one, self.since = False, now
