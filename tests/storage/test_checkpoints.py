"""Checkpoints are atomic, corruption is detected, and training resumes from them bit for bit."""

import errno
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState

from hpsearch.data.dataset import ImageData, Split
from hpsearch.errors import CheckpointError, Drained
from hpsearch.search.objective import Objective
from hpsearch.search.study import open_study
from hpsearch.storage import checkpoints
from hpsearch.storage.artifacts import Folder
from hpsearch.storage.checkpoints import (
    Checkpoint,
    checkpoint_folder,
    checkpoint_name,
    find_checkpoints,
    sweep_checkpoints,
)
from hpsearch.storage.rdb import open_storage
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import build_network
from hpsearch.training.trainer import Trainer

from ..conftest import make_definition

EPOCHS = 4


def stop_after(n_batches: int) -> Callable[..., None]:
    """A check that drains a trial after so many batches."""
    calls: list[int] = []

    def check(*, between_epochs: bool = False) -> None:
        if len(calls) == n_batches:
            raise Drained
        if not between_epochs:
            calls.append(1)

    return check


def retry_of(kept: Checkpoint) -> Checkpoint:
    return Checkpoint(kept.folder, [checkpoint_name(0), checkpoint_name(9)], json.loads(kept.identity))


@pytest.mark.parametrize(("kind", "width"), [("cnn", 2), ("mlp", 256)])  # the larger with the quick matrix products
def test_training_continues_bit_for_bit_from_a_file(blobs: Split, tmp_path: Path, kind: str, width: int) -> None:
    options: dict[str, Any] = {"optimizer": "adamw", "schedule": "onecycle", "dropout": 0.3, "augment": 0.5}
    hyperparameters = Hyperparameters(depth=2, width=width, batch_size=32, batch_norm=True, **options)

    def build() -> Trainer:
        network = build_network(kind, hyperparameters, (1, 28, 28), 2)
        return Trainer(network, blobs, hyperparameters, EPOCHS, validation=blobs, seed=5)

    undisturbed, interrupted, resumed = build(), build(), build()
    interrupted.network.load_state_dict(undisturbed.network.state_dict())
    list(undisturbed)
    interrupted.run_epoch()
    with pytest.raises(Drained):
        interrupted.run_epoch(stop_after(4))
    kept = Checkpoint(Folder(tmp_path), [checkpoint_name(0)], {})
    kept.write(interrupted.state_dict())
    state = retry_of(kept).load()
    assert state is not None
    resumed.load_state_dict(state)
    assert [result.epoch for result in resumed] == [2, 3, 4]
    assert resumed.results == undisturbed.results
    for name, tensor in undisturbed.network.state_dict().items():
        assert torch.equal(tensor, resumed.network.state_dict()[name]), name


def test_checkpoints_are_written_at_the_ends_of_epochs_but_not_more_often_than_the_interval(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[object] = []
    monkeypatch.setattr(Checkpoint, "write", lambda _checkpoint, state: written.append(state))

    def count_writes(interval: float) -> int:
        written.clear()
        definition = make_definition(recovery={"keep": 0, "checkpoint": interval}, budget={"epochs": EPOCHS})
        study = optuna.create_study(direction="maximize")
        study.optimize(Objective(definition, digits, checkpoints=tmp_path), n_trials=1)
        return len(written)

    assert count_writes(0) == EPOCHS
    assert count_writes(1000) == 0


class Suicide:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> Any:
        return os._exit, (3,)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"identity": Suicide()}, buffer)
    payload = buffer.getvalue()
    file = tmp_path / "trial-0.ckpt"
    file.write_bytes(payload + hashlib.sha256(payload).digest())
    with pytest.raises(CheckpointError, match="was not written by hpsearch"):
        checkpoints.read(Folder(tmp_path), file.name)


@pytest.mark.parametrize("content", [b"", b"short", bytes(1000)])
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x is corrupt"):
        checkpoints.read(Folder(tmp_path), "x")


def test_torch_reads_a_checkpoint_as_well(tmp_path: Path) -> None:
    Checkpoint(Folder(tmp_path), [checkpoint_name(3)], {"seed": 1}).write({"epoch": 2})
    assert torch.load(tmp_path / "trial-3.ckpt", weights_only=True)["state"] == {"epoch": 2}


def test_a_corrupt_checkpoint_is_reported_and_the_previous_one_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (0, 4):
        Checkpoint(Folder(tmp_path), [checkpoint_name(number)], {}).write({"number": number})
    retry = Checkpoint(Folder(tmp_path), [checkpoint_name(0), checkpoint_name(4), checkpoint_name(7)], {})
    assert retry.load() == {"number": 4}
    with (tmp_path / checkpoint_name(4)).open("r+b") as stream:
        stream.seek(100)
        stream.write(b"\xff\x00")
    assert retry.load() == {"number": 0}
    assert "trial-4.ckpt is corrupt" in caplog.text


