"""The network of a model.pt2 is run operator by operator, and no file makes it run anything else."""

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpsearch.bundle.graph import Graph
from hpsearch.errors import BundleError

SHAPE = (3, 16, 16)


class Residual(nn.Module):
    """A block with a shortcut, batch norm, attention, dropout, tied weights, a buffer, and sizes in its arithmetic."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding="same", bias=False)
        self.second.weight = nn.Parameter(self.second.weight / 2)
        self.norm, self.shortcut = nn.BatchNorm2d(8), nn.Conv2d(3, 8, 1)
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = self.tied = nn.Linear(8, 5)
        self.scale: Tensor
        self.register_buffer("scale", torch.rand(8), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.second(nn.functional.gelu(self.first(images), approximate="tanh"))))
        x += self.shortcut(images)
        x = nn.functional.max_pool2d(x, 2)
        x = nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear")
        n_images, height = x.shape[0], x.shape[2]
        x = self.attention(x.flatten(2).transpose(1, 2)).reshape(n_images, height * 4, -1)
        left, right = x.chunk(2, dim=1)
        x = torch.einsum("npc,npc->nc", left, right) * self.scale + torch.tensor([0.5]).repeat(n_images, 8)
        with torch.no_grad():
            largest, _ = x.masked_fill(x < 0, -float("inf")).max(dim=1, keepdim=True)
        logits: Tensor = self.tied(torch.where(largest > 0, x, torch.zeros(n_images, 1)))
        return logits


class Deployed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        probabilities: Tensor = self.network(images.float() / 255).softmax(dim=1)
        return probabilities


def save(network: nn.Module) -> bytes:
    stream = io.BytesIO()
    shapes = ({0: torch.export.Dim("n_images")},)
    example = (torch.zeros((2, *SHAPE), dtype=torch.uint8),)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = Deployed(network).eval().requires_grad_(False)
        torch.export.save(torch.export.export(model, example, dynamic_shapes=shapes), stream)
    return stream.getvalue()


@pytest.fixture(scope="module")
def content() -> bytes:
    torch.manual_seed(0)
    return save(Residual())


def read(content: bytes, n_classes: int = 5) -> Graph:
    return Graph(content, Path("model.pt2"), SHAPE, n_classes)


def images(n: int) -> Tensor:
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_a_graph_gives_what_torch_export_gives_for_any_number_of_images(content: bytes) -> None:
    expected = torch.export.load(io.BytesIO(content)).module()
    graph = read(content)
    for n in (1, 2, 7):
        assert torch.equal(graph.predict_proba(images(n)), expected(images(n)))
    assert torch.allclose(graph.predict_proba(images(7), batch_size=3), graph.predict_proba(images(7)), atol=1e-6)
    assert graph.n_parameters == sum(each.numel() for each in Residual().parameters())


def rewrite(content: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    """Return the archive after a change of its members."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, member in members.items():
            archive.writestr(name, member)
    return stream.getvalue()


def find(members: dict[str, bytes], end: str) -> str:
    [name] = [name for name in members if name.endswith(end)]
    return name


def edit(end: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def edit_json(members: dict[str, bytes]) -> None:
        name = find(members, end)
        document = json.loads(members[name])
        change(document)
        members[name] = json.dumps(document).encode()

    return edit_json


class Malicious:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path("executed").touch, ())


def pickled() -> bytes:
    stream = io.BytesIO()
    torch.save((Malicious(),), stream)
    return stream.getvalue()


def use_pickle(document: Any) -> None:
    next(iter(document["config"].values()))["use_pickle"] = True


def call(target: str, *arguments: Any) -> Callable[[Any], None]:
    def add_step(document: Any) -> None:
        inputs = [{"name": "", "arg": argument, "kind": 1} for argument in arguments]
        node = {"target": target, "inputs": inputs, "outputs": [], "metadata": {}}
        document["graph_module"]["graph"]["nodes"].insert(0, node)

    return add_step


def evaluate_expression(document: Any) -> None:
    size = document["graph_module"]["graph"]["tensor_values"]["images"]["sizes"][0]
    size["as_expr"]["expr_str"] = "__import__('pathlib').Path('executed').touch()"


def put(name: str, member: bytes) -> Callable[[dict[str, bytes]], None]:
    def put_member(members: dict[str, bytes]) -> None:
        folder = next(iter(members)).partition("/")[0]
        members[f"{folder}/{name}"] = member

    return put_member


