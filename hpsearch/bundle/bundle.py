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
from typing import Annotated, Any, Literal, NamedTuple, overload

import numpy as np
import psutil
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, Field, StringConstraints
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors

from hpsearch.bundle import formats, likeness
from hpsearch.bundle.evaluation import Evaluation, evaluate, find_worst
from hpsearch.bundle.figures import draw_evaluation
from hpsearch.bundle.likeness import Likeness, read_likeness
from hpsearch.bundle.manifest import MAX_BYTES, VerifiedFolder, check_outside, parse, replace_folder, write_manifest
from hpsearch.config.definition import DataName, NetworkName
from hpsearch.config.space import Table
from hpsearch.data.dataset import load_test, normalise
from hpsearch.data.sets import DataSet
from hpsearch.errors import BundleError, ImageError
from hpsearch.plugins import DATA_SETS, NETWORKS, find
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import Network, from_layers

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
CARD = "README.md"  # users may edit it
REQUIRED = (
    *("model.safetensors", "model.pt", "config.json", "metrics.json", "study.toml", "confusion_matrix.png"),
    CARD,
)
EXAMPLE = "example.png"  # the first test image, so that there is one to classify
OPTIONAL = (
    *("model.onnx", "model.pt2", likeness.FILE, "mistakes.png", "calibration.png", EXAMPLE),
    formats.PROGRAM,
)
_MAX_MODEL_BYTES = 2**32
_N_CLASSES, _N_WORST = 25, 20  # of more classes, the model card has only the worst

_Name = Annotated[str, StringConstraints(max_length=100)]
_Side = Annotated[int, Field(ge=1, le=4096)]


class Config(Table):
    """`config.json`: what is needed to rebuild the network. `layers` is for users without hpsearch."""

    format_version: Literal[1]
    data: DataName
    kind: NetworkName
    hyperparameters: Hyperparameters
    image_shape: tuple[_Side, _Side, _Side]
    mean: float = Field(ge=0, le=1)
    std: float = Field(gt=0, le=1)
    class_names: list[_Name] = Field(min_length=2, max_length=1000)
    layers: list[Any]


@dataclass(frozen=True)
class Contents:
    """The contents of a model folder: a network on the CPU and plain values."""

    network: Network
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluation: Evaluation
    study_toml: str
    likeness: Likeness | None = None


class Prediction(NamedTuple):
    """The most likely class of an image, and its probability."""

    class_name: str
    probability: float


