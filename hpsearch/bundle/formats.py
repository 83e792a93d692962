"""Write the model files, and verify in a new process that each gives the same probabilities."""

import copy
import importlib.util
import io
import logging
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from hpsearch.bundle.graph import Graph
from hpsearch.data.dataset import normalise
from hpsearch.errors import BundleError, OwnCodeError, UsageError
from hpsearch.plugins import OwnCode
from hpsearch.training.networks import Ensemble, Network, OwnNetwork, from_layers
from hpsearch.workers.forkserver import import_path

logger = logging.getLogger(__name__)

PROGRAM = "predict.py"
SAFETENSORS = """\
import safetensors.torch
network.load_state_dict(safetensors.torch.load_file("model.safetensors"))
"""
_BATCH_SIZE = 512
_BY_TORCH = " by torch.export"
_TIMEOUT = 900  # seconds for a file and a network


@dataclass(frozen=True)
class Format:
    """A file format: the code that loads a file, and the code that turns `images` into `probabilities`."""

    loading: str
    predicting: str
    tolerance: float  # largest allowed difference to the probabilities of the original network
    has_tensors: bool  # whether `images` is a tensor or a NumPy array


_SEQUENTIAL = 'torch.nn.Sequential(*(getattr(torch.nn, name)(**options) for name, options in config["layers"]))'
_PYTORCH = """\
import json, torch
config = json.load(open("config.json"))
network = {network}
network.load_state_dict(torch.load("model.pt", weights_only=True))
network.eval()
"""
_ENSEMBLE = 'torch.nn.ModuleList(\n    {network}\n    for _ in range(config["n_members"])\n)'
_PREDICTING = """\
mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
with torch.inference_mode():
    probabilities = network((images.float() / 255 - mean) / std).softmax(dim=1)
"""
_PREDICTING_MEAN = """\
mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
with torch.inference_mode():
    inputs = (images.float() / 255 - mean) / std
    probabilities = torch.stack([member(inputs).softmax(dim=1) for member in network]).mean(dim=0)
"""
_PREDICTING_SHIFTED = """\
mean, std = (torch.tensor(config[name]).view(-1, 1, 1) for name in ("mean", "std"))
n, (height, width) = config["shift"], images.shape[2:]
starts = (n, n), (0, n), (2 * n, n), (n, 0), (n, 2 * n)
with torch.inference_mode():
    inputs = torch.nn.functional.pad((images.float() / 255 - mean) / std, [n] * 4, mode="replicate")
    shifted = [inputs[:, :, y : y + height, x : x + width].contiguous() for y, x in starts]
    probabilities = torch.stack([member(view).softmax(dim=1) for member in network for view in shifted]).mean(dim=0)
"""
_ONNX = """\
import onnxruntime
session = onnxruntime.InferenceSession("model.onnx")
"""
_PREDICTING_ONNX = '[probabilities] = session.run(None, {"images": images})\n'
_TORCH_EXPORT = 'import torch\nmodel = torch.export.load("model.pt2").module()\n'
_HPSEARCH = 'import hpsearch\nclassifier = hpsearch.load(".")\n'
FORMATS = {
    "model.safetensors": Format(_HPSEARCH, "probabilities = classifier.predict_proba(images)\n", 1e-5, False),
    "model.pt": Format(_PYTORCH.format(network=_SEQUENTIAL), _PREDICTING, 1e-5, True),
    "model.onnx": Format(_ONNX, _PREDICTING_ONNX, 1e-4, False),
    "model.pt2": Format(_TORCH_EXPORT, "probabilities = model(images)\n", 1e-4, True),
}
_OWN = '{function}(tuple(config["image_shape"]), len(config["class_names"]), **config["build"])'
SOURCE = "network.py"  # the user's own, for those who want to train on; hpsearch.load never runs it
PROGRAM_FORMAT = Format("from predict import predict_proba\n", "probabilities = predict_proba(images)\n", 1e-5, True)


def choose_formats(code: OwnCode | None, n_members: int = 1, shift: int = 0) -> dict[str, Format]:
    """Return the formats of a built-in network, or of one that the user's own code builds, or of an `Ensemble` of such.

    `hpsearch.load` reads the weights of a built-in network, and `model.pt2` of the user's own.
    """
    network = _OWN.format(function=code.function) if code else _SEQUENTIAL
    loading, predicting = _PYTORCH.format(network=network), _PREDICTING
    if n_members > 1 or shift:
        loading = _PYTORCH.format(network=_ENSEMBLE.format(network=network))
        predicting = _PREDICTING_SHIFTED if shift else _PREDICTING_MEAN
    if code is None:
        return FORMATS | {"model.pt": Format(loading, predicting, FORMATS["model.pt"].tolerance, True)}
    module = Path(SOURCE).stem if code.is_file else code.path.rpartition(":")[0]
    loading = loading.replace("torch\n", f"torch\nfrom {module} import {code.function}\n", 1)
    from_safetensors = loading.replace(
        'torch.load("model.pt", weights_only=True)', 'safetensors.torch.load_file("model.safetensors")'
    ).replace("import json, torch\n", "import json, safetensors.torch, torch\n")
    return {
        "model.pt2": Format(_HPSEARCH, FORMATS["model.safetensors"].predicting, 1e-4, False),
        f"model.pt2{_BY_TORCH}": FORMATS["model.pt2"],
        "model.pt": Format(loading, predicting, 1e-4, True),
        "model.safetensors": Format(from_safetensors, predicting, 1e-4, True),
        "model.onnx": FORMATS["model.onnx"],
    }


