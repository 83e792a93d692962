"""The model folder: saved beside its target, verified in new processes, and loaded only if complete and unmodified."""

import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import psutil
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors

from hpsearch.bundle import formats, likeness
from hpsearch.bundle.config import Config, build_empty, read_config
from hpsearch.bundle.evaluation import Evaluation, evaluate, find_worst
from hpsearch.bundle.figures import draw_evaluation
from hpsearch.bundle.graph import Graph
from hpsearch.bundle.likeness import Likeness, read_likeness
from hpsearch.bundle.manifest import MAX_BYTES, VerifiedFolder, check_outside, parse, replace_folder, write_manifest
from hpsearch.config.definition import Data
from hpsearch.data import image_files
from hpsearch.data.dataset import load_test
from hpsearch.data.photos import read_photo
from hpsearch.errors import BundleError, DataError, ImageError, UsageError
from hpsearch.plugins import NETWORKS, OwnCode, find
from hpsearch.training.networks import Network, fit_batch
from hpsearch.training.run import open_images

logger = logging.getLogger(__name__)

CARD = "README.md"  # users may edit it
REQUIRED = (
    *("model.safetensors", "model.pt", "config.json", "metrics.json", "study.toml", "confusion_matrix.png"),
    CARD,
)
EXAMPLE = "example.png"  # the first test image, so that there is one to classify
GRAPH, MISTAKES = "model.pt2", "mistakes.png"
OPTIONAL = (
    *("model.onnx", GRAPH, likeness.FILE, MISTAKES, "calibration.png", EXAMPLE),
    *(formats.PROGRAM, formats.SOURCE),
)
_MAX_MODEL_BYTES = 2**32
_N_CLASSES, _N_WORST = 25, 20  # of more classes, the model card has only the worst


@dataclass(frozen=True)
class Contents:
    """The contents of a model folder: a network on the CPU and plain values.

    `hub_id` is the id of the data set at https://huggingface.co/datasets, if it has one, and `code` the user's own that
    built the network. With `has_examples`, some files show images of the data set.
    """

    network: Network
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluation: Evaluation
    study_toml: str
    likeness: Likeness | None = None
    hub_id: str | None = None
    code: OwnCode | None = None
    has_examples: bool = True


class Prediction(NamedTuple):
    """The most likely class of an image, and its probability."""

    class_name: str
    probability: float


