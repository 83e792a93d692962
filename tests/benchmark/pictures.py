"""How well `predict` reads pictures of digits: sizes, pens, paper, light and kinds of files, made from MNIST.

The digits are validation images, which the network has not seen; the test set is not used.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageOps
from scipy import ndimage

from hpsearch.bundle.predict import find_images
from hpsearch.config.definition import load_definition
from hpsearch.config.space import suggest
from hpsearch.data.dataset import ImageData, denormalise, normalise
from hpsearch.data.sets import MNIST
from hpsearch.errors import ImageError
from hpsearch.training.networks import Network
from hpsearch.training.run import build_trainer, load_study_data
from tests.benchmark.report import Options, Row

Digit = NDArray[np.uint8]  # shape (28, 28), light on black
Rng = np.random.Generator
Draw = Callable[[Digit, Rng], Image.Image]
Kinds = dict[str, tuple[Draw, str, dict[str, Any]]]
SURE = 0.9


def pictures(folder: Path, options: Options, n_pictures: int = 200, n_epochs: int = 9) -> list[Row]:
    """The shares of pictures that are read right, of each kind."""
    network, data = train(options.data, n_epochs)
    digits, labels = choose(data, n_pictures)
    return [measure(kind, write(kind, digits, folder / "pictures"), labels, network, data) for kind in KINDS]


def train(folder: Path, n_epochs: int) -> tuple[Network, ImageData]:
    """A network of `mnist-mlp` with the first values that this study tries."""
    definition = load_definition("mnist-mlp")
    data = load_study_data(definition, folder)
    hyperparameters = suggest(optuna.trial.FixedTrial(dict(definition.first[0])), definition.space)
    trainer = build_trainer(definition, data, hyperparameters, seed=0, epochs=n_epochs)
    while not trainer.is_done:
        trainer.run_epoch()
    return trainer.network, data


def choose(data: ImageData, n_pictures: int) -> tuple[NDArray[np.uint8], list[int]]:
    """The first validation images as raw pixels, shape (N, 28, 28), and their labels."""
    pixels = denormalise(data.validation.images[:n_pictures], data.mean, data.std)
    return pixels[:, 0].round().byte().numpy(), data.validation.labels[:n_pictures].tolist()


def write(kind: str, digits: NDArray[np.uint8], folder: Path, kinds: Kinds | None = None) -> Path:
    """Empty the folder, and write a picture of each digit, named by its number."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    draw, suffix, options = (kinds or KINDS)[kind]
    rng = np.random.default_rng(0)
    for i, digit in enumerate(digits):
        draw(digit, rng).save(folder / f"{i:04}{suffix}", **options)
    return folder


def measure(kind: str, folder: Path, labels: Sequence[int], network: Network, data: ImageData) -> Row:
    """Classify the pictures of a folder. One that is not found there counts as refused; a blank one should be."""
    found = dict(read(folder))
    images = torch.from_numpy(np.array([*found.values()], dtype=np.uint8).reshape(-1, 1, 28, 28))
    probabilities = (
        network.predict_proba(normalise(images, data.mean, data.std)).numpy() if found else np.empty((0, 10))
    )
    is_blank = kind.startswith("blank")
    is_wrong = (probabilities.argmax(axis=1) != [labels[i] for i in found]) | is_blank
    n_refused, wrong = len(labels) - len(found), probabilities.max(axis=1)[is_wrong]
    n_right = n_refused if is_blank else len(found) - len(wrong)
    sure = f", {np.mean(wrong):.2f} sure, {(wrong > SURE).sum()} above {SURE}" if len(wrong) else ""
    what = f"{kind}: right ({len(wrong)} wrong{sure}; {n_refused} refused)"
    return Row("pictures", what, "%", 100 * n_right / len(labels), n=len(labels))


