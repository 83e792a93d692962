"""Converts image files to raw pixels like those that a network was trained on, and handwriting to MNIST's format."""

import stat
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from hpsearch.errors import ImageError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP")
# Pillow raises all of these for corrupt files.
_CORRUPT = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError),
    *(struct.error, zlib.error),
)
_SIDE = 600  # pixels of the shorter side; larger images are shrunk
_BOX = 20 / 28  # MNIST scales a digit to 20x20 of its 28x28 pixels
_PEN = 1 / 14  # minimum stroke width, as a share of the box's side; MNIST's is about 1/8
Pixels = NDArray[np.float32]


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
            ink = _thicken_strokes(_crop_to_ink(_remove_paper(pixels))) if is_digit else _remove_ground(pixels)
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


def _remove_paper(pixels: Pixels) -> Pixels:
    """Return light ink on a background of 0, for any paper and lighting.

    In a small copy, a morphological closing (dark ink) or opening (light ink) removes everything narrower than half
    the image. The pixels that it changes most are ink; under them, the shade of the nearest paper pixel is assumed.
    """
    from scipy import ndimage

    small = _resize(pixels, 96)
    is_dark = _has_dark_ink(_resize(pixels, 32))
    window = [side // 2 + 1 for side in small.shape]
    # Odd reflection continues a gradient of light, so that closing and opening leave it unchanged.
    padded = np.pad(small, [(side, side) for side in window], mode="reflect", reflect_type="odd")
    padded = padded.clip(small.min(), small.max())
    closed = (ndimage.grey_closing if is_dark else ndimage.grey_opening)(padded, window)
    change = np.abs(closed[tuple(slice(side, -side) for side in window)] - small)
    is_ink = ndimage.grey_dilation(change > change.max() / 2, (3, 3))
    nearest = ndimage.distance_transform_edt(is_ink, return_distances=False, return_indices=True)
    paper = ndimage.gaussian_filter(small[tuple(nearest)], 1)
    paper = np.asarray(Image.fromarray(paper).resize(pixels.shape[::-1], Image.Resampling.BILINEAR))
    # Light multiplies dark ink, so that ink in a shadow is as black as elsewhere; chalk on a blackboard adds to it.
    ink = 255 * (1 - pixels / np.maximum(paper, 16)) if is_dark else pixels - paper
    return _remove_stains(np.asarray(np.clip(ink, 0, None)))


def _remove_stains(ink: Pixels) -> Pixels:
    """Remove parts that are faint throughout, such as the remains of a shadow."""
    from scipy import ndimage

    parts, _ = ndimage.label(ink > ink.max() / 4, np.ones((3, 3)))
    is_stain = np.isin(parts, np.unique(parts[ink > ink.max() / 2]), invert=True)
    return np.where(is_stain, np.float32(0), ink)


def _has_dark_ink(small: Pixels) -> bool:
    """Return whether the pixels that differ most from their local median are darker than it."""
    from scipy import ndimage

    return bool(((small - ndimage.median_filter(small, [side // 2 + 1 for side in small.shape])) ** 3).mean() < 0)


def _resize(pixels: Pixels, longer_side: int) -> Pixels:
    scale = min(1, longer_side / max(pixels.shape))
    height, width = (max(1, round(side * scale)) for side in pixels.shape)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))


def _crop_to_ink(ink: Pixels) -> Pixels:
    """Crop to the ink with a margin, so that its bounds can be found more precisely."""
    rows, columns = _bounds(ink)
    margin = 2 + (rows.stop - rows.start + columns.stop - columns.start) // 8
    return ink[max(rows.start - margin, 0) : rows.stop + margin, max(columns.start - margin, 0) : columns.stop + margin]


def _thicken_strokes(ink: Pixels) -> Pixels:
    """Dilate the ink until its strokes are at least `_PEN` wide."""
    from scipy import ndimage

    rows, columns = _bounds(ink)
    side = max(rows.stop - rows.start, columns.stop - columns.start)
    is_ink = ink > ink.max() / 3
    width = 4 * float(ndimage.distance_transform_edt(is_ink)[is_ink].mean()) - 1
    missing = round(_PEN * side - width)
    return ndimage.grey_dilation(ink, footprint=_disc(missing + 1)) if missing > 0 else ink


def _disc(width: int) -> NDArray[np.bool_]:
    y, x = np.indices((width, width)) - (width - 1) / 2
    return np.asarray(np.hypot(y, x) <= width / 2)


def scale_and_center(pixels: Pixels, height: int = 28, width: int = 28, *, is_digit: bool = True) -> Pixels:
    """Scale and center the bounding box of ink on a background of 0, as in steps 3 and 4 of `read_image`.

    The input shape (H, W) becomes (height, width), with values up to 255. Raises `ImageError` if there is no ink.
    """
    ink = pixels * (255 / max(float(pixels.max()), 16))
    bounds = _bounds(ink)
    ink[ink < 32] = 0
    cropped = ink[bounds]
    if not cropped.any():
        raise ImageError("image is blank")
    scale = (_BOX if is_digit else 1.0) * min(height / cropped.shape[0], width / cropped.shape[1])
    new_height, new_width = (max(1, round(side * scale)) for side in cropped.shape)
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(cropped).resize((new_width, new_height), method), dtype=np.float32)
    y, x = (new_height - 1) / 2, (new_width - 1) / 2
    if is_digit:
        y, x = (np.indices(small.shape) * small).sum(axis=(1, 2)) / small.sum()
    top = int(np.clip(round((height - 1) / 2 - y), 0, height - new_height))
    left = int(np.clip(round((width - 1) / 2 - x), 0, width - new_width))
    placed = np.zeros((height, width), dtype=np.float32)
    placed[top : top + new_height, left : left + new_width] = small
    return placed


def _bounds(ink: Pixels) -> tuple[slice, slice]:
    """Return the rows and columns of the ink; smoothing keeps paper grain and JPEG noise from stretching them."""
    smooth = Image.fromarray(ink.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(min(ink.shape) / 140))
    is_ink = np.asarray(smooth) > max(16, np.asarray(smooth).max() / 4)
    rows, columns = np.flatnonzero(is_ink.any(axis=1)), np.flatnonzero(is_ink.any(axis=0))
    if not len(rows):
        raise ImageError("image is blank")
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
