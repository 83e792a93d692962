"""Random shift, rotation and scaling of a batch."""

import torch
from torch import Tensor
from torch.nn import functional


def augment(images: Tensor, strength: float, generator: torch.Generator | None = None) -> Tensor:
    """Shift, rotate and scale each image by random amounts, in one resampling of the batch.

    At strength 1 the amounts are uniform up to 1/7 of the image (4 pixels of 28), 20 degrees and 20 percent; other
    strengths scale them. Pixels outside the image repeat the border. The shape (N, C, H, W) is unchanged. `generator`
    draws the amounts; it must be on the device of the images.
    """
    n, device = len(images), images.device
    angle, scale, *shift = (torch.rand(4, n, generator=generator, device=device) * 2 - 1) * strength
    angle, scale = angle * (torch.pi / 9), 1 + scale * 0.2
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    # Coordinates range from -1 to 1, so 2/7 is 1/7 of the image.
    x, y = shift[0] * (2 / 7), shift[1] * (2 / 7)
    height, width = images.shape[2:]
    row, column = (torch.arange(1, 2 * size, 2, device=device) / size - 1 for size in (height, width))
    # Same as affine_grid, which multiplies small matrices one by one and is slower than the resampling.
    across = (torch.outer(cosine, column) + x[:, None])[:, None, :] - torch.outer(sine, row)[:, :, None]
    down = (torch.outer(sine, column) + y[:, None])[:, None, :] + torch.outer(cosine, row)[:, :, None]
    grid = torch.stack([across, down], dim=-1)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
