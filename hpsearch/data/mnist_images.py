"""Converts handwriting to MNIST's format: removes the paper, thickens strokes, scales and centers the digit."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from hpsearch.errors import ImageError

_BOX = 20 / 28  # MNIST scales a digit to 20x20 of its 28x28 pixels
_PEN = 1 / 14  # minimum stroke width, as a share of the box's side; MNIST's is about 1/8
MIN_CONTRAST = 8  # shades, of 255, between ink and paper
_ROUNDING = 3 / 8  # the grain of paper of one shade, since shades are whole numbers
LOW_CONTRAST = "image has low contrast: nothing stands out from the background"
Pixels = NDArray[np.float32]


def remove_paper(pixels: Pixels) -> Pixels:
    """Return light ink on a background of 0, for any paper and lighting; faint ink becomes lighter.

    Raises `ImageError` if there is no ink.
    """
    small = resize(pixels, 96)
    is_dark = _has_dark_ink(resize(pixels, 32))
    paper = _estimate_even_paper(small, is_dark)
    if paper is None:
        paper = _estimate_paper(small, is_dark)
    paper = np.asarray(Image.fromarray(paper).resize(pixels.shape[::-1], Image.Resampling.BILINEAR))
    # Light multiplies dark ink, so that ink in a shadow is as black as elsewhere; chalk on a blackboard adds to it.
    ink = np.asarray(255 * (1 - pixels / np.maximum(paper, 16)) if is_dark else pixels - paper, dtype=np.float32)
    _check_for_ink(ink)
    return np.asarray(ink.clip(0, None) * max(1, 64 / ink.max()))


def _estimate_even_paper(small: Pixels, is_dark: bool) -> Pixels | None:
    """Return the shade of the paper everywhere if it is the same, whatever share of the picture the ink has."""
    from scipy import ndimage

    shades = small if is_dark else -small
    contrast = np.ptp(shades)
    is_flat = ndimage.morphological_gradient(shades, 3) < contrast / 16
    is_light = shades > shades.min() + contrast / 2
    at_border = ~ndimage.binary_erosion(np.ones_like(is_light))
    paper, dark = small[is_flat & is_light], shades[is_flat & ~is_light & at_border]
    if len(paper) < 16 or np.ptp(np.percentile(paper, [5, 95])) > contrast / 10:
        return None
    if len(dark) and np.median(dark) - shades.min() > contrast / 4:  # lighter than ink: a shadow
        return None
    return np.full_like(small, np.median(paper))


def _estimate_paper(small: Pixels, is_dark: bool) -> Pixels:
    """Return the shade of the paper at each pixel.

    A morphological closing (dark ink) or opening (light ink) removes everything narrower than half the image. The
    pixels that it changes most are ink; under them, the shade of the nearest paper pixel is assumed.
    """
    from scipy import ndimage

    window = [side // 2 + 1 for side in small.shape]
    # Odd reflection continues a gradient of light, so that closing and opening leave it unchanged.
    padded = np.pad(small, [(side, side) for side in window], mode="reflect", reflect_type="odd")
    padded = padded.clip(small.min(), small.max())
    closed = (ndimage.grey_closing if is_dark else ndimage.grey_opening)(padded, window)
    change = np.abs(closed[tuple(slice(side, -side) for side in window)] - small)
    is_ink = ndimage.grey_dilation(change > change.max() / 2, (3, 3))
    nearest = ndimage.distance_transform_edt(is_ink, return_distances=False, return_indices=True)
    return np.asarray(ndimage.gaussian_filter(small[tuple(nearest)], 1))


def is_like_mnist(pixels: Pixels) -> bool:
    """Return whether light ink on black is placed as in MNIST: 20 pixels high or wide, around its center of mass."""
    try:
        rows, columns = _bounds(pixels)
    except ImageError:
        return False
    side = max(rows.stop - rows.start, columns.stop - columns.start)
    offset = (np.indices(pixels.shape) * pixels).sum(axis=(1, 2)) / pixels.sum() - (np.array(pixels.shape) - 1) / 2
    is_placed = 18 <= side <= 20 and np.abs(offset).max() < 1.5
    return bool(is_placed and np.median(pixels) < 8 and pixels.max() > 200)


def _check_for_ink(ink: Pixels) -> None:
    """Raise `ImageError` if nothing stands out from the grain of the paper.

    Faint ink must stand out further, because JPEG smooths a grain of few shades, except in some places.
    """
    small = resize(ink, 96)
    grain = np.median(np.abs(np.diff(small, axis=int(np.argmax(small.shape)))))
    least = 14 * grain if ink.max() >= 16 else 24 * max(grain, _ROUNDING)
    if ink.max() < MIN_CONTRAST or small.max() < least:
        raise ImageError(LOW_CONTRAST)


def remove_stains(ink: Pixels) -> Pixels:
    """Remove parts that are faint throughout, such as the remains of a shadow."""
    from scipy import ndimage

    parts, _ = ndimage.label(ink > ink.max() / 4, np.ones((3, 3)))
    is_stain = np.isin(parts, np.unique(parts[ink > ink.max() / 2]), invert=True)
    return np.where(is_stain, np.float32(0), ink)


def _has_dark_ink(small: Pixels) -> bool:
    """Return whether all corners are light, or the pixels that differ most from their local median are darker."""
    from scipy import ndimage

    height, width = (max(1, side // 6) for side in small.shape)
    corners = [
        np.median(rows[:, part])
        for rows in (small[:height], small[-height:])
        for part in (slice(width), slice(-width, None))
    ]
    if min(corners) > (small.min() + small.max()) / 2:
        return True
    return bool(((small - ndimage.median_filter(small, [side // 2 + 1 for side in small.shape])) ** 3).mean() < 0)


def resize(pixels: Pixels, longer_side: int) -> Pixels:
    """Shrink to this longer side, unless the picture is smaller."""
    scale = min(1, longer_side / max(pixels.shape))
    height, width = (max(1, round(side * scale)) for side in pixels.shape)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX))


def crop_to_ink(ink: Pixels) -> Pixels:
    """Crop to the ink with a margin, so that its bounds can be found more precisely."""
    rows, columns = _bounds(ink)
    margin = 2 + (rows.stop - rows.start + columns.stop - columns.start) // 8
    return ink[max(rows.start - margin, 0) : rows.stop + margin, max(columns.start - margin, 0) : columns.stop + margin]


def thicken_strokes(ink: Pixels) -> Pixels:
    """Dilate the ink until its strokes are at least `_PEN` wide. The longer side becomes 400 or less."""
    from scipy import ndimage

    small = resize(ink, 400)
    ink = small * (ink.max() / small.max())  # a thin line is fainter in the small picture
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
        raise ImageError(LOW_CONTRAST)
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
        raise ImageError(LOW_CONTRAST)
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
