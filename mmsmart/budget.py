"""What blocks cost, and how much of it may be kept.

One multiply-accumulate counts as one MAC. A weight is used once at every position of the layer's
output (of its input, for a transposed convolution), so a block costs its number of weights times
the positions at which the layer runs, summed over all its uses in one forward pass of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.blocks import PRUNABLE, TRANSPOSED, BlockLayer


def block_cost(layers: Sequence[BlockLayer]) -> Tensor:
    """Number of weights of every block of the network, float64 `(num_blocks,)`."""
    return torch.cat([layer.sizes() for layer in layers]).double()


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity that is not a number in [0, 1).

    Raises:
        ValueError: Saying what is allowed.
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise ValueError(f'sparsity: expected a number in [0, 1), got {sparsity!r}.')
    if not 0 <= sparsity < 1:
        raise ValueError(
            f'sparsity: {sparsity!r} is outside [0, 1). It is the share of the weights to remove: '
            '0.8 keeps one weight in five.'
        )


def budget_for(cost: Tensor, sparsity: float) -> float:
    """The cost that may be kept: `sum(cost) * (1 - sparsity)`, without binary rounding of the rate.

    Raises:
        ValueError: If `sparsity` is outside [0, 1).

    Example:
        >>> budget_for(torch.ones(1000), 0.8)  # and not 199.99999999999997
        200.0
    """
    check_sparsity(sparsity)
    return float(Decimal(float(cost.sum())) * (1 - Decimal(repr(float(sparsity)))))


def count_positions(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """Number of positions at which each layer's weights are used in `forward`.

    Args:
        model: The model whose convolutions and linear layers are watched.
        forward: Runs the model once, on one image.

    Returns:
        Positions by layer name; a layer that was not run has 0.

    Example:
        >>> net = nn.Conv2d(3, 4, 3)
        >>> count_positions(net, lambda: net(torch.zeros(1, 3, 8, 8)))
        {'': 36}
    """
    names = {m: n for n, m in model.named_modules() if isinstance(m, PRUNABLE)}
    positions = dict.fromkeys(names.values(), 0)

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            used = output.numel() // module.out_features
        elif isinstance(module, TRANSPOSED):
            used = inputs[0].numel() // module.in_channels
        else:
            used = output.numel() // module.out_channels
        positions[names[module]] += used

    handles = [module.register_forward_hook(count) for module in names]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return positions


def count_macs(model: nn.Module, positions: dict[str, int]) -> int:
    """MACs of all convolutions and linear layers of the model, pruned or not, for one image."""
    modules = dict(model.named_modules())
    return sum(modules[name].weight.numel() * used for name, used in positions.items())
