"""Random changes of a batch of images: mirrored, partly erased, in other colours."""

import pytest
import torch
from torchvision.transforms import functional

from hpsearch.data.augment import erase, flip, jitter_color
from hpsearch.data.dataset import denormalise, normalise

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_half_of_the_images_are_mirrored_left_to_right() -> None:
    images = torch.rand(400, 3, 4, 6)
    flipped = flip(images, generator())
    is_mirrored = (flipped == images.flip(3)).all(3).all(2).all(1)
    assert 150 < is_mirrored.sum() < 250
    assert torch.equal(flipped[~is_mirrored], images[~is_mirrored])


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_rectangle_of_each_image_is_erased_in_all_channels_up_to_a_share_of_its_area(strength: float) -> None:
    images = torch.rand(1000, 3, 30, 40) + 1
    erased = erase(images, strength, generator())
    is_zero = erased == 0
    assert torch.equal(erased[~is_zero], images[~is_zero])
    assert torch.equal(is_zero.all(dim=1), is_zero.any(dim=1))
    rows, columns = is_zero[:, 0].any(2), is_zero[:, 0].any(1)
    assert torch.equal(is_zero[:, 0], rows[:, :, None] & columns[:, None, :]), "rectangles"
    assert (rows.diff(dim=1).sum(1) <= 2).all(), "in one piece"
    shares = is_zero[:, 0].float().mean((1, 2))
    assert shares.max() == pytest.approx(0.4 * strength, rel=0.15)
    assert shares.mean() == pytest.approx(0.2 * strength, rel=0.1)
    assert rows.any(0).all(), "everywhere"
    assert columns.any(0).all()
    ratios = rows.sum(1) / columns.sum(1).clamp(min=1)
    large = shares > 0.1 * strength
    assert 0.2 < ratios[large].min() < 0.5
    assert 2 < ratios[large].max() < 4.5


@pytest.mark.parametrize("n_channels", [1, 3])
def test_colours_change_as_torchvision_changes_those_of_the_pixels(n_channels: int) -> None:
    pixels = torch.randint(90, 160, (8, n_channels, 9, 12), dtype=torch.uint8)
    mean, std = MEAN[:n_channels], STD[:n_channels]
    jittered = denormalise(jitter_color(normalise(pixels, mean, std), 0.8, mean, std, generator()), mean, std) / 255
    factors = 1 + (torch.rand(3, 8, generator=generator()) - 0.5) * 0.8
    for image, expected, (brightness, contrast, saturation) in zip(jittered, pixels / 255, factors.T, strict=True):
        expected = functional.adjust_brightness(expected, float(brightness))
        expected = functional.adjust_contrast(expected, float(contrast))
        expected = functional.adjust_saturation(expected, float(saturation))
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)


def test_changed_colours_are_between_black_and_white() -> None:
    pixels = torch.randint(0, 256, (50, 3, 9, 12), dtype=torch.uint8)
    jittered = denormalise(jitter_color(normalise(pixels, MEAN, STD), 1.0, MEAN, STD), MEAN, STD)
    assert jittered.min() == pytest.approx(0, abs=1e-3)
    assert jittered.max() == pytest.approx(255, abs=1e-3)
