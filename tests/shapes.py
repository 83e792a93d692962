"""A made set of coloured images in class folders, such as a user may have: shapes, of classes of unequal size."""

import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = {"circle": 0.28, "square": 0.22, "triangle": 0.18, "star": 0.14, "cross": 0.11, "ring": 0.07}  # with shares
_SCALE = 4  # shapes are drawn larger and reduced, so that their edges are smooth


def write_shapes(
    folder: Path, n_images: int = 4000, seed: int = 0, *, size: int = 48, n_copies: int = 0, n_broken: int = 0
) -> list[Path]:
    """Write PNG files of RGB images into a subfolder for each class, and return the paths of those that are broken.

    Colours, sizes, positions, angles, backgrounds and noise are random. There are `n_images` different images, then
    `n_copies` exact copies of some (in the folder of the same class), and `n_broken` files that are no image: cut off,
    empty and text, in turn. The files are the same whenever the arguments are.
    """
    random = np.random.default_rng(seed)
    files = []
    for name, count in _class_sizes(n_images).items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            files.append(folder / name / f"{name}-{number:04}.png")
            draw_shape(name, random, size).save(files[-1])
    for number, index in enumerate(random.integers(len(files), size=n_copies)):
        shutil.copy(files[index], files[index].with_name(f"copy-{number:03}.png"))
    contents = [files[0].read_bytes()[:-200], b"", b"not an image"]
    broken = []
    for number, index in enumerate(random.integers(len(files), size=n_broken)):
        broken.append(files[index].with_name(f"broken-{number:03}.png"))
        broken[-1].write_bytes(contents[number % len(contents)])
    return broken


def draw_shape(name: str, random: np.random.Generator, size: int = 48) -> Image.Image:
    """Return an RGB image of a shape whose colour can be told from its background."""
    while True:
        shape, near, far = random.integers(0, 256, (3, 3))
        if min(np.abs(shape - near).mean(), np.abs(shape - far).mean()) > 50:
            break
    ramp = np.linspace(0, 1, size)[:, None] if random.random() < 0.5 else np.linspace(0, 1, size)[None]
    background = near + (far - near) * np.broadcast_to(ramp, (size, size))[..., None]
    mask = np.asarray(_draw_mask(name, random, size))[..., None] / 255
    pixels = background * (1 - mask) + shape * mask + random.normal(0, random.uniform(2, 14), (size, size, 3))
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _class_sizes(n_images: int) -> dict[str, int]:
    sizes = {name: max(round(n_images * share), 1) for name, share in CLASSES.items()}
    sizes["circle"] += n_images - sum(sizes.values())
    return sizes


def _draw_mask(name: str, random: np.random.Generator, size: int) -> Image.Image:
    """Return a grey image that is 255 in the shape, whose radius, centre and angle are random."""
    large = size * _SCALE
    radius = random.uniform(0.18, 0.4) * large
    x, y = random.uniform(radius, large - radius, 2)
    start = math.radians(random.uniform(-25, 25) - 90)

    def ring_of(n_points: int, *radii: float, turn: float = 0) -> list[tuple[float, float]]:
        angles = [start + math.radians(turn) + 2 * math.pi * i / n_points for i in range(n_points)]
        lengths = [radius * radii[i % len(radii)] for i in range(n_points)]
        return [(x + r * math.cos(a), y + r * math.sin(a)) for a, r in zip(angles, lengths, strict=True)]

    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    box = (x - radius, y - radius, x + radius, y + radius)
    match name:
        case "circle":
            draw.ellipse(box, fill=255)
        case "ring":
            draw.ellipse(box, outline=255, width=round(radius * 0.35))
        case "square":
            draw.polygon(ring_of(4, 1, turn=45), fill=255)
        case "triangle":
            draw.polygon(ring_of(3, 1), fill=255)
        case "star":
            draw.polygon(ring_of(10, 1, 0.45), fill=255)
        case "cross":
            for turn in (0, 90):
                draw.line(ring_of(2, 1, turn=turn), fill=255, width=round(radius * 0.55))
    return mask.resize((size, size), Image.Resampling.BOX)
