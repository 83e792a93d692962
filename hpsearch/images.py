"""Image files brought to the raw pixels that a network was trained on."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from hpsearch.errors import ImageError

_BOX = 20 / 28  # MNIST scales a digit into a box of 20x20 pixels of its 28x28


def read_image(file: Path | str, image_shape: tuple[int, int, int], *, is_digit: bool = True) -> NDArray[np.uint8]:
    """The raw pixels of a PNG or JPEG file of any size, uint8, shape (1, H, W): light ink on a dark ground.

    1. Colours become grey; what is transparent becomes white paper; a camera's rotation is undone.
    2. Dark on light is inverted: the ground is light if the median of the picture's border is above 127.
    3. A picture that already has the network's size goes on as it is.
    4. Of any other, the ground's shade is taken out and the ink's bounding box is scaled, keeping its proportions. A
       digit goes into 20x20 of 28x28 pixels, with its centre of mass in the middle, the way MNIST was made (LeCun,
       Cortes and Burges, http://yann.lecun.com/exdb/mnist/). Anything else fills the picture, centred, the way of
       Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, https://arxiv.org/abs/1708.07747).

    Raises `ImageError` for a file that is missing, damaged, blank or absurdly large.
    """
    pixels = _read_grey(Path(file))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(border) > 127:
        pixels, border = 255 - pixels, 255 - border
    height, width = image_shape[1:]
    if pixels.shape != (height, width):
        try:
            pixels = place(np.clip(pixels - np.median(border), 0, None), height, width, is_digit=is_digit)
        except ImageError as error:
            raise ImageError(f"{file}: {error}") from error
    return np.asarray(pixels.round(), dtype=np.uint8)[np.newaxis]


def _read_grey(file: Path) -> NDArray[np.float32]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(file, formats=("PNG", "JPEG"))
        with image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16 bits a pixel
                return np.asarray(upright, dtype=np.float32) / np.float32(257)
            if upright.has_transparency_data:
                rgba = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
            return np.asarray(upright.convert("L"), dtype=np.float32)
    except FileNotFoundError as error:
        raise ImageError(f"{file}: no such file") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{file}: too large an image: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
        reason = "not an image that can be read" if isinstance(error, UnidentifiedImageError) else error
        raise ImageError(f"{file}: {reason}") from error


def place(
    pixels: NDArray[np.float32], height: int = 28, width: int = 28, *, is_digit: bool = True
) -> NDArray[np.float32]:
    """Ink on a ground of 0, its bounding box scaled and centred as step 4 of `read_image` says.

    Shape (H, W), any size in, (height, width) out, values up to 255. Raises `ImageError` if there is no ink.
    """
    ink = pixels * (255 / max(float(pixels.max()), 16))
    # The grain of paper and of JPEG must not stretch the box, so it is found in a smoothed picture.
    smooth = Image.fromarray(ink.astype(np.uint8)).filter(ImageFilter.GaussianBlur(min(ink.shape) / 140))
    is_ink = np.asarray(smooth) > max(16, np.asarray(smooth).max() / 4)
    rows, columns = np.flatnonzero(is_ink.any(axis=1)), np.flatnonzero(is_ink.any(axis=0))
    ink[ink < 32] = 0
    cropped = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else ink[:0]
    if not cropped.any():
        raise ImageError("blank, there is nothing to classify")
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
