"""Threshold and top-k where blocks share what they cost: channels of layers that feed each other.

A weight between two channels leaves with either of them, so what a network costs is no sum over its
channels. With S_g = Σ f_i over the channels of group g, a layer l with A_l, B_l channels of each
group on its output and its input side costs

    P(f) = Σ_l u_l (a_l + A_l·S) (b_l + B_l·S) + w·S + const

where a_l and b_l are channels that always stay. P grows with every f_i, so one threshold still
meets a budget, and the closed-form gradient of the soft top-k holds with the marginal cost
c_i = ∂P/∂f_i in place of a fixed one (implicit function theorem).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .threshold import solve_threshold
from .topk import soft_mask

# Two or three from the last step's threshold, some ten from a cold start; a bound.
_MAX_PASSES = 100
_RESOLVED = 1e-12


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

    @property
    def num_groups(self) -> int:
        return len(self.linear)

    def of(self, mask: Tensor) -> float:
        """P(f) of a mask `(num_blocks,)`."""
        kept = self._by_group(mask)
        out, in_ = self._sides(kept)
        return float((self.unit * out * in_).sum() + self.linear @ kept) + self.constant

    def marginal(self, mask: Tensor) -> Tensor:
        """∂P/∂f_i at a mask, float64 `(num_blocks,)`, on the CPU."""
        out, in_ = self._sides(self._by_group(mask))
        by_group = self.linear + (self.unit * in_) @ self.out + (self.unit * out) @ self.in_
        # Channels that cost nothing share the fate of those that cost next to nothing.
        return by_group.clamp_min(1e-9 * float(by_group.max()))[self.group]

    def _by_group(self, mask: Tensor) -> Tensor:
        zeros = torch.zeros(self.num_groups, dtype=torch.float64)
        return zeros.index_add_(0, self.group, mask.detach().cpu().double())

    def _sides(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        return self.out_rest + self.out @ kept, self.in_rest + self.in_ @ kept


@torch.no_grad()
def solve_coupled_threshold(
    importance: Tensor,
    budget: float,
    temperature: float,
    cost: CoupledCost,
    start: float | Tensor | None = None,
) -> Tensor:
    """Find θ such that P(σ((m - θ)/τ)) = B, to 1e-9 of B.

    P lies above each of its linearisations along the masks of falling θ. Solving the linearised
    budget again and again is therefore Newton's method on a convex function: from the second pass
    on it comes down on the solution from above, from wherever it began.

    Args:
        importance: m, `(num_blocks,)`.
        budget: B, between the cost of empty and of full masks.
        temperature: τ > 0.
        cost: P.
        start: A guess, usually the last θ.

    Returns:
        θ, 0-dim float64, on the device of importance; `-inf` for the budget of full masks.

    Raises:
        ValueError: For a budget out of range, or what :func:`solve_threshold` refuses.
    """
    full, empty = cost.of(torch.ones_like(importance)), cost.of(torch.zeros_like(importance))
    if not empty <= budget <= full:
        raise ValueError(f'budget: expected a value in [{empty:g}, {full:g}], got {budget!r}.')
    m = importance.detach().cpu().double()
    if budget == full:
        return torch.tensor(-torch.inf, dtype=torch.float64, device=importance.device)
    everything = m.min() - 40 * temperature
    threshold = everything if start is None else torch.as_tensor(start).cpu()
    for _ in range(_MAX_PASSES):
        mask = soft_mask(m, threshold, temperature)
        spent = cost.of(mask)
        if abs(spent - budget) <= _RESOLVED * max(budget, 1.0):
            break
        price = cost.marginal(mask)
        if not bool(price.any()):  # where nothing is kept, a channel between two layers is free
            threshold = everything
            continue
        left = float(budget - spent + price @ mask)
        # From masks that are too small the linearised cost may never reach the budget.
        left = min(max(left, 0.0), float(price.sum()))
        moved = solve_threshold(m, left, temperature, price, start=threshold)
        if moved == threshold:
            break
        threshold = moved
    return threshold.to(importance.device)


@torch.no_grad()
def coupled_topk(
    importance: Tensor, budget: float, cost: CoupledCost, round_to: int = 1
) -> tuple[Tensor, Tensor]:
    """Keep the most important blocks that fit, at least one lot of every group.

    A lot is `round_to` blocks of one group in the order of their importance (the last lot of a
    group may be smaller), and is as important as its blocks are on average.

    Args:
        importance: m, `(num_blocks,)`.
        budget: B.
        cost: P.
        round_to: Blocks kept in each group are a multiple of it, or the whole group.

    Returns:
        The mask h, 0 or 1, `(num_blocks,)`, and the blocks of the first lot that did not fit, bool
        `(num_blocks,)`, none if everything fits.

    Raises:
        ValueError: If not even one lot of every group fits.
    """
    m = importance.detach().cpu().double()
    lot, first = _lots(m, cost.group, round_to)
    size = torch.bincount(lot)
    score = torch.zeros(len(size), dtype=torch.float64).index_add_(0, lot, m) / size
    order = torch.argsort(score.masked_fill(first, torch.inf), descending=True, stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order))
    rank = position[lot]

    def spent(count: int) -> float:
        return cost.of((rank < count).double())

    fits, too_many = int(first.sum()), len(order) + 1
    if spent(fits) > budget:
        raise ValueError(
            f'budget: {budget:g} is less than the {spent(fits):g} that {round_to} of the channels '
            'in each group cost. Lower the sparsity, or `round_to`.'
        )
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        fits, too_many = (middle, too_many) if spent(middle) <= budget else (fits, middle)
    mask = (rank < fits).to(importance.dtype).to(importance.device)
    return mask, (rank == fits).to(importance.device)


def _lots(m: Tensor, group: Tensor, round_to: int) -> tuple[Tensor, Tensor]:
    """Lot of every block, and whether a lot is the first of its group."""
    falling = torch.argsort(m, descending=True, stable=True)
    ranked = falling[torch.argsort(group[falling], stable=True)]  # by group, then by importance
    sizes = torch.bincount(group)
    begins = sizes.cumsum(0) - sizes
    place = torch.arange(len(m)) - begins[group[ranked]]
    lots = (sizes + round_to - 1) // round_to
    first_lot = lots.cumsum(0) - lots
    lot = torch.empty_like(ranked)
    lot[ranked] = first_lot[group[ranked]] + place // round_to
    first = torch.zeros(int(lots.sum()), dtype=torch.bool)
    first[first_lot[sizes > 0]] = True
    return lot, first
