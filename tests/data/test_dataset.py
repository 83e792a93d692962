"""Data in memory: loaded completely or refused, split without leaks, batched, augmented."""

import gzip
import hashlib
import os
import pwd
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch.nn import functional
from torch.utils.data import DataLoader

from hpsearch.data import dataset, sets
from hpsearch.data.augment import augment
from hpsearch.data.dataset import ImageData, Split, load_data, load_test, normalise
from hpsearch.data.sets import data_folder
from hpsearch.errors import DataError


def write_archives(raw: Path, monkeypatch: pytest.MonkeyPatch, class_name: str = "MNIST") -> None:
    """Archives in MNIST's format with random images, and their checksums where torchvision looks them up."""
    raw.mkdir(parents=True)
    resources = []
    generator = np.random.default_rng(0)
    for prefix, n in (("train", 60_000), ("t10k", 10_000)):
        images = generator.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            magic = 0x800 + array.ndim
            header = b"".join(int(number).to_bytes(4, "big") for number in (magic, *array.shape))
            file = raw / f"{prefix}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=0))
            resources.append((file.name, hashlib.md5(file.read_bytes()).hexdigest()))
    monkeypatch.setattr(getattr(torchvision.datasets, class_name), "resources", resources)
    monkeypatch.setitem(sets._MD5, class_name, dict(resources))


def test_digits_come_as_mnist_shaped_images(digits: ImageData) -> None:
    assert digits.train.images.shape == (300, 1, 28, 28)
    assert digits.validation.images.shape == (200, 1, 28, 28)
    assert digits.image_shape == (1, 28, 28)
    assert digits.train.images.dtype == torch.float32
    images, labels = load_test("digits")
    assert images.dtype == torch.uint8
    assert len(images) == len(labels) == 360
    assert images.max() == 255


def test_pixels_are_normalised_by_the_training_split_alone(digits: ImageData) -> None:
    assert digits.train.images.mean().item() == pytest.approx(0, abs=1e-4)
    assert digits.train.images.std().item() == pytest.approx(1, abs=1e-4)
    assert digits.validation.images.mean().item() != pytest.approx(0, abs=1e-4)


def test_normalise_follows_the_formula() -> None:
    images = torch.tensor([[[[0, 51, 255]]]], dtype=torch.uint8)
    assert torch.allclose(normalise(images, [0.2], [0.4]).flatten(), torch.tensor([-0.5, 0.0, 2.0]), atol=1e-6)


def test_the_splits_are_disjoint_stratified_and_seeded() -> None:
    one, same, other = (load_data("digits", validation=400, split_seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.validation.images, same.validation.images)
    assert not torch.equal(one.validation.labels, other.validation.labels)
    assert len(one.train) + len(one.validation) == 1437
    training = {image.numpy().tobytes() for image in one.train.images}
    assert not any(image.numpy().tobytes() in training for image in one.validation.images)
    shares = [torch.bincount(split.labels) / len(split) for split in (one.train, one.validation)]
    assert torch.allclose(shares[0], shares[1], atol=0.005)


def test_a_split_without_every_class_is_refused() -> None:
    with pytest.raises(DataError, match=r"data\.validation = 3 with every class in both"):
        load_data("digits", validation=3)


def test_a_loader_is_a_dataloader_that_yields_each_image_once(digits: ImageData) -> None:
    loader = digits.train.loader(64, shuffle=True, generator=torch.Generator().manual_seed(0))
    assert isinstance(loader, DataLoader)
    batches = list(loader)
    assert len(batches) == len(loader) == 5
    images = torch.cat([images for images, _ in batches])
    assert not torch.equal(images, digits.train.images)
    assert torch.equal(images.sum(0), images.sum(0))
    order = sorted(image.numpy().tobytes() for image in images)
    assert order == sorted(image.numpy().tobytes() for image in digits.train.images)


def test_a_loader_shuffles_each_epoch_differently_and_equally_for_the_same_seed(digits: ImageData) -> None:
    def epochs(seed: int) -> list[torch.Tensor]:
        loader = digits.train.loader(300, shuffle=True, generator=torch.Generator().manual_seed(seed))
        return [labels for _ in range(2) for _, labels in loader]

    first, second = epochs(0)
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(epochs(0), [first, second], strict=True))
    assert not torch.equal(epochs(1)[0], first)


def test_an_unshuffled_loader_keeps_the_order_and_every_image(digits: ImageData) -> None:
    labels = torch.cat([labels for _, labels in digits.validation.loader(199)])
    assert torch.equal(labels, digits.validation.labels)


def test_the_test_set_gets_a_loader_like_the_other_two(digits: ImageData) -> None:
    raw, labels = load_test("digits")
    batches = list(digits.split_of(raw, labels).loader(100))
    assert [len(images) for images, _ in batches] == [100, 100, 100, 60]
    assert torch.equal(torch.cat([labels for _, labels in batches]), labels)
    expected = (raw.float() / 255 - digits.mean[0]) / digits.std[0]
    assert torch.allclose(torch.cat([images for images, _ in batches]), expected, atol=1e-6)


