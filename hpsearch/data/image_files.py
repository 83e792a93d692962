"""Converts image files to raw pixels like those that a network was trained on."""

import os
import stat
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageStat, UnidentifiedImageError

from hpsearch.data.mnist_images import (
    LOW_CONTRAST,
    MIN_CONTRAST,
    Pixels,
    crop_to_ink,
    is_like_mnist,
    remove_paper,
    remove_stains,
    scale_and_center,
    thicken_strokes,
)
from hpsearch.data.page_lines import cover_table, remove_lines
from hpsearch.errors import ImageError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
# Pillow raises all of these for corrupt files.
CORRUPT = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError),
    *(struct.error, zlib.error),
)
_SIDE = 600  # pixels of the shorter side; larger images are shrunk
_MIN_CONTRAST = 16  # of what is no digit: the grain of its background is not measured
_INVISIBLE = 2  # shades, of 255
_TURN = Image.Transpose
# By EXIF orientation, from 2 on.
_TURNS = (
    *(_TURN.FLIP_LEFT_RIGHT, _TURN.ROTATE_180, _TURN.FLIP_TOP_BOTTOM),
    *(_TURN.TRANSPOSE, _TURN.ROTATE_270, _TURN.TRANSVERSE, _TURN.ROTATE_90),
)
_QUARTER_TURNS = _TURNS[3:]


def read_image(
    image: Path | str | Image.Image, image_shape: tuple[int, int, int], *, is_digit: bool = True
) -> NDArray[np.uint8]:
    """Return an image file or Pillow image of any size as raw pixels, uint8, shape (1, H, W): light ink on dark ground.

    1. Of several pictures in a file, the first is read. The camera's EXIF rotation is applied. Colors become gray,
       values of more than 8 bits are scaled to 8 bits, and transparent pixels become paper.
    2. A digit that already has the network's size, and is placed like those of MNIST, is only inverted, if the median
       of its border is above 127. So is any other image of the network's size.
    3. For a digit, the paper is removed, with its shades and shadows that are wider than the strokes, and with frames,
       ruled lines and dark edges. Strokes thinner than MNIST's are thickened. The ink's bounding box is scaled into
       20x20 of 28x28 pixels, keeping its aspect ratio, and its center of mass is centered, as in MNIST (LeCun, Cortes
       and Burges, http://yann.lecun.com/exdb/mnist/).
    4. Any other image is inverted as in 2, its background shade is subtracted, and it is scaled to fill the image, as
       in Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747).

    Raises `ImageError` for a file that is missing, not a regular file, corrupt, blank, too faint or too large.
    """
    height, width = image_shape[1:]
    with name_in_errors(image):
        with open_image(image) as (picture, _):
            pixels = _to_grey(picture)
        contrast = np.ptp(pixels)
        if contrast < (MIN_CONTRAST if is_digit else _MIN_CONTRAST):
            raise ImageError(LOW_CONTRAST if contrast > _INVISIBLE else "image is blank")
        upright = _invert_light_ground(pixels)
        if pixels.shape == (height, width) and (not is_digit or is_like_mnist(upright)):
            pixels = upright
        else:
            ink = _find_digit(pixels) if is_digit else _remove_ground(upright)
            pixels = scale_and_center(ink, height, width, is_digit=is_digit)
    return np.asarray(pixels.round(), dtype=np.uint8)[np.newaxis]


def _find_digit(pixels: Pixels) -> Pixels:
    bare = 255 - cover_table(255 - cover_table(pixels))  # a dark sheet may have light margins
    ink = remove_stains(remove_lines(remove_paper(bare)))
    return thicken_strokes(crop_to_ink(ink))


