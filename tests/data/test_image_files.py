"""Image files of any kind become what MNIST's networks were trained on."""

import os
import resource
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from hpsearch.data.image_files import FORMATS, read_image
from hpsearch.data.mnist_images import thicken_strokes
from hpsearch.data.sets import DIGITS
from hpsearch.errors import ImageError

SHAPE = (1, 28, 28)


def draw_one(size: tuple[int, int], ink: int, paper: int, offset: int = 0) -> Image.Image:
    """A vertical stroke, two fifths of the height long."""
    image = Image.new("L", size, paper)
    width, height = size
    left, top = width // 4 + offset, height // 3
    ImageDraw.Draw(image).rectangle([left, top, left + width // 12, top + height * 2 // 5], fill=ink)
    return image


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """Five digits as in MNIST, uint8, shape (5, 28, 28)."""
    return DIGITS.read(is_train=True)[0][:5, 0].numpy()


def difference(a: Path, b: Path) -> float:
    """The mean difference between two files as they are read, of 255."""
    read = [read_image(file, SHAPE).astype(float) for file in (a, b)]
    return float(np.abs(read[0] - read[1]).mean())


def save_page(digit: np.ndarray, file: Path) -> Image.Image:
    """Black ink on white paper, 320 pixels wide."""
    page = ImageOps.expand(Image.fromarray(255 - np.kron(digit, np.ones((8, 8), np.uint8))), 48, 255)
    page.save(file)
    return page


def test_an_image_made_as_in_mnist_is_read_as_it_is(tmp_path: Path, digits: np.ndarray) -> None:
    for pixels in digits:
        Image.fromarray(pixels).save(tmp_path / "raw.png")
        assert np.array_equal(read_image(tmp_path / "raw.png", SHAPE)[0], pixels)
        Image.fromarray(255 - pixels).save(tmp_path / "raw.png")
        assert np.array_equal(read_image(tmp_path / "raw.png", SHAPE)[0], pixels)


def test_an_image_of_28x28_pixels_that_was_not_made_as_in_mnist_is_brought_there(
    tmp_path: Path, digits: np.ndarray
) -> None:
    for pixels in digits:
        Image.fromarray(pixels).save(tmp_path / "raw.png")
        Image.fromarray(np.roll(pixels, (3, -3), axis=(0, 1))).save(tmp_path / "shifted.png")
        Image.fromarray(200 - pixels // 2).save(tmp_path / "grey.png")
        green = [80 + pixels // 3, np.full_like(pixels, 100), np.full_like(pixels, 90)]
        Image.fromarray(np.stack(green, axis=-1)).save(tmp_path / "colored.png")
        small = Image.new("L", (28, 28))
        small.paste(Image.fromarray(pixels).resize((20, 20), Image.Resampling.BOX), (8, 1))
        small.save(tmp_path / "small.png")
        for name in ("shifted", "grey", "colored", "small"):
            assert difference(tmp_path / f"{name}.png", tmp_path / "raw.png") < 24, name


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


@pytest.mark.parametrize("top", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("kind", ["png", "tif", "int32", "float"])
def test_pixels_of_more_than_8_bits_are_read_like_those_of_8(
    tmp_path: Path, digits: np.ndarray, top: int, kind: str
) -> None:
    for large in (digits[0], np.asarray(save_page(digits[0], tmp_path / "page.png"))):
        Image.fromarray(large).save(tmp_path / "8.png")
        deep = large * (top / 255)
        if kind == "float":
            Image.fromarray(np.float32(deep if top > 255 else large / 255)).save(tmp_path / "deep.tif")
        elif kind == "int32":
            Image.fromarray(deep.round().astype(np.int32)).save(tmp_path / "deep.tif")
        else:
            words = deep.round().astype("<u2")
            Image.frombytes("I;16", words.shape[::-1], words.tobytes()).save(tmp_path / f"deep.{kind}")
        [file] = tmp_path.glob("deep.*")
        assert difference(file, tmp_path / "8.png") < 2


def test_normalized_floats_are_read(tmp_path: Path, digits: np.ndarray) -> None:
    Image.fromarray((digits[0] / np.float32(255) - np.float32(0.13)) / np.float32(0.31)).save(tmp_path / "a.tif")
    assert np.abs(read_image(tmp_path / "a.tif", SHAPE)[0] - digits[0] * (255 / digits[0].max())).max() <= 1


def test_deep_pictures_are_shrunk_before_they_are_scaled(tmp_path: Path, digits: np.ndarray) -> None:
    page = np.asarray(save_page(digits[0], tmp_path / "page.png").resize((3200, 3200)))
    Image.fromarray(page).save(tmp_path / "8.png", compress_level=1)
    Image.fromarray(page.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    tracemalloc.start()
    read_image(tmp_path / "16.tif", SHAPE)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * page.size  # bytes: the size of the file
    assert difference(tmp_path / "16.tif", tmp_path / "8.png") < 2


@pytest.mark.parametrize("value", [np.float32("nan"), np.float32("inf"), np.int32(-5)])
def test_pixels_that_are_no_shades_are_refused(tmp_path: Path, digits: np.ndarray, value: np.generic) -> None:
    pixels = digits[0].astype(value.dtype)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="cannot be read as shades of gray"):
        read_image(tmp_path / "a.tif", SHAPE)


def box(page: ImageDraw.ImageDraw) -> None:
    page.rectangle([20, 20, 300, 300], outline=0, width=3)


def double_box(page: ImageDraw.ImageDraw) -> None:
    page.rectangle([10, 10, 310, 310], outline=60, width=8)
    page.rectangle([25, 25, 295, 295], outline=60, width=2)


def frame(page: ImageDraw.ImageDraw) -> None:
    page.rectangle([0, 0, 319, 319], outline=0, width=6)


def edge(page: ImageDraw.ImageDraw) -> None:
    page.rectangle([0, 0, 12, 319], fill=30)


def two_edges(page: ImageDraw.ImageDraw) -> None:
    page.polygon([(0, 0), (319, 0), (319, 30), (25, 15), (10, 319), (0, 319)], fill=50)


def rules(page: ImageDraw.ImageDraw) -> None:
    for y in range(20, 320, 40):
        page.line([0, y, 319, y], fill=190, width=2)


def squares(page: ImageDraw.ImageDraw) -> None:
    for place in range(5, 320, 30):
        page.line([0, place, 319, place], fill=150, width=2)
        page.line([place, 0, place, 319], fill=150, width=2)


@pytest.mark.parametrize("draw", [box, double_box, frame, edge, two_edges, rules, squares])
@pytest.mark.parametrize("is_light", [False, True])
def test_frames_edges_and_lines_do_not_matter(
    tmp_path: Path, digits: np.ndarray, draw: Callable[[ImageDraw.ImageDraw], None], is_light: bool
) -> None:
    for digit in digits[2:4]:
        page = save_page(digit, tmp_path / "plain.png")
        drawn = page.copy()
        draw(ImageDraw.Draw(drawn))
        lines = Image.fromarray(np.minimum(np.asarray(page), np.asarray(drawn)))
        (ImageOps.invert(lines) if is_light else lines).save(tmp_path / "drawn.png")
        assert difference(tmp_path / "drawn.png", tmp_path / "plain.png") < 8


def test_specks_do_not_matter(tmp_path: Path, digits: np.ndarray) -> None:
    page = save_page(digits[2], tmp_path / "page.png").resize((900, 900)).convert("1", dither=Image.Dither.NONE)
    page.save(tmp_path / "plain.png")
    specks = np.random.default_rng(0).random(page.size) < 0.01
    Image.fromarray(np.asarray(page) & ~specks).save(tmp_path / "specks.png")
    assert difference(tmp_path / "specks.png", tmp_path / "plain.png") < 8


@pytest.mark.parametrize("margins", [(40, 40), (120, 30), (10, 200)])
def test_a_dark_sheet_may_have_light_margins(tmp_path: Path, digits: np.ndarray, margins: tuple[int, int]) -> None:
    for digit in digits:
        page = save_page(digit, tmp_path / "page.png")
        ImageOps.expand(ImageOps.invert(page), margins, 255).save(tmp_path / "negative.png")
        assert difference(tmp_path / "negative.png", tmp_path / "page.png") < 8


@pytest.mark.parametrize(("bold", "margin"), [(0, 0), (6, 5)])
def test_a_digit_that_fills_its_picture_loses_nothing(tmp_path: Path, bold: int, margin: int) -> None:
    font = ImageFont.load_default(200)
    for figure in "0123456789":
        page = Image.new("L", (300, 300), 255)
        ImageDraw.Draw(page).text((150, 150), figure, fill=0, font=font, anchor="mm", stroke_width=bold)
        page.save(tmp_path / "page.png")
        crop = page.crop(ImageOps.invert(page).getbbox())
        ImageOps.expand(crop, margin, 255).save(tmp_path / "crop.png")
        assert difference(tmp_path / "crop.png", tmp_path / "page.png") < 8, figure


def test_what_is_no_digit_fills_the_picture(tmp_path: Path) -> None:
    draw_one((300, 300), 0, 255).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", SHAPE, is_digit=False)[0]
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    assert (rows[0], rows[-1]) == (0, 27)
    assert abs(columns[0] - (27 - columns[-1])) <= 1


@pytest.mark.parametrize("kind", ["bmp", "gif", "tif", "webp"])
def test_the_common_kinds_of_files_are_read_alike(tmp_path: Path, kind: str) -> None:
    draw_one((120, 120), 0, 255).save(tmp_path / f"a.{kind}", lossless=True)  # which webp alone heeds
    draw_one((120, 120), 0, 255).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / f"a.{kind}", SHAPE), read_image(tmp_path / "a.png", SHAPE))


@pytest.mark.parametrize("kind", ["PPM", "ICO", "PCX", "EPS"])
def test_rarer_kinds_of_files_are_not_opened(tmp_path: Path, kind: str) -> None:
    draw_one((60, 60), 0, 255).save(tmp_path / "a.png", kind)
    with pytest.raises(ImageError, match="not a readable image"):
        read_image(tmp_path / "a.png", SHAPE)


def light_from(side: str) -> np.ndarray:
    """Light on a picture of 300x300, from 1 down to a third at the other side, or with a shadow over half of it."""
    fall = np.linspace(1, 1 / 3, 300)
    light: dict[str, np.ndarray] = {
        "left": np.tile(fall, (300, 1)),
        "top": np.tile(fall[:, np.newaxis], (1, 300)),
        "the middle": 1 - np.hypot(*(np.indices((300, 300)) - 149.5)) / 320,
        "beside a shadow": np.where(np.arange(300) < 170, 1, 0.6) * np.ones((300, 1)),
        "with a lit corner": np.where([[x + 2 * y > 320 for x in range(300)] for y in range(300)], 0.6, 1.0),
    }
    return light[side]


@pytest.mark.parametrize("side", ["left", "top", "the middle", "beside a shadow", "with a lit corner"])
@pytest.mark.parametrize("place", [-40, 0, 40])
def test_uneven_light_on_the_paper_does_not_matter(tmp_path: Path, side: str, place: int) -> None:
    page = draw_one((300, 300), 20, 240, offset=60 + place)
    page.save(tmp_path / "even.png")
    lit = np.asarray(page) * light_from(side)
    Image.fromarray(lit.astype(np.uint8)).save(tmp_path / "lit.png")
    even, uneven = (read_image(tmp_path / f"{name}.png", SHAPE).astype(int) for name in ("even", "lit"))
    assert np.abs(even - uneven).mean() < 7


@pytest.mark.parametrize(("ink", "paper"), [(40, 110), (130, 190), (170, 90), (235, 60), (230, 240)])
def test_grey_paper_and_faint_ink_are_told_apart(tmp_path: Path, ink: int, paper: int) -> None:
    draw_one((300, 300), ink, paper).save(tmp_path / "faint.png")
    draw_one((300, 300), 0, 255).save(tmp_path / "clear.png")
    faint, clear = (read_image(tmp_path / f"{name}.png", SHAPE).astype(int) for name in ("faint", "clear"))
    assert np.abs(faint - clear).mean() < 4


def test_thin_strokes_become_as_wide_as_those_of_mnist_and_wide_ones_stay(tmp_path: Path) -> None:
    widths = {}
    for pen in (3, 6, 60):
        image = Image.new("L", (400, 400), 255)
        ImageDraw.Draw(image).line([(200, 100), (200, 300)], fill=0, width=pen)
        image.save(tmp_path / "a.png")
        widths[pen] = read_image(tmp_path / "a.png", SHAPE)[0].sum(axis=1).max() / 255
    assert widths[3] == pytest.approx(1.4, abs=0.6)  # 20 / 14
    assert widths[6] == pytest.approx(1.4, abs=0.6)
    assert widths[60] == pytest.approx(6, abs=0.6)


def test_a_thin_line_on_a_long_strip_is_thickened_in_a_small_picture(tmp_path: Path) -> None:
    image = Image.new("L", (1500, 100), 255)
    ImageDraw.Draw(image).line([(300, 30), (1200, 70)], fill=0, width=2)
    image.save(tmp_path / "strip.png")
    assert (read_image(tmp_path / "strip.png", SHAPE)[0].max(axis=0) > 128).sum() == 20
    assert max(thicken_strokes(255 - np.asarray(image, dtype=np.float32)).shape) == 400


def test_a_small_digit_on_a_large_page_fills_the_box(tmp_path: Path) -> None:
    image = Image.new("L", (1600, 1200), 240)
    ImageDraw.Draw(image).ellipse([1300, 900, 1340, 960], outline=20, width=6)
    noisy = np.asarray(image) + np.random.default_rng(0).normal(0, 5, (1200, 1600))
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpg", quality=85)
    pixels = read_image(tmp_path / "a.jpg", SHAPE)[0]
    rows = np.flatnonzero((pixels > 64).any(axis=1))
    assert 18 <= rows[-1] - rows[0] + 1 <= 20
    assert pixels[14, 14] < 64, "the hole of the zero is closed"


def test_the_rotation_of_a_camera_is_undone(tmp_path: Path) -> None:
    upright = draw_one((120, 120), 0, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    assert np.array_equal(read_image(tmp_path / "turned.png", SHAPE), read_image(tmp_path / "upright.png", SHAPE))


@pytest.mark.parametrize("shade", [0, 255])
def test_what_is_transparent_is_paper_for_black_and_for_white_ink(tmp_path: Path, shade: int) -> None:
    image = Image.new("RGBA", (100, 100), (shade, shade, shade, 0))
    ImageDraw.Draw(image).rectangle([45, 20, 55, 80], fill=(shade, shade, shade, 255))
    image.save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", SHAPE)[0]
    assert pixels[14, 14] > 200
    assert pixels[0, 0] == 0


@pytest.mark.parametrize("is_light", [False, True])
@pytest.mark.parametrize("kind", ["LA", "alpha alone", "palette", "grey", "16 bits"])
def test_whatever_is_declared_transparent_is_paper(
    tmp_path: Path, digits: np.ndarray, kind: str, is_light: bool
) -> None:
    ink = ImageOps.invert(page := save_page(digits[4], tmp_path / "page.png").resize((300, 300)))
    shades, paper = (ink, 0) if is_light else (page, 255)
    file = tmp_path / "a.png"
    if kind == "LA":
        Image.merge("LA", [shades, ink.point(lambda shade: 255 * (shade > 0))]).save(file)
    elif kind == "alpha alone":
        Image.merge("LA", [Image.new("L", ink.size, 255 - paper), ink]).save(file)
    elif kind == "palette":
        shades.quantize(16).save(file, transparency=shades.quantize(16).getpixel((0, 0)))
    elif kind == "grey":
        shades.save(file, transparency=paper)
    else:
        words = np.asarray(shades).astype("<u2") * 257
        Image.frombytes("I;16", ink.size, words.tobytes()).save(file, transparency=paper * 257)
    assert difference(file, tmp_path / "page.png") < 8


def test_a_page_with_transparent_surroundings_is_white(tmp_path: Path, digits: np.ndarray) -> None:
    page = save_page(digits[4], tmp_path / "page.png")
    ImageOps.expand(page.convert("RGBA"), 30, (0, 0, 0, 0)).rotate(3).save(tmp_path / "a.png")
    page.rotate(3, fillcolor=255).save(tmp_path / "turned.png")
    assert difference(tmp_path / "a.png", tmp_path / "turned.png") < 8


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x40broken", b"Exif\0\0"])
def test_broken_exif_is_ignored(tmp_path: Path, exif: bytes) -> None:
    draw_one((120, 120), 0, 255).save(tmp_path / "a.jpg")
    draw_one((120, 120), 0, 255).save(tmp_path / "broken.jpg", exif=exif)
    assert np.array_equal(read_image(tmp_path / "broken.jpg", SHAPE), read_image(tmp_path / "a.jpg", SHAPE))


def test_of_several_pictures_the_first_is_read(tmp_path: Path) -> None:
    first, second = draw_one((120, 120), 0, 255), draw_one((120, 120), 0, 255).rotate(90)
    first.save(tmp_path / "a.png")
    for kind in ("tif", "gif", "webp"):
        first.save(tmp_path / f"a.{kind}", save_all=True, append_images=[second], lossless=True)
        assert np.array_equal(read_image(tmp_path / f"a.{kind}", SHAPE), read_image(tmp_path / "a.png", SHAPE))


@pytest.mark.parametrize("side", [28, 56, 300])
@pytest.mark.parametrize("shade", [0, 90, 255])
@pytest.mark.parametrize("grain", [0, 4])
def test_a_blank_picture_is_refused_whatever_its_size(tmp_path: Path, side: int, shade: int, grain: int) -> None:
    pixels = shade + np.random.default_rng(0).normal(0, grain, (side, side))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpg")
    with pytest.raises(ImageError, match="image has low contrast" if grain else "image is blank"):
        read_image(tmp_path / "a.jpg", SHAPE)


@pytest.mark.parametrize("is_digit", [False, True])
def test_a_drawing_too_faint_to_be_read_is_not_called_blank(tmp_path: Path, is_digit: bool) -> None:
    draw_one((300, 300), 235, 240).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="image has low contrast: nothing stands out"):
        read_image(tmp_path / "a.png", SHAPE, is_digit=is_digit)


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


def test_files_that_are_not_images_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty.png").touch()
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    draw_one((60, 60), 0, 255).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:90])
    for name, reason in (
        ("text.png", "not a readable image"),
        ("empty.png", "file is empty"),
        ("missing.png", "no such file"),
        ("blank.png", "image is blank"),
        ("cut.png", "truncated"),
        (".", "directory"),
    ):
        with pytest.raises(ImageError, match=reason) as caught:
            read_image(tmp_path / name, SHAPE)
        assert str(tmp_path / name) in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="too large"):
        read_image(tmp_path / "whole.png", SHAPE)