def test_a_last_batch_of_one_image_is_left_out_of_training() -> None:
    split = Split(torch.zeros(9, 1, 2, 2), torch.zeros(9, dtype=torch.long))
    assert [len(labels) for _, labels in split.loader(4, shuffle=True)] == [4, 4]
    assert [len(labels) for _, labels in split.loader(4)] == [4, 4, 1]


def test_augmentation_moves_each_image_differently_and_keeps_the_shape() -> None:
    torch.manual_seed(0)
    image = torch.zeros(1, 1, 28, 28)
    image[..., 8:20, 12:16] = 1
    augmented = augment(image.repeat(8, 1, 1, 1), 1.0)
    assert augmented.shape == (8, 1, 28, 28)
    assert len({one.numpy().tobytes() for one in augmented}) == 8
    assert augmented.sum((1, 2, 3)) == pytest.approx(image.sum().item(), rel=0.5)


def test_augmentation_of_strength_zero_changes_nothing() -> None:
    images = torch.rand(4, 1, 28, 28)
    assert torch.allclose(augment(images, 0.0), images, atol=1e-5)


@pytest.mark.parametrize("shear", [0.0, 0.6])
def test_augmentation_is_the_affine_map_of_torch(monkeypatch: pytest.MonkeyPatch, shear: float) -> None:
    images, drawn, tilts = torch.rand(3, 1, 20, 28), torch.rand(4, 3), torch.rand(3)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: drawn if size == (4, 3) else tilts)
    angle, scale, x, y = (drawn * 2 - 1) * 0.7
    angle, scale = angle * torch.pi / 9, 1 + 0.2 * scale
    cosine, sine = angle.cos() / scale, angle.sin() / scale
    matrices = torch.stack([cosine, -sine, x * 2 / 7, sine, cosine, y * 2 / 7], dim=1).view(3, 2, 3)
    slanted = torch.eye(3).repeat(3, 1, 1)
    slanted[:, 0, 1] = ((tilts * 2 - 1) * shear * torch.pi / 9).tan()
    matrices = torch.cat([matrices[:, :, :2] @ slanted[:, :2, :2], matrices[:, :, 2:]], dim=2)
    grid = functional.affine_grid(matrices, [3, 1, 20, 28], align_corners=False)
    expected = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    torch.testing.assert_close(augment(images, 0.7, shear=shear), expected, rtol=1e-4, atol=1e-5)


def test_augmentation_shifts_by_at_most_a_seventh(monkeypatch: pytest.MonkeyPatch) -> None:
    image = torch.zeros(1, 1, 28, 28)
    image[0, 0, 14, 14] = 1
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.tensor([[0.5], [0.5], [1.0], [0.5]]))
    row, column = divmod(int(augment(image, 1.0).argmax()), 28)
    assert (row, column) == (14, 10)


def test_archives_and_unpacked_files_are_read_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_archives(raw, monkeypatch)
    monkeypatch.setenv("HPSEARCH_DATA", str(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    data, (images, labels) = load_data("mnist", validation=10_000), load_test("mnist")
    assert (len(data.train), len(data.validation), len(labels)) == (50_000, 10_000, 10_000)
    assert sorted(tmp_path.rglob("*")) == before
    for archive in raw.glob("t10k-*.gz"):
        archive.with_suffix("").write_bytes(gzip.decompress(archive.read_bytes()))
        archive.unlink()
    before = sorted(tmp_path.rglob("*"))
    assert torch.equal(load_test("mnist")[0], images)
    assert sorted(tmp_path.rglob("*")) == before


def test_only_what_is_missing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mirror, raw = tmp_path / "mirror", tmp_path / "data" / "MNIST" / "raw"
    write_archives(mirror, monkeypatch)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=mirror))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    raw.mkdir(parents=True)
    mine = {"train-images-idx3-ubyte": b"mine", "t10k-labels-idx1-ubyte.gz": gzip.compress(b"mine")}
    for name, content in mine.items():
        (raw / name).write_bytes(content)
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz is damaged; t10k-labels.* is not that of MNIST"):
        load_test("mnist", tmp_path / "data")
    assert {name: (raw / name).read_bytes() for name in mine} == mine
    assert {file.name for file in raw.iterdir()} == {
        *mine,
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
    }
    assert (raw / "t10k-images-idx3-ubyte.gz").read_bytes() == (mirror / "t10k-images-idx3-ubyte.gz").read_bytes()
    (raw / "t10k-labels-idx1-ubyte.gz").unlink()
    assert len(load_test("mnist", tmp_path / "data")[1]) == 10_000
    assert {file.name for file in raw.parent.iterdir()} == {"raw", ".lock"}
    server.shutdown()


def test_an_unpacked_file_that_differs_from_its_archive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    write_archives(raw, monkeypatch)
    file = raw / "t10k-images-idx3-ubyte"
    content = bytearray(gzip.decompress((raw / f"{file.name}.gz").read_bytes()))
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is corrupt"):
        load_test("mnist", tmp_path)
    (raw / f"{file.name}.gz").unlink()
    file.write_bytes(content[:7000])
    with pytest.raises(DataError, match="could not load"):
        load_test("mnist", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "kmnist"])