def test_an_unfinished_trial_keeps_its_two_newest_checkpoints_and_a_finished_one_the_newest(
    tmp_path: Path,
) -> None:
    definition = make_definition(study={"artifacts": str(tmp_path)})
    study = optuna.create_study(direction="maximize", study_name="small")
    folder = checkpoint_folder(definition, study)
    trial = study.ask()
    trial.set_user_attr("interruptions", [{}, {}, {}])
    names = [checkpoint_name(0, attempt) for attempt in range(4)]
    for name in names[:3]:  # the current attempt has written none yet
        Checkpoint(folder, [name], {}).write({})
    sweep_checkpoints(folder, study, definition.recovery.keep)
    assert find_checkpoints(folder) == names[1:3]
    study.tell(trial, 0.5)
    sweep_checkpoints(folder, study, definition.recovery.keep)
    assert find_checkpoints(folder) == names[2:3]


def test_the_checkpoint_of_another_training_is_not_resumed_from(tmp_path: Path) -> None:
    Checkpoint(Folder(tmp_path), [checkpoint_name(0)], {"lr": 0.1}).write({})
    assert Checkpoint(Folder(tmp_path), [checkpoint_name(0), checkpoint_name(1)], {"lr": 0.2}).load() is None
    assert Checkpoint(Folder(tmp_path), [checkpoint_name(0), checkpoint_name(1)], {"lr": 0.1}).load() == {}
    assert Checkpoint(Folder(tmp_path), [checkpoint_name(0)], {"lr": 0.1}).load() is None, (
        "what is there before the first attempt is not its own"
    )


def test_a_full_disk_costs_a_warning_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoint(Folder(tmp_path), [checkpoint_name(0)], {})
    kept.write({"epoch": 1})

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        kept.write({"epoch": 2})
        kept.write({"epoch": 3})
    assert retry_of(kept).load() == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == [kept.name]
    assert caplog.text.count("No space left on device") == 1


def test_an_interrupted_trial_gets_the_value_that_it_would_have_had(digits: ImageData, tmp_path: Path) -> None:
    definition = make_definition(
        budget={"epochs": 4}, recovery={"keep": 0}, fixed={"depth": 2, "batch_size": 64, "dropout": 0.2}
    )
    objective = Objective(definition, digits, checkpoints=tmp_path)
    values: list[tuple[float, dict[int, float]]] = []
    counted: list[int] = []

    def count_epochs(*, between_epochs: bool = False) -> None:
        counted.extend([1] * between_epochs)

    for n_batches in (None, 12):  # of 5 an epoch
        study = optuna.create_study(direction="maximize")
        study.enqueue_trial({"width": 16, "lr": 0.01})
        if n_batches:
            first = study.ask()
            with pytest.raises(Drained):
                objective(first, stop_after(n_batches))
            study.tell(first, state=TrialState.FAIL)
            study.enqueue_trial({"width": 16, "lr": 0.01}, user_attrs={"attempts": [0]})
        counted.clear()
        value = objective(study.ask(), count_epochs)
        values.append((value, study.get_trials()[-1].intermediate_values))
    assert values[0] == values[1], "the reports from before are there as well"
    assert len(counted) == 1, "only epochs 3 and 4 are trained again"
    assert study.get_trials()[-1].user_attrs["resumed_after"] == 2


def test_a_trial_of_another_definition_or_with_other_values_begins_anew(digits: ImageData, tmp_path: Path) -> None:
    definition, changed = make_definition(), make_definition(data={"split_seed": 1})
    study = optuna.create_study(direction="maximize")
    study.enqueue_trial({"width": 16, "lr": 0.01})
    first = study.ask()
    with pytest.raises(Drained):
        Objective(definition, digits, checkpoints=tmp_path)(first, stop_after(7))  # of 5 an epoch
    study.tell(first, state=TrialState.FAIL)
    resumed = []
    for which, width in ((changed, 16), (definition, 17), (definition, 16)):
        study.enqueue_trial({"width": width, "lr": 0.01}, user_attrs={"attempts": [0]})
        trial = study.ask()
        Objective(which, digits, checkpoints=tmp_path)(trial)
        resumed.append("resumed_after" in trial.user_attrs)
    assert resumed == [False, False, True]