def png_of(width: int, height: int, data: bytes) -> bytes:
    """A PNG file whose header says that size, whatever its compressed data hold."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 20_000, 60_000])  # Pillow warns of the first and refuses the others
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(side, side, zlib.compress(bytes(10_000_000))))
    with pytest.raises(ImageError, match=r"bomb\.png: image too large"):
        read_image(tmp_path / "bomb.png", SHAPE)


def test_data_beyond_the_size_of_the_header_are_not_unpacked(tmp_path: Path) -> None:
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(512)) + packer.flush()
    (tmp_path / "more.png").write_bytes(png_of(50, 50, packed))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ImageError):
        read_image(tmp_path / "more.png", SHAPE)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.timeout(20)
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for file in (tmp_path / "pipe.png", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ImageError, match=f"{file}: is not a regular file"):
            read_image(file, SHAPE)


def test_corrupt_files_raise_only_image_errors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in FORMATS:
        draw_one((60, 40), 0, 255).save(tmp_path / "whole", kind)
        whole = np.frombuffer((tmp_path / "whole").read_bytes(), dtype=np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), 3)] = rng.integers(0, 256, 3)
            (tmp_path / "damaged").write_bytes(damaged[: rng.integers(len(whole) // 2, len(whole) + 1)].tobytes())
            with suppress(ImageError):
                assert read_image(tmp_path / "damaged", SHAPE).shape == SHAPE