@pytest.mark.parametrize(
    "change",
    [
        put("data/sample_inputs/model.pt", pickled()),
        edit("model_weights_config.json", use_pickle),
        put("data/weights/model.pt", pickled()),
        put("data/constants/opaque_obj_0", pickle.dumps(Malicious())),
        put("data/aotinductor/model/model.so", b"\x7fELF"),
        edit("model.json", evaluate_expression),
        edit("model.json", call("torch.ops.aten.from_file.default", {"as_string": "executed"}, {"as_bool": True})),
        edit("model.json", call("torch.ops.aten.save.default", {"as_string": "executed"})),
        edit("model.json", call("torch.serialization.os.mkdir", {"as_string": "executed"})),
        edit("model.json", call("_operator.methodcaller", {"as_string": "executed"})),
        edit("model.json", call("torch.ops.aten.__class__.default")),
        edit("model.json", call("torch.ops.load_library", {"as_string": "executed"})),
    ],
)
def test_no_archive_runs_code(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Each of them is refused, or what is malicious in it is never looked at."""
    monkeypatch.chdir(tmp_path)
    malicious = rewrite(content, change)
    try:
        probabilities = read(malicious).predict_proba(images(2))
    except BundleError as error:
        assert str(error).startswith("model.pt2 is ")  # noqa: PT017 - the others are not refused
    else:
        assert torch.equal(probabilities, read(content).predict_proba(images(2)))
    assert [*tmp_path.iterdir()] == []


def test_torch_itself_would_run_the_code_of_such_an_archive(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, torch has become safer; what the test before says stays true."""
    monkeypatch.chdir(tmp_path)
    torch.export.load(io.BytesIO(rewrite(content, put("data/sample_inputs/model.pt", pickled()))))
    assert (tmp_path / "executed").exists()


def change_version(document: Any) -> None:
    document["schema_version"]["major"] = 9


def change_offset(document: Any) -> None:
    next(iter(document["config"].values()))["tensor_meta"]["storage_offset"] = {"as_int": 10**6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("model.json", change_version), "has version 9 of torch's format"),
        (edit("model.json", call("torch.ops.mine.op.default")), r"it calls torch\.ops\.mine\.op\.default"),
        (edit("model_weights_config.json", change_offset), "invalid: RuntimeError: "),
        (lambda members: members.pop(find(members, "models/model.json")), "invalid: KeyError: "),
        (lambda members: members.update({find(members, "models/model.json"): b"[" * 10**5}), "invalid: Recursion"),
        (put("extra/notes.txt", b"hello"), "it has extra/notes.txt, which is not part of a network"),
    ],
)
def test_an_archive_that_is_no_network_is_refused_with_the_reason(content: bytes, change: Any, message: str) -> None:
    with pytest.raises(BundleError, match=f"model.pt2 is .*{message}"):
        read(rewrite(content, change))


def test_an_archive_that_is_damaged_or_compressed_is_refused(content: bytes) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("m/models/model.json", b" " * 10**6)
    for bad in (b"", content[:-100], content[: len(content) // 2], stream.getvalue()):
        with pytest.raises(BundleError, match=r"model\.pt2 is "):
            read(bad)


def test_a_graph_for_other_images_or_classes_is_refused(content: bytes) -> None:
    with pytest.raises(BundleError, match=r"softmax has shape \(N, 5\), config\.json says \(N, 6\)"):
        read(content, n_classes=6)
    with pytest.raises(BundleError, match=r"images has shape \(N, 3, 16, 16\), config\.json says \(N, 1, 28, 28\)"):
        Graph(content, Path("model.pt2"), (1, 28, 28), 5)


def test_a_graph_that_does_not_give_what_it_says_is_an_error_when_it_runs(content: bytes) -> None:
    def lie(document: Any) -> None:
        [softmax] = [node for node in document["graph_module"]["graph"]["nodes"] if "softmax" in node["target"]]
        softmax["target"] = "torch.ops.aten.sum.dim_IntList"
        softmax["inputs"][1]["arg"] = {"as_ints": [1]}

    graph = read(rewrite(content, edit("model.json", lie)))
    with pytest.raises(BundleError, match=r"model\.pt2 cannot be run: its output has shape \(2,\)"):
        graph.predict_proba(images(2))