class Classifier:
    """A network loaded from a model folder, with everything it needs to classify images."""

    def __init__(self, network: Network, config: Config, likeness: Likeness | None = None) -> None:
        self.network, self.config, self.likeness = network, config, likeness
        self.image_shape = config.image_shape
        self.class_names = tuple(config.class_names)

    def __repr__(self) -> str:
        n_parameters = sum(parameter.numel() for parameter in self.network.parameters())
        size = "x".join(map(str, self.image_shape))
        return (
            f"<Classifier: {self.config.kind} with {n_parameters:,} parameters, trained on {self.config.data}, "
            f"{size} pixels to {len(self.class_names)} classes>"
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

        `images` is a NumPy array or tensor of type uint8 and shape (N, 1, H, W) or (N, H, W); anything else raises
        `ImageError`.
        """
        pixels = self._check(images)
        if not len(pixels):
            return np.empty((0, len(self.class_names)), dtype=np.float32)
        inputs = normalise(pixels, [self.config.mean], [self.config.std])
        probabilities: NDArray[np.float32] = self.network.predict_proba(inputs).numpy()
        return probabilities

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
        if pixels.shape[1:] != self.image_shape:
            raise ImageError(f"images must have shape (N, {', '.join(map(str, self.image_shape))}), "
                             f"got {tuple(pixels.shape)}")  # fmt: skip
        return pixels

    def read_image(self, image: Path | str | Image.Image) -> NDArray[np.uint8]:
        """Return an image file or Pillow image as raw pixels of the network's image shape; raises `ImageError`."""
        pixels: NDArray[np.uint8] = find(DATA_SETS, self.config.data).read_image(image)
        return pixels

    def rank(self, probabilities: NDArray[np.float32], top: int) -> list[tuple[str, float]]:
        """Return the `top` most likely classes of an image with their probabilities, the most likely first."""
        return [(self.class_names[i], float(probabilities[i])) for i in probabilities.argsort()[::-1][:top]]

    def evaluate(self, folder: Path | str | None = None) -> Evaluation:
        """Evaluate the model on the test set of its data set; raises `DataError`."""
        images, labels = load_test(self.config.data, folder)
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
        config = parse(Config, files.read("config.json"), folder / "config.json")
        network = _build(config, folder / "config.json")
        n_bytes = _count_bytes(network)
        bound = min(n_bytes + n_bytes // 4 + 2**22, _MAX_MODEL_BYTES)  # names and graphs take some space
        known = None
        for name in _sealed(files):
            content = files.read(name, bound if name.startswith("model.") else MAX_BYTES)
            if name == "model.safetensors":
                weights = content
            elif name == likeness.FILE:
                known = read_likeness(content, folder / name)
        if not files.is_original(CARD):
            logger.warning("warning: %s was edited or removed after the export; the model is unchanged", folder / CARD)
    except OSError as error:
        raise BundleError(f"cannot read {error.filename or folder}: {error.strerror}") from error
    _load_weights(network, weights, folder / "model.safetensors")
    return Classifier(network.eval(), config, known)


def _sealed(files: VerifiedFolder) -> list[str]:
    """Return the names of all files but the model card."""
    return [name for name in files.names if name != CARD]


def _build(config: Config, file: Path) -> Network:
    """Return the network with meta tensors as weights, so that a malicious config cannot exhaust the memory."""
    data_set: DataSet = find(DATA_SETS, config.data)
    for name in ("class_names", "image_shape"):
        if tuple(getattr(config, name)) != getattr(data_set, name):
            raise BundleError(f"{file}: {name} does not match {config.data}")
    layers = find(NETWORKS, config.kind).describe(config.hyperparameters, config.image_shape, len(config.class_names))
    if json.loads(json.dumps(layers)) != config.layers:
        raise BundleError(f"{file}: layers do not match the hyperparameters")
    with torch.device("meta"):
        return from_layers(layers)


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
        formats.write_models(contents.network, contents.config, new, onnx=onnx, torch_export=torch_export)
        _write_json(contents.config, new / "config.json")
        (new / "study.toml").write_text(contents.study_toml, encoding="utf-8")
        if contents.likeness:
            contents.likeness.save(new)
        is_photo = contents.config.get("preparation", {}).get("kind") == "photo"
        draw_evaluation(contents.evaluation, images, new, contents.metrics["study"], is_photo=is_photo)
        Image.fromarray(images[0, 0].numpy()).save(new / EXAMPLE)
        _write_program(contents.config, new)
        _write_texts(contents, new, {})  # `hpsearch.load`, which verifies model.safetensors, needs a manifest
        verified = formats.verify_models(contents.network, contents.config, new, images, labels, on_file)
        _write_texts(contents, new, verified)
        load(new)
        check_target(target, origin, force=force)  # it may have changed during the verification
    return verified


class Origin(BaseModel):
    """The study that a model was exported from, as in `metrics.json`; older versions wrote no id."""

    study: str
    study_id: str | None = None


def check_target(target: Path, origin: Origin, *, force: bool = False) -> None:
    """Raise `BundleError` if a model of the study cannot be written to the target.

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
        raise BundleError(f"cannot {verb} {target}: {reason}; {advice}") from error


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


def check_space(target: Path, config: dict[str, Any], n_models: int) -> None:
    """Raise `BundleError` if there is no space beside the target for that many model files and their verification."""
    with torch.device("meta"):
        network = from_layers(config["layers"])
    n_test, n_pixels = find(DATA_SETS, config["data"]).n_test, math.prod(config["image_shape"])
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


def _has_program(data_set: DataSet) -> bool:
    return type(data_set).read_image is DataSet.read_image and data_set.image_shape[0] == 1


def _write_program(config: dict[str, Any], folder: Path) -> None:
    """Write predict.py, unless only the data set itself knows how an image file becomes pixels."""
    data_set: DataSet = find(DATA_SETS, config["data"])
    if _has_program(data_set):
        program = _render("predict.py.jinja", data_set=data_set)
        (folder / formats.PROGRAM).write_text(program, encoding="utf-8")


def _write_json(document: dict[str, Any], file: Path) -> None:
    file.write_text(json.dumps(document, indent=2) + "\n")


def _render(template: str, **values: Any) -> str:
    loader = PackageLoader("hpsearch.bundle", "")
    environment = Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True)  # noqa: S701 - text
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False}  # YAML would read surrogates as two characters
    environment.filters["markdown"] = _escape_markdown
    return environment.get_template(template).render(**values)


def _escape_markdown(text: str) -> str:
    """Return the text on one line, without characters that Markdown, also in a table, or HTML would interpret."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in " ".join(text.split()))
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", line)


def _write_card(contents: Contents, verified: dict[str, dict[str, float]]) -> str:
    per_class = contents.metrics["per_class"]
    data_set: DataSet = find(DATA_SETS, contents.config["data"])
    return _render(
        "model_card.md.jinja",
        data_set=data_set,
        m=contents.metrics,
        config=contents.config,
        network=find(NETWORKS, contents.config["kind"]).title,
        confirmed=contents.metrics.get("confirmed"),
        is_balanced=contents.metrics["metric"] == "balanced_accuracy",
        worst=find_worst(per_class, _N_WORST) if len(per_class) > _N_CLASSES else per_class,
        verified=verified,
        formats=formats.FORMATS,
        program=formats.PROGRAM_FORMAT if _has_program(data_set) else None,
        safetensors=formats.SAFETENSORS,
    )
