"""A residual network (He et al. 2015, https://arxiv.org/abs/1512.03385) for the study file mnist-resnet.toml."""

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two convolutions, whose result is added to their input. With stride 2, height and width are halved."""

    def __init__(self, n_inputs: int, n_outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(n_inputs, n_outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(n_outputs),
            nn.ReLU(),
            nn.Conv2d(n_outputs, n_outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(n_outputs),
        )
        is_same = stride == 1 and n_inputs == n_outputs
        self.shortcut = nn.Identity() if is_same else nn.Conv2d(n_inputs, n_outputs, 1, stride, bias=False)

    def forward(self, values: Tensor) -> Tensor:
        return torch.relu(self.convolutions(values) + self.shortcut(values))


def build(
    image_shape: tuple[int, int, int],
    n_classes: int,
    *,
    stages: int,
    blocks: int = 1,
    width: int = 16,
    drop: float = 0.0,
) -> nn.Module:
    """Return a convolution with stride 2, and `stages` stages of `blocks` blocks; `drop` is the share of dropout.

    From stage to stage, height and width are halved, and the channels, `width` in the first, are doubled.
    Called by hpsearch with the shape of an image, (channels, height, width), the number of classes, and the
    hyperparameters of a trial. The network gets normalized images (N, C, H, W), and returns logits (N, classes).
    """
    stem = nn.Conv2d(image_shape[0], width, 5, stride=2, padding=2, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    n_inputs = width
    for stage in range(stages):
        n_outputs = width * 2**stage
        for block in range(blocks):
            layers.append(ResidualBlock(n_inputs, n_outputs, stride=2 if stage and not block else 1))
            n_inputs = n_outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(drop), nn.Linear(n_inputs, n_classes)]
    network = nn.Sequential(*layers, *head)
    return network.to(memory_format=torch.channels_last)  # faster for convolutions