def read(folder: Path) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The numbers and the pixels of the pictures that are not refused."""
    for file, error in find_images(str(folder)):
        try:
            if error is None:
                yield int(Path(file).stem), MNIST.read_image(file)
        except ImageError:
            continue


def page(digit: Digit, rng: Rng, scale: int = 10, margin: int = 20) -> Image.Image:
    """Black ink on white paper; a pixel of MNIST becomes `scale` pixels."""
    side = 28 * scale
    large = Image.fromarray(255 - digit).resize((side, side), Image.Resampling.BICUBIC)
    return ImageOps.expand(large, margin, 255)


def enlarged(factor: int) -> Draw:
    return lambda digit, rng: Image.fromarray(digit).resize((28 * factor, 28 * factor), Image.Resampling.BICUBIC)


def small_on_a_large_page(digit: Digit, rng: Rng) -> Image.Image:
    sheet = Image.new("L", (1200, 900), 255)
    sheet.paste(page(digit, rng, scale=6, margin=0), (int(rng.integers(50, 950)), int(rng.integers(50, 650))))
    return sheet


def tight_crop(digit: Digit, rng: Rng) -> Image.Image:
    return _crop(page(digit, rng), rng)


def _crop(image: Image.Image, rng: Rng) -> Image.Image:
    left, top, right, bottom = Image.eval(image, lambda shade: 255 * (shade < 128)).getbbox() or (0, 0, 1, 1)
    margins = rng.integers(0, 8, 4)
    return image.crop((left - margins[0], top - margins[1], right + margins[2], bottom + margins[3]))


def in_other_shades(digit: Digit, rng: Rng) -> Image.Image:
    """Grey on grey, dark on light or light on dark, with a contrast of at least 70."""
    ink, paper = rng.integers(0, 256, 2)
    while abs(int(ink) - int(paper)) < 70:
        ink, paper = rng.integers(0, 256, 2)
    return Image.fromarray((paper + (float(ink) - paper) * (digit / 255)).round().astype(np.uint8))


def in_colors(digit: Digit, rng: Rng) -> Image.Image:
    """One color on another; their channels differ by at least 130 in one of them."""
    ink, paper = rng.integers(0, 256, (2, 3)).astype(float)
    while np.abs(ink - paper).max() < 130:
        ink, paper = rng.integers(0, 256, (2, 3)).astype(float)
    return Image.fromarray((paper + (ink - paper) * (digit[..., np.newaxis] / 255)).round().astype(np.uint8))


def off_the_middle(digit: Digit, rng: Rng) -> Image.Image:
    """The ink somewhere in the 28x28 pixels."""
    rows, columns = np.flatnonzero(digit.any(axis=1)), np.flatnonzero(digit.any(axis=0))
    shift = [int(rng.integers(-place[0], 28 - place[-1])) for place in (rows, columns)]
    return Image.fromarray(np.roll(digit, shift, axis=(0, 1)))


def with_small_ink(digit: Digit, rng: Rng) -> Image.Image:
    """MNIST's 28x28 pixels in 14 to 20 of the 28x28."""
    side = int(rng.integers(14, 21))
    small = Image.fromarray(digit).resize((side, side), Image.Resampling.BOX)
    image = Image.new("L", (28, 28))
    image.paste(small, tuple(rng.integers(0, 29 - side, 2).tolist()))
    return image


def thin_pen(digit: Digit, rng: Rng) -> Image.Image:
    """A stroke of about a third of the width."""
    depth = ndimage.distance_transform_edt(np.asarray(page(digit, rng)) < 128)
    stroke = depth > 0.65 * ndimage.maximum_filter(depth, 25)
    return Image.fromarray(np.where(stroke & (depth > 0), 20, 250).astype(np.uint8)).filter(ImageFilter.GaussianBlur(1))


