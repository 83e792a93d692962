"""The bundle that a user takes away: saved beside its target, verified in a fresh process, loaded only if whole."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors

from hpsearch.data import load_test, normalise
from hpsearch.errors import BundleError, ImageError
from hpsearch.evaluation import Evaluation, evaluate
from hpsearch.images import read_image
from hpsearch.network import Network, build_network
from hpsearch.pictures import draw_confusion_matrix
from hpsearch.space import Hyperparameters, Table

FORMAT_VERSION = 1
DIGITS = ("mnist", "digits")  # data sets whose images were made the way of MNIST
TOLERANCE = 1e-5  # between probabilities of the same network in two processes
FILES = (
    *("model.safetensors", "model.pt", "config.json", "metrics.json", "study.toml", "confusion_matrix.png"),
    *("README.md", "manifest.json"),
)

LOADING = """\
import json, torch
config = json.load(open("config.json"))
network = torch.nn.Sequential(*(getattr(torch.nn, name)(**options) for name, options in config["layers"]))
network.load_state_dict(torch.load("model.pt", weights_only=True))
network.eval()
"""
PREDICTING = """\
with torch.inference_mode():
    probabilities = network((images.float() / 255 - config["mean"]) / config["std"]).softmax(dim=1)
"""
_VERIFICATION = f"""\
import sys, numpy
images = torch.from_numpy(numpy.load(sys.argv[1]))
{PREDICTING}
import hpsearch
numpy.savez(sys.argv[2], pt=probabilities.numpy(), safetensors=hpsearch.load(".").predict_proba(images))
"""


class Config(Table):
    """`config.json`: what rebuilds the network. `layers` is for readers without hpsearch."""

    format_version: Literal[1]
    data: str
    kind: Literal["mlp", "cnn"]
    hyperparameters: Hyperparameters
    image_shape: list[int] = Field(min_length=3, max_length=3)
    mean: float
    std: float = Field(gt=0)
    class_names: list[str] = Field(min_length=2, max_length=1000)
    layers: list[Any]


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle: a network on the CPU and plain values."""

    network: Network
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluation: Evaluation
    study_toml: str


class Classifier:
    """A network that was loaded from a bundle, with all that it needs to classify raw pixels."""

    def __init__(self, network: Network, config: Config) -> None:
        self.network, self.config = network, config
        channels, height, width = config.image_shape
        self.image_shape = (channels, height, width)
        self.class_names = tuple(config.class_names)

    def predict_proba(self, images: NDArray[np.uint8] | torch.Tensor) -> NDArray[np.float32]:
        """Softmax probabilities, float32, shape (N, classes), of raw pixels.

        `images` are uint8 of shape (N, 1, H, W) or (N, H, W), as a NumPy array or a tensor; anything else raises
        `ImageError`.
        """
        array = np.array(images.numpy(force=True) if isinstance(images, torch.Tensor) else images)
        if array.dtype != np.uint8:
            raise ImageError(f"images must be raw pixels of type uint8, but got {array.dtype}")
        pixels = torch.from_numpy(array)
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)
        if pixels.shape[1:] != self.image_shape:
            raise ImageError(f"images must have shape (N, {', '.join(map(str, self.image_shape))}), "
                             f"but got {tuple(pixels.shape)}")  # fmt: skip
        if not len(pixels):
            return np.empty((0, len(self.class_names)), dtype=np.float32)
        inputs = normalise(pixels, self.config.mean, self.config.std)
        probabilities: NDArray[np.float32] = self.network.predict_proba(inputs).numpy()
        return probabilities

    def predict_file(self, file: Path | str, top: int = 3) -> list[tuple[str, float]]:
        """The likeliest classes of an image file with their probabilities; raises `ImageError`."""
        pixels = read_image(file, self.image_shape, is_digit=self.config.data in DIGITS)
        [probabilities] = self.predict_proba(pixels[np.newaxis])
        order = probabilities.argsort()[::-1][:top]
        return [(self.class_names[i], float(probabilities[i])) for i in order]

    def evaluate(self, folder: Path | str | None = None) -> Evaluation:
        """The figures on the test set of the data that it was searched on; raises `DataError`."""
        images, labels = load_test(self.config.data, folder)
        return evaluate(self.predict_proba(images), labels.numpy(), self.class_names)


