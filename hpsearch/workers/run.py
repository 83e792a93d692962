"""`hpsearch.run`: what the command `run` does on this machine, for scripts and notebooks."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import TrialState

from hpsearch.config.definition import StudyDefinition, evolve, load_definition, resolve_artifacts
from hpsearch.data.sets import DataSet
from hpsearch.errors import HpsearchError, UsageError
from hpsearch.search.study import load_study, start_study
from hpsearch.search.trials import TrialEvent
from hpsearch.storage.rdb import open_storage
from hpsearch.storage.tables import by_value, rank
from hpsearch.training.devices import default_workers
from hpsearch.training.run import open_data_set
from hpsearch.workers.processes import run_pool
from hpsearch.workers.shutdown import Drain

_LOGGER = "optuna.hpsearch"  # so that Optuna's handlers and verbosity hold for it


def run(
    study: StudyDefinition | Path | str,
    *,
    n_workers: int | None = None,
    n_threads: int | None = None,
    trials: int | None = None,
    data: Path | str | None = None,
    storage: str | None = None,
    artifacts: Path | str | None = None,
) -> optuna.Study:
    """Start or resume a search with parallel workers on this machine; return the Optuna study when it has ended.

    `study` is a study file, the name of one, or a definition. By default there is a worker per GPU, or one per core,
    each with its share of the cores, less when others join; `n_threads` sets it. `trials` is the total, `data` what the
    option `--data` is, and `storage` and `artifacts` override the study file. Ctrl-C saves the running trials and
    raises `Interrupted`; the same call goes on. A script needs no `if __name__ == "__main__"`: workers do not import
    it.

    The end of each trial is logged as by Optuna's `optimize`; `optuna.logging.set_verbosity(optuna.logging.WARNING)`
    silences it. Raises `DefinitionError`, `DataError`, `StorageError` and the other errors of `hpsearch run`.
    """
    for name, number in {"n_workers": n_workers, "n_threads": n_threads}.items():
        if number is not None and number < 1:
            raise UsageError(f"{name} must be at least 1, not {number}")
    try:
        definition = _define(study, storage, artifacts)
        if trials is not None:
            definition = evolve(definition, "budget", trials=trials)
        with _signals_drain() as drain:
            images = data if definition.data.name else _read_own_images(definition, data, drain)
            start_study(definition, keeps_extension=trials is None, data=images)
            n_workers = n_workers or default_workers()
            stored = load_study(definition, open_storage(definition.study.storage))
            run_pool(definition, drain, n_workers, n_threads=n_threads, folder=images, emit=_Log(stored))
        return stored
    except HpsearchError as error:
        named = study.study.name if isinstance(study, StudyDefinition) else study
        error.args = (str(error).replace(" STUDY", f" {named}"),)
        raise


def _define(study: StudyDefinition | Path | str, storage: str | None, artifacts: Path | str | None) -> StudyDefinition:
    folder = resolve_artifacts(Path(), str(artifacts)) if artifacts else ""
    if not isinstance(study, StudyDefinition):
        return load_definition(study, storage=storage, artifacts=folder or None)
    given = {"storage": storage, "artifacts": folder}
    return evolve(study, "study", **{name: value for name, value in given.items() if value})


def _read_own_images(definition: StudyDefinition, folder: Path | str | None, drain: Drain) -> DataSet:
    """Return the user's own images, which are read unless that was done before. Raises `Drained` if that is asked."""
    announced, log = set[str](), optuna.logging.get_logger(_LOGGER)

    def show(step: str, _n_done: int, n_total: int) -> None:
        drain.check()
        if step not in announced:
            announced.add(step)
            log.info(f"{step} {n_total:,} images of {definition.data.title}.")

    data_set = open_data_set(definition, folder, partial(show, "Checking"))
    data_set.map_training(partial(show, "Reading"))
    return data_set


class _Log:
    """Logs the end of each trial as Optuna's `optimize` does."""

    def __init__(self, study: optuna.Study) -> None:
        self.info = optuna.logging.get_logger(_LOGGER).info
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self._best = min(map(by_value, complete), default=(1.0, 0))

    def __call__(self, event: TrialEvent) -> None:
        if event.state == "complete" and event.value is not None:
            self._best = min(self._best, rank(event.value, event.number))
            loss, number = self._best
            self.info(
                f"Trial {event.number} finished with value: {event.value} and parameters: {dict(event.params)}. "
                f"Best is trial {number} with value: {-loss}."
            )
        elif event.state != "running":
            self.info(f"Trial {event.number} {event.state}. {event.message}".rstrip())


@contextmanager
def _signals_drain() -> Iterator[Drain]:
    """Let Ctrl-C and SIGTERM stop the workers in order meanwhile. Signals reach only the main thread."""
    drain = Drain()
    if threading.current_thread() is not threading.main_thread():
        yield drain
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    drain.listen()
    try:
        yield drain
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
