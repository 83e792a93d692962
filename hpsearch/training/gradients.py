"""The gradients of a training step: by autograd for any network, or in closed form for a perceptron.

In a small perceptron, autograd's bookkeeping takes more time than the arithmetic. `PerceptronGradients` calls the same
kernels in the same order without it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpsearch.training.networks import Dropout, Network, OwnNetwork
from hpsearch.training.randomness import turn

Gradients = Callable[[Tensor, Tensor], Tensor]
"""Maps normalized images (N, C, H, W) and labels (N,) to the mean loss, and stores the gradients in `.grad`."""

_aten: Any = torch.ops.aten
_FAST_MATMUL_FROM = 2**16  # parameters; in smaller perceptrons oneDNN's overhead per product outweighs the gain


def join_parameters(network: nn.Module) -> nn.Parameter:
    """Join all parameters that are trained into one, with zero gradients; the parameters become views of it.

    An elementwise optimizer then updates a single tensor. Parameters keep their memory format, and tied ones are tied.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    joined = nn.Parameter(torch.empty(sum(map(torch.numel, parameters)), device=parameters[0].device))
    joined.grad = torch.zeros_like(joined)
    start = 0
    for parameter in parameters:
        strides = _dense_strides(parameter)
        values, parameter.grad = (
            part.as_strided(parameter.shape, strides, start) for part in (joined.detach(), joined.grad)
        )
        parameter.data = values.copy_(parameter.data)
        start += parameter.numel()
    return joined


def _dense_strides(parameter: Tensor) -> tuple[int, ...]:
    """Return the strides of a parameter, or contiguous ones if its elements are apart or shared, as in a slice."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(parameter.shape, parameter.stride(), strict=True))
    is_dense = extent == parameter.numel()
    return parameter.stride() if is_dense else torch.empty(parameter.shape, device="meta").stride()


@contextmanager
def fast_matmul(n_parameters: int) -> Iterator[None]:
    """Use torch's fastest float32 matrix multiplication inside the `with` block, if the network is large enough.

    With AVX-512 this is oneDNN, still in float32 and about twice as fast as MKL on AMD processors. With AMX or on a GPU
    the products are rounded (`torch.set_float32_matmul_precision`). The setting applies to the whole process, so only
    one thread at a time is inside.
    """
    with turn:
        previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("medium" if n_parameters >= _FAST_MATMUL_FROM else previous)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(previous)


def choose_gradients(network: Network, label_smoothing: float) -> Gradients:
    """Return the fastest way to compute the gradients of the mean cross entropy for the network's layers.

    Every parameter must have a `.grad`, as after `join_parameters`.
    """
    is_perceptron = [type(layer) for layer in network][:2] == [nn.Flatten, nn.Linear]
    if is_perceptron and all(type(layer) in _RULES for layer in network):
        return PerceptronGradients(network, label_smoothing)
    return Autograd(network, label_smoothing)


class Autograd:
    """torch's own loss and gradients; a built-in network's convolutions use bfloat16 where the hardware supports it."""

    def __init__(self, network: Network, label_smoothing: float) -> None:
        self.network, self.loss_function = network, nn.CrossEntropyLoss(label_smoothing=label_smoothing)
        self.device = next(network.parameters()).device.type
        has_convolutions = not isinstance(network, OwnNetwork) and any(
            isinstance(layer, nn.Conv2d) for layer in network
        )
        self.is_mixed = has_convolutions and _computes_bfloat16(self.device)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        self.network.zero_grad(set_to_none=False)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.is_mixed):
            loss: Tensor = self.loss_function(self.network(images), labels)
        loss.backward()
        return loss.detach()


def _computes_bfloat16(device: str) -> bool:
    """Return whether the device has bfloat16 instructions: 1.2x to 1.5x faster with AVX512-BF16, 7x slower without."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return device == "cpu" and bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


