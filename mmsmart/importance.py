"""First importance of every block: what is known before the search has learnt anything.

Scores of different layers are made comparable by dividing each layer's by its mean, and are then
standardised over the network, so that temperatures and learning rates mean the same everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmsmart.blocks import BlockLayer


def magnitude(layers: Sequence[BlockLayer]) -> Tensor:
    """Mean |w| of every block, `(num_blocks,)`, on the network's common scale.

    Example:
        >>> from mmsmart.blocks import find_layers
        >>> layers, _ = find_layers(nn.Linear(4, 4, bias=False), block=(2, 2))
        >>> magnitude(layers).shape
        torch.Size([4])
    """
    return live_magnitude(layers).detach()


def live_magnitude(layers: Sequence[BlockLayer]) -> Tensor:
    """The same with its gradient to the weights."""
    return common_scale([_block_mean(layer, layer.weight.abs()) for layer in layers])


def live_squares(layers: Sequence[BlockLayer]) -> Tensor:
    """Mean w² of every block, `(num_blocks,)`, on no scale but its own, with its gradient."""
    return torch.cat([_block_mean(layer, layer.weight.square()) for layer in layers])


def contributions(layers: Sequence[BlockLayer]) -> Tensor:
    """Sum of w ∂L/∂w over every block, `(num_blocks,)`, from the gradients that are there.

    To first order, what the loss rises by if the block doubles. Zeros for a layer without one.
    """
    sums = []
    for layer in layers:
        weight, grad = layer.weight.detach(), layer.weight.grad
        sums.append(layer.reduce(torch.zeros_like(weight) if grad is None else weight * grad))
    return torch.cat(sums)


def gradient(squares: Tensor) -> Tensor:
    """Logarithm of the mean squared contributions, standardised over the network.

    The criterion of Molchanov et al. (arXiv 1906.10771). Layers keep their own scales, since the
    loss compares them; blocks without effect score as 1e-8 of the mean.

    Args:
        squares: Mean over batches of the squared contributions, `(num_blocks,)`.

    Example:
        >>> gradient(torch.tensor([1.0, 100.0]))
        tensor([-1.,  1.])
    """
    least = (1e-8 * squares.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return standardised(squares.clamp_min(least).log())


def activation(layers: Sequence[BlockLayer], norms: dict[str, Tensor]) -> Tensor:
    """Mean |w| times the norm of the input channel it multiplies, `(num_blocks,)`.

    The score of Wanda (arXiv 2306.11695), averaged over blocks. A layer without recorded norms
    (its weight is used without a call of its own) falls back to its magnitude.

    Args:
        layers: Layers of the network.
        norms: Norm of every input channel `(in_channels,)` by layer name, see :func:`input_norms`.
    """
    scores = []
    for layer in layers:
        score = layer.weight.detach().abs()
        norm = norms.get(layer.name)
        if norm is not None:
            score = score.reshape(layer.view_shape) * _along_input_axis(layer, norm)
        scores.append(_block_mean(layer, score))
    return common_scale(scores)


def common_scale(scores: Sequence[Tensor]) -> Tensor:
    """Divide each layer's scores by their mean, then standardise over the network (std 1)."""
    tiny = torch.finfo(torch.float32).tiny
    parts = [score.double() for score in scores]
    return standardised(torch.cat([part / part.mean().clamp_min(tiny) for part in parts]))


def standardised(scores: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the network; zeros where all scores are the same."""
    centred = scores - scores.mean(dtype=torch.float64)
    spread = centred.square().mean(dtype=torch.float64).sqrt()
    # Around a mean of 1, a smaller spread than this is the rounding of float32 scores.
    return (centred / torch.where(spread > 1e-6, spread, torch.inf)).float()


@contextmanager
def input_norms(layers: Sequence[BlockLayer]) -> Iterator[dict[str, Tensor]]:
    """Record the root mean square of every input channel over all forward passes inside.

    The dictionary it gives is filled on leaving: `(in_channels,)` by layer name.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    norms: dict[str, Tensor] = {}

    def watch(layer: BlockLayer) -> torch.utils.hooks.RemovableHandle:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().float()
            axis = x.ndim - 1 if isinstance(module, nn.Linear) else x.ndim - layer.weight.ndim + 1
            others = [a for a in range(x.ndim) if a != axis]
            squares = x.square().sum(dim=others) if others else x.square()
            sums[layer.name] = sums.get(layer.name, 0) + squares
            counts[layer.name] = counts.get(layer.name, 0) + x.numel() // x.shape[axis]

        return layer.module.register_forward_pre_hook(add)

    handles = [watch(layer) for layer in layers]
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()
    norms.update({name: (sums[name] / counts[name]).sqrt() for name in sums})


def _block_mean(layer: BlockLayer, values: Tensor) -> Tensor:
    return layer.reduce(values) / layer.sizes().to(values.device)


def _along_input_axis(layer: BlockLayer, norm: Tensor) -> Tensor:
    shape = [1] * len(layer.view_shape)
    shape[layer.input_axis] = layer.view_shape[layer.input_axis]
    if layer.groups > 1:
        shape[0] = layer.groups
    return norm.reshape(shape)
