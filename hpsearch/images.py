"""Image files brought to the raw pixels that a network was trained on."""

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hpsearch.errors import ImageError

_BOX = 20 / 28  # MNIST scales a digit into a box of 20x20 pixels of its 28x28


def read_image(file: Path | str, image_shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """The raw pixels of a PNG or JPEG file of any size, uint8, shape (1, H, W): light ink on a dark ground.

    1. Colours become grey; what is transparent becomes white paper; a camera's rotation is undone.
    2. Dark on light is inverted: the ground is light if the median of the picture's border is above 127.
    3. A picture that already has the network's size goes on as it is.
    4. Any other is brought to it the way MNIST was made: the ground's shade is taken out, the bounding box of the ink
       is scaled, keeping its proportions, into 20x20 of 28x28 pixels, and its centre of mass is put in the middle
       (LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist/).

    Raises `ImageError` for a file that is missing, damaged, blank or absurdly large.
    """
    pixels = _read_grey(Path(file))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    if np.median(border) > 127:
        pixels, border = 255 - pixels, 255 - border
    height, width = image_shape[1:]
    if pixels.shape != (height, width):
        try:
            pixels = place_like_mnist(np.clip(pixels - np.median(border), 0, None), height, width)
        except ImageError as error:
            raise ImageError(f"{file}: {error}") from error
    return np.asarray(pixels.round(), dtype=np.uint8)[np.newaxis]


def _read_grey(file: Path) -> NDArray[np.float32]:
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
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


def place_like_mnist(pixels: NDArray[np.float32], height: int = 28, width: int = 28) -> NDArray[np.float32]:
    """Ink on a ground of 0, scaled into 20/28 of the new size and moved so that its centre of mass is in the middle.

    Shape (H, W), any size in, (height, width) out, values up to 255. Raises `ImageError` if there is no ink.
    """
    ink = pixels * (255 / max(float(pixels.max()), 16))
    ink[ink < 32] = 0  # the grain of paper
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(rows):
        raise ImageError("blank, there is nothing to classify")
    cropped = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = _BOX * min(height / cropped.shape[0], width / cropped.shape[1])
    new_height, new_width = (max(1, round(side * scale)) for side in cropped.shape)
    method = Image.Resampling.BOX if scale < 1 else Image.Resampling.BILINEAR
    small = np.asarray(Image.fromarray(cropped).resize((new_width, new_height), method), dtype=np.float32)
    y, x = (np.indices(small.shape) * small).sum(axis=(1, 2)) / small.sum()
    top = int(np.clip(round((height - 1) / 2 - y), 0, height - new_height))
    left = int(np.clip(round((width - 1) / 2 - x), 0, width - new_width))
    placed = np.zeros((height, width), dtype=np.float32)
    placed[top : top + new_height, left : left + new_width] = small
    return placed