def pencil(digit: Digit, rng: Rng) -> Image.Image:
    """Faint grey strokes on grainy paper."""
    return _lit(Image.eval(page(digit, rng), lambda shade: 185 + shade * 45 // 255), rng, 1, 3)


def _lit(image: Image.Image, rng: Rng, light: Any, grain: float) -> Image.Image:
    pixels = np.asarray(image) * light + rng.normal(0, grain, image.size[::-1])
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _direction(size: tuple[int, int], rng: Rng) -> NDArray[Any]:
    """The distance of each pixel from a line through the middle at a random angle, from about -0.5 to 0.5."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = (np.indices(size[::-1]).T / size[::-1] - 0.5).T
    return np.asarray(x * np.cos(angle) + y * np.sin(angle))


def shadow(digit: Digit, rng: Rng) -> Image.Image:
    """A shadow with a sharp edge over a part of the page."""
    image = page(digit, rng, margin=40)
    light = np.where(_direction(image.size, rng) < rng.uniform(-0.2, 0.2), 0.55, 1)
    return _lit(image, rng, light, 2)


def photograph(image: Image.Image, rng: Rng) -> Image.Image:
    """Turned by up to 4 degrees, lit from one side, out of focus, grainy."""
    turned = image.rotate(rng.uniform(-4, 4), Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))
    light = 0.75 + rng.uniform(0.1, 0.4) * _direction(image.size, rng)
    return _lit(turned.filter(ImageFilter.GaussianBlur(1.2)), rng, light, 4)


def photographed(draw: Draw) -> Draw:
    return lambda digit, rng: photograph(draw(digit, rng), rng)


def photographed_tight_crop(digit: Digit, rng: Rng) -> Image.Image:
    return photograph(tight_crop(digit, rng), rng)


def in_a_box(digit: Digit, rng: Rng) -> Image.Image:
    image = page(digit, rng, margin=60)
    _outline(image, int(rng.integers(15, 56)), int(rng.integers(2, 9)), int(rng.integers(0, 130)))
    return image


def _outline(image: Image.Image, place: int, width: int, shade: int) -> None:
    end = [side - 1 - place for side in image.size]
    ImageDraw.Draw(image).rectangle([place, place, *end], outline=shade, width=width)


def touching_its_box(digit: Digit, rng: Rng) -> Image.Image:
    """A box that the ink reaches, or crosses by up to 12 of 320 pixels, at the right."""
    image = page(digit, rng, margin=60)
    left, top, right, bottom = Image.eval(image, lambda shade: 255 * (shade < 128)).getbbox() or (0, 0, 1, 1)
    right -= int(rng.integers(0, 13))
    ImageDraw.Draw(image).rectangle([left - 25, top - 25, right, bottom + 25], outline=40, width=3)
    return image


def frame_at_the_border(digit: Digit, rng: Rng) -> Image.Image:
    image = page(digit, rng)
    _outline(image, 0, int(rng.integers(2, 13)), int(rng.integers(0, 100)))
    return image


def dark_edge(digit: Digit, rng: Rng) -> Image.Image:
    """The edge of a table at one side, or at two that meet."""
    pixels, side, n_sides = np.array(page(digit, rng, margin=40)), int(rng.integers(4)), int(rng.integers(1, 3))
    shade = rng.integers(10, 80)
    for turn in range(side, side + n_sides):
        np.rot90(pixels, turn)[: int(rng.integers(5, 35))] = shade
    return Image.fromarray(pixels)


def sheet_on_a_table(digit: Digit, rng: Rng) -> Image.Image:
    """A sheet that lies slightly turned on a dark table, which is seen at all sides."""
    sheet = Image.eval(page(digit, rng, margin=30), lambda shade: shade * 235 // 255)
    table = Image.new("L", (480, 480), int(rng.integers(20, 80)))
    mask = Image.new("L", sheet.size, 255).rotate(angle := rng.uniform(-6, 6), expand=True)
    table.paste(sheet.rotate(angle, Image.Resampling.BICUBIC, expand=True), (60, 60), mask)
    return _lit(table, rng, 1, 3)


def negative_with_white_margins(digit: Digit, rng: Rng) -> Image.Image:
    """White ink on a black sheet, with the margins of a scanner or a plot."""
    return ImageOps.expand(ImageOps.invert(page(digit, rng)), tuple(rng.integers(8, 150, 2).tolist()), 255)


def ruled_paper(digit: Digit, rng: Rng) -> Image.Image:
    image = page(digit, rng)
    _rule(image, rng, horizontal=True)
    return image


def squared_paper(digit: Digit, rng: Rng) -> Image.Image:
    image = page(digit, rng)
    _rule(image, rng, horizontal=True)
    _rule(image, rng, horizontal=False)
    return image


def _rule(image: Image.Image, rng: Rng, *, horizontal: bool) -> None:
    """Draw thin grey lines under the ink."""
    lines, step = Image.new("L", image.size, 255), int(rng.integers(25, 60))
    for place in range(int(rng.integers(0, step)), image.width, step):
        ends = [0, place, image.width, place] if horizontal else [place, 0, place, image.height]
        ImageDraw.Draw(lines).line(ends, fill=int(rng.integers(60, 200)), width=2)
    image.paste(Image.fromarray(np.minimum(np.asarray(image), np.asarray(lines))))


def in_16_bits(top: int) -> Draw:
    """Two in three are large pages, the third is 28x28; all have values up to `top`."""

    def draw(digit: Digit, rng: Rng) -> Image.Image:
        pixels = (_either(digit, rng) * (top / 255)).astype("<u2")
        return Image.frombytes("I;16", pixels.shape[::-1], pixels.tobytes())

    return draw


def _either(digit: Digit, rng: Rng) -> NDArray[Any]:
    return np.asarray(page(digit, rng) if rng.random() < 2 / 3 else digit, dtype=np.float32)


def in_floats(digit: Digit, rng: Rng) -> Image.Image:
    return Image.fromarray(_either(digit, rng) / 255)


def in_normalized_floats(digit: Digit, rng: Rng) -> Image.Image:
    return Image.fromarray((_either(digit, rng) / 255 - np.float32(0.1307)) / np.float32(0.3081))


def in_32_bits(digit: Digit, rng: Rng) -> Image.Image:
    return Image.fromarray((_either(digit, rng) * float(rng.choice([1, 257, 2**16]))).astype(np.int32))


def transparent_paper(ink: int) -> Draw:
    """Only the ink is opaque."""

    def draw(digit: Digit, rng: Rng) -> Image.Image:
        opacity = ImageOps.invert(page(digit, rng))
        image = Image.new("RGBA", opacity.size, (ink, ink, ink, 0))
        image.putalpha(opacity)
        return image

    return draw


def transparent_grey(digit: Digit, rng: Rng) -> Image.Image:
    return transparent_paper(int(rng.choice([0, 255])))(digit, rng).convert("LA")


def cut_out_page(digit: Digit, rng: Rng) -> Image.Image:
    """A white page with transparent surroundings."""
    image = ImageOps.expand(page(digit, rng).convert("RGBA"), 30, (0, 0, 0, 0))
    return image.rotate(rng.uniform(-5, 5))


def of_16_colors(digit: Digit, rng: Rng) -> Image.Image:
    """A palette whose first entry is the paper, which is its lightest or its darkest color."""
    shades = np.asarray(page(digit, rng)) // 16
    image = Image.fromarray(15 - shades, "P")
    ramp = np.linspace(255, 0, 16) if rng.random() < 0.5 else np.linspace(0, 255, 16)
    image.putpalette(np.repeat(ramp.astype(np.uint8), 3).tolist())
    return image


def paper_color_transparent(digit: Digit, rng: Rng) -> Image.Image:
    """Grey, black on white or as in MNIST, with the color of the paper declared transparent."""
    is_page = rng.random() < 0.5
    image = page(digit, rng) if is_page else Image.fromarray(digit)
    image.info["transparency"] = 255 if is_page else 0
    return image


def turned(digit: Digit, rng: Rng) -> Image.Image:
    return page(digit, rng).transpose(Image.Transpose.ROTATE_90)


def blank(digit: Digit, rng: Rng) -> Image.Image:
    side = int(rng.choice([28, 56, 300]))
    return Image.new("L", (side, side), int(rng.integers(0, 256)))


def blank_photograph(digit: Digit, rng: Rng) -> Image.Image:
    side = int(rng.choice([28, 56, 300]))
    return photograph(Image.new("L", (side, side), int(rng.integers(120, 256))), rng)


TURNED = Image.Exif()
TURNED[0x0112] = 6  # the camera was held upright
OTHER_PAGE = ImageOps.expand(Image.new("L", (60, 200)), 60, 255)

# How each kind is drawn, the suffix of its files, and the options with which Pillow saves them.
KINDS: Kinds = {
    "28x28 as in MNIST": (enlarged(1), ".png", {}),
    "28x28 black on white": (lambda digit, rng: Image.fromarray(255 - digit), ".png", {}),
    "28x28 in other shades of grey": (in_other_shades, ".png", {}),
    "28x28 in colors": (in_colors, ".png", {}),
    "28x28 off the middle": (off_the_middle, ".png", {}),
    "28x28 with small ink": (with_small_ink, ".png", {}),
    "28x28 JPEG": (enlarged(1), ".jpg", {"quality": 75}),
    "56x56": (enlarged(2), ".png", {}),
    "280x280": (enlarged(10), ".png", {}),
    "page": (page, ".png", {}),
    "small digit on a large page": (small_on_a_large_page, ".png", {}),
    "tight crop": (tight_crop, ".png", {}),
    "tight crop, photographed": (photographed_tight_crop, ".jpg", {"quality": 85}),
    "thin pen": (thin_pen, ".png", {}),
    "pencil": (pencil, ".jpg", {"quality": 85}),
    "shadow": (shadow, ".jpg", {"quality": 85}),
    "photograph": (photographed(page), ".jpg", {"quality": 85}),
    "photograph of a thin pen": (photographed(thin_pen), ".jpg", {"quality": 85}),
    "JPEG of low quality": (page, ".jpg", {"quality": 15}),
    "in a box": (in_a_box, ".png", {}),
    "in a box, photographed": (photographed(in_a_box), ".jpg", {"quality": 85}),
    "touching its box": (touching_its_box, ".png", {}),
    "frame at the border": (frame_at_the_border, ".png", {}),
    "dark edge of a table": (dark_edge, ".png", {}),
    "sheet on a table": (sheet_on_a_table, ".jpg", {"quality": 85}),
    "negative with white margins": (negative_with_white_margins, ".png", {}),
    "ruled paper": (ruled_paper, ".png", {}),
    "ruled paper, photographed": (photographed(ruled_paper), ".jpg", {"quality": 85}),
    "squared paper": (squared_paper, ".png", {}),
    "16 bits up to 255": (in_16_bits(255), ".png", {}),
    "16 bits up to 1023": (in_16_bits(1023), ".png", {}),
    "16 bits up to 4095": (in_16_bits(4095), ".png", {}),
    "16 bits up to 65535": (in_16_bits(65535), ".png", {}),
    "TIFF of 32 bits": (in_32_bits, ".tif", {}),
    "TIFF of floats from 0 to 1": (in_floats, ".tif", {}),
    "TIFF of normalized floats": (in_normalized_floats, ".tif", {}),
    "transparent paper, black ink": (transparent_paper(0), ".png", {}),
    "transparent paper, white ink": (transparent_paper(255), ".webp", {"lossless": True}),
    "transparent paper, grey and opacity": (transparent_grey, ".png", {}),
    "transparent color of a palette": (of_16_colors, ".png", {"transparency": 0}),
    "transparent grey": (paper_color_transparent, ".png", {}),
    "page cut out": (cut_out_page, ".png", {}),
    "jfif": (page, ".jfif", {}),
    "GIF of several pictures": (page, ".gif", {"save_all": True, "append_images": [OTHER_PAGE], "duration": 500}),
    "TIFF of several pages": (page, ".tiff", {"save_all": True, "append_images": [OTHER_PAGE]}),
    "turned, EXIF says how": (turned, ".jpg", {"exif": TURNED}),
    "broken EXIF": (page, ".jpg", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x40broken"}),
    "blank": (blank, ".png", {}),
    "blank, photographed": (blank_photograph, ".jpg", {"quality": 85}),
}