class Classifier:
    """A network loaded from a model folder, with everything it needs to classify images."""

    def __init__(
        self,
        network: Network | Graph,
        config: Config,
        likeness: Likeness | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        self.network, self.config, self.likeness, self.metrics = network, config, likeness, metrics or {}
        self.image_shape = config.image_shape
        self.class_names = tuple(config.class_names)

    def __repr__(self) -> str:
        if isinstance(self.network, Graph):
            n_parameters = self.network.n_parameters
        else:
            n_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        size, n_members = "x".join(map(str, self.image_shape)), self.config.n_members
        kind = f"ensemble of {n_members} {self.config.kind}" if n_members > 1 else self.config.kind
        shifted = f", averaged over shifts by {self.config.shift}," if self.config.shift else ""
        return (
            f"<Classifier: {kind} with {n_parameters:,} parameters, trained on {self.config.data}, "
            f"{size} pixels{shifted} to {len(self.class_names)} classes>"
        )

    @overload
    def predict(self, images: Path | str | Image.Image) -> Prediction: ...
    @overload
    def predict(self, images: NDArray[np.uint8] | torch.Tensor) -> list[Prediction]: ...
    def predict(
        self, images: Path | str | Image.Image | NDArray[np.uint8] | torch.Tensor
    ) -> Prediction | list[Prediction]:
        """Return the `Prediction` for an image, or a list of them for an array of images.

        An image is the path of a file or a Pillow image, and is prepared as `hpsearch predict` does. An array has raw
        pixels as for `predict_proba`. Raises `ImageError`.
        """
        if isinstance(images, Path | str | Image.Image):
            return self.predict(self.read_image(images)[np.newaxis])[0]
        return [Prediction(*self.rank(probabilities, 1)[0]) for probabilities in self.predict_proba(images)]

    def predict_proba(self, images: NDArray[np.uint8] | torch.Tensor) -> NDArray[np.float32]:
        """Return the softmax probabilities of raw pixels: float32 of shape (N, classes).

        `images` is a NumPy array or tensor of type uint8 and shape (N, C, H, W). With one channel, (N, H, W) will do,
        and with three, (N, H, W, 3). Anything else raises `ImageError`.
        """
        pixels = self._check(images)
        if not len(pixels):
            return np.empty((0, len(self.class_names)), dtype=np.float32)
        if isinstance(self.network, Graph):
            probabilities = self.network.predict_proba(pixels, fit_batch(pixels))
        else:
            probabilities = formats.predict_pixels(self.network, self.config.mean, self.config.std, pixels)
        return np.asarray(probabilities.numpy())

    def measure_distances(self, images: NDArray[np.uint8] | torch.Tensor) -> NDArray[np.float32] | None:
        """Return how far from the training images raw pixels are: float32 of shape (N,).

        Above 1, an image is unlike them, so that its probabilities mean little; about 1% of the data set's own images
        are. Returns None for a model folder of an older version. `images` are those of `predict_proba`.
        """
        pixels = self._check(images)
        return None if self.likeness is None else self.likeness.measure(pixels).numpy()

    def _check(self, images: NDArray[np.uint8] | torch.Tensor) -> torch.Tensor:
        """Return a copy of the images as a tensor of shape (N, C, H, W); raises `ImageError`."""
        array = np.array(images.numpy(force=True) if isinstance(images, torch.Tensor) else images)
        if array.dtype != np.uint8:
            raise ImageError(f"images must be uint8 pixels, got {array.dtype}")
        pixels = torch.from_numpy(array)
        if pixels.ndim == 3:
            pixels = pixels.unsqueeze(1)
        elif pixels.shape[1:] == (*self.image_shape[1:], 3) != self.image_shape:
            pixels = pixels.permute(0, 3, 1, 2)
        if pixels.shape[1:] != self.image_shape:
            raise ImageError(f"images must have shape (N, {', '.join(map(str, self.image_shape))}), "
                             f"got {tuple(pixels.shape)}")  # fmt: skip
        return pixels

    def read_image(self, image: Path | str | Image.Image) -> NDArray[np.uint8]:
        """Return an image file or Pillow image as raw pixels of the network's image shape, prepared as for training.

        Raises `ImageError`.
        """
        preparation = self.config.preparation
        if preparation.kind == "photo":
            return read_photo(image, size=preparation.size, color=str(preparation.color))
        return image_files.read_image(image, self.image_shape, is_digit=preparation.kind == "digit")

    def rank(self, probabilities: NDArray[np.float32], top: int) -> list[tuple[str, float]]:
        """Return the `top` most likely classes of an image with their probabilities, the most likely first."""
        return [(self.class_names[i], float(probabilities[i])) for i in probabilities.argsort()[::-1][:top]]

    def load_test(self, folder: Path | str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the test set: raw pixels, uint8, (N, C, H, W), and labels, int64, (N,). Raises `DataError`.

        `folder` is that of built-in data sets. The user's own images are not in a model folder: `folder` is then
        the folder or file with them, and they must be those of the export.
        """
        if self.config.preparation.kind != "photo":
            return load_test(self.config.data, folder)
        settings, title = self.metrics["images"] or {}, self.config.data
        if "load" in settings:
            raise DataError(f"the test images come from the function {title}: evaluate what it returns in Python")
        if folder is None:
            raise DataError(f"the images of {title} are not in the model folder; point --data at them")
        data_set = open_images(Data(**settings), folder)
        known = self.metrics["data"]
        if data_set.inventory is None or data_set.inventory.sha256 != known["sha256"]:
            counts = data_set.inventory.counts if data_set.inventory else []
            raise DataError(
                f"{folder} has other images than {title}, with which the model was exported: {sum(known['counts']):,} "
                f"images of {len(known['counts'])} classes then, {sum(counts):,} of {len(counts)} now, or other content"
            )
        return load_test(data_set)

    def evaluate(self, folder: Path | str | None = None) -> Evaluation:
        """Evaluate the model on its test set: see `load_test`, which raises `DataError`."""
        images, labels = self.load_test(folder)
        return evaluate(self.predict_proba(images), labels.numpy(), self.class_names)


def load(path: Path | str) -> Classifier:
    """Load the classifier from a model folder after checking every file's SHA-256; runs no code from it.

    Reads only regular files with known names, and no more bytes than the network can have. Raises `BundleError` naming
    the file that is missing, modified, too large, a link, unexpected or invalid. Nothing is read from the model card:
    if it was edited or removed, that is only logged as a warning.
    """
    folder = Path(path)
    while True:
        before = _identify(folder)
        try:
            return _load(folder)
        except BundleError:
            if _identify(folder) == before:  # otherwise a new export has just replaced it
                raise


def _identify(folder: Path) -> tuple[int, int, int] | None:
    status = folder.stat() if folder.exists() else None
    return status and (status.st_dev, status.st_ino, status.st_ctime_ns)  # inode numbers are reused


def _load(folder: Path) -> Classifier:
    try:
        files = VerifiedFolder(folder, REQUIRED, OPTIONAL)
        config = read_config(files.read("config.json"), folder / "config.json")
        network = None if config.layers is None else build_empty(config, folder / "config.json")
        if network is None and GRAPH not in files.names:
            raise BundleError(f"{folder / GRAPH} is missing: a network of the user's own is loaded from it")
        n_bytes = _MAX_MODEL_BYTES if network is None else _count_bytes(network)
        overhead = n_bytes // 4 + 2**22 * config.n_members  # names and graphs
        bound = min(n_bytes + overhead, _MAX_MODEL_BYTES)
        known, metrics = None, dict[str, Any]()
        for name in _sealed(files):
            content = files.read(name, bound if name.startswith("model.") else MAX_BYTES)
            if name == "model.safetensors":
                weights = content
            elif name == GRAPH and network is None:
                graph = Graph(content, folder / name, config.image_shape, len(config.class_names))
            elif name == likeness.FILE:
                known = read_likeness(content, folder / name)
            elif name == "metrics.json":
                metrics = parse(Metrics, content, folder / name).model_dump()
        if not files.is_original(CARD):
            logger.warning("warning: %s was edited or removed after the export; the model is unchanged", folder / CARD)
    except OSError as error:
        raise BundleError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    if network is None:
        return Classifier(graph, config, known, metrics)
    _load_weights(network, weights, folder / "model.safetensors")
    return Classifier(network.eval(), config, known, metrics)


def _sealed(files: VerifiedFolder) -> list[str]:
    """Return the names of all files but the model card."""
    return [name for name in files.names if name != CARD]


def _load_weights(network: Network, content: bytes, file: Path) -> None:
    try:
        state = from_safetensors(content)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise BundleError(f"{file} is invalid: {error}") from error
    found, expected = (
        {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        for tensors in (state, network.state_dict())
    )
    if found != expected:
        raise BundleError(f"{file} does not match config.json: tensor names, shapes or types differ")
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise BundleError(f"{file} contains NaN or infinite weights")
    network.load_state_dict(state, assign=True)


def save(
    contents: Contents,
    target: Path,
    images: torch.Tensor,
    labels: NDArray[np.int64],
    *,
    onnx: bool = False,
    torch_export: bool = False,
    force: bool = False,
    on_file: Callable[[int, int], None] = lambda n_done, n_total: None,
) -> dict[str, dict[str, float]]:
    """Write a model folder to `target`, if `check_target` allows it; returns the result of `formats.verify_models`.

    It is written to a temporary folder beside the target. Each model file is loaded in a new process and run on
    `images` (uint8, (N, C, H, W)). If the probabilities agree, the folder replaces the target in one step; otherwise
    raises `BundleError` and leaves the target unchanged.
    """
    origin = Origin.model_validate(contents.metrics)
    check_target(target, origin, force=force)
    with replace_folder(target) as new:
        has_graph = torch_export or contents.code is not None
        formats.write_models(contents.network, contents.config, new, onnx=onnx, torch_export=has_graph)
        _write_json(contents.config, new / "config.json")
        (new / "study.toml").write_text(contents.study_toml, encoding="utf-8")
        if contents.code and contents.code.is_file:
            (new / formats.SOURCE).write_text(contents.code.source, encoding="utf-8")
        is_photo = contents.config["preparation"]["kind"] == "photo"
        draw_evaluation(contents.evaluation, images, new, contents.metrics["study"], is_photo=is_photo)
        if contents.has_examples:
            Image.fromarray(images[0].permute(1, 2, 0).squeeze(2).numpy()).save(new / EXAMPLE)
            if contents.likeness:
                contents.likeness.save(new)
        else:
            (new / MISTAKES).unlink(missing_ok=True)
        _write_program(contents.config, new)
        _write_texts(contents, new, {})  # `hpsearch.load`, which verifies model.safetensors, needs a manifest
        verified = formats.verify_models(
            contents.network, contents.config, new, images, labels, on_file, code=contents.code
        )
        _write_texts(contents, new, verified)
        load(new)
        check_target(target, origin, force=force)  # it may have changed during the verification
    return verified


class Origin(BaseModel):
    """The study that a model was exported from, as in `metrics.json`; older versions wrote no id."""

    study: str
    study_id: str | None = None


class Metrics(BaseModel):
    """The part of `metrics.json` by which the user's own images are recognized; older versions wrote less."""

    data: dict[str, Any] = {}
    images: dict[str, Any] | None = None


def check_target(target: Path, origin: Origin, *, force: bool = False) -> None:
    """Raise `UsageError` if a model of the study cannot be written to the target.

    What is there must be empty or an unmodified model folder of the same study; with `force`, any model folder.
    """
    check_outside(target, "--output")
    advice = "choose another --output"
    try:
        _check_place(target)
        if target.exists() and any(target.iterdir()):
            older = VerifiedFolder(target, REQUIRED, OPTIONAL)
            advice += ", or replace it with --force"
            if not force:
                _check_origin(older, origin)
    except (BundleError, OSError) as error:
        reason = str(error).partition(";")[0]
        if isinstance(error, OSError):
            reason = f"{error.filename}: {error.strerror}"
        verb = "replace" if os.path.lexists(target) else "create"
        raise UsageError(f"cannot {verb} {target}: {reason}; {advice}") from error


def _check_place(target: Path) -> None:
    """Raise `BundleError` or `OSError` if no folder can be renamed to the target."""
    if target.is_symlink() or not target.is_dir():
        if os.path.lexists(target):
            raise BundleError(f"{target} is {'a link' if target.is_symlink() else 'not a folder'}")
        target.parent.mkdir(parents=True, exist_ok=True)
    elif Path.cwd().is_relative_to(target.resolve()):
        raise BundleError("it is the current folder or contains it")
    elif str(target.resolve()) in {part.mountpoint for part in psutil.disk_partitions(all=True)}:
        raise BundleError("it is a mount point")
    elif not os.access(target, os.W_OK):
        raise BundleError("it is not writable")
    try:  # the names of `replace_folder`
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.").cleanup()
    except OSError as error:
        raise BundleError(f"no folder can be created in {target.parent} ({error.strerror})") from error


def read_origin(folder: Path) -> Origin:
    """Return the study that a verified model folder was exported from; raises `BundleError`."""
    return parse(Origin, (folder / "metrics.json").read_bytes(), folder / "metrics.json")


def _check_origin(older: VerifiedFolder, origin: Origin) -> None:
    """Raise `BundleError` if a file was changed, or if the model is of another study."""
    for name in _sealed(older):
        older.read(name, _MAX_MODEL_BYTES)
    if not older.is_original(CARD):
        raise BundleError(f"its model card, {CARD}, was edited or removed after the export")
    found = read_origin(older.path)
    if found.study != origin.study:
        raise BundleError(f"it is the model of study '{found.study}'")
    if found.study_id not in (None, origin.study_id):
        raise BundleError(f"it is the model of another study with the name '{found.study}'")


def check_space(target: Path, network: Network, config: dict[str, Any], n_models: int, n_test: int) -> None:
    """Raise `BundleError` if there is no space beside the target for that many model files and their verification."""
    n_pixels = math.prod(config["image_shape"])
    n_bytes = n_models * (_count_bytes(network) + 4 * n_test * len(config["class_names"])) + n_test * n_pixels + 2**21
    free = shutil.disk_usage(target.parent).free
    if free < n_bytes:
        raise BundleError(
            f"only {free / 1e6:.0f} MB free in {target.parent}, {n_bytes / 1e6:.0f} MB needed; choose another --output"
        )


def _count_bytes(network: Network) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def _write_texts(contents: Contents, folder: Path, verified: dict[str, dict[str, float]]) -> None:
    """Write the files whose content depends on the verification of the models."""
    _write_json(contents.metrics | {"verified": verified}, folder / "metrics.json")
    (folder / "README.md").write_text(_write_card(contents, verified), encoding="utf-8")
    write_manifest(folder)


def _write_program(config: dict[str, Any], folder: Path) -> None:
    """Write predict.py, which builds the network from its layers, and prepares images of the built-in data sets."""
    if _has_program(config):
        program = _render("predict.py.jinja", config=config, is_digit=config["preparation"]["kind"] == "digit")
        (folder / formats.PROGRAM).write_text(program, encoding="utf-8")


def _has_program(config: dict[str, Any]) -> bool:
    return config["layers"] is not None and config["preparation"]["kind"] != "photo"


def _write_json(document: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n")


def _render(template: str, **values: Any) -> str:
    loader = PackageLoader("hpsearch.bundle", "")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - text
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # YAML would read surrogates as two characters
    environment.filters["markdown"] = _escape_markdown
    return environment.get_template(template).render(**values)


def _escape_markdown(text: Any) -> str:
    """Return the text on one line, without characters that Markdown, also in a table, or HTML would interpret."""
    words = " ".join(str(text).split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", line)


def _write_card(contents: Contents, verified: dict[str, dict[str, float]]) -> str:
    config, per_class = contents.config, contents.metrics["per_class"]
    return _render(
        "model_card.md.jinja",
        hub_id=contents.hub_id,
        m=contents.metrics,
        config=config,
        kind=config["preparation"]["kind"],
        network="network" if contents.code else find(NETWORKS, config["kind"]).title,
        code=contents.code,
        has_examples=contents.has_examples,
        confirmed=contents.metrics.get("confirmed"),
        is_balanced=contents.metrics["metric"] == "balanced_accuracy",
        worst=find_worst(per_class, _N_WORST) if len(per_class) > _N_CLASSES else per_class,
        verified=verified,
        formats=formats.choose_formats(contents.code, config.get("n_members", 1), config.get("shift", 0)),
        program=formats.PROGRAM_FORMAT if _has_program(config) else None,
        safetensors=formats.SAFETENSORS,
    )