class _PillowWarnings:
    """Makes Pillow's warning of a bomb an error and ignores all other warnings, while any thread is in the context.

    The filters belong to the process. If each thread set and restored them, one would do so under another one.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_inside = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._n_inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
            self._n_inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                self._filters.__exit__(None, None, None)


PILLOW_WARNINGS = _PillowWarnings()


@contextmanager
def name_in_errors(image: Path | str | Image.Image) -> Iterator[None]:
    """Begin each `ImageError` of the block with the name of the file."""
    try:
        yield
    except ImageError as error:
        raise error if isinstance(image, Image.Image) else ImageError(f"{image}: {error}") from error


@contextmanager
def open_image(
    source: Path | str | BinaryIO | Image.Image, side: int | None = None
) -> Iterator[tuple[Image.Image, tuple[int, int]]]:
    """Yield the first picture of a file, loaded and turned upright, and its height and width in the file.

    With `side`, a JPEG file may be decoded at a half, quarter or eighth of its size, but not smaller than `side`
    pixels, which is faster. Raises `ImageError` for all that Pillow raises, in the block as well.
    """
    try:
        if isinstance(source, Image.Image):
            yield _turn_upright(source, source.size)
            return
        if isinstance(source, Path | str) and not stat.S_ISREG(mode := Path(source).stat().st_mode):
            # a pipe or a device may never end
            raise ImageError(f"is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}")
        with PILLOW_WARNINGS, Image.open(source, formats=FORMATS) as image:
            size = image.size
            if side is not None:
                image.draft(None, (side, side))
            yield _turn_upright(image, size)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"image too large: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError("file is empty" if _is_empty(source) else "not a readable image") from error
    except FileNotFoundError as error:
        raise ImageError("no such file") from error
    except CORRUPT as error:
        raise ImageError(getattr(error, "strerror", None) or str(error)) from error


def _is_empty(source: Path | str | BinaryIO | Image.Image) -> bool:
    if isinstance(source, Path | str):
        return Path(source).stat().st_size == 0
    return not isinstance(source, Image.Image) and source.seek(0, os.SEEK_END) == 0


def _turn_upright(image: Image.Image, size: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
    """Apply the EXIF rotation to a picture of a width and height, and return its height and width after that.

    Like a viewer, it ignores broken EXIF, at which Pillow's `exif_transpose` fails.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except CORRUPT:
        orientation = None
    turns: dict[Any, Image.Transpose] = dict(enumerate(_TURNS, 2))
    width, height = size
    if (turn := turns.get(orientation)) is None:
        return image, (height, width)
    return image.transpose(turn), (width, height) if turn in _QUARTER_TURNS else (height, width)


def _to_grey(image: Image.Image) -> Pixels:
    if image.mode[0] in "IF":  # integers of 16 or 32 bits, or floats
        values = image.convert("I") if ";" in image.mode else image
        grey = scale_to_8_bits(values, _pixels(_shrink(values)))
        if "transparency" in image.info:
            is_opaque = Image.fromarray(np.asarray(image) != image.info["transparency"])
            return _lay_on_paper(grey, _pixels(_shrink(is_opaque.convert("L"))) / np.float32(255))
        return grey
    if image.has_transparency_data:
        rgba = _shrink(image.convert("RGBA"))
        return _lay_on_paper(_pixels(rgba.convert("L")), _pixels(rgba.getchannel("A")) / np.float32(255))
    if image.mode in ("1", "L"):
        return _pixels(_shrink(image.convert("L")))
    colors = _shrink(image.convert("RGB"))
    shades, best = colors.convert("L"), max(colors.split(), key=_spread)
    return _pixels(best if _spread(best) > 2 * _spread(shades) else shades)


def _spread(channel: Image.Image) -> float:
    return ImageStat.Stat(channel).stddev[0]


def scale_to_8_bits(image: Image.Image, values: Pixels) -> Pixels:
    """Return the values of an image, or of a smaller copy, from 0 for black to 255 for white.

    White is 1 or the largest value for floats, and the largest of as many bits as they take for integers. Raises
    `ImageError` for values that are no shades of gray.
    """
    low, high = np.array(image.getextrema()).tolist()
    is_float = image.mode == "F"
    if not np.isfinite(values).all():
        raise ImageError("pixel values that are infinite or not a number cannot be read as shades of gray")
    if low < 0 and not is_float:
        raise ImageError(f"pixel values from {low:g} to {high:g} cannot be read as shades of gray")
    if is_float and low < 0:  # normalized
        white = max(high, low + 1e-6)
    elif is_float and high <= 16:
        low, white = 0, max(high, 1)
    else:
        low, white = 0, 2 ** max(8, int(high).bit_length()) - 1
    return np.asarray(((values - low) * (255 / (white - low))).clip(0, 255), dtype=np.float32)


def _lay_on_paper(grey: Pixels, opacity: Pixels) -> Pixels:
    """Return a picture on paper: white for dark ink, and black for light ink.

    Where both are seen, the paper is white if the pixels beside the transparent ones are lighter than the others.
    """
    from scipy import ndimage

    seen = opacity > 0.5
    light = (grey[seen] > 127).mean() if seen.any() else 0
    is_white = light < 0.5
    beside = seen & ndimage.binary_dilation(~seen, np.ones((3, 3)))
    if 0.005 < light < 0.995 and (inside := seen & ~beside).any() and beside.any():
        is_white = grey[beside].mean() > grey[inside].mean()
    return grey * opacity + (255 * (1 - opacity) if is_white else 0)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, dtype=np.float32)


def _shrink(image: Image.Image) -> Image.Image:
    return image.reduce(max(1, min(image.size) // _SIDE))


def _invert_light_ground(pixels: Pixels) -> Pixels:
    return 255 - pixels if np.median(_border(pixels)) > 127 else pixels


def _border(pixels: Pixels) -> Pixels:
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _remove_ground(pixels: Pixels) -> Pixels:
    return np.asarray(np.clip(pixels - np.median(_border(pixels)), 0, None))
