"""A first study file for images of one's own: splits, search space and budget that suit them and this machine."""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit

_UNEQUAL = 2  # times as many images in the largest class as in the smallest one
_TRIALS = 30
_MOST_MINUTES = 60  # of a search that would take longer
TRAINED = 0.35  # share of all epochs that are trained; pruning saves the others: see the tests
_SECONDS_PER_PIXEL = 6e-7  # of an epoch of a CNN in the middle of the space, on one core (Xeon, 2.5 GHz)
_IMAGES_PER_TRIAL = 60_000  # what made shapes of 48x48 need; their epochs are from 10 to 100
_LONGEST, _SHORTEST = 64, 16  # pixels of the sides that images are scaled to
_FEW, _MANY = 1_000, 20_000  # training images
_SIDED = re.compile(r"left|right", re.IGNORECASE)  # classes that a mirror may exchange


@dataclass(frozen=True)
class Images:
    """What a draft depends on.

    `source` is the key in [data] that names the images, "folder" or "file", and its value. `counts` has the numbers of
    images of each class, by side: "train", and "validation" and "test" unless they are chosen later. `splits` are the
    sides that the images have of their own. `is_own_size` says whether `shape` is that of all files. `unreadable` has
    names of files, in one line each.
    """

    source: tuple[str, str]
    counts: Mapping[str, Mapping[str, int]]
    shape: tuple[int, int, int]
    splits: Collection[str] = ()
    is_own_size: bool = True
    unreadable: Sequence[str] = ()


def choose_shares(n_images: int, splits: Collection[str]) -> dict[str, float]:
    """Return the shares of the images for the sides that they do not have of their own: "test" and "validation"."""
    share = 0.2 if n_images < _FEW else 0.15 if n_images < _MANY else 0.1
    return {side: share for side in ("test", "validation") if side not in splits}


def choose_size(sizes: Mapping[tuple[int, int], int]) -> tuple[int, int]:
    """Return the height and width for images, given how many have each height and width.

    Images that are all alike keep their proportions, with 64 pixels at most on the longer side and 16 at least on the
    shorter one. Others become squares, which are not larger than most of the images.
    """
    if len(sizes) == 1:
        [(height, width)] = sizes
        scale = min(1.0, _LONGEST / max(height, width))
        least = min(height, width, _SHORTEST)
        return max(round(height * scale), least), max(round(width * scale), least)
    sides = sorted(side for size, n in sizes.items() for side in [min(size)] * n)
    side = min(max(sides[len(sides) // 2] if sides else _LONGEST, _SHORTEST), _LONGEST)
    return side, side


def draft_study(name: str, images: Images, n_cores: int) -> str:
    """Return the text of a commented study file for these images, whose search suits so many cores."""
    import jinja2

    environment = jinja2.Environment(  # noqa: S701 - TOML has no markup
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["toml"] = lambda value: tomlkit.item(value).as_string()
    environment.filters["pad"] = lambda value, width: f"{value!s:{width - 1}} "
    template = environment.from_string(Path(__file__).with_suffix(".toml.jinja").read_text("utf-8"))
    return template.render(_plan(images, n_cores), name=name)


def _plan(images: Images, n_cores: int) -> dict[str, Any]:
    """Return what the template needs."""
    key, path = images.source
    channels, height, width = images.shape
    sizes = {side: sum(counts.values()) for side, counts in images.counts.items()}
    classes = [sum(counts[name] for counts in images.counts.values()) for name in images.counts["train"]]
    shares = choose_shares(sum(sizes.values()), images.splits)
    n_validation = sizes.get("validation") or round(shares["validation"] * sizes["train"])
    n_training = sizes["train"] - (0 if "validation" in sizes else n_validation)
    epochs = min(max(round(_IMAGES_PER_TRIAL / max(n_training, 1)), 10), 100)
    batch_sizes = (16, 32) if n_training < _FEW else (32, 64) if n_training < _MANY else (64, 128)
    seconds = _TRIALS * TRAINED * epochs * n_training * height * width * _SECONDS_PER_PIXEL / n_cores
    minutes = math.ceil(seconds / 60)
    limit = min(max(2 * minutes, 10), _MOST_MINUTES)
    is_long = minutes > _MOST_MINUTES
    depth = (4, 8) if min(height, width) >= 32 else (3, 6)
    return {
        "n_images": f"{sum(sizes.values()):,}",
        "n_classes": len(classes),
        "cores": f"{n_cores} core{'s' * (n_cores != 1)}",
        "duration": f"about {minutes:,} minutes",
        "is_unequal": max(classes) >= _UNEQUAL * min(classes),
        "smallest": f"{min(classes):,}",
        "largest": f"{max(classes):,}",
        "trials": _TRIALS,
        "epochs": epochs,
        "limit": limit,
        "limit_comment": "no trial starts after this" + "; more minutes, more trials" * is_long,
        "source": {"key": key, "path": path},
        "size": (height if height == width else [height, width]) if key == "folder" else None,
        "size_comment": "pixels; " + ("that of all files" if images.is_own_size else "images are scaled, and cropped"),
        "color": "rgb" if channels == 3 else "grey",
        "color_comment": 'or "grey"' if channels == 3 else "as all files are",
        "test": shares.get("test"),
        "n_test": f"{sizes.get('test', 0):,}",
        "validation": shares.get("validation"),
        "validation_of": "of the images" if "validation" in sizes else "of the training images",
        "n_validation": f"{n_validation:,}",
        "n_unreadable": f"{len(images.unreadable):,} file{'s' * (len(images.unreadable) != 1)}",
        "unreadable": images.unreadable and images.unreadable[0],
        "depth": depth,
        "batch_sizes": batch_sizes,
        "is_small": n_training < _FEW,
        "erases": n_training >= _MANY,
        "flips": any(len(name) > 1 for name in images.counts["train"])
        and not any(map(_SIDED.search, images.counts["train"])),
        "jitters": channels == 3,
    }