class PerceptronGradients:
    """The same loss and gradients in closed form, for a sequence of layers that have a rule in `_RULES`."""

    def __init__(self, network: Network, label_smoothing: float) -> None:
        self.layers = [_RULES[type(layer)](layer) for layer in network if type(layer) is not nn.Flatten]
        last_weight = [layer.weight for layer in network if type(layer) is nn.Linear][-1]
        one_hot = torch.eye(len(last_weight), device=last_weight.device)
        # (classes, classes): the smoothed target probabilities, one row per label
        self.targets = one_hot * (1 - label_smoothing) + label_smoothing / len(one_hot)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        values = images.flatten(1)
        for layer in self.layers:
            values = layer.forward(values)
        log_probabilities = values.log_softmax(1)
        targets = self.targets.index_select(0, labels)
        loss = (log_probabilities * targets).sum().div_(-len(labels))
        # Gradient of the cross entropy w.r.t. the logits: Goodfellow, Bengio and Courville, Deep Learning, 6.2.2.3.
        gradient = log_probabilities.exp_().sub_(targets).div_(len(labels))
        for layer in reversed(self.layers[1:]):
            gradient = layer.backward(gradient)
        self.layers[0].backward_parameters(gradient)
        return loss


class _Linear:
    def __init__(self, layer: nn.Linear) -> None:
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, values: Tensor) -> Tensor:
        self.values = values
        return nn.functional.linear(values, self.weight, self.bias)

    def backward_parameters(self, gradient: Tensor) -> None:
        torch.mm(gradient.t(), self.values, out=self.weight.grad)
        if self.bias is not None:
            torch.sum(gradient, 0, out=self.bias.grad)

    def backward(self, gradient: Tensor) -> Tensor:
        self.backward_parameters(gradient)
        return gradient.mm(self.weight)


class _BatchNorm:
    def __init__(self, layer: nn.BatchNorm1d) -> None:
        self.layer: Any = layer

    def forward(self, values: Tensor) -> Any:
        layer = self.layer
        layer.num_batches_tracked.add_(1)
        self.values = values
        normed, self.mean, self.inverse_deviation = _aten.native_batch_norm(
            values, layer.weight, layer.bias, layer.running_mean, layer.running_var, True, layer.momentum, layer.eps
        )
        return normed

    def backward(self, gradient: Tensor) -> Any:
        layer = self.layer
        by_values, by_weight, by_bias = _aten.native_batch_norm_backward(
            gradient, self.values, layer.weight, layer.running_mean, layer.running_var,
            self.mean, self.inverse_deviation, True, layer.eps, [True, True, True],
        )  # fmt: skip
        layer.weight.grad.copy_(by_weight)
        layer.bias.grad.copy_(by_bias)
        return by_values


class _Activation:
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.rule = _ACTIVATION_RULES[type(layer)]

    def forward(self, values: Tensor) -> Any:
        self.values = values
        return self.layer(values)

    def backward(self, gradient: Tensor) -> Tensor:
        return self.rule(gradient, self.values)


class _Dropout:
    def __init__(self, layer: Dropout) -> None:
        self.layer = layer

    def forward(self, values: Tensor) -> Tensor:
        self.mask = self.layer.draw_mask(values)
        return values * self.mask

    def backward(self, gradient: Tensor) -> Tensor:
        return gradient.mul_(self.mask)


_ACTIVATION_RULES: dict[type[nn.Module], Callable[[Tensor, Tensor], Tensor]] = {
    nn.ReLU: lambda gradient, values: _aten.threshold_backward(gradient, values, 0),
    nn.GELU: _aten.gelu_backward,
    nn.SiLU: _aten.silu_backward,
}
_RULES: dict[type[nn.Module], Any] = {
    nn.Flatten: None,
    nn.Linear: _Linear,
    nn.BatchNorm1d: _BatchNorm,
    Dropout: _Dropout,
    **dict.fromkeys(_ACTIVATION_RULES, _Activation),
}
