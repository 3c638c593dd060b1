"""Plans: what shares one importance, what it costs to keep, and which weights it silences.

:class:`mmsmart.BlockMasks` asks its plan for everything that differs between blocks of weights,
each with a cost of its own, and coupled channels, whose costs depend on each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmsmart.blocks import BlockLayer, Excluded, cut_layer
from mmsmart.budget import block_cost, budget_for, coupled_cost
from mmsmart.channels import ChannelGroup, ChannelLayer, pruned_weights
from mmsmart.functional import (
    coupled_topk,
    hard_topk,
    solve_coupled_threshold,
    solve_threshold,
)
from mmsmart.importance import standardised
from mmsmart.shrink import Kept, out_axis

_UNUSED = 'not run in the prediction for one image: it costs no MACs'


class BlockPlan:
    """Blocks of weights: every block is a set of weights of one layer, and costs what it holds.

    Attributes:
        layers: The layers cut into blocks; block vectors follow their order.
        excluded: Weights that stay dense, with the reason.
        sparsity: Share of the cost to remove.
        resource: What costs count: 'params' or 'macs'.
        positions: As given.
        cost: Cost of every block, float64 `(num_blocks,)`.
        total: Cost of all blocks.
        budget: Cost that may be kept.
        layer_sizes: Number of blocks of each layer.

    Args:
        layers: The layers.
        excluded: What stays dense.
        sparsity: Share of the cost to remove, in [0, 1).
        positions: Uses of each layer's weights in one forward pass, by name, if the budget counts
            MACs; None if it counts parameters.
    """

    def __init__(
        self,
        layers: Sequence[BlockLayer],
        excluded: Sequence[Excluded],
        sparsity: float,
        positions: dict[str, int] | None = None,
    ) -> None:
        used = {x.name for x in layers if positions is None or positions.get(x.name)}
        self.layers = [layer for layer in layers if layer.name in used]
        unused = [Excluded(x.name, _UNUSED) for x in layers if x.name not in used]
        self.excluded = [*excluded, *unused]
        self.sparsity = sparsity
        self.positions = positions
        self.resource = 'params' if positions is None else 'macs'
        self.cost = block_cost(self.layers, positions)
        self.total = float(self.cost.sum())
        self.budget = budget_for(self.cost, sparsity)
        self.layer_sizes = [layer.num_blocks for layer in self.layers]
        if self.budget < float(self.cost.min()):
            raise ValueError(
                f'sparsity: {sparsity} leaves a budget of {self.budget:g} {self.unit}, less than '
                f'the smallest block ({float(self.cost.min()):g}). Lower it, or choose smaller '
                'blocks.'
            )

    @property
    def num_blocks(self) -> int:
        return len(self.cost)

    @property
    def unit(self) -> str:
        """What costs are counted in."""
        return 'weights' if self.resource == 'params' else 'MACs'

    @property
    def weights(self) -> list[nn.Parameter]:
        """The parameters that the soft mask multiplies."""
        return [layer.weight for layer in self.layers]

    def follow(self, device: torch.device) -> None:
        """The model has moved to this device."""
        self.cost = self.cost.to(device)

    def spread(self, mask: Tensor) -> Iterator[Tensor]:
        """For each of :attr:`weights`, one after the other, what multiplies it, broadcastable."""
        for layer, part in zip(self.layers, mask.split(self.layer_sizes)):
            yield layer.expand(part)

    def gather(self, products: Iterable[Tensor | None], into: Tensor) -> Tensor:
        """Sum what was computed for each of :attr:`weights` over every block, `(num_blocks,)`."""
        for layer, part, product in zip(self.layers, into.split(self.layer_sizes), products):
            if product is not None:
                part.copy_(layer.reduce(product))
        return into

    def threshold(self, importance: Tensor, temperature: float, start: Tensor | None) -> Tensor:
        """θ of the soft mask that meets the budget."""
        return solve_threshold(importance, self.budget, temperature, self.cost, start=start)

    def price(self, mask: Tensor) -> Tensor:
        """What a little more of each block would cost, `(num_blocks,)`."""
        return self.cost

    def top(self, importance: Tensor) -> Tensor:
        """The hard mask of an importance."""
        return hard_topk(importance, self.budget, self.cost)

    def spent(self, mask: Tensor) -> float:
        """Cost of a mask."""
        return float((self.cost * mask).sum())

    def next_cost(self, importance: Tensor, kept: Tensor) -> float:
        """What the most important of the pruned blocks would cost; 0 if nothing is pruned."""
        pruned = ~kept.bool()
        if not bool(pruned.any()):
            return 0.0
        return float(self.cost[importance.masked_fill(~pruned, -torch.inf).argmax()])

    def first(self, scores: Tensor) -> Tensor:
        """First importance, from scores of the blocks of :attr:`layers`."""
        return scores

    def pruned(self, kept: Tensor) -> list[tuple[str, nn.Parameter, Tensor]]:
        """Every parameter with pruned weights: key, parameter, and where it is pruned, bool."""
        gone = self.spread(~kept)
        return [
            (f'{layer.name}.weight', layer.weight, where) for layer, where in zip(self.layers, gone)
        ]

    def description(self) -> list[list[Any]]:
        """What tells one plan from another, in numbers, names and lists."""
        return [[layer.name, list(layer.view_shape), list(layer.block)] for layer in self.layers]


class ChannelPlan:
    """Coupled channels: every block is a unit of channels that can be cut out whole.

    Attributes:
        layers: The layers whose output channels are units, each output channel a block of its own:
            what scores of units are computed from.
        channels: All layers that lose channels.
        groups: Units in the same places of the same layers.

    The other attributes and methods are those of :class:`BlockPlan`.

    Args:
        channels: Layers of :func:`mmsmart.channels.find_channels`.
        groups: Its groups.
        excluded: What stays whole.
        sparsity: Share of the cost to remove, in [0, 1).
        positions: See :class:`BlockPlan`.
        round_to: Channels left in each group are a multiple of it, or the whole group.
    """

    def __init__(
        self,
        channels: Sequence[ChannelLayer],
        groups: Sequence[ChannelGroup],
        excluded: Sequence[Excluded],
        sparsity: float,
        positions: dict[str, int] | None = None,
        round_to: int = 1,
    ) -> None:
        self.channels, self.groups, self.excluded = list(channels), list(groups), list(excluded)
        self.sparsity, self.round_to = sparsity, round_to
        self.positions = positions
        self.resource = 'params' if positions is None else 'macs'
        self._cost = coupled_cost(self.channels, self.groups, positions)
        self.total = self._cost.of(torch.ones(self.num_blocks))
        self.budget = budget_for(torch.tensor(self.total).double(), sparsity)
        producers = [x for x in self.channels if x.in_ is not None and bool((x.out >= 0).any())]
        self.layers = [cut_layer(x.name, x.module, (1, -1, -1, -1)) for x in producers]
        self._unit_of_score = torch.cat([layer.out for layer in producers])
        self._carriers = [layer for layer in self.channels if layer.carries]
        try:
            coupled_topk(torch.zeros(self.num_blocks), self.budget, self._cost, round_to)
        except ValueError as error:
            raise ValueError(f'sparsity: {sparsity} is too high. {error}') from error

    @property
    def num_blocks(self) -> int:
        return len(self._cost.group)

    @property
    def unit(self) -> str:
        return 'parameters' if self.resource == 'params' else 'MACs'

    @property
    def weights(self) -> list[nn.Parameter]:
        return [parameter for _, parameter, _ in self._carried()]

    def _carried(self) -> list[tuple[ChannelLayer, nn.Parameter, int]]:
        """Layer, parameter, and the axis of it that runs over the layer's output channels."""
        found = []
        for layer in self._carriers:
            module = layer.module
            axis = out_axis(module) if module.weight.ndim > 1 else 0
            found.append((layer, module.weight, axis))
            if module.bias is not None:
                found.append((layer, module.bias, 0))
        return found

    def follow(self, device: torch.device) -> None:
        pass  # costs are summed on the CPU, where they wait for nothing

    def spread(self, mask: Tensor) -> Iterator[Tensor]:
        with_rest = torch.cat([mask, mask.new_ones(1)])  # -1, the last: a channel that stays
        for layer, parameter, axis in self._carried():
            values = with_rest[layer.out.to(mask.device)]
            yield values.reshape([-1 if i == axis else 1 for i in range(parameter.ndim)])

    def gather(self, products: Iterable[Tensor | None], into: Tensor) -> Tensor:
        for (layer, _, axis), product in zip(self._carried(), products):
            if product is not None:
                others = [i for i in range(product.ndim) if i != axis]
                sums = product.sum(dim=others) if others else product
                masked = (layer.out >= 0).to(into.device)
                into.index_add_(0, layer.out.to(into.device)[masked], sums.to(into.dtype)[masked])
        return into

    def threshold(self, importance: Tensor, temperature: float, start: Tensor | None) -> Tensor:
        return solve_coupled_threshold(importance, self.budget, temperature, self._cost, start)

    def price(self, mask: Tensor) -> Tensor:
        return self._cost.marginal(mask).to(mask.device)

    def top(self, importance: Tensor) -> Tensor:
        return coupled_topk(importance, self.budget, self._cost, self.round_to)[0]

    def spent(self, mask: Tensor) -> float:
        return self._cost.of(mask)

    def next_cost(self, importance: Tensor, kept: Tensor) -> float:
        _, following = coupled_topk(importance, self.budget, self._cost, self.round_to)
        more = kept.float().cpu() + following.float().cpu()
        return self._cost.of(more) - self._cost.of(kept)

    def first(self, scores: Tensor) -> Tensor:
        """Mean over all the layers that make a unit's channels, standardised anew."""
        units = self._unit_of_score.to(scores.device)
        made = units >= 0
        sums = scores.new_zeros(self.num_blocks).index_add_(0, units[made], scores[made])
        return standardised(sums / torch.bincount(units[made], minlength=self.num_blocks))

    def pruned(self, kept: Tensor) -> list[tuple[str, nn.Parameter, Tensor]]:
        return [
            (f'{layer.name}.{key}', getattr(layer.module, key), where)
            for layer in self.channels
            for key, where in pruned_weights(layer, kept)
        ]

    def kept_channels(self, kept: Tensor) -> dict[str, Kept]:
        """Channels that stay in every layer that loses some, by layer name."""
        return {layer.name: layer.kept(kept) for layer in self.channels}

    def description(self) -> list[list[Any]]:
        return [[group.name, list(group.layers), len(group.units)] for group in self.groups]
