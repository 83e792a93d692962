"""Runs the network of a `model.pt2` without running code from it.

`torch.export.load` unpickles parts of the file, evaluates expressions in it and compiles Python that it generates from
it, so it is only for files that one trusts. But the network itself is data: a list of operators on tensors in JSON,
and weights as raw bytes. This file reads both (the format is `torch/_export/serde/schema.py` of torch), and calls the
operators one after the other, if they are operators on tensors and nothing else.
"""

import io
import json
import math
import operator
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from hpsearch.errors import BundleError

_MAJOR_VERSION = 8  # of the format
_MAX_GRAPH_BYTES = 2**26
_NOT_READ = ("archive_format", "archive_version", ".data/version", "byteorder", ".data/serialization_id",
             "data/sample_inputs/model.pt")  # fmt: skip

# What parts of another type or value raise.
_INVALID = (
    *(zipfile.BadZipFile, LookupError, ValueError, TypeError, AttributeError, RuntimeError),
    *(ArithmeticError, MemoryError),
)

# Numbers of the format.
_DTYPES = {
    **{1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16},
    **{7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16},
}
_MEMORY_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 4: torch.preserve_format}
_LAYOUTS = {7: torch.strided}

# Arithmetic on sizes.
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    f"_operator.{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge")
} | {"math.ceil": math.ceil, "math.floor": math.floor, "math.trunc": math.trunc,
     "torch.sym_max": max, "torch.sym_min": min, "torch.sym_int": int, "torch.sym_float": float}  # fmt: skip

