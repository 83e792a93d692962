"""Model folders: written completely or not at all, verified, and loaded only if no file has changed."""

import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from filelock import FileLock, Timeout
from PIL import Image

from hpsearch.bundle import bundle, formats, manifest
from hpsearch.bundle.evaluation import evaluate
from hpsearch.data.dataset import ImageData, load_test
from hpsearch.errors import BundleError, ImageError, UsageError
from hpsearch.plugins import NETWORKS, find
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import Ensemble, build_network, combine
from hpsearch.training.trainer import Trainer


def make_contents(data: ImageData, kind: str = "mlp", n_members: int = 1, shift: int = 0) -> bundle.Contents:
    hyperparameters = find(NETWORKS, kind).hyperparameters(width=8, dropout=0.1)
    networks = [build_network(kind, hyperparameters, data.image_shape, 10) for _ in range(n_members)]
    evaluation = evaluate(np.eye(10, dtype=np.float32), np.arange(10), data.class_names)
    config = {
        "format_version": 2,
        "data": "digits",
        "kind": kind,
        "hyperparameters": hyperparameters.model_dump(),
        "image_shape": list(data.image_shape),
        "mean": list(data.mean),
        "std": list(data.std),
        "preparation": {"kind": "digit"},
        "class_names": list(data.class_names),
        "layers": find(NETWORKS, kind).describe(hyperparameters, data.image_shape, 10),
        **({"n_members": n_members, "shift": shift} if n_members > 1 or shift else {}),
    }
    metrics: dict[str, Any] = {
        "metric": "accuracy",
        "test_interval": evaluation.interval,
        "test_balanced_accuracy": 0.79,
        "test_balanced_interval": evaluation.balanced_interval,
        "calibration": evaluation.calibration,
        "test_reads": 1,
        "confirmed": None,
        "versions": {"python": "3.11"},
        "study": "small",
        "trial": 3,
        "n_trials": 9,
        "epochs": 2,
        "n_members": n_members,
        "shift": shift,
        "n_parameters": 1234,
        "validation_accuracy": 0.9,
        "test_accuracy": 0.8,
        "test_accuracies": {"of_each_seed": [0.8, 0.7], "mean": 0.75, "std": 0.07},
        "n_images": {"train": 500, "validation": 200, "test": 360},
        "per_class": evaluation.per_class,
    }
    return bundle.Contents(combine(networks, shift), config, metrics, evaluation, '[study]\nname = "small"\n')


def save(contents: bundle.Contents, target: Path, n: int = 8, **options: Any) -> dict[str, dict[str, float]]:
    images, labels = load_test("digits")
    return bundle.save(contents, target, images[:n], labels[:n].numpy(), **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, digits: ImageData) -> Path:
    target = tmp_path_factory.mktemp("models") / "small"
    save(make_contents(digits), target)
    return target


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_a_bundle_has_the_files_of_the_design_and_nothing_beside_it(saved: Path) -> None:
    assert {file.name for file in saved.iterdir()} == {
        *bundle.REQUIRED,
        "mistakes.png",
        "calibration.png",
        "example.png",
        "predict.py",
        "manifest.json",
    }
    assert [file.name for file in saved.parent.iterdir()] == ["small"]
    modes = {file.stat().st_mode & 0o777 for file in saved.iterdir()}
    assert len(modes) == 1, "one file is not readable for those who can read the others"


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_the_files_of_a_trained_network_hold_each_parameter_once(digits: ImageData, tmp_path: Path, kind: str) -> None:
    contents = make_contents(digits, kind)
    wide = find(NETWORKS, kind).hyperparameters(width=32)
    network = build_network(kind, wide, digits.image_shape, 10)
    Trainer(network, digits.train, wide, 1).run_epoch()
    layers = find(NETWORKS, kind).describe(wide, digits.image_shape, 10)
    config = contents.config | {"hyperparameters": wide.model_dump(), "layers": layers}
    save(replace(contents, network=network, config=config), tmp_path / "b")
    n_bytes = 4 * sum(parameter.numel() for parameter in network.parameters())
    for name in ("model.pt", "model.safetensors"):
        assert n_bytes < (tmp_path / "b" / name).stat().st_size < 1.1 * n_bytes + 10_000


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_loaded_classifier_predicts_what_the_network_did(digits: ImageData, tmp_path: Path, kind: str) -> None:
    contents = make_contents(digits, kind)
    images = load_test("digits")[0]
    save(contents, tmp_path / "b")
    classifier = bundle.load(tmp_path / "b")
    probabilities = classifier.predict_proba(images)
    assert probabilities.dtype == np.float32
    assert probabilities.shape == (360, 10)
    normalised = (images.float() / 255 - digits.mean[0]) / digits.std[0]
    assert np.allclose(probabilities, contents.network.predict_proba(normalised).numpy(), atol=1e-6)


