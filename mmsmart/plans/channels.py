"""Coupled channels under one or more budgets."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.blocks import Excluded, cut_layer
from mmsmart.budget import Target, make_budget
from mmsmart.channels import ChannelGroup, ChannelLayer, pruned_weights
from mmsmart.cost import coupled_cost
from mmsmart.functional import (
    Floors,
    coupled_topk,
    limits_mask,
    limits_vjp,
    solve_limits,
    tightest,
)
from mmsmart.importance import standardised
from mmsmart.latency import LatencyTable
from mmsmart.shrink import TRANSPOSED, Kept, is_grouped, out_axis

_UNITS = {'params': 'parameters', 'macs': 'MACs'}


class ChannelPlan:
    """Coupled channels: every block is a unit of channels that can be cut out whole.

    Attributes:
        layers: The layers whose output channels are units, each output channel a block of its own:
            what scores of units are computed from.
        channels: All layers that lose channels.
        groups: Units in the same places of the same layers.
        layer_sizes: Number of units of each group.

    The other attributes and methods are those of :class:`mmsmart.plans.BlockPlan`.

    Args:
        channels: Layers of :func:`mmsmart.channels.find_channels`.
        groups: Its groups.
        excluded: What stays whole.
        targets: What to remove; of the whole network, since channels tie its parts together.
        positions: See :class:`mmsmart.plans.BlockPlan`.
        table: The same.
        least: Least share of a layer's channels, by name; a group keeps the largest of its layers.
        round_to: Channels left in each group are a multiple of it, or the whole group.

    Raises:
        ValueError: For targets by part, or if not even the floors fit the budgets.
    """

    def __init__(
        self,
        channels: Sequence[ChannelLayer],
        groups: Sequence[ChannelGroup],
        excluded: Sequence[Excluded],
        targets: Sequence[Target],
        positions: dict[str, int] | None = None,
        table: LatencyTable | None = None,
        least: dict[str, float | None] | None = None,
        round_to: int = 1,
    ) -> None:
        parts = [target.part for target in targets if target.part]
        if parts:
            raise ValueError(
                f"sparsity: budgets by part ({', '.join(parts)}) don't go with block='channel': a "
                'channel of one part feeds layers of another, and leaves with its weights in '
                'both. Give one sparsity, or prune blocks.'
            )
        self.channels, self.groups, self.excluded = list(channels), list(groups), list(excluded)
        self.layer_sizes = [len(group.units) for group in self.groups]
        self.round_to = round_to
        self.budgets = []
        for target in targets:
            macs, latency = target.resource == 'macs', target.resource == 'latency'
            cost = coupled_cost(
                self.channels, self.groups, positions if macs else None, table if latency else None
            )
            unit = table.unit if latency else _UNITS[target.resource]
            self.budgets.append(
                make_budget(target, cost, cost.of(torch.ones(len(cost.group))), unit)
            )
        self._group = cost.group
        self._floors = self._least(least or {})
        producers = [x for x in self.channels if x.in_ is not None and bool((x.out >= 0).any())]
        self.layers = [cut_layer(x.name, x.module, (1, -1, -1, -1)) for x in producers]
        self._unit_of_score = torch.cat([layer.out for layer in producers])
        self._carriers = [layer for layer in self.channels if layer.carries]
        try:
            self._topk(torch.zeros(self.num_blocks))
        except ValueError as error:
            asked = ', '.join(f'{t.sparsity} of the {t.resource}' for t in targets)
            raise ValueError(f'sparsity: {asked} is too high. {error}') from error

    def _least(self, least: dict[str, float | None]) -> Floors:
        lengths = torch.tensor(self.layer_sizes)
        shares = [max(least.get(name) or 0.0 for name in group.layers) for group in self.groups]
        least = [max(1, math.ceil(x * n - 1e-9)) for x, n in zip(shares, lengths.tolist())]
        ones = torch.ones(self.num_blocks, dtype=torch.float64)
        return Floors(ones, lengths, torch.tensor(least).double())

    def _topk(self, importance: Tensor, removed: float = 1.0) -> tuple[Tensor, Tensor]:
        limits = [budget.limit_at(removed) for budget in self.budgets]
        return coupled_topk(importance, limits, self._group, self._floors.least, self.round_to)

    @property
    def num_blocks(self) -> int:
        return len(self._group)

    @property
    def weights(self) -> list[nn.Parameter]:
        return [parameter for _, parameter, _ in self._carried()]

    def _carried(self) -> list[tuple[Tensor, nn.Parameter, int]]:
        """Units, parameter, and the axis of it that runs over the channels of these units."""
        found = []
        for layer in self._carriers:
            module = layer.module
            if is_grouped(module) and isinstance(module, TRANSPOSED):
                # The second axis holds the channels of one group; groups leave whole.
                found.append((layer.in_, module.weight, 0))
            else:
                axis = out_axis(module) if module.weight.ndim > 1 else 0
                found.append((layer.out, module.weight, axis))
            if module.bias is not None:
                found.append((layer.out, module.bias, 0))
        return found

    def follow(self, device: torch.device) -> None:
        pass  # costs are summed on the CPU, where they wait for nothing

    def spread(self, mask: Tensor) -> Iterator[Tensor]:
        with_rest = torch.cat([mask, mask.new_ones(1)])  # -1, the last: a channel that stays
        for units, parameter, axis in self._carried():
            values = with_rest[units.to(mask.device)]
            yield values.reshape([-1 if i == axis else 1 for i in range(parameter.ndim)])

    def scale(self, latent: Sequence[Tensor], mask: Tensor, out: Sequence[Tensor]) -> None:
        for w, factor, masked in zip(latent, self.spread(mask), out):
            torch.mul(w, factor, out=masked)

    def unmask(
        self, latent: Sequence[Tensor], grads: Sequence[Tensor | None], mask: Tensor
    ) -> Tensor:
        grad_mask = torch.zeros(self.num_blocks, device=mask.device)
        carried = zip(self._carried(), self.spread(mask), latent, grads)
        for (units, _, axis), factor, w, grad in carried:
            if grad is None:
                continue
            others = [i for i in range(w.ndim) if i != axis]
            sums = (w * grad).sum(dim=others) if others else w * grad
            units = units.to(mask.device)
            masked = units >= 0
            grad_mask.index_add_(0, units[masked], sums.to(mask.dtype)[masked])
            grad.mul_(factor)
        return grad_mask

    def thresholds(self, importance: Tensor, temperature: float, start: Tensor | None) -> Tensor:
        limits = [budget.limit for budget in self.budgets]
        start = None if start is None else start.cpu()
        found = solve_limits(importance.cpu(), limits, temperature, self._floors, start)
        return found.to(importance.device)

    def soft_mask(self, importance: Tensor, thresholds: Tensor, temperature: float) -> Tensor:
        floors = self._floors.to(importance.device) if thresholds.ndim else None
        return limits_mask(importance, thresholds, temperature, floors)

    def pull_back(
        self, importance: Tensor, thresholds: Tensor, temperature: float, grad_mask: Tensor
    ) -> Tensor:
        m, found = importance.cpu(), thresholds.cpu()
        mask = self.soft_mask(m, found, temperature)
        price = tightest([budget.limit for budget in self.budgets], mask).cost.marginal(mask)
        grad = limits_vjp(m, found, temperature, grad_mask.cpu(), price, self._floors)
        return grad.to(importance.device)

    def top(self, importance: Tensor, removed: float = 1.0) -> Tensor:
        return self._topk(importance, removed)[0]

    def spent(self, mask: Tensor) -> list[float]:
        return [budget.spent(mask) for budget in self.budgets]

    def next_cost(self, importance: Tensor, kept: Tensor) -> list[float]:
        _, following = self._topk(importance)
        more = kept.float().cpu() + following.float().cpu()
        return [budget.cost.of(more) - budget.cost.of(kept) for budget in self.budgets]

    def average(self, scores: Tensor) -> Tensor:
        """Mean over all the layers that make a unit's channels."""
        units = self._unit_of_score.to(scores.device)
        made = units >= 0
        sums = scores.new_zeros(self.num_blocks).index_add(0, units[made], scores[made])
        return sums / torch.bincount(units[made], minlength=self.num_blocks)

    def first(self, scores: Tensor) -> Tensor:
        return standardised(self.average(scores))

    def pruned(self, kept: Tensor) -> list[tuple[str, nn.Parameter, Tensor]]:
        return [
            (f'{layer.name}.{key}', getattr(layer.module, key), where)
            for layer in self.channels
            for key, where in pruned_weights(layer, kept)
        ]

    def kept_channels(self, kept: Tensor) -> dict[str, Kept]:
        """Channels that stay in every layer that loses some, by layer name."""
        return {layer.name: layer.kept(kept) for layer in self.channels}

    def at_floor(self, importance: Tensor, kept: Tensor) -> set[str]:
        """Names of the groups that keep no more than their floor, rounded up to whole lots."""
        counts = self._floors.kept(kept.cpu().double())
        lots = (self._floors.least / self.round_to).ceil() * self.round_to
        return {group.name for group, n, lot in zip(self.groups, counts, lots) if n <= lot}

    def description(self) -> list[list[Any]]:
        return [[group.name, list(group.layers), len(group.units)] for group in self.groups]
