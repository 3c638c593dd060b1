"""What every layer keeps at least, whatever the importance of its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ._checks import on_host
from .costs import Cost
from .runs import Runs
from .threshold import weighed_sum


@dataclass(frozen=True)
class Floors:
    """How much every layer keeps at least.

    Args:
        sizes: Weights of every block, `(num_blocks,)`; held by runs of equal ones, in float64.
        lengths: Number of blocks of each layer, int64 `(num_layers,)`.
        least: Weights that a layer keeps at least, float64 `(num_layers,)`.
    """

    sizes: Runs | Tensor
    lengths: Tensor
    least: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, 'sizes', Runs.of(self.sizes))

    @cached_property
    def any(self) -> bool:
        """Whether some layer keeps something at least; asked of the device once only."""
        return bool((self.least > 0).any())

    @cached_property
    def by_layer(self) -> list[tuple[slice, Runs]]:
        """Where the blocks of each layer are, and their sizes."""
        pairs = zip(self.lengths.cumsum(0).tolist(), self.lengths.tolist())
        return [(slice(end - n, end), self.sizes.narrow(end - n, n)) for end, n in pairs]

    def kept(self, mask: Tensor) -> Tensor:
        """Weights that a mask keeps of each layer, float64 `(num_layers,)`."""
        if not on_host(mask):
            weights = self.sizes.dense().mul_(mask)
            return torch.segment_reduce(weights, 'sum', lengths=self.lengths)
        # One layer at a time needs no memory worth the name.
        sums = [weighed_sum(sizes, mask[place]) for place, sizes in self.by_layer]
        return torch.tensor(sums, dtype=torch.float64)

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
        sizes = self.sizes[order]
        before = sizes.cumsum(0) - sizes
        ends = self.lengths.cumsum(0)
        begins = before[(ends - self.lengths).clamp_max(len(before) - 1)]
        short = before - self.by_block(begins) < self.by_block(self.least)
        return torch.zeros_like(short).index_put_((order,), short)

    def most(self, cost: Cost) -> float:
        """The most that what the floors force may cost, whatever the importance.

        For layers whose blocks cost alike, or whose cost follows their density; as tight as blocks
        of different sizes allow.
        """
        sizes = self.sizes.dense()
        ends = torch.segment_reduce(sizes, 'max', lengths=self.lengths)
        least_block = torch.segment_reduce(sizes, 'min', lengths=self.lengths)
        whole = self.kept(torch.ones_like(sizes))
        # Blocks are taken until the floor is reached: all but the last are below it together.
        even = torch.where(least_block == ends, (self.least / ends).ceil() * ends, whole)
        ragged = torch.where(self.least <= least_block, ends, self.least.ceil() - 1 + ends)
        bound = torch.minimum(torch.minimum(even, ragged.maximum(self.least)), whole)
        bound = torch.where(self.least > 0, bound, torch.zeros_like(bound))
        by_weight = self.by_block(bound / whole)
        most_blocks = self.forced(-sizes).double()
        return max(cost.of(by_weight), cost.of(most_blocks))

    def by_block(self, values: Tensor) -> Tensor:
        """Give every block the value of its layer."""
        return values.repeat_interleave(self.lengths, output_size=len(self.sizes))

    def to(self, device: torch.device) -> Floors:
        return Floors(*(x.to(device) for x in (self.sizes, self.lengths, self.least)))
