"""Removes from the ink of a page what is no digit: ruled lines, frames, and the edges of the sheet or the table."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpsearch.data.mnist_images import Pixels, resize

_Box = NDArray[np.int64]  # top, left, bottom, right


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
    if not (is_even and has_ink and sheet.mean() > 0.35 and sheet[box].mean() > 0.81):
        return pixels
    beside = ndimage.binary_dilation(table, iterations=2)
    nearest = ndimage.distance_transform_edt(beside, return_distances=False, return_indices=True)
    covered = Image.fromarray(small[tuple(nearest)]).resize(pixels.shape[::-1])
    return np.where(_enlarge(beside, pixels.shape), np.asarray(covered), pixels)


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
    are_dark = np.unique(parts[ink > ink.max() / 2])
    boxes = {
        i: np.array([rows.start, columns.start, rows.stop, columns.stop])
        for i, (rows, columns) in enumerate(ndimage.find_objects(parts), 1)
        if i in are_dark
    }
    removed = list[int]()
    for i in sorted(boxes, key=lambda i: -_height(boxes[i])):
        if any(_is_within(other, boxes[i]) and _height(other) > _height(boxes[i]) / 4 for other in boxes.values()):
            removed.append(i)
            del boxes[i]
    whole = np.array([0, 0, *ink.shape])
    inner = [box for box in boxes.values() if _is_within(box, whole)]
    if inner:
        digit = max(inner, key=_height)
        is_large = _height(digit) > len(ink) / 4
        for i, box in boxes.items():
            if not _is_within(box, whole):
                spans = (box == whole)[[0, 2]].all() or (box == whole)[[1, 3]].all()
                if (is_large and spans) or _gap(box, digit) > _height(digit) * (0.15 if is_large else 0.5):
                    removed.append(i)
    return np.where(np.isin(parts, removed), np.float32(0), ink) if removed else ink


def _height(box: _Box) -> int:
    return int(box[2] - box[0])


def _is_within(inner: _Box, outer: _Box) -> bool:
    return bool((inner[:2] > outer[:2]).all() and (inner[2:] < outer[2:]).all())


def _gap(a: _Box, b: _Box) -> int:
    """The larger of the vertical and the horizontal distance between two boxes; negative if they overlap."""
    return int(np.maximum(a[:2] - b[2:], b[:2] - a[2:]).max())
