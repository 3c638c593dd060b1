"""Soft and hard top-k under several limits at once, with a floor for every layer.

Blocks of a layer stand together in the vectors. With φ_l the threshold at which layer l alone
keeps just its floor,

    f_i = σ((m_i - min(θ, φ_l))/τ)   with the least θ for which   C_k(f) ≤ B_k for every limit k.

Hence one limit at least is met exactly, the others hold, and no layer falls below its floor. Where
no floor is touched and there is one limit, this is the soft top-k of :mod:`.topk`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .costs import Cost, LinearCost
from .floors import Floors
from .runs import Runs
from .threshold import solve_threshold
from .topk import hard_topk, soft_mask, soft_topk_vjp

# Three to five from the last step's threshold, ten from a cold start; a bound.
_MAX_PASSES = 200
_RESOLVED = 1e-12


@dataclass(frozen=True)
class Limit:
    """A cost and how much of it may be spent.

    Args:
        cost: C.
        budget: B, between the cost of empty and of full masks.
    """

    cost: Cost
    budget: float


@torch.no_grad()
def solve_limits(
    importance: Tensor,
    limits: Sequence[Limit],
    temperature: float,
    floors: Floors | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Find the thresholds of the soft mask that meets all limits and floors.

    Args:
        importance: m, `(num_blocks,)`.
        limits: At least one.
        temperature: τ > 0.
        floors: None for none.
        start: A guess, usually what this function gave at the last step.

    Returns:
        θ, 0-dim float64; or, where floors are touched, θ and after it the threshold of every layer,
        `(1 + num_layers,)`.

    Raises:
        ValueError: For what :func:`solve_threshold` refuses, or if the floors leave too little.

    Example:
        Two layers of two blocks; the second keeps half of its weights whatever its importance.

        >>> m, ones = torch.tensor([4.0, 3.0, 0.0, -1.0]), torch.ones(4).double()
        >>> limits = [Limit(LinearCost(ones), 2.0)]
        >>> floors = Floors(ones, torch.tensor([2, 2]), torch.tensor([0.0, 1.0]).double())
        >>> thresholds = solve_limits(m, limits, 0.1, floors)
        >>> limits_mask(m, thresholds, 0.1, floors).round(decimals=2)
        tensor([0.9900, 0.0100, 0.9900, 0.0100])
    """
    guess = None if start is None else start.reshape(-1)[0]
    theta = _shared(importance, limits, temperature, None, None, guess)
    if floors is None or not floors.any:
        return theta
    by_layer = theta.expand(len(floors.lengths)).clone()
    pinned = torch.zeros_like(by_layer, dtype=torch.bool)
    mask = soft_mask(importance, theta, temperature)
    while True:
        short = (floors.kept(mask) < floors.least * (1 - 1e-6)) & ~pinned
        if not bool(short.any()):
            break
        pinned |= short
        for layer in short.nonzero().flatten().tolist():
            part, sizes = floors.by_layer[layer]
            by_layer[layer] = solve_threshold(
                importance[part], floors.least[layer], temperature, sizes
            )
        held = soft_mask(importance, floors.by_block(by_layer), temperature)
        free = floors.by_block(~pinned)
        theta = _shared(importance, limits, temperature, free, held, theta)
        by_layer = torch.where(pinned, by_layer, theta)
        mask = soft_mask(importance, floors.by_block(by_layer), temperature)
    return torch.cat([theta.reshape(1), by_layer]) if bool(pinned.any()) else theta


def limits_mask(
    importance: Tensor, thresholds: Tensor, temperature: float, floors: Floors | None = None
) -> Tensor:
    """The soft mask of the thresholds that :func:`solve_limits` gave."""
    if thresholds.ndim:
        thresholds = floors.by_block(thresholds[1:])
    return soft_mask(importance, thresholds, temperature)


