"""One image file of the user's own to pixels, and what is known of it before."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from hpsearch.data.image_files import CORRUPT, FORMATS, PILLOW_WARNINGS, name_in_errors, open_image, scale_to_8_bits
from hpsearch.data.inventory import N_DIGITS
from hpsearch.errors import ImageError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")
SUFFIXES = (*_JPEG, ".png", ".apng", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp")  # of the formats that are read
_SNIFFED = tuple(kind for kind in FORMATS if kind != "TIFF")  # raw files of cameras begin like TIFF files
_SIDE = 256  # pixels of the picture whose colors are compared
_GRAIN = 2  # shades of 255, by which WEBP changes the channels of a gray picture

Color = Literal["grey", "rgb"]


class Look(NamedTuple):
    """What is known of a file: a digest of its bytes, the size of its picture, and why it cannot be read.

    `color` is "grey" also for files whose color channels are alike. A file that is no image, by its suffix
    and by its content, has no color and no problem.
    """

    digest: str = ""
    height: int = 0
    width: int = 0
    color: str = ""
    problem: str = ""

    @property
    def is_image(self) -> bool:
        return bool(self.color or self.problem)


def look_at(file: Path | str) -> Look:
    """Read a file completely, and return what is known of it. Raises nothing: `problem` says what is wrong.

    The digest is the first 16 hex digits of the SHA-256 of its bytes, or empty if they cannot be read.
    """
    digest, has_suffix = "", Path(file).suffix.lower() in SUFFIXES
    try:
        with Path(file).open("rb") as stream:
            if not has_suffix and not _begins_as_image(stream):
                return Look()
            digest = _digest(stream)
            with open_image(stream, _SIDE) as (picture, (height, width)):
                color = _find_color(picture)
        return Look(digest, height, width, color)
    except ImageError as error:
        return Look(digest, problem=str(error))
    except OSError as error:
        if not has_suffix:
            return Look()
        is_dangling = isinstance(error, FileNotFoundError) and Path(file).is_symlink()
        return Look(digest, problem="is a link to a missing file" if is_dangling else error.strerror or str(error))


def read_photo(
    image: Path | str | Image.Image, *, size: tuple[int, int] | None, color: str, digest: str = ""
) -> NDArray[np.uint8]:
    """Return an image file or Pillow image as pixels, uint8, of shape (3, H, W) for "rgb" or (1, H, W) for "grey".

    The first picture of a file is read and turned upright. It is scaled to fill the `size`, height and width, with its
    proportions kept, and its centre is cropped; one that has the size already, or without `size`, keeps its pixels.
    Values of more than 8 bits are scaled to 8 bits, and transparent pixels become white. Raises `ImageError`, also for
    a file whose bytes have another `digest`.
    """
    # Twice the size, so that most of the shrinking is not done by the decoder.
    side = None if size is None else 2 * max(size)
    with name_in_errors(image), _open(image, digest) as source, open_image(source, side) as (picture, _):
        plain = _to_plain_mode(picture)
        if size is not None and plain.size != (size[1], size[0]):
            plain = ImageOps.fit(plain, (size[1], size[0]))
        pixels = np.asarray(_lay_on_white(plain).convert("RGB" if color == "rgb" else "L"))
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) if color == "rgb" else pixels[np.newaxis].copy()


@contextmanager
def _open(image: Path | str | Image.Image, digest: str) -> Iterator[Path | str | BinaryIO | Image.Image]:
    """Yield what to read: an open file if it must have a digest, so that what is read is what was compared."""
    if not digest or isinstance(image, Image.Image):
        yield image
        return
    try:
        with Path(image).open("rb") as stream:
            if _digest(stream) != digest:
                raise ImageError("has changed since the other files were looked at; run the command again")
            yield stream
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


def _digest(stream: BufferedReader) -> str:
    """Return the digest of a file, and go back to its beginning."""
    stream.seek(0)
    digest = hashlib.file_digest(stream, "sha256").hexdigest()[:N_DIGITS]
    stream.seek(0)
    return digest


def _begins_as_image(stream: BinaryIO) -> bool:
    try:
        with PILLOW_WARNINGS, Image.open(stream, formats=_SNIFFED):
            return True
    except UnidentifiedImageError:
        return False
    except OSError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, *CORRUPT):
        return True


def _find_color(picture: Image.Image) -> Color:
    plain = _to_plain_mode(picture)
    if plain.mode == "L":
        return "grey"
    shrunk = plain.reduce(max(1, min(plain.size) // _SIDE))
    pixels = np.asarray(_lay_on_white(shrunk))
    return "grey" if (np.ptp(pixels, axis=-1) <= _GRAIN).all() else "rgb"


def _to_plain_mode(picture: Image.Image) -> Image.Image:
    """Return a picture of 8 bits, in gray (L), in color (RGB), or in color with transparency (RGBA)."""
    if picture.mode[0] in "IF":  # integers of 16 or 32 bits, or floats
        values = picture.convert("I") if ";" in picture.mode else picture
        shades = scale_to_8_bits(values, np.asarray(values, dtype=np.float32)).round().astype(np.uint8)
        if "transparency" in picture.info:
            shades[np.asarray(picture) == picture.info["transparency"]] = 255
        return Image.fromarray(shades)
    if picture.has_transparency_data:
        return picture.convert("RGBA")
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def _lay_on_white(plain: Image.Image) -> Image.Image:
    if plain.mode != "RGBA":
        return plain
    return Image.alpha_composite(Image.new("RGBA", plain.size, "white"), plain).convert("RGB")
