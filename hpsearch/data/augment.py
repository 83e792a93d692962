"""Random shift, rotation and scale of a batch, in one resampling."""

import torch
from torch import Tensor
from torch.nn import functional


def augment(images: Tensor, strength: float) -> Tensor:
    """The images, each shifted, rotated and scaled by random amounts of its own, in one resampling of the batch.

    At strength 1 the amounts are uniform up to 1/7 of the image (4 pixels of 28), 20 degrees and 20 percent; other
    strengths scale them. Pixels from outside repeat the border. Shape (N, C, H, W), unchanged.
    """
    n, device = len(images), images.device
    angle, scale, *shift = (torch.rand(4, n, device=device) * 2 - 1) * strength
    angle, scale = angle * (torch.pi / 9), 1 + scale * 0.2
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    # The coordinates span 2 across the image, so 2/7 of them are 1/7 of the image.
    x, y = shift[0] * (2 / 7), shift[1] * (2 / 7)
    height, width = images.shape[2:]
    row, column = (torch.arange(1, 2 * size, 2, device=device) / size - 1 for size in (height, width))
    # As affine_grid, which multiplies one small matrix after the other and takes longer than the resampling.
    across = (torch.outer(cosine, column) + x[:, None])[:, None, :] - torch.outer(sine, row)[:, :, None]
    down = (torch.outer(sine, column) + y[:, None])[:, None, :] + torch.outer(cosine, row)[:, :, None]
    grid = torch.stack([across, down], dim=-1)
    return functional.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
