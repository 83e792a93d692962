"""Where a training step of a CNN goes, on one thread: shares of its operators, and its convolutions alone."""

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import profile

from hpsearch.data.dataset import Split
from hpsearch.training.gradients import Autograd
from hpsearch.training.kinds import Hyperparameters
from hpsearch.training.networks import build_network
from hpsearch.training.trainer import Trainer
from tests.benchmark.report import Options, Row, summarize

_N_STEPS, _N_CLASSES = 8, 10
_OPERATORS = {  # parts of their names in the profile; the first one that fits
    "convolutions": ("convolution",),
    "batch norm": ("batchnorm",),
    "activations": ("relu", "clampmin", "threshold"),
    "taking and changing the images": ("gridsampler", "indexselect", "::cat", "::rand"),
    "optimizer": ("adamw",),
}


def step(folder: Path, options: Options, widths: Sequence[int] = (16, 24)) -> list[Row]:
    """Shares of a step; and its convolutions by themselves, over the step and over a product of matrices."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    rows = [
        summarize(f"step: CNN 5x{width}", what, unit, values)
        for width in widths
        for (what, unit), values in _measure(width, options.repeats).items()
    ]
    torch.set_num_threads(threads)
    return rows


def _measure(width: int, n_repeats: int) -> dict[tuple[str, str], list[float]]:
    """Return the values of each figure and unit."""
    chosen = Hyperparameters(
        depth=5, width=width, batch_size=256, optimizer="adamw", schedule="onecycle", label_smoothing=0.1, augment=0.5
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_N_STEPS * chosen.batch_size, 1, 28, 28, generator=generator)
    split = Split(images, torch.randint(_N_CLASSES, (len(images),), generator=generator))
    network = build_network("cnn", chosen, (1, 28, 28), _N_CLASSES)
    trainer = Trainer(network, split, chosen, epochs=1_000_000)
    convolutions = _take_convolutions(network, images[: chosen.batch_size])
    n_operations = sum(_count(layer, inputs) for layer, inputs in convolutions)
    is_mixed = Autograd(network, 0.0).is_mixed
    matrix = torch.randn(1024, 1024, generator=generator)
    figures = defaultdict[tuple[str, str], list[float]](list)
    trainer.run_epoch()
    for _ in range(n_repeats):
        with profile() as profiled:
            trainer.run_epoch()
        for what, percent in _share(profiled).items():
            figures[what, "%"].append(percent)
        seconds = min(_time(trainer.run_epoch) for _ in range(3)) / _N_STEPS
        bare = min(_time(lambda: _convolve(convolutions, is_mixed)) for _ in range(_N_STEPS))
        product = min(_time(lambda: matrix @ matrix) for _ in range(_N_STEPS))
        figures["its convolutions by themselves, over the step", "x"].append(bare / seconds)
        speed = n_operations / bare / (2 * len(matrix) ** 3 / product)
        figures["their FLOP/s, over those of a product of matrices", "x"].append(speed)
    return figures


def _time(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _take_convolutions(network: nn.Module, values: Tensor) -> list[tuple[nn.Conv2d, Tensor]]:
    """Return each convolution with a batch of its inputs."""
    found = []
    values = values.to(memory_format=torch.channels_last)
    with torch.no_grad():
        for layer in network.children():
            if isinstance(layer, nn.Conv2d):
                found.append((layer, values))
            values = layer(values)
    return [(layer, inputs.requires_grad_(i > 0)) for i, (layer, inputs) in enumerate(found)]


def _count(layer: nn.Conv2d, inputs: Tensor) -> int:
    """Return the floating point operations of a step: forward, for the weights, and unless it is the first, back."""
    n_products: int = layer(inputs[:1]).numel() * len(inputs) * layer.weight[0].numel()
    return 2 * n_products * (3 if inputs.requires_grad else 2)


def _convolve(convolutions: list[tuple[nn.Conv2d, Tensor]], is_mixed: bool) -> None:
    for layer, inputs in convolutions:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
            outputs = layer(inputs)
        outputs.backward(outputs.detach())


def _share(profiled: profile) -> dict[str, float]:
    """Return percent of the processor's time of each kind of operator."""
    seconds = dict.fromkeys((*_OPERATORS, "the rest"), 0.0)
    for event in profiled.key_averages():
        names = (
            kind
            for kind, parts in _OPERATORS.items()
            if any(part in event.key.lower().replace("_", "") for part in parts)
        )
        seconds[next(names, "the rest")] += event.self_cpu_time_total
    return {name: 100 * value / sum(seconds.values()) for name, value in seconds.items()}
