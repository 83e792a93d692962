"""Write the model files, and verify in a new process that each gives the same probabilities."""

import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from hpsearch.data.dataset import normalise
from hpsearch.errors import BundleError, UsageError
from hpsearch.training.networks import Network, from_layers
from hpsearch.workers.forkserver import import_path

logger = logging.getLogger(__name__)

PROGRAM = "predict.py"
SAFETENSORS = """\
import safetensors.torch
network.load_state_dict(safetensors.torch.load_file("model.safetensors"))
"""
_BATCH_SIZE = 512
_TIMEOUT = 900  # seconds per file


@dataclass(frozen=True)
class Format:
    """A file format: the code that loads a file, and the code that turns `images` into `probabilities`."""

    loading: str
    predicting: str
    tolerance: float  # largest allowed difference to the probabilities of the original network
    has_tensors: bool  # whether `images` is a tensor or a NumPy array


_PYTORCH = """\
import json, torch
config = json.load(open("config.json"))
network = torch.nn.Sequential(*(getattr(torch.nn, name)(**options) for name, options in config["layers"]))
network.load_state_dict(torch.load("model.pt", weights_only=True))
network.eval()
"""
_PREDICTING = """\
with torch.inference_mode():
    probabilities = network((images.float() / 255 - config["mean"]) / config["std"]).softmax(dim=1)
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
    "model.pt": Format(_PYTORCH, _PREDICTING, 1e-5, True),
    "model.onnx": Format(_ONNX, _PREDICTING_ONNX, 1e-4, False),
    "model.pt2": Format(_TORCH_EXPORT, "probabilities = model(images)\n", 1e-4, True),
}
PROGRAM_FORMAT = Format("from predict import predict_proba\n", "probabilities = predict_proba(images)\n", 1e-5, True)


class _Deployed(nn.Module):
    """A network with normalization and softmax included: raw pixels (uint8) to probabilities."""

    def __init__(self, network: Network, mean: float, std: float) -> None:
        super().__init__()
        self.network, self.mean, self.std = network, mean, std

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images.float() / 255 - self.mean) / self.std)
        return logits.softmax(dim=1)


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
    state = {name: tensor.clone(memory_format=layout) for name, tensor in network.state_dict().items()}
    (folder / "model.safetensors").write_bytes(to_safetensors(state))
    torch.save(state, folder / "model.pt")
    if not onnx and not torch_export:
        return
    copy = from_layers(config["layers"])
    copy.load_state_dict(state)
    model = _Deployed(copy, config["mean"], config["std"]).eval().requires_grad_(False)
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


def verify_models(
    network: Network,
    config: dict[str, Any],
    folder: Path,
    images: Tensor,
    labels: NDArray[np.int64],
    on_file: Callable[[int, int], None] = lambda n_done, n_total: None,
) -> dict[str, dict[str, float]]:
    """Return, for each model file, the maximum difference of its probabilities and its accuracy on the images.

    `images` are raw pixels, uint8, (N, C, H, W). Each file is loaded in a new process with the model card's code, and
    model.pt with predict.py if there is one, and run in batches; `on_file` gets the number of files verified and all.
    Raises `BundleError` if a difference exceeds the format's tolerance; a `model.pt2` is removed instead.
    """
    expected = network.predict_proba(normalise(images, [config["mean"]], [config["std"]])).numpy()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, ThreadPoolExecutor() as pool:
        pixels = Path(temporary, "images.npy")
        np.save(pixels, images.numpy())
        answers = {name: pool.submit(_predict, folder / name, pixels) for name in FORMATS if (folder / name).exists()}
        for i, (name, answer) in enumerate(answers.items()):
            on_file(i, len(answers))
            try:
                found[name] = _compare(name, answer.result(), expected, labels)
            except BundleError as error:
                if name != "model.pt2":
                    raise
                logger.warning("%s; skipped", error)
                (folder / name).unlink()
    return found


def _predict(file: Path, pixels: Path) -> NDArray[np.float32]:
    """Load a model file in a new process, and return its probabilities for the pixels."""
    kind, output = FORMATS[file.name], pixels.with_name(f"{file.name}.npy")
    if file.name == "model.pt" and file.with_name(PROGRAM).exists():
        kind = PROGRAM_FORMAT
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
            cwd=file.parent,
            env=os.environ | import_path(),
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
    except subprocess.TimeoutExpired as error:
        raise BundleError(f"verification of {file.name} timed out after {_TIMEOUT} s") from error
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise BundleError(f"verification failed: {file.name} cannot be loaded in a new process: {last[0]}")
    probabilities: NDArray[np.float32] = np.load(output)
    return probabilities


def _compare(
    name: str, probabilities: NDArray[np.float32], expected: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, float]:
    difference = float(np.abs(probabilities - expected).max())
    if not difference <= FORMATS[name].tolerance:
        raise BundleError(f"verification failed: the probabilities of {name} differ by up to {difference:.2g}")
    accuracy = int((probabilities.argmax(axis=1) == labels).sum()) / len(labels)
    return {"difference": difference, "accuracy": accuracy}
