"""How often `predict` warns that a picture is unlike the training images: of digits, and of what is no digit.

What is no digit may also be refused. The digits are validation images, with which the limits were not calibrated.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps
from sklearn.datasets import load_sample_images

from hpsearch.bundle.likeness import Likeness
from hpsearch.data.dataset import Split, load_data
from tests.benchmark.pictures import KINDS, Digit, Draw, Kinds, Rng, choose, page, read, write
from tests.benchmark.report import Options, Row

DATA = Path(matplotlib.get_data_path())
FONTS = [str(DATA / "fonts" / "ttf" / f"DejaVuSans{kind}.ttf") for kind in ("", "-Oblique", "Mono")]
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog")


def unlike(folder: Path, options: Options, n_pictures: int = 100) -> list[Row]:
    """The shares of pictures of which `predict` warns, of each kind; of what is no digit, those that it refuses, too.

    No network is needed.
    """
    data = load_data("mnist", options.data, validation=10_000)
    digits, _ = choose(data, n_pictures)
    validation = Split(data.validation.images[n_pictures:], data.validation.labels[n_pictures:])
    likeness = Likeness.fit(replace(data, validation=validation))
    rows = []
    for kinds, name in ((KINDS, "a digit"), (UNLIKE, "no digit")):
        for kind in kinds:
            if not kind.startswith("blank"):
                n_warned, n_refused = warn(write(kind, digits, folder / "pictures", kinds), likeness, n_pictures)
                share = 100 * (n_warned + (n_refused if kinds is UNLIKE else 0)) / n_pictures
                rows.append(
                    Row("unlike", f"{name}, {kind}: {n_warned} warned, {n_refused} refused", "%", share, n=n_pictures)
                )
    return rows


def warn(folder: Path, likeness: Likeness, n_pictures: int) -> tuple[int, int]:
    """The numbers of pictures of a folder that are unlike the training images, and that are refused."""
    images = [pixels for _, pixels in read(folder)]
    distances = likeness.measure(torch.from_numpy(np.array(images, dtype=np.uint8).reshape(-1, 1, 28, 28)))
    return int((distances > 1).sum()), n_pictures - len(images)


@cache
def photographs() -> Sequence[Image.Image]:
    """A temple, a flower and a portrait."""
    portrait = Image.open(DATA / "sample_data" / "grace_hopper.jpg").convert("RGB")
    return [*map(Image.fromarray, load_sample_images().images), portrait]


def photograph(digit: Digit, rng: Rng) -> Image.Image:
    """More than half of the width and the height of a photograph."""
    image = photographs()[int(rng.integers(len(photographs())))]
    return _cut(image, rng, *(int(side * rng.uniform(0.6, 1)) for side in image.size))


def piece_of_a_photograph(digit: Digit, rng: Rng) -> Image.Image:
    image = photographs()[int(rng.integers(len(photographs())))]
    side = int(rng.integers(60, min(image.size)))
    return _cut(image, rng, side, side)


def _cut(image: Image.Image, rng: Rng, width: int, height: int) -> Image.Image:
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    return image.crop((left, top, left + width, top + height))


def digits_in_a_row(n: int, *, is_column: bool = False) -> Draw:
    """The digit, repeated."""

    def draw(digit: Digit, rng: Rng) -> Image.Image:
        parts = [np.asarray(page(digit, rng, margin=0).resize((280, 280))) for _ in range(n)]
        large = Image.fromarray(np.vstack(parts) if is_column else np.hstack(parts))
        return ImageOps.expand(large, 20, 255)

    return draw


def figure(kind: str, *, is_filled: bool) -> Draw:
    """A rectangle, an ellipse or a triangle of 120 to 180 pixels."""

    def draw(digit: Digit, rng: Rng) -> Image.Image:
        image = Image.new("L", (300, 300), int(rng.integers(200, 256)))
        (left, top), (width, height), shade = rng.integers(20, 110, 2), rng.integers(120, 181, 2), int(rng.integers(90))
        box = [(int(left), int(top)), (int(left + width), int(top + height))]
        corners = [(box[0][0], box[1][1]), (box[1][0], box[1][1]), (int(rng.integers(20, 280)), box[0][1])]
        options = {"fill": shade} if is_filled else {"outline": shade, "width": int(rng.integers(8, 20))}
        getattr(ImageDraw.Draw(image), kind)(corners if kind == "polygon" else box, **options)
        return image

    return draw


def half_of_a_page(digit: Digit, rng: Rng) -> Image.Image:
    image = Image.new("L", (300, 300), 240)
    ImageDraw.Draw(image).rectangle([0, int(rng.integers(80, 220)), 300, 300], fill=int(rng.integers(0, 120)))
    return image.rotate(int(rng.integers(4)) * 90)


def paper(roughness: float, depth: float) -> Draw:
    """A texture whose amplitudes fall with the frequency to this power."""

    def draw(digit: Digit, rng: Rng) -> Image.Image:
        frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(300), np.fft.fftfreq(300)))
        frequencies[0, 0] = 1
        waves = np.fft.ifft2(np.fft.fft2(rng.normal(size=(300, 300))) / frequencies**roughness).real
        return Image.fromarray((190 + depth * waves / waves.std()).clip(0, 255).astype(np.uint8))

    return draw


def noise(digit: Digit, rng: Rng) -> Image.Image:
    side = int(rng.choice([28, 56, 280]))
    return Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8))


def letter(letters: str) -> Draw:
    def draw(digit: Digit, rng: Rng) -> Image.Image:
        image, font = Image.new("L", (300, 300), 255), ImageFont.truetype(str(rng.choice(FONTS)), 180)
        ImageDraw.Draw(image).text((150, 150), str(rng.choice([*letters])), fill=0, font=font, anchor="mm")
        return image

    return draw


def text(digit: Digit, rng: Rng) -> Image.Image:
    image, font = Image.new("L", (400, 300), 255), ImageFont.truetype(FONTS[0], int(rng.integers(14, 36)))
    lines = [" ".join(rng.choice(WORDS, 4)) for _ in range(int(rng.integers(2, 6)))]
    ImageDraw.Draw(image).multiline_text((20, 20), "\n".join(lines), fill=0, font=font)
    return image


def drawing_of_a_cat(digit: Digit, rng: Rng) -> Image.Image:
    """A head with ears, eyes and whiskers."""
    image, width = Image.new("L", (300, 300), 255), int(rng.integers(3, 9))
    pen, (dx, dy) = ImageDraw.Draw(image), rng.integers(-15, 16, 2).tolist()
    pen.ellipse([70 + dx, 90 + dy, 230 + dx, 240 + dy], outline=0, width=width)
    for ear in ([(90, 120), (80, 40 + dy), (140, 100)], [(160, 100), (220, 40 - dy), (210, 120)]):
        pen.line(ear, fill=0, width=width)
    for x in (120, 180):
        pen.ellipse([x - 8, 140, x + 8, 160], fill=0)
    for y in (180, 195, 210):
        pen.line([(20 + dx, y), (120, 190)], fill=0, width=width // 2 + 1)
        pen.line([(280 + dx, y), (180, 190)], fill=0, width=width // 2 + 1)
    return image


def scribble(digit: Digit, rng: Rng) -> Image.Image:
    image, course = Image.new("L", (300, 300), 255), np.cumsum(rng.normal(0, 60, (25, 2)), axis=0) % 240 + 30
    line: NDArray[np.int64] = course.astype(np.int64)
    ImageDraw.Draw(image).line([(x, y) for x, y in line.tolist()], fill=0, width=int(rng.integers(4, 12)))
    return image


# How each kind is drawn, the suffix of its files, and the options with which Pillow saves them.
UNLIKE: Kinds = {
    "photograph": (photograph, ".jpg", {"quality": 85}),
    "piece of a photograph": (piece_of_a_photograph, ".jpg", {"quality": 85}),
    "two digits side by side": (digits_in_a_row(2), ".png", {}),
    "three digits side by side": (digits_in_a_row(3), ".png", {}),
    "a digit above another": (digits_in_a_row(2, is_column=True), ".png", {}),
    "filled rectangle": (figure("rectangle", is_filled=True), ".png", {}),
    "filled ellipse": (figure("ellipse", is_filled=True), ".png", {}),
    "filled triangle": (figure("polygon", is_filled=True), ".png", {}),
    "outline of a rectangle": (figure("rectangle", is_filled=False), ".png", {}),
    "outline of a triangle": (figure("polygon", is_filled=False), ".png", {}),
    "half of the page filled": (half_of_a_page, ".png", {}),
    "rough paper": (paper(1, 15), ".jpg", {"quality": 85}),
    "stained paper": (paper(2, 15), ".jpg", {"quality": 85}),
    "noise": (noise, ".png", {}),
    "capital letter": (letter("ACEFHJKMNPRTUVWXYQ"), ".png", {}),
    "small letter": (letter("aekmnrwxhd"), ".png", {}),
    "lines of text": (text, ".png", {}),
    "drawing of a cat": (drawing_of_a_cat, ".png", {}),
    "scribble": (scribble, ".png", {}),
}