# Operators of `torch.ops.aten` may take and return these. So none gets the name of a file, a device's stream, a list of
# lists of anything, or an object of Python.
_TAKEN = {"Tensor", "int", "SymInt", "float", "number", "bool"}
_RETURNED = {"Tensor", "int", "float", "bool", "number"}
_TEXT_ALLOWED = {  # and these may take a text, such as the name of a mode
    *("gelu", "gelu_", "div", "div_", "pad", "einsum", "meshgrid", "conv1d", "conv2d", "conv3d", "scatter_reduce"),
    *("linalg_norm", "linalg_matrix_norm", "fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "quantile"),
}
_NO_INPUTS = {"zeros", "ones", "full", "arange", "eye", "linspace", "scalar_tensor", "empty", "tril_indices",
              "triu_indices", "rand", "randn"}  # fmt: skip
_UNDERSCORED = {"_assert_tensor_metadata", "_unsafe_view", "_weight_norm", "_upsample_bilinear2d_aa",
                "_upsample_bicubic2d_aa", "_to_copy", "_softmax", "_log_softmax"}  # fmt: skip
_LEFT_OUT = re.compile("^(set|resize|shallow|pin)|backward|sparse|quant|fbgemm|mkldnn|cudnn|miopen|cuda|mps")


@dataclass(frozen=True)
class _Name:
    """An argument that is the result of an earlier step, an input or a weight."""

    name: str


@dataclass(frozen=True)
class _Step:
    call: Callable[..., Any]
    args: list[Any]
    kwargs: dict[str, Any]
    results: list[Any]  # a name, or a list of names, for each value returned
    unused_after: list[str]  # names that no later step needs


class Graph:
    """The network of a `model.pt2`: maps raw pixels, uint8, (N, C, H, W), to probabilities, float32, (N, classes)."""

    def __init__(self, content: bytes, file: Path, image_shape: tuple[int, int, int], n_classes: int) -> None:
        """Read the content of the file. Raises `BundleError` if it has other shapes, or is not understood."""
        self._file, self._n_classes = file, n_classes
        try:
            archive = _Archive(content)
            document = json.loads(archive.read("models/model.json", _MAX_GRAPH_BYTES))
            _check_version(document)
            module = document["graph_module"]
            self._weights = dict(_read_weights(archive, module["signature"]["input_specs"]))
            archive.check_rest()
            self._input = _read_input(module["signature"])
            graph = module["graph"]
            self._output = _read_output(graph, module["signature"])
            _check_shape(graph, self._input, _DTYPES[1], [*image_shape])
            _check_shape(graph, self._output, torch.float32, [n_classes])
            self._steps = _read_steps(graph["nodes"], {*self._weights, self._output})
        except BundleError as error:
            raise BundleError(f"{file} is not accepted: {error}") from error
        except _INVALID as error:
            raise BundleError(f"{file} is invalid: {type(error).__name__}: {error}") from error

    @property
    def n_parameters(self) -> int:
        """Return the number of parameters; tied ones count once."""
        parameters = [tensor for tensor in self._weights.values() if isinstance(tensor, torch.nn.Parameter)]
        return sum({parameter.data_ptr(): parameter.numel() for parameter in parameters}.values())

    def predict_proba(self, images: Tensor, batch_size: int = 512) -> Tensor:
        """Return the probabilities of any number of images. Raises `BundleError` if the file gives none."""
        try:
            probabilities = torch.cat([self._run(batch) for batch in images.split(batch_size)])
            if (probabilities.shape, probabilities.dtype) != ((len(images), self._n_classes), torch.float32):
                raise ValueError(f"its output has shape {tuple(probabilities.shape)}")
        except _INVALID as error:
            raise BundleError(f"{self._file} cannot be run: {error}") from error
        return probabilities

    @torch.inference_mode()
    def _run(self, images: Tensor) -> Tensor:
        values: dict[str, Any] = {**self._weights, self._input: images}
        for step in self._steps:
            returned = step.call(*_fill(step.args, values), **_fill(step.kwargs, values))
            if len(step.results) == 1:
                returned = [returned]
            for result, value in zip(step.results, () if returned is None else returned, strict=True):
                values |= {result: value} if isinstance(result, str) else dict(zip(result, value, strict=True))
            for name in step.unused_after:
                values.pop(name, None)
        probabilities: Tensor = values[self._output]
        return probabilities


class _Archive:
    """The members of the zip file, without its folder; none is compressed, so none is larger than the file."""

    def __init__(self, content: bytes) -> None:
        self._zip = zipfile.ZipFile(io.BytesIO(content))
        self._members = dict[str, zipfile.ZipInfo]()
        for info in self._zip.infolist():
            name = info.filename.partition("/")[2]
            if info.compress_type != zipfile.ZIP_STORED or name in self._members:
                raise BundleError(f"{info.filename} is compressed, or is in it twice")
            self._members[name] = info
        self._read = {*_NOT_READ}

    def read(self, name: str, max_bytes: int | None = None) -> bytes:
        info = self._members[name]
        if max_bytes is not None and info.file_size > max_bytes:
            raise BundleError(f"{name} is too large")
        self._read.add(name)
        return self._zip.read(info)

    def check_rest(self) -> None:
        """Raise `BundleError` if there are members that this file does not know, such as compiled code."""
        if unknown := sorted(self._members.keys() - self._read):
            raise BundleError(f"it has {unknown[0]}, which is not part of a network")


def _check_version(document: Mapping[str, Any]) -> None:
    major = document["schema_version"]["major"]
    if major != _MAJOR_VERSION:
        raise BundleError(f"it has version {major} of torch's format, which this version of hpsearch does not read")


def _read_weights(archive: _Archive, specs: list[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the name in the graph and the tensor of each parameter, buffer and constant."""
    stored = {
        folder: json.loads(archive.read(f"data/{folder}/model_{folder}_config.json", _MAX_GRAPH_BYTES))["config"]
        for folder in ("weights", "constants")
    }
    tensors, contents = dict[tuple[str, str], Tensor](), dict[str, bytearray]()
    for folder, entries in stored.items():
        for name, entry in entries.items():
            if entry["use_pickle"] or not entry["tensor_meta"]:
                raise BundleError(f"{name} is stored as a Python object")
            path = f"data/{folder}/{entry['path_name']}"
            if path not in contents:  # tied parameters have one
                contents[path] = bytearray(archive.read(path))
            tensor = _as_tensor(contents[path], entry["tensor_meta"])
            tensors[folder, name] = torch.nn.Parameter(tensor, requires_grad=False) if entry["is_param"] else tensor
    for spec in specs:
        [(kind, value)] = spec.items()
        if kind == "parameter":
            yield value["arg"]["name"], tensors["weights", value["parameter_name"]]
        elif kind == "buffer":
            folder = "weights" if value["persistent"] else "constants"
            yield value["arg"]["name"], tensors[folder, value["buffer_name"]]
        elif kind == "tensor_constant":
            yield value["arg"]["name"], tensors["constants", value["tensor_constant_name"]]
        elif kind != "user_input":
            raise BundleError(f"it has an input of an unknown kind, {kind}")


def _as_tensor(content: bytearray, meta: Mapping[str, Any]) -> Tensor:
    dtype, sizes, strides = _DTYPES[meta["dtype"]], _integers(meta["sizes"]), _integers(meta["strides"])
    if not content:
        return torch.zeros(sizes, dtype=dtype) if 0 in sizes else _fail("a weight is empty")
    [offset] = _integers([meta["storage_offset"]])
    return torch.frombuffer(content, dtype=dtype).as_strided(sizes, strides, offset)  # checks the bounds


def _integers(sizes: list[dict[str, Any]]) -> list[int]:
    return [operator.index(size["as_int"]) for size in sizes]


def _fail(message: str) -> Any:
    raise BundleError(message)


def _read_input(signature: Mapping[str, Any]) -> str:
    [name] = [
        spec["user_input"]["arg"]["as_tensor"]["name"] for spec in signature["input_specs"] if "user_input" in spec
    ]
    return str(name)


def _read_output(graph: Mapping[str, Any], signature: Mapping[str, Any]) -> str:
    if [*map(list, signature["output_specs"])] != [["user_output"]]:
        raise BundleError("it changes its own weights, or has several outputs")
    [output] = graph["outputs"]
    return str(output["as_tensor"]["name"])


def _check_shape(graph: Mapping[str, Any], name: str, dtype: torch.dtype, sizes: list[int]) -> None:
    meta = graph["tensor_values"][name]
    found = meta["sizes"]
    if _DTYPES[meta["dtype"]] != dtype or "as_int" in found[0] or _integers(found[1:]) != sizes:
        shape = ", ".join(str(size.get("as_int", "N")) for size in found)
        expected = ", ".join(map(str, ("N", *sizes)))
        raise BundleError(f"its {name} has shape ({shape}), config.json says ({expected})")


def _read_steps(nodes: list[dict[str, Any]], kept: set[str]) -> list[_Step]:
    steps = []
    for node in reversed(nodes):
        args, kwargs = list[Any](), dict[str, Any]()
        for each in node["inputs"]:
            if each["kind"] == 2:
                kwargs[each["name"]] = _read_argument(each["arg"])
            else:
                args.append(_read_argument(each["arg"]))
        results = [_read_result(result) for result in node["outputs"]]
        names = {*_names(args), *_names([*kwargs.values()]), *_flatten(results)}
        steps.append(_Step(_find_operator(node["target"]), args, kwargs, results, sorted(names - kept)))
        kept = kept | names
    return steps[::-1]


def _find_operator(target: str) -> Callable[..., Any]:
    """Return what a step calls. Raises `BundleError` if it may do anything but calculate."""
    if target in _ARITHMETIC:
        return _ARITHMETIC[target]
    match target.split("."):
        case ["torch", "ops", "aten", str(name), str(overload)]:
            found = getattr(getattr(torch.ops.aten, name), overload)
            if isinstance(found, OpOverload) and _is_calculation(name, found._schema):
                return found
    raise BundleError(f"it calls {target}, which is not one of the operators that a network may call")


def _is_calculation(name: str, schema: Any) -> bool:
    taken = [(_bare(argument.type), argument) for argument in schema.arguments]
    texts = {"str", "Device"} if name in _TEXT_ALLOWED else {"Device"}
    return (
        (not name.startswith("_") or name in _UNDERSCORED)
        and not _LEFT_OUT.search(name)
        and all(kind in _TAKEN | texts and not argument.is_out for kind, argument in taken)
        and all(_bare(value.type) in _RETURNED for value in schema.returns)
        and (name in _NO_INPUTS or any(kind == "Tensor" for kind, _ in taken))
    )


def _bare(kind: Any) -> str:
    """Return the type in an optional value or a list."""
    while kind.kind() in ("OptionalType", "ListType"):
        kind = kind.getElementType()
    return str(kind)


def _read_argument(argument: Mapping[str, Any]) -> Any:
    [(kind, value)] = argument.items()
    match kind:
        case "as_none":
            return None
        case "as_int" | "as_bool" | "as_string" | "as_ints" | "as_bools":
            return value
        case "as_float":
            return float(value)  # infinity is a text
        case "as_floats":
            return [*map(float, value)]
        case "as_tensor":
            return _Name(value["name"])
        case "as_tensors":
            return [_Name(each["name"]) for each in value]
        case "as_optional_tensor" | "as_sym_int" | "as_sym_float" | "as_sym_bool":
            return _Name(value["as_name"]) if "as_name" in value else _read_argument(value)
        case "as_optional_tensors" | "as_sym_ints" | "as_sym_floats":
            return [_Name(each["as_name"]) if "as_name" in each else _read_argument(each) for each in value]
        case "as_scalar_type":
            return _DTYPES[value]
        case "as_memory_format":
            return _MEMORY_FORMATS[value]
        case "as_layout":
            return _LAYOUTS[value]
        case "as_device" if value["type"] == "cpu":
            return torch.device("cpu")
    raise BundleError(f"it has an argument of the kind {kind}")


def _read_result(result: Mapping[str, Any]) -> Any:
    """Return the name of a value that a step returns, or a list of names."""
    names = _read_argument(result)
    return [each.name for each in names] if isinstance(names, list) else names.name


def _names(arguments: list[Any]) -> Iterator[str]:
    for argument in arguments:
        if isinstance(argument, list):
            yield from _names(argument)
        elif isinstance(argument, _Name):
            yield argument.name


def _flatten(results: list[Any]) -> Iterator[str]:
    for result in results:
        yield from (result,) if isinstance(result, str) else result


def _fill(arguments: Any, values: Mapping[str, Any]) -> Any:
    """Return the arguments with the values of their names."""
    match arguments:
        case _Name():
            return values[arguments.name]
        case list():
            return [_fill(each, values) for each in arguments]
        case dict():
            return {key: _fill(each, values) for key, each in arguments.items()}
    return arguments
