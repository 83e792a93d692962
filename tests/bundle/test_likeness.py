"""An image that is unlike the training images gets a warning; most others of the data set get none."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save as to_safetensors

from hpsearch.bundle import bundle
from hpsearch.bundle.likeness import FILE, Likeness, read_likeness
from hpsearch.bundle.manifest import MANIFEST, write_manifest
from hpsearch.data.dataset import ImageData, denormalise, load_data, load_test
from hpsearch.errors import BundleError, ImageError

from ..cli.test_app import Run, run  # noqa: F401
from .test_bundle import make_contents, save


@pytest.fixture(scope="module")
def data() -> ImageData:
    return load_data("digits", validation=437)


@pytest.fixture(scope="module")
def likeness(data: ImageData) -> Likeness:
    return Likeness.fit(data)


@pytest.fixture(scope="module")
def saved(
    tmp_path_factory: pytest.TempPathFactory, data: ImageData, likeness: Likeness, forked_verification: None
) -> Path:
    target = tmp_path_factory.mktemp("models") / "small"
    save(replace(make_contents(data), likeness=likeness), target)
    return target


def draw(what: Callable[[ImageDraw.ImageDraw], None]) -> torch.Tensor:
    image = Image.new("L", (28, 28))
    what(ImageDraw.Draw(image))
    return torch.from_numpy(np.array(image))


def test_about_one_in_a_hundred_images_of_the_data_set_is_unlike_the_others(
    data: ImageData, likeness: Likeness
) -> None:
    validation = denormalise(data.validation.images, data.mean, data.std)
    assert (likeness.measure(validation) > 1).float().mean() < 0.015
    assert (likeness.measure(load_test("digits")[0]) > 1).float().mean() < 0.05
    assert likeness.measure(torch.empty(0, 1, 28, 28)).shape == (0,)


@pytest.mark.parametrize("distance", [0, 1, 2])
def test_each_distance_finds_what_the_others_miss(likeness: Likeness, distance: int) -> None:
    """Two digits in shape, a bold digit in ink, and a digit on fine stripes in detail."""
    digit = load_test("digits")[0][0, 0].float()
    two = torch.zeros(28, 28)
    small = torch.nn.functional.avg_pool2d(digit[None, None], 2)[0, 0] * 0.7
    two[7:21, :14], two[7:21, 14:] = small, small
    bold = (digit * 1.9).clamp(max=510)
    striped = digit + torch.arange(28).remainder(2) * 60
    found = likeness.distances(torch.stack([two, bold, striped])[:, None]) / likeness.limits
    assert found[distance].argmax() == distance
    assert found[distance, distance] > 1


@pytest.mark.parametrize(
    "what",
    [
        lambda page: page.rectangle([4, 4, 23, 23], fill=255),
        lambda page: page.ellipse([4, 4, 23, 23], fill=255),
        lambda page: [page.line([x, 4, x, 23], fill=255) for x in range(4, 24, 3)],
        lambda page: [page.text((x, 8), "8", fill=255) for x in (3, 11, 19)],
        lambda page: page.rectangle([0, 14, 27, 27], fill=120),
    ],
    ids=["square", "circle", "stripes", "three digits", "half of a page"],
)
def test_what_is_no_digit_is_unlike_the_digits(likeness: Likeness, what: Callable[[ImageDraw.ImageDraw], None]) -> None:
    assert likeness.measure(draw(what)[None, None]).item() > 1


def test_noise_and_blank_images_are_unlike_the_digits(likeness: Likeness) -> None:
    noise = torch.randint(0, 256, (20, 1, 28, 28), generator=torch.Generator().manual_seed(0))
    assert (likeness.measure(noise) > 1).all()
    assert (likeness.measure(torch.zeros(1, 1, 28, 28)) > 1).all()


def test_images_of_any_size_and_color_are_compared() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 40, 64), (1, 3, 3)):
        base = torch.rand((1, *shape), generator=generator)
        images = base + torch.rand((300, *shape), generator=generator) / 9
        labels = torch.zeros(len(images), dtype=torch.int64)
        split = load_data("digits", validation=200).train
        train, validation = (type(split)(images[rows], labels[rows]) for rows in (slice(200), slice(200, None)))
        likeness = Likeness.fit(ImageData(train, validation, (0.0,), (1.0,), ("a", "b")))
        assert (likeness.measure(validation.images * 255) > 1).float().mean() < 0.05
        assert (likeness.measure((1 - base) * 255) > 1).all()


def test_what_predict_says_of_a_file_unlike_the_training_images(
    run: Run,  # noqa: F811
    saved: Path,
) -> None:
    Image.fromarray(load_test("digits")[0][1, 0].numpy()).save("digit.png")
    Image.fromarray(draw(lambda page: page.rectangle([4, 4, 23, 23], fill=255)).numpy()).save("square\n.png")
    code, out, err = run("predict", saved, "digit.png", "square\n.png")
    assert code == 0
    assert [len(line.split("  ")) for line in out.splitlines()] == [4, 4]
    assert err == "warning: square\\n.png is unlike the training images\n"
    code, out, err = run("predict", saved, "digit.png", "square\n.png", "--json")
    digit, square = json.loads(out)
    assert (code, err, digit["unlike"], square["unlike"]) == (0, "", False, True)
    assert digit["distance"] < 1 < square["distance"]


def test_a_classifier_measures_what_it_classifies(saved: Path, likeness: Likeness) -> None:
    classifier, images = bundle.load(saved), load_test("digits")[0][:9]
    found = classifier.measure_distances(images[:, 0].numpy())
    assert found is not None
    assert np.allclose(found, likeness.measure(images), rtol=1e-3)
    with pytest.raises(ImageError, match="must be uint8"):
        classifier.measure_distances(images.float())


def test_a_model_folder_of_an_older_version_gives_no_warning(
    run: Run,  # noqa: F811
    saved: Path,
) -> None:
    older = Path("older")
    older.mkdir()
    for file in saved.iterdir():
        if file.name not in (FILE, MANIFEST):
            (older / file.name).write_bytes(file.read_bytes())
    write_manifest(older)
    assert bundle.load(older).measure_distances(load_test("digits")[0]) is None
    Image.fromarray(draw(lambda page: page.rectangle([4, 4, 23, 23], fill=255)).numpy()).save("square.png")
    assert run("predict", older, "square.png")[2] == ""
    [row] = json.loads(run("predict", older, "square.png", "--json")[1])
    assert (row["unlike"], row["distance"]) == (None, None)


def test_a_damaged_file_is_refused_by_name(saved: Path, likeness: Likeness, tmp_path: Path) -> None:
    whole = {name: getattr(likeness, name) for name in ("references", "components", "limits")}
    likeness.save(tmp_path)
    assert torch.equal(read_likeness((tmp_path / FILE).read_bytes(), Path(FILE)).limits, likeness.limits)
    for content in (
        b"no tensors",
        to_safetensors({}),
        to_safetensors(whole | {"limits": torch.ones(4)}),
        to_safetensors(whole | {"limits": torch.ones(3).double()}),
        to_safetensors(whole | {"limits": torch.tensor([1.0, float("nan"), 1.0])}),
        to_safetensors(whole | {"references": torch.zeros((0, 196), dtype=torch.uint8)}),
        to_safetensors(whole | {"references": torch.zeros((), dtype=torch.uint8)}),
        to_safetensors(whole | {"more": torch.ones(3)}),
    ):
        with pytest.raises(BundleError, match=f"{FILE} is invalid: "):
            read_likeness(content, Path(FILE))


def test_images_with_pixels_that_are_always_zero_can_be_measured() -> None:
    digits = load_data("digits", validation=287)  # as in the example, where float32 was not enough
    assert Likeness.fit(digits).limits.isfinite().all()