def test_images_may_come_as_arrays_or_tensors_with_or_without_a_channel(saved: Path) -> None:
    classifier = bundle.load(saved)
    images = load_test("digits")[0][:5]
    expected = classifier.predict_proba(images)
    read_only = images.numpy().copy()
    read_only.flags.writeable = False
    flipped_twice = images.numpy()[:, :, ::-1].copy()[:, :, ::-1]  # a view with a negative stride
    for given in (images.numpy(), images[:, 0], images[:, 0].numpy(), read_only, flipped_twice):
        assert np.array_equal(classifier.predict_proba(given), expected)
    assert classifier.predict_proba(images[:0]).shape == (0, 10)


def test_a_prediction_is_a_class_and_its_probability_for_one_image_and_a_list_for_an_array(
    saved: Path, tmp_path: Path
) -> None:
    classifier = bundle.load(saved)
    images = load_test("digits")[0][:3]
    expected = [(str(row.argmax()), float(row.max())) for row in classifier.predict_proba(images)]
    assert [(each.class_name, each.probability) for each in classifier.predict(images)] == expected
    assert classifier.predict(images[:, 0].numpy()) == classifier.predict(images)
    picture = Image.fromarray(images[1, 0].numpy()).resize((90, 90))
    for i, image in ((1, Image.fromarray(images[1, 0].numpy())), (0, saved / "example.png")):
        name, probability = classifier.predict(image)
        assert name == expected[i][0]
        assert probability == pytest.approx(expected[i][1], abs=1e-6)
    picture.save(tmp_path / "picture.png")
    assert classifier.predict(picture) == classifier.predict(tmp_path / "picture.png")
    with pytest.raises(ImageError, match=r"^image "):
        classifier.predict(Image.new("L", (28, 28)))


