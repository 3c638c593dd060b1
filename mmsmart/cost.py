"""What blocks cost: weights, MACs, or latency.

One multiply-accumulate counts as one MAC. A weight is used once at every position of the layer's
output (of its input, for a transposed convolution), so a block costs its number of weights times
the positions at which the layer runs, summed over all its uses in one forward pass of one image.
Latency is what the user's own table says (:mod:`mmsmart.latency`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.blocks import TRANSPOSED, BlockLayer, is_layer
from mmsmart.channels import ChannelGroup, ChannelLayer
from mmsmart.functional import CoupledCost
from mmsmart.latency import LatencyTable
from mmsmart.shrink import is_grouped


def block_cost(layers: Sequence[BlockLayer], positions: dict[str, int] | None = None) -> Tensor:
    """What every block of the network costs, float64 `(num_blocks,)`.

    Args:
        layers: The layers, in the order of their blocks.
        positions: Uses of each layer's weights in one forward pass, by name (see
            :func:`count_positions`): the cost is then in MACs. None counts weights.
    """
    return torch.cat(
        [layer.sizes() * _uses(positions, layer.name) for layer in layers] or [torch.zeros(0)]
    ).double()


def coupled_cost(
    layers: Sequence[ChannelLayer],
    groups: Sequence[ChannelGroup],
    positions: dict[str, int] | None = None,
    table: LatencyTable | None = None,
) -> CoupledCost:
    """What a network costs by the channels it keeps: weights, biases and norms, MACs, or latency.

    Args:
        layers: All layers that lose channels.
        groups: The groups of units.
        positions: As for :func:`block_cost`; biases and norms cost no MACs.
        table: Latency of each convolution and linear layer by the share of its weights that is
            left; norms are counted with the layer before them.
    """
    num_units = sum(len(group.units) for group in groups)
    group_of = torch.empty(num_units, dtype=torch.long)
    for index, group in enumerate(groups):
        group_of[list(group.units)] = index
    size = torch.tensor([len(group.units) for group in groups], dtype=torch.float64)

    def places(units: Tensor) -> Tensor:
        """Channels that one unit of each group has among these."""
        found = torch.bincount(group_of[units[units >= 0]], minlength=len(groups))
        return found / size

    linear = torch.zeros(len(groups), dtype=torch.float64)
    constant, rows, names = 0.0, [], []
    for layer in layers:
        uses, vectors = _uses(positions, layer.name), int(layer.module.bias is not None)
        stays = int((layer.out < 0).sum())
        if layer.in_ is None:
            vectors += 1
        elif is_grouped(layer.module):  # its weights leave with its groups, on both sides at once
            each = layer.module.weight.numel() // len(layer.out) * uses
            rows.append((each, places(layer.out), torch.zeros_like(size), stays, 1))
            names.append(layer.name)
        else:
            kernel = layer.module.weight[0, 0].numel() * uses
            rest = int((layer.in_ < 0).sum())
            rows.append((kernel, places(layer.out), places(layer.in_), stays, rest))
            names.append(layer.name)
        if positions is None and table is None:
            linear += vectors * places(layer.out)
            constant += vectors * stays
    kernel, out, in_, out_rest, in_rest = zip(*rows)
    return CoupledCost(
        group=group_of,
        unit=torch.tensor(kernel, dtype=torch.float64),
        out=torch.stack(out).double(),
        in_=torch.stack(in_).double(),
        out_rest=torch.tensor(out_rest, dtype=torch.float64),
        in_rest=torch.tensor(in_rest, dtype=torch.float64),
        linear=linear,
        constant=constant,
        curves=None if table is None else table.of_layers(names),
    )


def _uses(positions: dict[str, int] | None, name: str) -> int:
    return 1 if positions is None else positions.get(name, 0)


def count_positions(model: nn.Module, forward: Callable[[], Any]) -> dict[str, int]:
    """Number of positions at which each layer's weights are used in `forward`.

    Args:
        model: The model whose convolutions and linear layers are watched.
        forward: Runs the model once, on one image.

    Returns:
        Positions by layer name; a layer that was not run has 0, and one that holds the weight of a
        layer before it, whose positions are then those of both.

    Example:
        >>> net = nn.Conv2d(3, 4, 3)
        >>> count_positions(net, lambda: net(torch.zeros(1, 3, 8, 8)))
        {'': 36}
    """
    layers = {m: n for n, m in model.named_modules() if is_layer(m)}
    positions, owners = dict.fromkeys(layers.values(), 0), {}
    names = {m: owners.setdefault(id(m._parameters.get('weight', m)), n) for m, n in layers.items()}

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
