"""Costs that blocks share, and their top-k: channels of layers that feed each other.

A weight between two channels leaves with either of them, so what a network costs is no sum over its
channels. With S_g = Σ f_i over the channels of group g, a layer l with A_l, B_l channels of each
group on its output and its input side costs

    P(f) = Σ_l u_l (a_l + A_l·S) (b_l + B_l·S) + w·S + const

where a_l and b_l are channels that always stay; or, where its time was measured, a function of the
share of its weights that is left. P grows with every f_i, so one threshold still meets a budget,
and the closed-form gradient of the soft top-k holds with the marginal cost c_i = ∂P/∂f_i in place
of a fixed one (implicit function theorem).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .costs import Curves
from .limits import Limit


@dataclass(frozen=True)
class CoupledCost:
    """P(f) above, and its derivative. Float64, on the CPU.

    Args:
        group: Group of every block, int64 `(num_blocks,)`.
        unit: u, what one pair of output and input channel costs, `(num_layers,)`.
        out: A, output channels of a layer that one block of a group takes, `(num_layers, groups)`.
        in_: B, the same for input channels.
        out_rest: a, output channels that always stay, `(num_layers,)`.
        in_rest: b, the same for input channels.
        linear: w, what a block costs by itself, `(groups,)`.
        constant: What stays in any case.
        curves: y, one a layer, of the share of u (a + A·S) (b + B·S) that is left, in place of it.

    Example:
        A hidden layer of three channels between one input and two outputs costs 3 weights each.

        >>> one, row = torch.ones(1).double(), torch.ones(1, 1).double()
        >>> cost = CoupledCost(
        ...     group=torch.zeros(3, dtype=torch.long),
        ...     unit=torch.ones(2).double(),
        ...     out=torch.tensor([[1.0], [0.0]]).double(),
        ...     in_=torch.tensor([[0.0], [1.0]]).double(),
        ...     out_rest=torch.tensor([0.0, 2.0]).double(),
        ...     in_rest=torch.tensor([1.0, 0.0]).double(),
        ...     linear=torch.zeros(1).double(),
        ... )
        >>> cost.of(torch.ones(3)), cost.of(torch.tensor([1.0, 0.0, 0.0]))
        (9.0, 3.0)
    """

    group: Tensor
    unit: Tensor
    out: Tensor
    in_: Tensor
    out_rest: Tensor
    in_rest: Tensor
    linear: Tensor
    constant: float = 0.0
    curves: Curves | None = None

    @property
    def num_groups(self) -> int:
        return len(self.linear)

    def of(self, mask: Tensor) -> float:
        """P(f) of a mask `(num_blocks,)`."""
        kept = self._by_group(mask)
        out, in_ = self._sides(kept)
        weights = self.unit * out * in_
        if self.curves is not None:
            weights, _ = self.curves.at(weights / self._whole())
        return float(weights.sum() + self.linear @ kept) + self.constant

    def marginal(self, mask: Tensor) -> Tensor:
        """∂P/∂f_i at a mask, float64 `(num_blocks,)`, on the CPU."""
        out, in_ = self._sides(self._by_group(mask))
        unit = self.unit
        if self.curves is not None:
            _, slope = self.curves.at(unit * out * in_ / self._whole())
            unit = unit * slope / self._whole()
        by_group = self.linear + (unit * in_) @ self.out + (unit * out) @ self.in_
        # Channels that cost nothing share the fate of those that cost next to nothing.
        return by_group.clamp_min(1e-9 * float(by_group.max()))[self.group]

    def _whole(self) -> Tensor:
        out, in_ = self._sides(torch.bincount(self.group, minlength=self.num_groups).double())
        whole = self.unit * out * in_
        return torch.where(whole > 0, whole, torch.ones_like(whole))

    def _by_group(self, mask: Tensor) -> Tensor:
        zeros = torch.zeros(self.num_groups, dtype=torch.float64)
        return zeros.index_add_(0, self.group, mask.detach().cpu().double())

    def _sides(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        return self.out_rest + self.out @ kept, self.in_rest + self.in_ @ kept


@torch.no_grad()
def coupled_topk(
    importance: Tensor,
    limits: Sequence[Limit],
    group: Tensor,
    least: Tensor,
    round_to: int = 1,
) -> tuple[Tensor, Tensor]:
    """Keep the most important blocks that fit, and of every group at least what its floor says.

    A lot is `round_to` blocks of one group in the order of their importance (the last lot of a
    group may be smaller), and is as important as its blocks are on average.

    Args:
        importance: m, `(num_blocks,)`.
        limits: At least one.
        group: Group of every block, int64 `(num_blocks,)`.
        least: Blocks that each group keeps at least, `(groups,)`, 1 or more.
        round_to: Blocks kept in each group are a multiple of it, or the whole group.

    Returns:
        The mask h, 0 or 1, `(num_blocks,)`, and the blocks of the first lot that did not fit, bool
        `(num_blocks,)`, none if everything fits.

    Raises:
        ValueError: If not even the floors fit.
    """
    m = importance.detach().cpu().double()
    lot, forced = _lots(m, group, least, round_to)
    size = torch.bincount(lot)
    score = torch.zeros(len(size), dtype=torch.float64).index_add_(0, lot, m) / size
    order = torch.argsort(score.masked_fill(forced, torch.inf), descending=True, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    rank = position[lot]

    def fit(count: int) -> bool:
        return all(x.cost.of((rank < count).double()) <= x.budget for x in limits)

    fits, too_many = int(forced.sum()), len(order) + 1
    if not fit(fits):
        each = [f'{x.cost.of((rank < fits).double()):g} of {x.budget:g}' for x in limits]
        raise ValueError(
            f'budget: what the floors keep in each group (at least {round_to} of its channels) '
            f'costs {", ".join(each)}. Lower the sparsity, `round_to`, or `min_density`.'
        )
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if fit(middle) else (fits, middle)
    mask = (rank < fits).to(importance.dtype).to(importance.device)
    return mask, (rank == fits).to(importance.device)


def _lots(m: Tensor, group: Tensor, least: Tensor, round_to: int) -> tuple[Tensor, Tensor]:
    """Lot of every block, and whether a lot belongs to its group's floor."""
    falling = torch.argsort(m, descending=True, stable=True)
    ranked = falling[torch.argsort(group[falling], stable=True)]  # by group, then by importance
    sizes = torch.bincount(group)
    begins = sizes.cumsum(0) - sizes
    place = torch.arange(len(m)) - begins[group[ranked]]
    lots = (sizes + round_to - 1) // round_to
    first_lot = lots.cumsum(0) - lots
    lot = torch.empty_like(ranked)
    lot[ranked] = first_lot[group[ranked]] + place // round_to
    forced = torch.zeros(int(lots.sum()), dtype=torch.bool)
    forced[lot[ranked[place < least[group[ranked]]]]] = True
    return lot, forced
