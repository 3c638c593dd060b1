"""Put masks on a model, find them, and fold them away."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from mmsmart.blocks import find_layers
from mmsmart.budget import read_targets
from mmsmart.channels import find_channels
from mmsmart.dependency import Forward
from mmsmart.latency import LatencyTable
from mmsmart.layer_rules import default_sparsity, least_densities
from mmsmart.masking import BlockMasks
from mmsmart.methods import Method
from mmsmart.plans import ChannelPlan, plan_blocks

_ATTRIBUTE = 'block_masks'


def install_masks(
    model: nn.Module,
    sparsity: float | dict[str, Any] | None = None,
    block: Sequence[int] | str = (16, 8, 1, 1),
    layers: Sequence[dict[str, Any]] = (),
    positions: dict[str, int] | None = None,
    forward: Forward | None = None,
    round_to: int = 1,
    resource: str | None = None,
    latency: LatencyTable | None = None,
    method: Method | None = None,
) -> BlockMasks:
    """Give a model masks over its blocks; its weights stay as they are until the search begins.

    Args:
        model: Any module with convolutions or linear layers.
        sparsity: Share of the resource to remove, in [0, 1); or a dict by resource, or by part of
            the model; see :func:`mmsmart.budget.read_targets`. If not given, what N of M removes,
            else one half.
        block: `(out, in, kh, kw)`, -1 for a whole axis, or a string such as '16x8' or '2:4'; see
            :func:`mmsmart.layer_rules.read_block`. Or 'channel': coupled output channels, see
            :func:`mmsmart.channels.find_channels`.
        layers: Overrides by name pattern; see :func:`mmsmart.blocks.find_layers`. Without a
            `min_density` a layer keeps one block at least.
        positions: Uses of each layer's weights by name, as `mmsmart.cost.count_positions` gives
            them, for budgets of MACs.
        forward: For 'channel': runs a model like this one on one image and gives all its outputs.
        round_to: For 'channel': channels left in each group are a multiple of it, or all.
        resource: What a plain `sparsity` counts: 'params', 'macs' or 'latency'. If not given, MACs
            where there are positions, else parameters.
        latency: Latencies of the layers, for budgets of latency.
        method: What decides the masks; SMART if not given, see :mod:`mmsmart.methods`.

    Raises:
        ValueError: If the model has masks already, nothing can be pruned, or an argument is out of
            its range.
        ModuleNotFoundError: For 'channel', if Torch-Pruning is not installed.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> masks = install_masks(model, sparsity=0.5, block=(4, 4))
        >>> optimizer = torch.optim.SGD([*model.parameters(), masks.importance], lr=0.1)
        >>> masks.begin(torch.randn(masks.num_blocks), temperature=1.0)
        >>> for temperature in (1.0, 0.1, 0.01):
        ...     model(torch.randn(2, 8)).square().mean().backward()
        ...     with masks.latent_weights(temperature):
        ...         optimizer.step()
        ...     optimizer.zero_grad()
        >>> masks.harden()
        >>> float(sum((layer.weight != 0).sum() for layer in masks.layers))
        96.0
    """
    if masks_of(model) is not None:
        raise ValueError(
            f'{type(model).__name__} has block masks already. Remove them with '
            '`mmsmart.remove_masks(model)` before new ones are installed.'
        )
    sparsity = default_sparsity(block) if sparsity is None else sparsity
    targets = read_targets(sparsity, resource or ('params' if positions is None else 'macs'))
    for name, needed in (('macs', positions), ('latency', latency)):
        if needed is None and any(target.resource == name for target in targets):
            what = 'positions' if name == 'macs' else 'latency'
            raise ValueError(f'{what}: a budget of {name} needs it, got None.')
    if block == 'channel':
        if forward is None:
            raise ValueError("forward: block='channel' needs a forward pass to follow, got None.")
        found = find_channels(model, forward, layers)
        least = least_densities([layer.name for layer in found[0]], layers)
        plan = ChannelPlan(*found, targets, positions, latency, least, _checked(round_to))
    else:
        found = find_layers(model, block, layers)
        least = least_densities([layer.name for layer in found[0]], layers)
        plan = plan_blocks(*found, targets, positions, latency, least)
    masks = BlockMasks(plan, method)
    masks.stock_keys = frozenset(model.state_dict())
    masks.positions, masks.latency = positions, latency
    setattr(model, _ATTRIBUTE, masks)
    return masks


def _checked(round_to: int) -> int:
    if isinstance(round_to, bool) or not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f'round_to: expected an integer above 0, got {round_to!r}.')
    return round_to


def masks_of(model: nn.Module) -> BlockMasks | None:
    """The masks that were installed on this model, or None."""
    return getattr(model, _ATTRIBUTE, None)


def remove_masks(model: nn.Module) -> None:
    """Forget the masks and leave the weights as the network computes with them now.

    After :meth:`BlockMasks.harden` this folds the hard mask into the weights.

    Raises:
        ValueError: If the model has no masks.
    """
    if masks_of(model) is None:
        raise ValueError(f'{type(model).__name__} has no block masks to remove.')
    delattr(model, _ATTRIBUTE)