class _Deployed(nn.Module):
    """A network with normalization and softmax included: raw pixels (uint8) to probabilities."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Network, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.float() / 255 - self.mean) / self.std)
        return logits.softmax(dim=1)


def predict_pixels(network: Network, mean: Sequence[float], std: Sequence[float], images: Tensor) -> Tensor:
    """Return the probabilities of raw pixels, uint8, (N, C, H, W), a batch of which is normalized at a time."""
    batches = images.split(_BATCH_SIZE)
    return torch.cat([network.predict_proba(normalise(batch, mean, std)) for batch in batches])


def check_onnx() -> None:
    """Raise `UsageError` if a package of the extra `onnx` is missing."""
    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")):
        raise UsageError("ONNX export needs extra packages; install them with: pip install 'hpsearch[onnx]'")


def write_models(
    network: Network, config: dict[str, Any], folder: Path, *, onnx: bool = False, torch_export: bool = False
) -> None:
    """Write the network to the folder as safetensors and `torch.save` file, and optionally as ONNX and `model.pt2`."""
    # Training joins all parameters in one tensor, which torch.save would write once per parameter.
    layout = torch.contiguous_format
    state = {name: tensor.clone(memory_format=layout) for name, tensor in _unwrap(network).state_dict().items()}
    (folder / "model.safetensors").write_bytes(to_safetensors(state))
    torch.save(state, folder / "model.pt")
    if not onnx and not torch_export:
        return
    model = _Deployed(_copy(network, config), config["mean"], config["std"]).eval().requires_grad_(False)
    example = (torch.zeros((2, *config["image_shape"]), dtype=torch.uint8),)
    shapes = ({0: torch.export.Dim("n_images")},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns about its own code
        if torch_export:
            exported = torch.export.export(model, example, dynamic_shapes=shapes)
            for node in exported.graph.nodes:
                node.meta.pop("stack_trace", None)  # contains paths of this machine
            torch.export.save(exported, folder / "model.pt2")
        if onnx:
            program = torch.onnx.export(
                model,
                example,
                dynamo=True,
                dynamic_shapes=shapes,
                verbose=False,
                input_names=["images"],
                output_names=["probabilities"],
            )
            if program is None:
                raise BundleError("torch could not export this network to ONNX")
            content = program.model_proto
            for node in content.graph.node:
                del node.metadata_props[:]  # contains paths, too
            (folder / "model.onnx").write_bytes(content.SerializeToString())


def check_conversion(code: OwnCode, network: Network, image_shape: tuple[int, int, int], n_classes: int) -> None:
    """Raise `OwnCodeError` unless a network of the user's becomes a `model.pt2` that `hpsearch.load` accepts.

    `export` would find out only after the search.
    """
    config: dict[str, Any] = {
        "image_shape": image_shape,
        "mean": [0.5] * image_shape[0],
        "std": [0.25] * image_shape[0],
    }
    pixels = torch.randint(0, 256, (3, *image_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = predict_pixels(network, config["mean"], config["std"], pixels)
    disabled = logging.root.manager.disable
    logging.disable()  # torch logs and prints the graph that it could not convert
    try:
        with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()):
            write_models(network, config, Path(folder), torch_export=True)
            file = Path(folder, "model.pt2")
            found = Graph(file.read_bytes(), Path(file.name), image_shape, n_classes).predict_proba(pixels)
    except BundleError as error:
        raise OwnCodeError(f"{code.path}: `hpsearch export` could not use it: {error}") from error
    except Exception as error:
        reason = re.split(" For more information| The error above", code.locate(error))[0]
        if "Constraints violated" in str(error):
            reason = "it depends on the number of images; instead of len(images), write images.shape[0] or flatten(1)"
        sentence = f"torch.export cannot convert it, as `hpsearch export` must: {reason}"
        raise OwnCodeError(f"{code.path}: {sentence}") from error
    finally:
        logging.disable(disabled)
    if not torch.allclose(found, expected, atol=FORMATS["model.pt2"].tolerance):
        difference = (found - expected).abs().max().item()
        raise OwnCodeError(
            f"{code.path}: converted by torch.export, its probabilities differ by up to {difference:.2g}"
        )


def _unwrap(network: Network) -> nn.Module:
    """Return the module, or the list of those of an ensemble, whose tensors have the names that are in the files."""
    if isinstance(network, Ensemble):
        return nn.ModuleList(map(_unwrap, network.members))
    return network.module if isinstance(network, OwnNetwork) else network


def _copy(network: Network, config: Mapping[str, Any]) -> Network:
    """Return a copy of the network, each parameter of which has its own memory; tied ones stay tied."""
    if isinstance(network, Ensemble):
        return Ensemble(*(_copy(member, config) for member in network.members), shift=network.shift)
    if not isinstance(network, OwnNetwork):
        built = from_layers(config["layers"])
        built.load_state_dict(network.state_dict())
        return built
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        parameter.grad, parameter.data = None, parameter.data.clone()
    return copied


def verify_models(
    network: Network,
    config: dict[str, Any],
    folder: Path,
    images: Tensor,
    labels: NDArray[np.int64],
    on_file: Callable[[int, int], None] = lambda n_done, n_total: None,
    *,
    code: OwnCode | None = None,
) -> dict[str, dict[str, float]]:
    """Return, for each model file, the maximum difference of its probabilities and its accuracy on the images.

    `images` are raw pixels, uint8, (N, C, H, W). Each file is loaded in a new process with the model card's code, and
    model.pt with predict.py if there is one, and run in batches; `on_file` gets the number of files verified and all.
    Raises `BundleError` if a difference exceeds the format's tolerance. A `model.pt2` is removed instead, unless the
    network is one that `code`, the user's, builds.
    """
    expected = predict_pixels(network, config["mean"], config["std"], images).numpy()
    n_members, shift = config.get("n_members", 1), config.get("shift", 0)
    timeout = _TIMEOUT * n_members * (5 if shift else 1)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, ThreadPoolExecutor() as pool:
        pixels = Path(temporary, "images.npy")
        np.save(pixels, images.numpy())
        kinds = {
            name: kind
            for name, kind in choose_formats(code, n_members, shift).items()
            if (folder / name.removesuffix(_BY_TORCH)).exists()
        }
        if (folder / PROGRAM).exists():
            kinds["model.pt"] = PROGRAM_FORMAT
        n_threads = max(1, torch.get_num_threads() // len(kinds))  # more would wait for each other's cores
        answers = {
            name: pool.submit(_predict, kind, folder, pixels, pixels.with_name(f"{name}.npy"), timeout, n_threads)
            for name, kind in kinds.items()
        }
        for i, (name, answer) in enumerate(answers.items()):
            on_file(i, len(answers))
            try:
                found[name] = _compare(name, kinds[name], answer.result(), expected, labels)
            except BundleError as error:
                if name != "model.pt2" or code:
                    raise
                logger.warning("%s; skipped", error)
                (folder / name).unlink()
    return found


def _predict(
    kind: Format, folder: Path, pixels: Path, output: Path, timeout: int, n_threads: int
) -> NDArray[np.float32]:
    """Load a model file in a new process with so many threads, and return its probabilities for the pixels."""
    name = output.stem
    wrap = "torch.from_numpy(images)" if kind.has_tensors else "images"
    program = (  # the folder gets no bytecode of predict.py
        f"import sys\nsys.dont_write_bytecode = True\nsys.path.insert(0, '')\n{kind.loading}"
        f"import numpy{', torch' * kind.has_tensors}\nparts, pixels = [], numpy.load(sys.argv[1])\n"
        f"for start in range(0, len(pixels), {_BATCH_SIZE}):\n"
        f"    images = pixels[start : start + {_BATCH_SIZE}]\n    images = {wrap}\n"
        f"{textwrap.indent(kind.predicting, '    ')}    parts.append(numpy.asarray(probabilities))\n"
        "numpy.save(sys.argv[2], numpy.concatenate(parts))\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(pixels.resolve()), str(output.resolve())]
    try:
        process = subprocess.run(  # noqa: S603
            command,
            cwd=folder,
            env=os.environ | import_path() | {"OMP_NUM_THREADS": str(n_threads)},
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"verification of {name} timed out after {timeout} s") from error
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise BundleError(f"verification failed: {name} cannot be loaded in a new process: {last[0]}")
    probabilities: NDArray[np.float32] = np.load(output)
    return probabilities


def _compare(
    name: str,
    kind: Format,
    probabilities: NDArray[np.float32],
    expected: NDArray[np.float32],
    labels: NDArray[np.int64],
) -> dict[str, float]:
    difference = float(np.abs(probabilities - expected).max())
    if not difference <= kind.tolerance:
        raise BundleError(f"verification failed: the probabilities of {name} differ by up to {difference:.2g}")
    accuracy = int((probabilities.argmax(axis=1) == labels).sum()) / len(labels)
    return {"difference": difference, "accuracy": accuracy}
