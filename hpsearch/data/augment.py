"""Random changes of the images of a batch: shift, rotation, scale and shear; mirroring; erasing; colour."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_LUMA = [0.2989, 0.587, 0.1141]  # of red, green and blue: ITU-R BT.601, as in torchvision and Pillow


def augment(images: Tensor, strength: float, generator: torch.Generator | None = None, *, shear: float = 0.0) -> Tensor:
    """Shift, rotate, scale and shear each image by random amounts, in one resampling of the batch.

    At strength 1 the amounts are uniform up to 1/7 of the image (4 pixels of 28), 20 degrees and 20 percent; other
    strengths scale them. With `shear` 1, columns are tilted by up to 20 degrees before that. Pixels outside the image
    repeat the border. The shape (N, C, H, W) is unchanged. `generator` draws the amounts; it must be on the device of
    the images.
    """
    n, device = len(images), images.device
    angle, scale, *shift = (torch.rand(4, n, generator=generator, device=device) * 2 - 1) * strength
    angle, scale = angle * (torch.pi / 9), 1 + scale * 0.2
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    across_rows, down_rows = -sine, cosine
    if shear:
        tilt = torch.tan((torch.rand(n, generator=generator, device=device) * 2 - 1) * shear * (torch.pi / 9))
        across_rows, down_rows = across_rows + tilt * cosine, down_rows + tilt * sine
    # Coordinates range from -1 to 1, so 2/7 is 1/7 of the image.
    x, y = shift[0] * (2 / 7), shift[1] * (2 / 7)
    height, width = images.shape[2:]
    row, column = (torch.arange(1, 2 * size, 2, device=device) / size - 1 for size in (height, width))
    # Same as affine_grid, which multiplies small matrices one by one and is slower than the resampling.
    across = (torch.outer(cosine, column) + x[:, None])[:, None, :] + torch.outer(across_rows, row)[:, :, None]
    down = (torch.outer(sine, column) + y[:, None])[:, None, :] + torch.outer(down_rows, row)[:, :, None]
    grid = torch.stack([across, down], dim=-1)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def flip(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mirror half of the images left to right, chosen at random."""
    is_mirrored = torch.rand(len(images), generator=generator, device=images.device) < 0.5
    return torch.where(is_mirrored[:, None, None, None], images.flip(3), images)


def erase(images: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Set a random rectangle of each normalized image to 0, the mean of all images.

    At strength 1 its area is uniform up to 40% of the image; other strengths scale it. Its height is between 0.3 and
    3.3 times its width (Random Erasing, Zhong et al. 2017, https://arxiv.org/abs/1708.04896, who erase half of the
    images instead of less).
    """
    height, width = images.shape[2:]
    area, ratio, top, left = torch.rand(4, len(images), generator=generator, device=images.device)
    area, ratio = area * (0.4 * strength * height * width), (1 / 0.3) ** (ratio - 0.5).mul(2)
    rows, columns = (area * ratio).sqrt().clamp(max=height), (area / ratio).sqrt().clamp(max=width)
    is_erased = (
        _is_between(top * (height - rows), rows, height)[:, :, None]
        & _is_between(left * (width - columns), columns, width)[:, None, :]
    )
    return images * (~is_erased[:, None]).to(images.dtype)


def _is_between(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return which of `size` pixels have their centre in the stretches, shape (N, size)."""
    centre = torch.arange(size, device=start.device) + 0.5
    return (centre >= start[:, None]) & (centre < (start + length)[:, None])


def jitter_color(
    images: Tensor,
    strength: float,
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Change brightness, contrast and, with three channels, saturation of each image by random factors.

    At strength 1 the factors are uniform between 0.5 and 1.5; other strengths scale the difference from 1. They are
    applied to the pixels before the normalization with `mean` and `std`, one number a channel, in this order and as
    torchvision's ColorJitter does, but pixels are clipped to [0, 1] only at the end.
    """
    n, n_channels = images.shape[:2]
    factors = 1 + (torch.rand(3, n, 1, generator=generator, device=images.device) - 0.5) * strength
    brightness, contrast, saturation = factors if n_channels == 3 else (*factors[:2], torch.ones_like(factors[2]))
    luma = _LUMA if n_channels == 3 else [1 / n_channels] * n_channels
    middle, deviation, weights = torch.tensor([mean, std, luma], device=images.device)
    # All three are linear in the pixels, so that they are one product with a matrix for each image.
    mixed = (
        saturation[:, :, None] * torch.eye(n_channels, device=images.device) + (1 - saturation)[:, :, None] * weights
    )
    matrix = (brightness * contrast)[:, :, None] * mixed
    grey = (images.mean((2, 3)) * deviation + middle) @ weights
    offset = matrix @ middle + (1 - contrast) * brightness * grey[:, None]
    matrix, offset = matrix * deviation / deviation[:, None], (offset - middle) / deviation
    jittered = torch.baddbmm(offset[:, :, None], matrix, images.flatten(2)).view_as(images)
    for channel in range(n_channels):
        jittered[:, channel].clamp_(-mean[channel] / std[channel], (1 - mean[channel]) / std[channel])
    return jittered
