"""A layer's forward pass over the blocks that are left of its weight."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from . import gpu, kernel

KERNELS = {'cpu': kernel, 'cuda': gpu}  # by the device of a weight
_DTYPES = {
    'cpu': (torch.float32,),
    'cuda': (torch.float32, torch.float16, torch.bfloat16),
}


def reason_for_dense(layer: nn.Module) -> str | None:
    """Why this convolution or linear layer can not run through the kernel; None if it can."""
    weight = layer.weight
    if is_parametrized(layer):
        return 'the weight is computed from other parameters (a parametrization)'
    if type(layer).forward not in (nn.Conv2d.forward, nn.Linear.forward):
        return f'{type(layer).__name__} has a forward of its own'
    if weight.device.type not in KERNELS:
        return f'the weight is on {weight.device}, not on the CPU or a CUDA device'
    if weight.dtype not in _DTYPES[weight.device.type]:
        allowed = ', '.join(str(dtype) for dtype in _DTYPES[weight.device.type])
        return f'the weight is {weight.dtype} on {weight.device}, where the kernel takes {allowed}'
    if getattr(layer, 'groups', 1) != 1:
        return f'the convolution has {layer.groups} groups'
    if getattr(layer, 'padding_mode', 'zeros') != 'zeros':
        return f'padding_mode is {layer.padding_mode!r}'
    if isinstance(layer, nn.Conv2d) and _padding(layer) is None:
        return "padding='same' differs from one side to the other"
    if not weight.numel():
        return 'the weight is empty'
    return None


def _padding(layer: nn.Conv2d) -> list[int] | None:
    """Padding of height and width; None where the two sides differ."""
    if layer.padding == 'valid':
        return [0, 0]
    if layer.padding == 'same':
        both = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size)]
        return None if any(total % 2 for total in both) else [total // 2 for total in both]
    return list(layer.padding)


def sparse_forwards(layer: nn.Conv2d | nn.Linear) -> list[SparseForward]:
    """All ways to run a layer over its kept blocks, among which measuring decides."""
    weight = layer.weight if isinstance(layer, nn.Conv2d) else layer.weight[:, :, None, None]
    packings = KERNELS[weight.device.type].packings(weight, layer.bias)
    return [SparseForward(layer, packed) for packed in packings]


class SparseForward:
    """Takes the place of a layer's `forward`; the layer keeps its weight, its type and its name.

    Whatever the kernel does not cover goes through the layer's own forward: other dtypes and
    devices, gradients, tracing and compiling, and a weight that has changed since it was packed.

    Args:
        layer: Convolution or linear layer without a :func:`reason_for_dense`.
        packed: Its weight and bias, packed for the kernel of their device.
    """

    def __init__(
        self, layer: nn.Conv2d | nn.Linear, packed: kernel.PackedWeight | gpu.PackedRows
    ) -> None:
        self.layer, self.packed = layer, packed
        self.stamp = self._stamp()
        self.geometry = [[1, 1], [1, 1], [0, 0], [1, 1]]
        if isinstance(layer, nn.Conv2d):
            self.geometry = [
                list(layer.kernel_size), list(layer.stride), _padding(layer), list(layer.dilation),
            ]  # fmt: skip

    def __call__(self, input: Tensor) -> Tensor:
        if not self._covers(input):
            return self.dense(input)
        if isinstance(self.layer, nn.Linear):
            # The rows of a matrix are the pixels of an image that is one row high.
            pixels = input.reshape(1, 1, -1, input.shape[-1]).permute(0, 3, 1, 2)
            output = self._run(pixels, channels_last=True)
            return output.permute(0, 2, 3, 1).reshape(*input.shape[:-1], -1)
        # The rule of torch's own convolution.
        contiguous = input.is_contiguous() and self.layer.weight.is_contiguous()
        return self._run(input, channels_last=not contiguous)

    def dense(self, input: Tensor) -> Tensor:
        """What the layer does by itself."""
        return type(self.layer).forward(self.layer, input)

    def _run(self, input: Tensor, channels_last: bool) -> Tensor:
        return self.packed.convolve(input, *self.geometry, channels_last=channels_last)

    def _covers(self, input: Tensor) -> bool:
        if torch.jit.is_tracing() or torch.compiler.is_compiling():
            return False
        convolution = isinstance(self.layer, nn.Conv2d)
        fits = (
            input.dtype == self.layer.weight.dtype
            and input.device == self.layer.weight.device
            and input.numel() > 0
            and (input.ndim == 4 if convolution else input.ndim > 0)
            and input.shape[1 if convolution else -1] == self.packed.shape[1]
        )
        if not fits or (torch.is_grad_enabled() and self._wants_gradient(input)):
            return False
        if input.is_cuda and torch.is_autocast_enabled():
            return False
        if self._stamp() != self.stamp:
            warnings.warn(
                'weights have changed since mmsmart.executor.accelerate packed them, so their '
                'layers run dense. Call accelerate again.',
                stacklevel=2,
            )
            return False
        return True

    def _wants_gradient(self, input: Tensor) -> bool:
        return input.requires_grad or any(p.requires_grad for p in self.layer.parameters())

    def _stamp(self) -> list[Any]:
        """Differs once the parameters hold something else, or are others."""
        parameters = self.layer._parameters.values()
        return [
            (p.data_ptr(), 0 if p.is_inference() else p._version)
            for p in parameters
            if p is not None
        ]
