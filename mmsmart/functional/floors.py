"""What every layer keeps at least, whatever the importance of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ._checks import on_host
from .costs import Cost
from .threshold import weighed_sum


@dataclass(frozen=True)
class Floors:
    """How much every layer keeps at least.

    Args:
        sizes: Weights of every block, float64 `(num_blocks,)`.
        lengths: Number of blocks of each layer, int64 `(num_layers,)`.
        least: Weights that a layer keeps at least, float64 `(num_layers,)`.
    """

    sizes: Tensor
    lengths: Tensor
    least: Tensor

    @cached_property
    def any(self) -> bool:
        """Whether some layer keeps something at least; asked of the device once only."""
        return bool((self.least > 0).any())

    def kept(self, mask: Tensor) -> Tensor:
        """Weights that a mask keeps of each layer, float64 `(num_layers,)`."""
        if not on_host(mask):
            return torch.segment_reduce(self.sizes * mask, 'sum', lengths=self.lengths)
        lengths = self.lengths.tolist()  # one layer at a time needs no memory worth the name
        layers = zip(self.sizes.split(lengths), mask.split(lengths))
        return torch.tensor([weighed_sum(s, f) for s, f in layers], dtype=torch.float64)

    def forced(self, importance: Tensor) -> Tensor:
        """The most important blocks of each layer, as many as its floor takes, bool.

        Example:
            >>> floors = Floors(torch.ones(5), torch.tensor([3, 2]), torch.tensor([2.0, 0.0]))
            >>> floors.forced(torch.tensor([1.0, 3.0, 2.0, 9.0, 9.0])).tolist()
            [False, True, True, False, False]
        """
        layer = self.by_block(torch.arange(len(self.lengths), device=importance.device))
        falling = torch.argsort(importance, descending=True, stable=True)
        order = falling[torch.argsort(layer[falling], stable=True)]
        before = self.sizes[order].cumsum(0) - self.sizes[order]
        ends = self.lengths.cumsum(0)
        begins = before[(ends - self.lengths).clamp_max(len(before) - 1)]
        short = before - self.by_block(begins) < self.by_block(self.least)
        return torch.zeros_like(short).index_put_((order,), short)

    def most(self, cost: Cost) -> float:
        """The most that what the floors force may cost, whatever the importance.

        For layers whose blocks cost alike, or whose cost follows their density; as tight as blocks
        of different sizes allow.
        """
        ones = torch.ones_like(self.sizes)
        ends = torch.segment_reduce(self.sizes, 'max', lengths=self.lengths)
        least_block = torch.segment_reduce(self.sizes, 'min', lengths=self.lengths)
        whole = self.kept(ones)
        # Blocks are taken until the floor is reached: all but the last are below it together.
        even = torch.where(least_block == ends, (self.least / ends).ceil() * ends, whole)
        ragged = torch.where(self.least <= least_block, ends, self.least.ceil() - 1 + ends)
        bound = torch.minimum(torch.minimum(even, ragged.maximum(self.least)), whole)
        bound = torch.where(self.least > 0, bound, torch.zeros_like(bound))
        by_weight = self.by_block(bound / whole)
        most_blocks = self.forced(-self.sizes).double()
        return max(cost.of(by_weight), cost.of(most_blocks))

    def by_block(self, values: Tensor) -> Tensor:
        """Give every block the value of its layer."""
        return values.repeat_interleave(self.lengths, output_size=len(self.sizes))

    def to(self, device: torch.device) -> Floors:
        return Floors(*(x.to(device) for x in (self.sizes, self.lengths, self.least)))
