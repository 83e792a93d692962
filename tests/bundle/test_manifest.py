"""Nothing but the model that was written is loaded, and no code from its folder runs, whatever was done to it."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hpsearch.bundle import bundle, manifest
from hpsearch.data.dataset import ImageData
from hpsearch.errors import BundleError

from .test_bundle import make_contents, save

FILES = ({*bundle.REQUIRED} - {bundle.CARD}) | {"mistakes.png", "calibration.png", "predict.py", "manifest.json"}
DANGEROUS = {"pickle.find_class", "exec", "compile", "import", "subprocess.Popen", "os.system", "os.exec", "os.fork"}
Mutate = Callable[[Path], None]

seen: list[str] = []
is_watched = False


def _watch(event: str, arguments: Any) -> None:
    if is_watched and event in DANGEROUS:
        seen.append(f"{event} {arguments}")


sys.addaudithook(_watch)


class Hostile:
    """Creates a file, the proof that it ran, when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.proof,)


@pytest.fixture(scope="module")
def bundles(
    tmp_path_factory: pytest.TempPathFactory, digits: ImageData, forked_verification: None
) -> tuple[Path, Path]:
    """A bundle of an ensemble, and one of other networks of the same shape."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("one", "other"):
        save(make_contents(digits, n_members=2, shift=1), folder / name)
        bundle.load(folder / name)  # whatever is imported for loading is imported now
    return folder / "one", folder / "other"


def flip(name: str, place: float, bit: int) -> Mutate:
    def mutate(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        index = int(place * len(content))
        if name == "manifest.json":  # the card may have another digest
            digest = content.index(b"README.md") + len('README.md": "')
            assume(not digest <= index < digest + 64)
        content[index] ^= 1 << bit
        (folder / name).write_bytes(content)

    return mutate


def truncate(name: str, place: float) -> Mutate:
    return lambda folder: os.truncate(folder / name, int(place * (folder / name).stat().st_size))


def swap(name: str, other: str) -> Mutate:
    def mutate(folder: Path) -> None:
        contents = [(folder / n).read_bytes() for n in (name, other)]
        if contents[0] == contents[1]:
            assume(False)
        for n, content in zip((other, name), contents, strict=True):
            (folder / n).write_bytes(content)

    return mutate


def take_from_another(name: str) -> Mutate:
    def mutate(folder: Path) -> None:
        content = (folder.parent / "other" / name).read_bytes()
        assume(content != (folder / name).read_bytes())
        (folder / name).write_bytes(content)

    return mutate


def add(name: str) -> Mutate:
    return lambda folder: (folder / name).touch()


def link(name: str) -> Mutate:
    def mutate(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return mutate


def replace(name: str, make: Callable[[Path], Any]) -> Mutate:
    def mutate(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return mutate


def grow(name: str, n_bytes: int, *, is_signed: bool) -> Mutate:
    def mutate(folder: Path) -> None:
        os.truncate(folder / name, (folder / name).stat().st_size + n_bytes)
        if is_signed:
            manifest.write_manifest(folder)

    return mutate


def put_pickle(name: str, protocol: int, *, is_torch: bool, is_signed: bool) -> Mutate:
    def mutate(folder: Path) -> None:
        hostile = Hostile(folder.parent / "proof")
        with (folder / name).open("wb") as stream:
            torch.save(hostile, stream) if is_torch else pickle.dump(hostile, stream, protocol)
        if is_signed:
            manifest.write_manifest(folder)

    return mutate


def put_json(name: str, text: str) -> Mutate:
    """A manifest is hostile as it is; a config is signed, so that it is read."""

    def mutate(folder: Path) -> None:
        (folder / name).write_text(text)
        if name == "config.json":
            manifest.write_manifest(folder)

    return mutate


def spoil_config(path: tuple[str, ...], value: Any) -> Mutate:
    def mutate(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        table = config
        for key in path[:-1]:
            table = table[key]
        assume(table.get(path[-1]) != value)
        table[path[-1]] = value
        put_json("config.json", json.dumps(config))(folder)

    return mutate


names, places = st.sampled_from(sorted(FILES)), st.floats(0, 1, exclude_max=True)
documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
nested = st.sampled_from(["[" * 5_000, '{"a":' * 5_000, "9" * 5_000, '{"sha256": ' + "[" * 5_000 + "]" * 5_000 + "}"])
paths = st.sampled_from(
    [
        *(
            ("format_version",),
            ("kind",),
            ("image_shape",),
            ("mean",),
            ("std",),
            ("class_names",),
            ("layers",),
            ("n_members",),
            ("shift",),
        ),
        *(("hyperparameters",), ("hyperparameters", "depth"), ("hyperparameters", "width"), ("__class__",)),
    ]
)
values: st.SearchStrategy[Any] = st.sampled_from(
    [None, "", "x" * 10_000, "__import__('os')", [], {}, -1, 10**30, 65_536, [2**40] * 3, [[]] * 50]
)
mutations = st.one_of(
    st.builds(flip, names, places, st.integers(0, 7)),
    st.builds(truncate, names, places),
    st.builds(swap, names, names),
    st.builds(take_from_another, names),
    st.builds(
        add, st.sampled_from(["__init__.py", "model.pkl", ".hidden", "model.onnx", "conftest.py", "Manifest.json"])
    ),
    st.builds(link, names),
    st.builds(replace, names, st.sampled_from([Path.mkdir, os.mkfifo, lambda file: None, Path.touch])),
    st.builds(grow, st.sampled_from(bundle.REQUIRED), st.sampled_from([2**25, 2**40]), is_signed=st.just(False)),
    st.builds(grow, st.just("model.safetensors"), st.sampled_from([1, 2**25]), is_signed=st.just(True)),
    st.builds(put_pickle, names, st.integers(0, 5), is_torch=st.booleans(), is_signed=st.just(False)),
    st.builds(
        put_pickle,
        st.sampled_from(["model.safetensors", "config.json"]),
        st.integers(0, 5),
        is_torch=st.booleans(),
        is_signed=st.just(True),
    ),
    st.builds(put_json, st.sampled_from(["config.json", "manifest.json"]), documents.map(json.dumps) | nested),
    st.builds(spoil_config, paths, values),
)


@settings(
    max_examples=1_000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(mutate=mutations)
def test_a_thousand_mutated_bundles_are_refused_by_our_error_and_run_no_code(
    bundles: tuple[Path, Path], mutate: Mutate
) -> None:
    global is_watched
    one, other = bundles
    copy = other.parent / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(one, copy)
    mutate(copy)
    seen.clear()
    is_watched = True
    try:
        with pytest.raises(BundleError) as caught:
            bundle.load(copy)
    finally:
        is_watched = False
    assert str(copy) in str(caught.value)
    assert len(str(caught.value)) < 2_000
    assert seen == []
    assert not (copy.parent / "proof").exists()
    (copy.parent / "elsewhere").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "mutate",
    [
        flip("README.md", 0.5, 3),
        truncate("README.md", 0),
        put_pickle("README.md", 4, is_torch=False, is_signed=False),
        replace("predict.py", lambda file: file.write_text(f"open({str(file.parent.parent / 'proof')!r}, 'w')")),
    ],
    ids=["flipped", "empty", "pickle", "program"],
)
def test_no_card_and_no_program_of_a_folder_is_run(bundles: tuple[Path, Path], tmp_path: Path, mutate: Mutate) -> None:
    copy = Path(shutil.copytree(bundles[0], tmp_path / "copy"))
    mutate(copy)
    if "proof" in (copy / "predict.py").read_text():
        manifest.write_manifest(copy)
    bundle.load(copy)
    assert not (tmp_path / "proof").exists()


def test_the_hostile_pickle_would_be_noticed_if_it_ran(tmp_path: Path) -> None:
    global is_watched
    is_watched = True
    try:
        pickle.loads(pickle.dumps(Hostile(tmp_path / "proof")))
    finally:
        is_watched = False
    assert (tmp_path / "proof").exists()
    assert any(event.startswith("pickle.find_class") for event in seen)


def test_an_untouched_copy_is_loaded(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    bundle.load(shutil.copytree(bundles[0], tmp_path / "copy"))


def test_a_config_that_asks_for_more_memory_than_there_is_is_refused_at_once(
    bundles: tuple[Path, Path], tmp_path: Path
) -> None:
    from hpsearch.plugins import NETWORKS, find

    mlp = find(NETWORKS, "mlp")
    copy = Path(shutil.copytree(bundles[0], tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    giant = mlp.hyperparameters(depth=64, width=65_536)
    config["hyperparameters"] = giant.model_dump()
    config["layers"] = mlp.describe(giant, (1, 28, 28), 10)
    put_json("config.json", json.dumps(config))(copy)
    with pytest.raises(BundleError, match=r"too large|does not match"):
        bundle.load(copy)


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (swap("model.pt", "model.safetensors"), "was changed after the export"),
        (add("notes.txt"), r"contains an unexpected file: notes\.txt; remove it"),
        (add("model.onnx"), r"model\.onnx is not listed in manifest\.json"),
        (link("model.pt"), r"model\.pt is a link"),
        (replace("README.md", os.mkfifo), r"README\.md is not a regular file"),
        (grow("model.safetensors", 2**40, is_signed=False), r"model\.safetensors is too large: 1,099,511"),
        (grow("metrics.json", 2**25, is_signed=False), r"metrics\.json is too large"),
        (truncate("manifest.json", 0.9999), r"manifest\.json is corrupt"),
    ],
    ids=["swapped", "extra", "extra-known", "linked", "pipe", "oversized", "oversized-text", "manifest"],
)
def test_what_is_wrong_is_named(bundles: tuple[Path, Path], tmp_path: Path, mutate: Mutate, message: str) -> None:
    copy = Path(shutil.copytree(bundles[0], tmp_path / "copy"))
    mutate(copy)
    with pytest.raises(BundleError, match=message):
        bundle.load(copy)