def load(path: Path | str) -> Classifier:
    """The classifier in a bundle, after every file's SHA-256 was checked; runs no code from it.

    Raises `BundleError` naming the file that is missing, damaged or not understood.
    """
    folder = Path(path)
    _check_manifest(folder)
    try:
        config = Config.model_validate_json((folder / "config.json").read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        raise BundleError(f"{folder / 'config.json'}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    shape = (config.image_shape[0], config.image_shape[1], config.image_shape[2])
    network = build_network(config.kind, config.hyperparameters, shape, len(config.class_names))
    try:
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except (SafetensorError, RuntimeError) as error:
        raise BundleError(f"{folder / 'model.safetensors'} does not fit config.json: {error}") from error
    network.eval()
    return Classifier(network, config)


def save(contents: Contents, target: Path, probe: torch.Tensor) -> None:
    """Write a bundle to `target`, replacing an older bundle there.

    It is written in a temporary folder beside the target, loaded again in a fresh process from both weight files, and
    renamed if the probabilities of the `probe` images (uint8, (N, C, H, W)) are the same. Raises `BundleError`, and
    leaves the target as it was, if they are not.
    """
    check_target(target)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        new.mkdir()
        _write(contents, new)
        _verify(contents, new, probe)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise


def check_target(target: Path) -> None:
    """Raise `BundleError` if a bundle cannot be written to the target, or would overwrite something else there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(target.parent, os.W_OK):
        raise BundleError(f"{target.parent} cannot be written to; choose another --output")
    if (
        target.exists()
        and not (target / "manifest.json").is_file()
        and not (target.is_dir() and not any(target.iterdir()))
    ):
        raise BundleError(f"{target} exists and is not a bundle; move it away or choose another --output")


def _write(contents: Contents, folder: Path) -> None:
    # After training, parameters share one memory, which `torch.save` would write whole.
    layout = torch.contiguous_format
    state = {name: tensor.clone(memory_format=layout) for name, tensor in contents.network.state_dict().items()}
    (folder / "model.safetensors").write_bytes(to_safetensors(state))
    torch.save(state, folder / "model.pt")
    (folder / "config.json").write_text(json.dumps(contents.config, indent=2) + "\n")
    (folder / "metrics.json").write_text(json.dumps(contents.metrics, indent=2) + "\n")
    (folder / "study.toml").write_text(contents.study_toml)
    draw_confusion_matrix(contents.evaluation, folder / "confusion_matrix.png")
    (folder / "README.md").write_text(_model_card(contents))
    digests = {file.name: _digest(file) for file in sorted(folder.iterdir())}
    manifest = {"format_version": FORMAT_VERSION, "sha256": digests}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _verify(contents: Contents, folder: Path, probe: torch.Tensor) -> None:
    expected = contents.network.predict_proba(normalise(probe, contents.config["mean"], contents.config["std"])).numpy()
    with tempfile.TemporaryDirectory() as temporary:
        images, answers = Path(temporary, "images.npy"), Path(temporary, "answers.npz")
        np.save(images, probe.numpy())
        program = [sys.executable, "-c", LOADING + _VERIFICATION, str(images), str(answers)]
        process = subprocess.run(program, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603
        if process.returncode:
            last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
            raise BundleError(f"the new bundle cannot be loaded in a fresh process: {last[0]}")
        for name, probabilities in np.load(answers).items():
            difference = float(np.abs(probabilities - expected).max())
            if not difference <= TOLERANCE:
                raise BundleError(
                    f"model.{name} gives other probabilities when loaded again, by up to {difference:.2g}"
                )


def _check_manifest(folder: Path) -> None:
    manifest_file = folder / "manifest.json"
    try:
        digests = json.loads(manifest_file.read_bytes())["sha256"]
        names = set(digests)
    except FileNotFoundError as error:
        raise BundleError(f"{folder} is not a bundle: it has no manifest.json") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BundleError(f"{manifest_file} is damaged: {error}") from error
    for name in FILES:
        if name != "manifest.json" and name not in names:
            raise BundleError(f"{manifest_file} does not list {name}")
    for name in sorted(names & set(FILES)):
        file = folder / name
        if not file.is_file():
            raise BundleError(f"{file} is missing")
        if _digest(file) != digests[name]:
            raise BundleError(f"{file} is damaged: its SHA-256 differs from that in manifest.json; export it again")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _model_card(contents: Contents) -> str:
    return "\n".join(_model_card_lines(contents.config, contents.metrics)) + "\n"


def _model_card_lines(config: dict[str, Any], metrics: dict[str, Any]) -> Iterator[str]:
    images = metrics["n_images"]
    yield f"# {metrics['study']}: a classifier of {config['data']}"
    yield (
        f"\nA network of kind {config['kind']} with {metrics['n_parameters']:,} parameters, found by hpsearch as trial "
        f"{metrics['trial']} among {metrics['n_trials']}, then trained anew for {metrics['epochs']} epochs on all "
        f"{images['train']:,} training and validation images.\n"
    )
    yield "| measured | accuracy |\n|---|---|"
    yield f"| validation, in the search ({images['validation']:,} images) | {metrics['validation_accuracy']:.2%} |"
    yield f"| **test, once, after training ({images['test']:,} images)** | **{metrics['test_accuracy']:.2%}** |"
    several = metrics["test_accuracies"]
    if several["std"] is not None:
        yield (
            f"\n{len(several['of_each_seed'])} models were trained from different seeds: test accuracy "
            f"{several['mean']:.2%}, deviation {several['std']:.2%}. This is the first of them, not the best."
        )
    yield "\nThe validation accuracy is that of the best of many trials, so it flatters; the test accuracy does not.\n"
    yield "| class | precision | recall | F1 | images |\n|---|---|---|---|---|"
    yield from (
        f"| {row['name']} | {row['precision']:.4f} | {row['recall']:.4f} | {row['f1']:.4f} | {row['support']} |"
        for row in metrics["per_class"]
    )
    yield "\n![confusion matrix](confusion_matrix.png)\n\n## Hyperparameters\n\n| name | value |\n|---|---|"
    yield from (f"| {name} | {value} |" for name, value in config["hyperparameters"].items())
    shape = ", ".join(map(str, config["image_shape"]))
    yield f"\n## Loading it with torch alone\n\n```python\n{LOADING}```"
    yield f"\nThen, for raw pixels `images`, a uint8 tensor of shape (N, {shape}):\n\n```python\n{PREDICTING}```"
    yield "\nOr with hpsearch, which checks every file first: `hpsearch.load(folder).predict_proba(images)`."
    yield "\n`study.toml` is the search that found it, `manifest.json` has the SHA-256 of every file."