def test_data_that_cannot_be_loaded_are_reported_with_their_folder_and_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(DataError) as caught:
        load_data(name, tmp_path, validation=10_000)
    message = str(caught.value)
    assert str(tmp_path) in message
    assert "HPSEARCH_DATA" in message
    assert "digits" in message


@pytest.mark.parametrize("content", [b"", b"\0\0\x08", b"<html>not found</html>", b"\0\0\x08\x03" + b"\0" * 9])
def test_an_unpacked_file_of_another_format_is_refused(tmp_path: Path, content: bytes) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (raw / name).write_bytes(content)
    with pytest.raises(DataError, match="could not load MNIST from"):
        load_data("mnist", tmp_path, validation=10)


def test_a_corrupt_archive_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    raw = tmp_path / "MNIST" / "raw"
    write_archives(raw, monkeypatch)
    with (raw / "train-images-idx3-ubyte.gz").open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"damage")
    with pytest.raises(DataError, match="MNIST"):
        load_data("mnist", tmp_path, validation=10_000)


def test_archives_of_another_data_set_are_refused_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, checksums in sets._MD5.items():
        assert checksums == dict(getattr(torchvision.datasets, name).resources)
    raw = tmp_path / "MNIST" / "raw"
    write_archives(raw, monkeypatch)
    monkeypatch.setitem(sets._MD5, "MNIST", sets._MD5["KMNIST"])
    before = {file: file.read_bytes() for file in raw.iterdir()}
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz is not that of MNIST \(its MD5 differs\)"):
        load_test("mnist", tmp_path)
    assert {file: file.read_bytes() for file in raw.iterdir()} == before


def test_the_data_folder_is_the_argument_else_the_variable_else_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPSEARCH_DATA", "/there")
    assert data_folder("/here") == Path("/here")
    assert data_folder() == Path("/there")
    monkeypatch.delenv("HPSEARCH_DATA")
    assert data_folder().name == "hpsearch"
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a name
    for folder in (None, "~/data"):
        with pytest.raises(DataError, match="set HOME, or point HPSEARCH_DATA"):
            data_folder(folder)


def test_without_a_home_folder_one_for_the_data_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CACHE_HOME", "HPSEARCH_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # nor is there an entry of this user
    with pytest.raises(DataError, match=r"no home folder found.*HPSEARCH_DATA"):
        data_folder()


@pytest.mark.skipif(
    not (Path(os.environ.get("HPSEARCH_DATA", "/nowhere")) / "MNIST" / "raw").is_dir(), reason="no MNIST at hand"
)
def test_the_real_mnist_is_read_from_its_archives(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for archive in (Path(os.environ["HPSEARCH_DATA"]) / "MNIST" / "raw").glob("*.gz"):
        shutil.copy(archive, raw)
    data = load_data("mnist", tmp_path, validation=10_000)
    assert data.mean == pytest.approx((0.1307,), abs=0.001)
    assert data.std == pytest.approx((0.3081,), abs=0.001)


def test_pixels_have_the_same_mean_in_any_number_of_threads() -> None:
    images = torch.randint(0, 256, (1000, 1, 28, 28), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    measured = set()
    for n_threads in (1, 2, 3, 4):
        torch.set_num_threads(n_threads)
        measured.add(dataset._measure_pixels(images, torch.arange(len(images))))
        assert torch.get_num_threads() == n_threads
    assert len(measured) == 1


def test_pixels_of_large_sets_are_counted_with_the_same_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    images, rows = torch.randint(0, 256, (200, 3, 9, 8), dtype=torch.uint8), torch.arange(0, 200, 2)
    expected = dataset._measure_pixels(images, rows)
    monkeypatch.setattr(dataset, "_N_COUNTED", 0)
    for found, known in zip(dataset._measure_pixels(images, rows), expected, strict=True):
        assert found == pytest.approx(known, rel=1e-5)


def test_scripts_import_the_loaders_from_the_room_which_does_not_import_torch_before() -> None:
    from hpsearch.data import load_data, load_test

    assert (load_data, load_test) == (dataset.load_data, dataset.load_test)
    program = "import sys, hpsearch.data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(ImportError, match="no_such_name"):
        from hpsearch.data import no_such_name  # noqa: F401


def test_data_are_described_alike_on_every_machine_and_no_other_data_are(digits: ImageData) -> None:
    images, labels = digits.train.images, digits.train.labels
    rounded = replace(digits, train=Split(images * (1 + 1e-6), labels), mean=(digits.mean[0] + 1e-7,))
    assert rounded.describe() == digits.describe()
    darker, shifted = images.clone(), labels.clone()
    darker[7, 0, 14, 14] -= 0.1
    shifted[7] = (labels[7] + 1) % 10
    others = [Split(darker, labels), Split(images, shifted), Split(images[1:], labels[1:])]
    digests = {replace(digits, train=split).describe()["sha256"] for split in [*others, digits.train]}
    assert len(digests) == 4