@torch.no_grad()
def limits_vjp(
    importance: Tensor,
    thresholds: Tensor,
    temperature: float,
    grad_mask: Tensor,
    price: Tensor | Runs,
    floors: Floors | None = None,
) -> Tensor:
    """Turn ∂L/∂f into ∂L/∂m, the thresholds moving with m so that limits and floors stay met.

    Args:
        importance: m.
        thresholds: As :func:`solve_limits` gave them.
        temperature: τ.
        grad_mask: ∂L/∂f, shape of importance.
        price: Marginal cost of every block in the limit that is met exactly.
        floors: As they were given to it.

    Returns:
        ∂L/∂m: over the layers above their floor the closed form of :func:`soft_topk_vjp` for the
        limit, within every other layer that for its floor, its blocks' cost to the former included.
    """
    if not thresholds.ndim:
        return soft_topk_vjp(importance, thresholds, temperature, grad_mask, price)
    theta, by_layer = thresholds[0], thresholds[1:]
    pinned = by_layer < theta
    free = floors.by_block(~pinned)
    grad = torch.zeros_like(importance)
    worth = 0.0  # of a unit of the limit's cost, by which the free layers pay for the others
    if bool(free.any()):
        m, g, c = importance[free], grad_mask[free].double(), price[free]
        grad[free] = soft_topk_vjp(m, theta, temperature, g, c)
        f = soft_mask(m.double(), theta, temperature)
        v = f * (1 - f)
        spent = float(c @ v)
        worth = float(v @ g) / spent if spent > 0 else 0.0
    for layer in pinned.nonzero().flatten().tolist():
        part, sizes = floors.by_layer[layer]
        net = grad_mask[part] - worth * price[part]
        grad[part] = soft_topk_vjp(importance[part], by_layer[layer], temperature, net, sizes)
    return grad


@torch.no_grad()
def limited_topk(
    importance: Tensor, limits: Sequence[Limit], floors: Floors | None = None
) -> Tensor:
    """Keep what the floors ask for, then the most important blocks that fit every limit.

    Blocks are taken in order of falling importance, ties by lower index, each if it still fits.
    Hence C_k(h) ≤ B_k, and no pruned block could be added without going over some limit.

    Args:
        importance: m, `(num_blocks,)`, no NaN.
        limits: At least one.
        floors: None for none.

    Returns:
        h of 0 and 1, shape and dtype of importance.

    Raises:
        ValueError: If the floors alone go over a limit.
    """
    forced = torch.zeros_like(importance, dtype=torch.bool)
    if floors is not None:
        forced = floors.forced(importance)
    mask = forced.to(importance.dtype)
    for limit in limits:
        if limit.cost.of(mask) > limit.budget:
            raise ValueError(
                f'floors: what they keep costs {limit.cost.of(mask):g}, more than the budget of '
                f'{limit.budget:g}. Lower the floors or the sparsity.'
            )
    (first, *others), rest = limits, ~forced
    if not others and isinstance(first.cost, LinearCost) and first.cost.is_whole:
        if bool(rest.any()):
            left = first.budget - first.cost.of(mask)
            mask[rest] = hard_topk(importance[rest], left, first.cost.cost[rest])
        return mask
    order = torch.argsort(importance, descending=True, stable=True)
    order = order[rest[order]]
    while order.numel():
        fits = _most_that_fit(mask, order, limits)
        mask[order[:fits]] = 1
        # What goes over a limit by itself always will: costs grow with every block.
        room = torch.ones_like(order[fits:], dtype=torch.bool)
        for limit in limits:
            left = limit.budget - limit.cost.of(mask)
            room &= limit.cost.increments(mask)[order[fits:]] <= left
        order = order[fits + 1 :][room[1:]]
    return mask


def tightest(limits: Sequence[Limit], mask: Tensor) -> Limit:
    """The limit of which a mask spends the largest share."""
    if len(limits) == 1:
        return limits[0]
    return max(limits, key=lambda limit: limit.cost.of(mask) / max(limit.budget, 1e-300))


