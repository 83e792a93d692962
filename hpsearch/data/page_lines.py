"""Removes from the ink of a page what is no digit: ruled lines, frames, and the edges of the sheet or the table."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpsearch.data.mnist_images import Pixels, resize

_Boxes = NDArray[np.int64]  # top, left, bottom, right; of one box or of N, shape (N, 4)


def cover_table(pixels: Pixels) -> Pixels:
    """Return the picture with the dark table at the sides of a light sheet painted over in the color of the sheet.

    The table is dark throughout, and fills whole sides of the picture. The sheet is about a rectangle, and has ink.
    """
    from scipy import ndimage

    small = resize(pixels, 96)
    parts, _ = ndimage.label(is_dark := small < (small.min() + small.max()) / 2)
    sides = [parts[0], parts[-1], parts[:, 0], parts[:, -1]]
    table = np.isin(parts, [np.median(side) for side in sides if side.all() and np.ptp(side) == 0])
    lights, _ = ndimage.label(~is_dark)
    if not table.any() or not lights.any():
        return pixels
    sheet = ndimage.binary_fill_holes(lights == np.bincount(lights[lights > 0]).argmax())
    [box] = ndimage.find_objects(sheet.astype(int))
    paper, [darkest, shade] = np.median(small[sheet]), np.percentile(small[table], [2, 50])
    is_even = shade < paper / 2 and shade - darkest < (paper - shade) / 4
    has_ink = is_dark[box][sheet[box]].any()
    if not (is_even and has_ink and sheet.mean() > 0.35 and _is_rectangle(sheet[box])):
        return pixels
    beside = ndimage.binary_dilation(table, iterations=2)
    nearest = ndimage.distance_transform_edt(beside, return_distances=False, return_indices=True)
    covered = Image.fromarray(small[tuple(nearest)]).resize(pixels.shape[::-1])
    return np.where(_enlarge(beside, pixels.shape), np.asarray(covered), pixels)


def _is_rectangle(part: NDArray[np.bool_]) -> bool:
    """Return whether a part fills its box up to the corners: a slightly turned rectangle does, a bold 0 does not."""
    y, x = ((np.argwhere(part) + 0.5) / part.shape - 0.5).T
    return bool(part.mean() > 0.81 and min(np.max(a * x + b * y) for a in (-1, 1) for b in (-1, 1)) > 0.83)


def remove_lines(ink: Pixels) -> Pixels:
    """Return the ink without lines from side to side, without frames, and without what is cut off by the border.

    What is left must be large enough for a digit; otherwise it stays.
    """
    return _remove_frames(_remove_rules(_remove_rules(ink).T).T)


def _remove_rules(ink: Pixels) -> Pixels:
    """Remove horizontal lines from side to side that are thinner than strokes. Strokes that cross them stay."""
    is_line = _find_rules(resize(ink, 400))
    if not is_line.any():
        return ink
    return np.where(_enlarge(is_line, ink.shape), _without_thin(ink), ink)


def _find_rules(ink: Pixels) -> NDArray[np.bool_]:
    """Return which pixels are on a straight line that is seen at a side, and wherever no stroke hides it."""
    from scipy import ndimage

    strokes = _without_thin(ink)
    is_stroke, thin = strokes > ink.max() / 6, ink - strokes
    height, width = ink.shape
    weights = ndimage.uniform_filter1d(np.float32(~is_stroke), width // 4 + 1, axis=1)
    along = ndimage.uniform_filter1d(np.where(is_stroke, 0, thin), width // 4 + 1, axis=1)
    parts, _ = ndimage.label(along > weights.clip(0.05) * ink.max() / 12, np.ones((3, 3)))
    rows, columns = np.arange(height)[:, np.newaxis], np.arange(width)
    is_line = np.zeros(ink.shape, dtype=bool)
    for part in np.union1d(parts[:, 0], parts[:, -1])[1:]:
        course = np.where(parts == part, along, 0)
        left, right = np.array_split(np.flatnonzero(course.any(axis=0)), 2)
        if len(right) < width / 16:
            continue
        peaks = course.argmax(axis=0)
        slope = (np.median(peaks[right]) - np.median(peaks[left])) / (np.median(right) - np.median(left))
        line = np.median(peaks[left]) + slope * (columns - np.median(left))
        is_near = np.abs(rows - line) <= _pen(ink) / 2 + 1
        is_free = ~(is_stroke & is_near).any(axis=0)
        is_seen = ((thin > ink.max() / 12) & is_near).any(axis=0)
        if is_free.mean() > 0.25 and is_seen[is_free].mean() > 0.9:
            is_line |= is_near
    return is_line


def _without_thin(ink: Pixels) -> Pixels:
    """Return the ink without what is thinner than a pen in the vertical direction."""
    from scipy import ndimage

    return np.asarray(ndimage.grey_opening(ink, (_pen(ink), 1)))


def _pen(ink: Pixels) -> int:
    return int(max(ink.shape)) // 60 + 2


def _enlarge(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))


def _remove_frames(ink: Pixels) -> Pixels:
    """Remove parts that surround a digit, and parts at the border that are no piece of the digit."""
    from scipy import ndimage

    parts, _ = ndimage.label(ink > ink.max() / 6, np.ones((3, 3)))
    numbers = np.unique(parts[ink > ink.max() / 2])
    places = ndimage.find_objects(parts)
    corners = [[rows.start, columns.start, rows.stop, columns.stop] for rows, columns in places]
    boxes, whole = np.array(corners).reshape(-1, 4)[numbers - 1], np.array([0, 0, *ink.shape])
    heights = boxes[:, 2] - boxes[:, 0]
    is_removed = np.zeros(len(boxes), dtype=bool)
    for i in np.flatnonzero(heights > min(ink.shape) / 32):  # specks are no frames
        is_removed[i] = (_are_within(boxes, boxes[i]) & (heights > heights[i] / 4)).any()
    is_inside = _are_within(boxes, whole)
    if (is_inner := is_inside & ~is_removed).any():
        digit = boxes[np.where(is_inner, heights, 0).argmax()]
        height = digit[2] - digit[0]
        is_large = height > len(ink) / 4
        at_sides = boxes == whole
        spans = at_sides[:, [0, 2]].all(axis=1) | at_sides[:, [1, 3]].all(axis=1)
        are_far = _gaps(boxes, digit) > height * (0.15 if is_large else 0.5)
        is_removed |= ~is_inside & (is_large & spans | are_far)
    return np.where(np.isin(parts, numbers[is_removed]), np.float32(0), ink) if is_removed.any() else ink


def _are_within(boxes: _Boxes, outer: _Boxes) -> NDArray[np.bool_]:
    return np.asarray((boxes[:, :2] > outer[:2]).all(axis=1) & (boxes[:, 2:] < outer[2:]).all(axis=1))


def _gaps(boxes: _Boxes, box: _Boxes) -> _Boxes:
    """The larger of the vertical and the horizontal distance of each box from one; negative if they overlap."""
    return np.asarray(np.maximum(boxes[:, :2] - box[2:], box[:2] - boxes[:, 2:]).max(axis=1))
