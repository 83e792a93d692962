"""One file of the user's own to pixels: every kind of picture as a viewer shows it, and what is wrong with a file."""

import hashlib
import os
import shutil
import stat
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpsearch.data.image_files import FORMATS
from hpsearch.data.photos import Look, look_at, read_photo
from hpsearch.errors import ImageError
from tests.data.test_image_files import png_of

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
_NOBODY = 65534
PICTURE = Image.fromarray(PIXELS)


@contextmanager
def as_nobody() -> Iterator[Path]:
    """Run the block with no more rights than other users have, and yield a folder of this user."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        if user == 0:
            os.chown(folder, _NOBODY, -1)
            os.seteuid(_NOBODY)
        try:
            yield Path(folder)
        finally:
            os.seteuid(user)


def read(file: Path, size: tuple[int, int] | None = None, color: str = "rgb") -> np.ndarray:
    return read_photo(file, size=size, color=color)


def test_a_file_of_the_wanted_size_keeps_its_pixels(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    grey = PICTURE.convert("L")
    grey.save(tmp_path / "grey.png")
    for size in (None, (20, 30)):
        assert np.array_equal(read(tmp_path / "a.png", size), PIXELS.transpose(2, 0, 1))
        assert np.array_equal(read(tmp_path / "grey.png", size, "grey"), np.asarray(grey)[None])
        assert np.array_equal(read(tmp_path / "a.png", size, "grey"), np.asarray(grey)[None])
    assert np.array_equal(read_photo(PICTURE, size=(20, 30), color="rgb"), PIXELS.transpose(2, 0, 1))


def test_a_picture_is_scaled_with_its_proportions_and_its_centre_is_cropped(tmp_path: Path) -> None:
    picture = Image.new("RGB", (600, 200), "red")
    picture.paste("blue", (200, 0, 400, 200))
    picture.save(tmp_path / "wide.png")
    picture.rotate(90, expand=True).save(tmp_path / "high.png")
    picture.resize((12, 4)).save(tmp_path / "small.png")
    for name in ("wide", "high", "small"):
        pixels = read(tmp_path / f"{name}.png", (32, 32))
        assert pixels.shape == (3, 32, 32)
        assert pixels[2, 4:-4, 4:-4].min() > 240
    assert read(tmp_path / "wide.png", (10, 30))[0].max(axis=0).tolist()[::14] == [255, 0, 255]


@pytest.mark.parametrize("mode", ["CMYK", "P", "RGBA", "YCbCr", "L", "1", "LA", "I;16", "I", "F"])
def test_every_mode_is_read_like_plain_color(tmp_path: Path, mode: str) -> None:
    plain = Image.new("RGB", (40, 40), "black")
    plain.paste("white", (0, 0, 40, 20))
    if mode in ("I;16", "I", "F"):
        white = {"I;16": 65535, "I": 65535, "F": 1.0}[mode]
        values = (np.asarray(plain.convert("L")) / 255 * white).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode])
        Image.fromarray(values).save(tmp_path / "a.tif")
    else:
        plain.convert(mode).save(tmp_path / ("a.jpg" if mode == "YCbCr" else "a.tif"))
    [file] = tmp_path.iterdir()
    assert abs(read(file, (8, 8)).astype(int) - read_photo(plain, size=(8, 8), color="rgb")).max() <= 2
    assert read(file, (8, 8), "grey").shape == (1, 8, 8)
    assert look_at(file)[1:4] == (40, 40, "grey")


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    if mode == "RGBA":
        picture = Image.new("RGBA", (10, 10), (200, 0, 0, 0))
        picture.paste((0, 0, 200, 255), (0, 0, 10, 5))
        picture.save(tmp_path / "a.png")
    elif mode == "P":
        picture = Image.new("P", (10, 10), 1)
        picture.putpalette([0, 0, 200, 0, 0, 0])
        picture.paste(0, (0, 0, 10, 5))
        picture.save(tmp_path / "a.gif", transparency=1)
    else:
        values = np.full((10, 10), 999, np.uint16)
        values[0] = 65535
        values[1:5] = 0
        Image.fromarray(values).save(tmp_path / "a.png", transparency=999)
    [file] = tmp_path.iterdir()
    pixels = read(file)
    assert pixels[:, 6:].min() == 255
    assert pixels[:2, 1:4].max() == 0


def test_a_picture_is_turned_upright_and_only_the_first_of_a_file_is_read(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURE.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read(tmp_path / "turned.png"), np.rot90(PIXELS, -1).transpose(2, 0, 1))
    assert look_at(tmp_path / "turned.png")[1:3] == (30, 20)
    PICTURE.save(tmp_path / "moving.webp", save_all=True, append_images=[PICTURE.rotate(180)], lossless=True)
    assert np.array_equal(read(tmp_path / "moving.webp"), PIXELS.transpose(2, 0, 1))


def test_a_large_photo_is_decoded_smaller_and_looks_the_same(tmp_path: Path) -> None:
    y, x = np.mgrid[:1200, :1600]
    pixels = np.stack([x / 1600, y / 1200, (x + y) / 2800], -1) * 255
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    Image.fromarray(np.rot90(pixels).astype(np.uint8)).save(tmp_path / "a.png")
    assert look_at(tmp_path / "a.jpg")[1:] == (1600, 1200, "rgb", "")
    difference = read(tmp_path / "a.jpg", (48, 64)).astype(int) - read(tmp_path / "a.png", (48, 64))
    assert abs(difference).max() <= 6


@pytest.mark.parametrize("kind", FORMATS)
def test_a_look_has_the_digest_of_the_bytes_the_size_and_the_color(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"a.{kind}"
    PICTURE.save(file, kind)
    assert look_at(file) == Look(hashlib.sha256(file.read_bytes()).hexdigest()[:16], 20, 30, "rgb")
    PICTURE.convert("L").convert("RGB").save(file, kind)
    assert look_at(file).color == "grey"
    shutil.copy(file, tmp_path / "no suffix")
    assert look_at(tmp_path / "no suffix") == (Look() if kind == "TIFF" else look_at(file))
    file.write_bytes(file.read_bytes()[:-100])
    assert look_at(file).problem


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda file: file.touch(), "file is empty"),
        (lambda file: file.write_text("no image"), "not a readable image"),
        (lambda file: PICTURE.save(file, "ICNS"), "not a readable image"),
        (lambda file: file.write_bytes(png_of(20_000, 20_000, zlib.compress(bytes(1000)))), "image too large"),
        (lambda file: file.write_bytes(png_of(50, 50, b"")), ""),
        (lambda file: file.symlink_to("nowhere.png"), "is a link to a missing file"),
    ],
)
def test_a_look_says_what_is_wrong_and_the_file_cannot_be_read(
    tmp_path: Path, write: Callable[[Path], None], problem: str
) -> None:
    file = tmp_path / "a.png"
    write(file)
    look = look_at(file)
    assert problem in look.problem
    assert look.problem
    assert str(tmp_path) not in look.problem
    with pytest.raises(ImageError, match=r"^/.*a\.png: "):
        read(file)


def test_a_file_that_may_not_be_read_is_a_problem() -> None:
    with as_nobody() as folder:
        PICTURE.save(folder / "a.png")
        (folder / "a.png").chmod(stat.S_IWUSR)
        assert look_at(folder / "a.png") == Look(problem="Permission denied")


def test_threads_that_look_at_files_refuse_every_bomb_and_leave_the_warnings_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png_of(10_000, 10_000, zlib.compress(bytes(1000))))  # Pillow only warns of it
    PICTURE.save(tmp_path / "a.png")
    before = warnings.filters[:]
    with ThreadPoolExecutor(8) as pool:
        looks = list(pool.map(look_at, [tmp_path / "bomb.png", tmp_path / "a.png"] * 500))
    assert all("image too large" in look.problem for look in looks[::2])
    assert not any(look.problem for look in looks[1::2])
    assert warnings.filters == before