def _most_that_fit(mask: Tensor, order: Tensor, limits: Sequence[Limit]) -> int:
    fits, too_many = 0, order.numel() + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        tried = mask.index_fill(0, order[:middle], 1)
        if all(limit.cost.of(tried) <= limit.budget for limit in limits):
            fits = middle
        else:
            too_many = middle
    return fits


def _shared(
    m: Tensor,
    limits: Sequence[Limit],
    temperature: float,
    free: Tensor | None,
    held: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """The least θ of the free blocks that meets all limits beside what the others hold."""
    thetas = [_of_limit(m, limit, temperature, free, held, start) for limit in limits]
    return torch.stack(thetas).amax(0)


def _of_limit(
    m: Tensor,
    limit: Limit,
    temperature: float,
    free: Tensor | None,
    held: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    cost, budget = limit.cost, limit.budget
    if isinstance(cost, LinearCost):
        price = cost.cost
        if free is None:
            return solve_threshold(m, budget, temperature, price, start=start)
        if not bool(free.any()):
            return torch.full((), math.inf, dtype=torch.float64, device=m.device)
        left = budget - float(torch.dot(price[~free], held[~free].double()))
        price = price[free]
        left = min(max(left, 0.0), float(price.sum()))
        return solve_threshold(m[free], left, temperature, price, start=start)

    full, empty = cost.of(torch.ones_like(m)), cost.of(torch.zeros_like(m))
    if not empty <= budget <= full:
        raise ValueError(f'budget: expected a value in [{empty:g}, {full:g}], got {budget!r}.')

    def spent(theta: float) -> tuple[float, float]:
        mask = soft_mask(m.double(), theta, temperature)
        moving = mask * (1 - mask)
        if free is not None:
            mask, moving = torch.where(free, mask, held.double()), moving * free
        return cost.of(mask), float((cost.marginal(mask) * moving).sum()) / temperature

    theta = _newton(spent, budget, m, temperature, None if start is None else float(start))
    return torch.full((), theta, dtype=torch.float64, device=m.device)


def _newton(
    spent: Callable[[float], tuple[float, float]],
    budget: float,
    m: Tensor,
    temperature: float,
    start: float | None,
) -> float:
    """Solve spent(θ) = budget for a function that never rises, given with minus its slope.

    Newton's method on the logit of both sides, as in :mod:`.threshold`; a step that leaves the
    bracket, or that is not half of the last but one, gives way to bisection.
    """
    full, empty = spent(-math.inf)[0], spent(math.inf)[0]
    if budget >= full:
        return -math.inf
    if budget <= empty:
        return math.inf
    low, high = (bound.item() for bound in torch.aminmax(m.detach().double()))
    if not -math.inf < low <= high < math.inf:
        raise ValueError(
            f'importance ranges over [{low}, {high}]; every entry must be finite. NaN or inf '
            f'usually means that training diverged: lower the learning rate of the importance'
        )
    theta = 0.5 * (low + high) if start is None or not math.isfinite(start) else start
    low, high = low - 700 * temperature, high + 700 * temperature
    theta = min(max(theta, low), high)
    last = older = high - low
    wanted = math.log(budget - empty) - math.log(full - budget)
    for _ in range(_MAX_PASSES):
        now, slope = spent(theta)
        if abs(now - budget) <= _RESOLVED * budget:
            break
        low, high = (theta, high) if now > budget else (low, theta)
        step = math.inf
        if slope > 0 and empty < now < full:
            ahead = math.log(now - empty) - math.log(full - now) - wanted
            step = ahead / slope * (now - empty) * (full - now) / (full - empty)
        if not (low < theta + step < high and abs(step) <= 0.5 * older):
            step = 0.5 * (high - low) + (low - theta)
        if theta + step == theta:
            break
        older, last = last, abs(step)
        theta += step
    return theta