def test_the_checkpoints_of_the_best_stay_and_those_that_will_be_resumed(digits: ImageData, tmp_path: Path) -> None:
    definition = make_definition(study={"artifacts": str(tmp_path)}, recovery={"keep": 2, "checkpoint": 1000})
    study = optuna.create_study(direction="maximize", study_name="small")
    folder = checkpoint_folder(definition, study)
    study.optimize(Objective(definition, digits, checkpoints=folder), n_trials=5)
    running = study.ask()
    retried = study.ask()
    study.tell(retried, state=TrialState.FAIL)
    study.enqueue_trial({}, user_attrs={"attempts": [retried.number]})
    for number in (running.number, retried.number, 17):
        Checkpoint(folder, [checkpoint_name(number)], {}).write({})
    writing = f"{checkpoint_name(running.number)}.0123abcd.tmp"
    for partial in ("trial-1.ckpt.tmp", "trial-1.ckpt.0123abcd.tmp", writing):
        folder.write(partial, b"")
    sweep_checkpoints(folder, study, definition.recovery.keep)
    best = sorted(study.trials[:5], key=lambda trial: (-(trial.value or 0), trial.number))[:2]
    kept = {*(trial.number for trial in best), running.number, retried.number}
    assert {*find_checkpoints(folder)} == {writing, *(checkpoint_name(number) for number in kept)}
    final = checkpoints.read(folder, checkpoint_name(best[0].number))["state"]
    assert len(final["results"]) == 2
    assert final["results"][-1][2] == best[0].value


def test_the_checkpoint_of_a_trial_that_begins_during_the_sweep_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    definition = make_definition(study={"artifacts": str(tmp_path)})
    study = optuna.create_study(direction="maximize", study_name="small")
    folder = checkpoint_folder(definition, study)
    Checkpoint(folder, ["trial-7.ckpt"], {}).write({})

    def then_begin_one(read: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            found = read(*arguments, **options)
            trial = study.ask()
            Checkpoint(folder, [checkpoint_name(trial.number)], {}).write({})
            return found

        return call

    monkeypatch.setattr(checkpoints, "find_checkpoints", then_begin_one(find_checkpoints))
    monkeypatch.setattr(study, "get_trials", then_begin_one(study.get_trials))
    sweep_checkpoints(folder, study, keep=3)
    assert find_checkpoints(folder) == ["trial-0.ckpt", "trial-1.ckpt"]


def test_of_equal_trials_the_earlier_ones_keep_their_checkpoints(tmp_path: Path) -> None:
    definition = make_definition(study={"artifacts": str(tmp_path)}, recovery={"keep": 2})
    study = optuna.create_study(direction="maximize", study_name="small")
    trials = [study.ask() for _ in range(4)]
    for trial in trials:
        Checkpoint(checkpoint_folder(definition, study), [checkpoint_name(trial.number)], {}).write({})
        study.tell(trial, 0.5)
    sweep_checkpoints(checkpoint_folder(definition, study), study, definition.recovery.keep)
    assert find_checkpoints(checkpoint_folder(definition, study)) == ["trial-0.ckpt", "trial-1.ckpt"]


def test_a_kept_trial_keeps_the_file_that_it_was_resumed_from(tmp_path: Path) -> None:
    definition = make_definition(study={"artifacts": str(tmp_path)})
    study = optuna.create_study(direction="maximize", study_name="small")
    study.tell(study.ask(), state=TrialState.FAIL)
    study.enqueue_trial({}, user_attrs={"attempts": [0]})
    # It was killed between its last epoch and its result.
    Checkpoint(checkpoint_folder(definition, study), [checkpoint_name(0)], {}).write({})
    study.tell(study.ask(), 0.5)
    sweep_checkpoints(checkpoint_folder(definition, study), study, definition.recovery.keep)
    assert find_checkpoints(checkpoint_folder(definition, study)) == ["trial-0.ckpt"]


def test_studies_of_one_name_in_two_databases_have_checkpoints_of_their_own(tmp_path: Path) -> None:
    definition = make_definition(study={"artifacts": str(tmp_path)})
    studies = [open_study(definition, open_storage(f"sqlite:///{tmp_path / name}.db")) for name in "ab"]
    first, second = (checkpoint_folder(definition, study) for study in studies)
    assert first != second
    assert {str(first).rpartition("/")[0], str(second).rpartition("/")[0]} == {f"{tmp_path}/small"}


def test_a_checkpoint_that_cannot_be_removed_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    definition = make_definition(study={"artifacts": str(tmp_path)})
    study = optuna.create_study(direction="maximize", study_name="small")
    Checkpoint(checkpoint_folder(definition, study), [checkpoint_name(7)], {}).write({})

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    sweep_checkpoints(checkpoint_folder(definition, study), study, definition.recovery.keep)
    assert f"cannot remove old checkpoints in {tmp_path}/small (Permission denied)" in caplog.text
