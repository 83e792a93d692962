"""Image files of any kind become what MNIST's networks were trained on."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hpsearch.errors import ImageError
from hpsearch.images import read_image

SHAPE = (1, 28, 28)


def draw_one(size: tuple[int, int], ink: int, paper: int, offset: int = 0) -> Image.Image:
    """A vertical stroke, two fifths of the height long."""
    image = Image.new("L", size, paper)
    width, height = size
    left, top = width // 4 + offset, height // 3
    ImageDraw.Draw(image).rectangle([left, top, left + width // 12, top + height * 2 // 5], fill=ink)
    return image


def test_an_image_of_the_right_size_and_ground_is_read_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    pixels[[0, -1]] = 0
    pixels[:, [0, -1]] = 0
    Image.fromarray(pixels).save(tmp_path / "raw.png")
    assert np.array_equal(read_image(tmp_path / "raw.png", SHAPE)[0], pixels)


def test_dark_on_light_and_light_on_dark_give_the_same(tmp_path: Path) -> None:
    draw_one((200, 150), 0, 255).save(tmp_path / "dark.png")
    draw_one((200, 150), 255, 0).save(tmp_path / "light.png")
    dark, light = (read_image(tmp_path / f"{name}.png", SHAPE) for name in ("dark", "light"))
    assert np.array_equal(dark, light)
    assert dark.dtype == np.uint8
    assert dark.shape == SHAPE


def test_size_place_and_contrast_of_the_ink_do_not_matter(tmp_path: Path) -> None:
    draw_one((280, 280), 0, 255).save(tmp_path / "a.png")
    draw_one((560, 560), 90, 220, offset=150).save(tmp_path / "b.png")
    a, b = (read_image(tmp_path / f"{name}.png", SHAPE).astype(int) for name in "ab")
    assert np.abs(a - b).mean() < 2  # only pixels at the edge of the stroke differ


def test_the_digit_fills_a_box_of_20_pixels_around_its_centre_of_mass(tmp_path: Path) -> None:
    draw_one((300, 300), 0, 255).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", SHAPE)[0]
    rows = np.flatnonzero(pixels.any(axis=1))
    assert rows[-1] - rows[0] + 1 == 20
    y, x = (np.indices(pixels.shape) * pixels).sum(axis=(1, 2)) / pixels.sum()
    assert (y, x) == (pytest.approx(13.5, abs=0.6), pytest.approx(13.5, abs=0.6))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P", "1", "I;16"])
def test_grey_and_colour_are_read_alike(mode: str, tmp_path: Path) -> None:
    grey = draw_one((120, 120), 0, 255)
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode == "CMYK":
        grey.convert(mode).save(file, quality=100, subsampling=0)
        difference = read_image(file, SHAPE).astype(int)
        grey.save(tmp_path / "grey.png")
        assert np.abs(difference - read_image(tmp_path / "grey.png", SHAPE)).max() < 16
        return
    if mode == "I;16":
        Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(file)
    else:
        grey.convert(mode).save(file)
    grey.save(tmp_path / "grey.png")
    assert np.array_equal(read_image(file, SHAPE), read_image(tmp_path / "grey.png", SHAPE))


def test_jpeg_files_are_read_despite_their_grain(tmp_path: Path) -> None:
    draw_one((120, 120), 0, 255).save(tmp_path / "a.jpg", quality=60)
    draw_one((120, 120), 0, 255).save(tmp_path / "a.png")
    a, b = (read_image(tmp_path / f"a.{kind}", SHAPE).astype(int) for kind in ("jpg", "png"))
    assert np.abs(a - b).mean() < 8


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_noise_does_not_stretch_the_box_of_the_ink(tmp_path: Path, kind: str) -> None:
    clean = np.asarray(draw_one((200, 220), 20, 230), dtype=float)
    noisy = clean + np.random.default_rng(0).normal(0, 12, clean.shape)
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / f"noisy.{kind}", quality=70)
    Image.fromarray(clean.astype(np.uint8)).save(tmp_path / "clean.png")
    a, b = (read_image(tmp_path / name, SHAPE).astype(int) for name in (f"noisy.{kind}", "clean.png"))
    assert np.abs(a - b).mean() < 12


def test_what_is_no_digit_fills_the_picture(tmp_path: Path) -> None:
    draw_one((300, 300), 0, 255).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", SHAPE, is_digit=False)[0]
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    assert (rows[0], rows[-1]) == (0, 27)
    assert abs(columns[0] - (27 - columns[-1])) <= 1


def test_only_png_and_jpeg_are_opened(tmp_path: Path) -> None:
    draw_one((60, 60), 0, 255).save(tmp_path / "a.gif")
    with pytest.raises(ImageError, match="not an image"):
        read_image(tmp_path / "a.gif", SHAPE)


def test_what_is_transparent_is_white_paper(tmp_path: Path) -> None:
    image = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle([45, 20, 55, 80], fill=(0, 0, 0, 255))
    image.save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", SHAPE)[0]
    assert pixels[14, 14] > 200
    assert pixels[0, 0] == 0


def test_tiny_and_lopsided_images_are_read(tmp_path: Path) -> None:
    for size in ((3, 3), (1000, 10), (10, 1000)):
        image = Image.new("L", size, 255)
        image.putpixel((size[0] // 2, size[1] // 2), 0)
        image.save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png", SHAPE).max() > 100


@pytest.mark.parametrize(("size", "width"), [(2480, 8), (700, 3), (280, 1), (120, 1)])
def test_thin_strokes_on_large_pages_are_seen(tmp_path: Path, size: int, width: int) -> None:
    image = Image.new("L", (size, size), 255)
    corners = [(size * 0.3, size * 0.2), (size * 0.7, size * 0.2), (size * 0.4, size * 0.8)]
    ImageDraw.Draw(image).line(corners, fill=0, width=width)
    image.save(tmp_path / "seven.png")
    pixels = read_image(tmp_path / "seven.png", SHAPE)[0]
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    assert rows[-1] - rows[0] >= 17
    assert columns[-1] - columns[0] >= 10


def test_files_that_are_no_image_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    draw_one((60, 60), 0, 255).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    for name, reason in (
        ("text.png", "not an image"),
        ("empty.png", "not an image"),
        ("missing.png", "no such file"),
        ("blank.png", "blank"),
        ("cut.png", "truncated"),
        (".", "directory"),
    ):
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(tmp_path / name, SHAPE)
        assert str(tmp_path / name) in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too large"):
        read_image(tmp_path / "whole.png", SHAPE)