def test_a_classifier_says_what_it_is(saved: Path) -> None:
    pattern = r"<Classifier: mlp with 6,\d{3} parameters, trained on digits, 1x28x28 pixels to 10 classes>"
    assert re.fullmatch(pattern, repr(bundle.load(saved)))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 28, 28), dtype=np.float32), "must be uint8 pixels, got float32"),
        (None, "must be uint8 pixels, got object"),
        (np.zeros((2, 27, 28), dtype=np.uint8), "must have shape"),
        (np.zeros((28, 28), dtype=np.uint8), "must have shape"),
        (np.zeros((2, 3, 28, 28), dtype=np.uint8), "must have shape"),
    ],
)
def test_images_of_another_type_or_shape_are_refused(saved: Path, images: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        bundle.load(saved).predict_proba(images)


@pytest.mark.parametrize("name", sorted({*bundle.REQUIRED, formats.PROGRAM} - {bundle.CARD}))
def test_a_damaged_or_missing_file_is_refused_by_name(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} was changed"):
        bundle.load(copy)
    (copy / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        bundle.load(copy)


def test_a_model_whose_card_was_edited_or_removed_is_loaded_with_a_warning(
    copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle.load(copy)
    assert caplog.messages == []
    card = copy / "README.md"
    card.write_text(card.read_text().replace("library_name", "license: mit\nlibrary_name", 1))
    bundle.load(copy)
    card.unlink()
    bundle.load(copy)
    assert caplog.messages == [
        f"warning: {card} was edited or removed after the export; the model is unchanged",
    ] * 2  # fmt: skip


def test_a_folder_is_used_and_replaced_after_predict_py_was_imported_from_it(copy: Path, digits: ImageData) -> None:
    (copy / "__pycache__").mkdir()
    (copy / "__pycache__" / "predict.cpython-311.pyc").write_bytes(b"whatever")
    bundle.load(copy)
    save(make_contents(digits), copy)
    assert not (copy / "__pycache__").exists()


def test_predict_py_is_not_written_for_photos_which_it_cannot_prepare(digits: ImageData, tmp_path: Path) -> None:
    contents = make_contents(digits)
    contents.config["preparation"] = {"kind": "photo", "size": [28, 28], "color": "grey"}
    save(contents, tmp_path / "b")
    assert not (tmp_path / "b" / "predict.py").exists()
    assert "predict.py" not in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize("manifest", [None, "", "[]", '{"sha256": 3}', '{"sha256": {}}'])
def test_a_damaged_manifest_is_refused(copy: Path, manifest: str | None) -> None:
    (copy / "manifest.json").unlink()
    if manifest is not None:
        (copy / "manifest.json").write_text(manifest)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        bundle.load(copy)


def sign(folder: Path) -> None:
    """Write a manifest that fits whatever the files hold now."""
    manifest.write_manifest(folder)


def test_a_config_that_is_not_understood_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    for change in (
        {"format_version": 3},
        {"std": [0.0]},
        {"mean": [0.1, 0.1]},
        {"kind": "rnn"},
        {"extra": 1},
        {"hyperparameters": {"depth": -1}},
        {"layers": config["layers"][:-1]},
        {"n_members": 101},
        {"shift": 5},
        {"class_names": [*config["class_names"][:-1], "x" * 1001]},
        {"image_shape": [2, 28, 28]},
        {"preparation": {"kind": "photo", "size": [28, 28], "color": "rgb"}},
    ):
        (copy / "config.json").write_text(json.dumps(config | change))
        sign(copy)
        with pytest.raises(BundleError, match=next(iter(change))):
            bundle.load(copy)
    (copy / "config.json").write_text(json.dumps(config | {"n_members": 2}))
    sign(copy)
    with pytest.raises(BundleError, match=r"model\.safetensors does not match config\.json: tensor names"):
        bundle.load(copy)


def test_a_model_folder_of_version_1_is_read_as_it_was(copy: Path) -> None:
    images = load_test("digits")[0][:20]
    expected = bundle.load(copy).predict_proba(images)
    config = json.loads((copy / "config.json").read_text())
    del config["preparation"]
    older = config | {"format_version": 1, "mean": config["mean"][0], "std": config["std"][0]}
    (copy / "config.json").write_text(json.dumps(older))
    sign(copy)
    classifier = bundle.load(copy)
    assert np.array_equal(classifier.predict_proba(images), expected)
    assert classifier.config.preparation.kind == "digit"


def test_weights_that_do_not_fit_the_config_are_refused(copy: Path) -> None:
    right = safetensors.torch.load_file(copy / "model.safetensors")
    for state in (
        {"0.weight": torch.zeros(2)},
        {name: tensor.double() for name, tensor in right.items()},
        right | {"1.weight": right["1.weight"].T.contiguous()},
    ):
        (copy / "model.safetensors").write_bytes(safetensors.torch.save(state))
        sign(copy)
        with pytest.raises(BundleError, match=r"model\.safetensors does not match"):
            bundle.load(copy)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(copy: Path, bad: float) -> None:
    state = safetensors.torch.load_file(copy / "model.safetensors")
    state["1.weight"][0, 0] = bad
    safetensors.torch.save_file(state, copy / "model.safetensors")
    sign(copy)
    with pytest.raises(BundleError, match=r"model\.safetensors contains NaN or infinite weights"):
        bundle.load(copy)


def test_probabilities_that_are_nan_are_a_mismatch() -> None:
    expected = np.full((2, 10), 0.1, dtype=np.float32)
    with pytest.raises(BundleError, match=r"the probabilities of model\.onnx differ by up to nan"):
        formats._compare(
            "model.onnx", formats.FORMATS["model.onnx"], expected * np.nan, expected, np.zeros(2, dtype=np.int64)
        )


def test_a_mismatch_in_a_fresh_process_leaves_the_older_bundle(
    copy: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy / "manifest.json").read_bytes()
    contents = make_contents(digits)
    other = make_contents(digits).network
    original = formats.verify_models
    monkeypatch.setattr(formats, "verify_models", lambda _, *arguments, **more: original(other, *arguments, **more))
    with pytest.raises(BundleError, match=r"the probabilities of model\.safetensors differ"):
        save(contents, copy)
    assert (copy / "manifest.json").read_bytes() == before
    assert [file.name for file in copy.parent.iterdir()] == ["copy"]


def test_a_bundle_that_cannot_be_loaded_leaves_nothing(tmp_path: Path, digits: ImageData) -> None:
    contents = make_contents(digits)
    wrong = replace(contents, config=contents.config | {"layers": [["Flatten", {}]]})
    with pytest.raises(BundleError, match="cannot be loaded in a new process"):
        save(wrong, tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_is_replaced_and_anything_else_is_not(copy: Path, digits: ImageData, tmp_path: Path) -> None:
    before = (copy / "manifest.json").read_bytes()
    save(make_contents(digits), copy)
    assert (copy / "manifest.json").read_bytes() != before
    bundle.load(copy)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all my work")
    with pytest.raises(UsageError, match=r"cannot replace .*; choose another --output"):
        save(make_contents(digits), precious)
    shutil.copy(copy / "manifest.json", precious)
    (copy / "notes.txt").write_text("all my work")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for target in (precious, copy, tmp_path / "link"):
        with pytest.raises(UsageError, match=r"cannot replace .*; choose another --output"):
            save(make_contents(digits), target)
    assert (precious / "thesis.txt").read_text() == (copy / "notes.txt").read_text() == "all my work"


def test_the_model_of_another_study_and_a_modified_one_are_replaced_only_by_force(
    copy: Path, digits: ImageData
) -> None:
    mine, notes = make_contents(digits), "my own notes"
    other = replace(mine, metrics=mine.metrics | {"study": "other"})
    again = replace(mine, metrics=mine.metrics | {"study_id": "0123abcd"})
    with pytest.raises(UsageError, match=r"it is the model of study 'small'; .* or replace it with --force"):
        save(other, copy)
    save(again, copy)  # the older model has no id
    with pytest.raises(UsageError, match="it is the model of another study with the name 'small'"):
        save(replace(mine, metrics=mine.metrics | {"study_id": "89abcdef"}), copy)
    (copy / "README.md").write_text(notes)
    with pytest.raises(UsageError, match=r"its model card, README\.md, was edited or removed .* --force"):
        save(again, copy)
    assert (copy / "README.md").read_text() == notes
    save(other, copy, force=True)
    assert json.loads((copy / "metrics.json").read_text())["study"] == "other"


def test_what_was_changed_in_the_target_during_the_verification_is_kept(
    copy: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = formats.verify_models

    def verify_while_someone_writes(*arguments: Any, **more: Any) -> dict[str, dict[str, float]]:
        (copy / "notes.txt").write_text("all my work")
        return verify(*arguments, **more)

    monkeypatch.setattr(formats, "verify_models", verify_while_someone_writes)
    with pytest.raises(UsageError, match=r"unexpected file: notes\.txt; choose another --output"):
        save(make_contents(digits), copy)
    assert (copy / "notes.txt").read_text() == "all my work"
    assert [file.name for file in copy.parent.iterdir()] == ["copy"]


def test_a_place_that_cannot_be_replaced_is_refused(
    tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path / "here")
    for target, reason in (
        (Path(), "it is the current folder"),
        (tmp_path / "here" / "..", "it is the current folder or contains it"),
        (Path("/proc"), "it is a mount point"),
        (Path("/proc/model"), "/proc/"),
        (tmp_path / "file", "is not a folder"),
        (tmp_path / "file" / "model", "file: File exists"),
        (tmp_path / ("x" * 250), rf"no folder can be created in {tmp_path} \(File name too long\)"),
    ):
        with pytest.raises(UsageError, match=rf"cannot (replace|create) .*{reason}.*; choose another --output$"):
            bundle.check_target(target, bundle.Origin(study="small"), force=True)
    with pytest.raises(UsageError, match=f"{saved} is a model folder"):
        bundle.check_target(saved / "model", bundle.Origin(study="small"))
    assert [*(tmp_path / "here").iterdir()] == []


def test_a_full_disk_is_noticed_before_the_training(
    tmp_path: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = make_contents(digits)
    bundle.check_space(tmp_path / "model", contents.network, contents.config, 4, 360)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000))
    with pytest.raises(BundleError, match="only 2 MB free in"):
        bundle.check_space(tmp_path / "model", contents.network, contents.config, 2, 360)


def test_an_older_bundle_is_put_back_if_the_new_one_cannot_take_its_place(
    copy: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy / "manifest.json").read_bytes()
    monkeypatch.setattr(manifest, "_exchange", lambda one, other: False)  # as on a system that cannot do it
    rename = Path.rename

    def fail_for_the_new_one(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(KeyboardInterrupt):
        save(make_contents(digits), copy)
    assert (copy / "manifest.json").read_bytes() == before


def test_the_model_card_tells_how_good_and_how_to_load(saved: Path) -> None:
    card = (saved / "README.md").read_text()
    figures = ("80.00%", "90.00%", "75.00%, standard deviation 7.00%", "1,234 parameters", "trial 3, out of 9")
    for part in (*figures, formats.FORMATS["model.pt"].loading):
        assert part in card


def test_the_head_of_the_model_card_is_what_hugging_face_reads(saved: Path) -> None:
    """As https://github.com/huggingface/hub-docs/blob/main/modelcard.md describes it."""
    before, head, _ = (saved / "README.md").read_text().split("---\n", 2)
    assert before == ""
    assert yaml.safe_load(head) == {
        "library_name": "pytorch",
        "pipeline_tag": "image-classification",
        "datasets": ["digits"],
        "metrics": ["accuracy", "balanced_accuracy"],
        "model-index": [
            {
                "name": "small",
                "results": [
                    {
                        "task": {"type": "image-classification"},
                        "dataset": {"type": "digits", "name": "digits", "split": "test"},
                        "metrics": [
                            {"type": "accuracy", "value": 0.8, "name": "test accuracy"},
                            {"type": "balanced_accuracy", "value": 0.79, "name": "test balanced accuracy"},
                        ],
                    }
                ],
            }
        ],
    }


@pytest.mark.parametrize("name", ["1e3", "yes", "2026-01-01", "null", "𠮷野.c-d"])
def test_whatever_a_study_is_called_is_its_name_on_hugging_face(digits: ImageData, name: str) -> None:
    contents = make_contents(digits)
    contents = replace(contents, hub_id="ylecun/mnist", metrics=contents.metrics | {"study": name})
    head = yaml.safe_load(bundle._write_card(contents, {}).split("---\n")[1])
    assert head["model-index"][0]["name"] == name
    assert head["datasets"] == ["ylecun/mnist"]


@pytest.mark.parametrize(("kind", "n_members", "shift"), [("mlp", 1, 0), ("cnn", 1, 0), ("cnn", 2, 1)])
def test_every_format_gives_the_same_probabilities_from_the_lines_of_the_model_card_alone(
    digits: ImageData, tmp_path: Path, kind: str, n_members: int, shift: int
) -> None:
    contents = make_contents(digits, kind, n_members, shift)
    members = contents.network.members if isinstance(contents.network, Ensemble) else [contents.network]
    for member in members:
        Trainer(member, digits.train, Hyperparameters(width=8), 1).run_epoch()
    verified = save(contents, tmp_path / "b", n=100, onnx=True, torch_export=True)
    assert [*verified] == ["model.safetensors", "model.pt", "model.onnx", "model.pt2"]
    assert all(seen["difference"] < 1e-5 for seen in verified.values())
    assert len({seen["accuracy"] for seen in verified.values()}) == 1
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["verified"] == verified
    images = load_test("digits")[0][:7]
    expected = bundle.load(tmp_path / "b").predict_proba(images)
    np.save(tmp_path / "images.npy", images.numpy())
    programs = re.findall(r"```python\n(.*?)```", (tmp_path / "b" / "README.md").read_text(), re.DOTALL)
    from_torch = "import torch, numpy\nimages = torch.from_numpy(numpy.load('../images.npy'))\n"
    from_numpy = "import numpy\nimages = numpy.load('../images.npy')\n"
    [line] = [line for line in programs[1].splitlines(keepends=True) if "model.pt" in line]
    for before, program, allowed in (
        (from_torch, programs[0], ("torch", "PIL")),
        (from_torch, programs[1], ("torch",)),
        (from_torch, programs[1].replace(line, programs[2]), ("torch", "safetensors")),
        (from_numpy, programs[3], ("onnxruntime",)),
        (from_torch, programs[4], ("torch",)),
    ):
        blocked = {"hpsearch", "torch", "onnx", "onnxruntime", "optuna", "safetensors", "sklearn", "PIL"} - {*allowed}
        guard = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        after = "numpy.save('../answers.npy', numpy.asarray(probabilities))\n"
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", guard + before + program + after], cwd=tmp_path / "b", check=True
        )
        assert np.allclose(np.load(tmp_path / "answers.npy"), expected, atol=1e-6)


def test_no_file_of_a_bundle_tells_where_it_was_made(digits: ImageData, tmp_path: Path) -> None:
    save(make_contents(digits), tmp_path / "b", onnx=True, torch_export=True)
    here = str(Path(bundle.__file__).parent).encode()
    assert [file.name for file in (tmp_path / "b").iterdir() if here in file.read_bytes()] == []


def test_a_program_that_torch_cannot_load_again_is_left_out(
    digits: ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.export, "save", lambda program, file: file.write_bytes(b"nothing"))
    verified = save(make_contents(digits), tmp_path / "b", torch_export=True)
    assert "model.pt2" not in verified
    assert "model.pt2 cannot be loaded in a new process" in caplog.text
    bundle.load(tmp_path / "b")
    assert not (tmp_path / "b" / "model.pt2").exists()


def test_what_killed_exports_left_behind_is_removed_by_the_next_one(digits: ImageData, tmp_path: Path) -> None:
    for name in (".b.abcdefgh", ".b.12345678", ".b.other.abcdefgh"):
        (tmp_path / name / "new").mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    with FileLock(tmp_path / ".b.12345678" / "lock"):
        save(make_contents(digits), tmp_path / "b")
    assert {file.name for file in tmp_path.iterdir()} == {"b", ".b.12345678", ".b.other.abcdefgh"}


def test_an_export_leaves_another_one_to_the_same_place_alone(tmp_path: Path) -> None:
    with manifest.replace_folder(tmp_path / "b") as slow:
        (slow / "a.txt").touch()
        with pytest.raises(Timeout), FileLock(slow.parent / "lock", timeout=0):
            pass
        with manifest.replace_folder(tmp_path / "b") as fast:
            (fast / "b.txt").touch()
        assert [file.name for file in slow.iterdir()] == ["a.txt"]
    assert [file.name for file in (tmp_path / "b").iterdir()] == ["a.txt"]


def test_an_older_bundle_that_was_being_replaced_is_put_back(copy: Path) -> None:
    left = copy.parent / f".{copy.name}.abcdefgh"
    left.mkdir()
    (left / "lock").touch()
    copy.rename(left / "old")
    with pytest.raises(KeyError), manifest.replace_folder(copy):
        raise KeyError
    bundle.load(copy)
    assert [file.name for file in copy.parent.iterdir()] == [copy.name]


def test_a_bundle_can_be_loaded_while_it_is_replaced(saved: Path, tmp_path: Path, digits: ImageData) -> None:
    target = Path(shutil.copytree(saved, tmp_path / "b"))
    other = Path(shutil.copytree(saved, tmp_path / "other"))
    (other / "metrics.json").write_text("{}")
    manifest.write_manifest(other)
    is_over = threading.Event()

    def replace_often() -> None:
        for i in range(60):
            with manifest.replace_folder(target) as new:
                shutil.copytree((saved, other)[i % 2], new, dirs_exist_ok=True)
        is_over.set()

    thread = threading.Thread(target=replace_often)
    thread.start()
    while not is_over.is_set():
        bundle.load(target)
    thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can exchange two folders")
def test_an_older_bundle_is_there_at_every_moment(
    copy: Path, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", None)  # two renamings would leave a gap
    before = (copy / "manifest.json").read_bytes()
    save(make_contents(digits), copy)
    assert (copy / "manifest.json").read_bytes() != before


def test_the_card_names_the_worst_of_many_classes_and_markup_in_names_has_no_effect(digits: ImageData) -> None:
    contents = make_contents(digits)
    rows = [
        {"name": f"a|b\n<i>*{i}*", "precision": None, "recall": i / 200, "f1": None, "support": 1} for i in range(200)
    ]
    contents.metrics["per_class"] = rows
    card = bundle._write_card(contents, {})
    assert "The 20 of 200 classes with the lowest recall" in card
    assert r"| a\|b \<i\>\*0\* | - | 0.0000 | - | 1 |" in card
    assert r"\*20\*" not in card
    contents.metrics["per_class"] = [row | {"recall": None, "support": 0} for row in rows[:2]]
    assert r"| a\|b \<i\>\*1\* | - | - | - | 0 |" in bundle._write_card(contents, {})
