"""Converts image files to raw pixels like those that a network was trained on."""

import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hpsearch.data.mnist_images import Pixels, crop_to_ink, remove_paper, scale_and_center, thicken_strokes
from hpsearch.errors import ImageError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
# Pillow raises all of these for corrupt files.
_CORRUPT = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError),
    *(struct.error, zlib.error),
)
_SIDE = 600  # pixels of the shorter side; larger images are shrunk


def read_image(file: Path | str, image_shape: tuple[int, int, int], *, is_digit: bool = True) -> NDArray[np.uint8]:
    """Read an image file of any size as raw pixels, uint8, shape (1, H, W): light ink on a dark background.

    1. Colors become gray, transparent pixels become paper, and the camera's EXIF rotation is applied.
    2. An image that already has the network's size is only inverted, if the median of its border is above 127.
    3. For a digit, the paper is removed, with its shades and shadows that are wider than the strokes. Strokes thinner
       than MNIST's are thickened. The ink's bounding box is scaled into 20x20 of 28x28 pixels, keeping its aspect
       ratio, and its center of mass is centered, as in MNIST (LeCun, Cortes and Burges,
       http://yann.lecun.com/exdb/mnist/).
    4. Any other image is inverted as in 2, its background shade is subtracted, and it is scaled to fill the image, as
       in Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747).

    Raises `ImageError` for a file that is missing, not a regular file, corrupt, blank or too large.
    """
    pixels = _read_grey(Path(file))
    height, width = image_shape[1:]
    if pixels.shape == (height, width):
        pixels = _invert_light_ground(pixels)
    else:
        try:
            ink = thicken_strokes(crop_to_ink(remove_paper(pixels))) if is_digit else _remove_ground(pixels)
            pixels = scale_and_center(ink, height, width, is_digit=is_digit)
        except ImageError as error:
            raise ImageError(f"{file}: {error}") from error
    return np.asarray(pixels.round(), dtype=np.uint8)[np.newaxis]


def _read_grey(file: Path) -> Pixels:
    try:
        if not stat.S_ISREG(mode := file.stat().st_mode):  # a pipe or a device may never end
            raise ImageError(f"{file}: is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return np.asarray(_shrink(_to_grey(ImageOps.exif_transpose(image))), dtype=np.float32)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{file}: image too large: {error}") from error
    except UnidentifiedImageError as error:
        reason = "file is empty" if file.stat().st_size == 0 else "not a readable image"
        raise ImageError(f"{file}: {reason}") from error
    except FileNotFoundError as error:
        raise ImageError(f"{file}: no such file") from error
    except _CORRUPT as error:
        raise ImageError(f"{file}: {getattr(error, 'strerror', None) or error}") from error


def _to_grey(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits per pixel
        return Image.fromarray(np.asarray(image, dtype=np.float32) / np.float32(257))
    if image.has_transparency_data:
        rgba = _shrink(image.convert("RGBA"))
        seen = np.asarray(rgba.convert("L"))[np.asarray(rgba)[..., 3] > 127]
        paper = "black" if len(seen) and seen.mean() > 127 else "white"
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, paper), rgba)
    return image.convert("L")


def _shrink(image: Image.Image) -> Image.Image:
    return image.reduce(max(1, min(image.size) // _SIDE))


def _invert_light_ground(pixels: Pixels) -> Pixels:
    return 255 - pixels if np.median(_border(pixels)) > 127 else pixels


def _border(pixels: Pixels) -> Pixels:
    return np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])


def _remove_ground(pixels: Pixels) -> Pixels:
    pixels = _invert_light_ground(pixels)
    return np.asarray(np.clip(pixels - np.median(_border(pixels)), 0, None))
