"""The threshold that makes a soft mask meet its budget.

Source: SMART pruner, arXiv 2403.19969, which writes the mask as σ(x_i/τ + t(x)) with Σ f = k. Here
t = -θ/τ and Σ c_i f_i = B: m is the importance, θ the threshold, τ the temperature, c the cost and
B the budget.

θ is the root of a falling function of one variable, so it is found by search, in float64 whatever
the dtype of the importance, on m shifted by its centre and divided by τ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ._checks import (
    check_importance,
    check_scalar_budget,
    check_temperature,
    checked_budget,
    flat_cost,
    on_host,
)

# Far above what the search needs (see benchmarks/soft_topk.py); a bound, so that it always ends.
_MAX_PASSES = 200
# |Σ c f - B| <= this share of B is as near as a float64 sum can tell.
_RESOLVED = 1e-13
# On a GPU: 8 points a pass cut the bracket to a ninth, and 9^17 > 2^53 leaves nothing to cut.
_POINTS = 8
_SECTIONS = 17
# Blocks handled at a time. On a CPU, by each of its threads: what is computed on the way, in
# float64, stays in the cache. On a GPU it bounds that memory to 8 * 2^22 float64 = 256 MiB.
_CHUNK_ON_HOST = 2**17
_CHUNK_ON_DEVICE = 2**22


@torch.no_grad()
def solve_threshold(
    importance: Tensor,
    budget: float | Tensor,
    temperature: float,
    cost: Tensor | None = None,
    start: float | Tensor | None = None,
) -> Tensor:
    """Find θ such that the soft mask meets the budget: Σ c_i σ((m_i - θ)/τ) = B.

    The budget is met to 1e-6 of itself, as long as ``|m| / τ`` stays below about 1e9: beyond it a
    float64 cannot hold θ finely enough.

    On a CPU this is Newton's method inside a bracket, and stops as soon as the step left to take is
    known to be exact enough. On a GPU it is a section search of a fixed number of passes, without
    synchronising with the host; there the values of importance, cost and budget are not checked
    (a NaN gives NaN), and ``start`` is not needed and not used.

    Args:
        importance: m, any shape, floating point.
        budget: B, in [0, total cost]; a float or a 0-dim tensor.
        temperature: τ > 0.
        cost: c > 0, shape of importance; None means 1 for every block.
        start: a guess, usually the last θ (a warm start). A bad guess costs time, nothing else.

    Returns:
        θ, 0-dim float64, on the device of importance. ``inf`` for budget 0 and ``-inf`` for a
        budget equal to the total cost: the masks are then exactly 0 and 1.

    Raises:
        ValueError: an argument is outside what is said above.

    Example:
        >>> m = torch.tensor([3.0, 1.0, -1.0, -3.0])
        >>> solve_threshold(m, 2.0, temperature=0.5).abs() < 1e-6
        tensor(True)
    """
    check_importance(importance)
    check_temperature(temperature)
    price = flat_cost(cost, importance)
    m = importance.detach().reshape(-1)
    if on_host(m):
        return _solve_on_host(m, budget, temperature, price, start)
    return _solve_on_device(m, budget, temperature, price)


def _solve_on_host(
    m: Tensor,
    budget: float | Tensor,
    temperature: float,
    cost: Tensor | None,
    start: float | Tensor | None,
) -> Tensor:
    total = float(m.numel()) if cost is None else cost.sum().item()
    goal = checked_budget(budget, total)
    wide = m.float() if m.element_size() < 4 else m  # torch 2.1 has none for halves
    least, most = (bound.item() for bound in torch.aminmax(wide))
    if not -math.inf < least <= most < math.inf:
        raise ValueError(
            f'importance ranges over [{least}, {most}]; every entry must be finite. NaN or inf '
            f'usually means that training diverged: lower the learning rate of the importance'
        )
    if goal == 0 or goal == total:
        return torch.tensor(math.inf if goal == 0 else -math.inf, dtype=torch.float64)

    centre = 0.5 * least + 0.5 * most
    x = _Scaled(m, centre, temperature, cost)
    reach = 0.5 * most / temperature - 0.5 * least / temperature
    if start is not None and math.isfinite(float(start)):
        guess = (float(start) - centre) / temperature
    else:
        guess = _first_guess(x, goal, total)
    # A step δ leaves at most δ²/2 of the budget: 5e-9, and 5e-15 where the mask is float64.
    small_step = 1e-7 if m.dtype == torch.float64 else 1e-4
    t = _newton(x, goal, total, reach, guess, small_step)
    return torch.tensor(centre + temperature * t, dtype=torch.float64)


class _Scaled:
    """x = (m - centre)/τ in float64, part by part with its costs, in memory that each part reuses.

    Parts may be overwritten.
    """

    def __init__(self, m: Tensor, centre: float, temperature: float, cost: Tensor | None) -> None:
        self.m, self.centre, self.rate, self.cost = m, centre, 1 / temperature, cost
        self._scratch = torch.empty(len(m[next(chunks(m))]), dtype=torch.float64)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for part in chunks(self.m):
            m = self.m[part]
            x = self._scratch[: len(m)].copy_(m).sub_(self.centre).mul_(self.rate)
            yield x, None if self.cost is None else self.cost[part]


def _first_guess(x: _Scaled, goal: float, total: float) -> float:
    """Return what the root would be if x were normal: there E σ(x) ≈ σ(E x / √(1 + π/8 Var x))."""
    first = second = 0.0
    for part, cost in x:
        weighted = part if cost is None else cost * part
        first += weighted.sum().item()
        second += torch.dot(weighted, part).item()
    mean = first / total
    spread = math.sqrt(1 + math.pi / 8 * max(second / total - mean * mean, 0.0))
    return mean - _logit(goal, total - goal) * spread


def _newton(
    x: _Scaled,
    goal: float,
    total: float,
    reach: float,
    guess: float,
    small_step: float,
) -> float:
    """Solve Σ c σ(x - t) = goal for t, where x lies in [-reach, reach].

    Newton's method runs on the logit of both sides, which is nearly linear in t where the sum
    itself is exponential. A step that leaves the bracket, or that is not half of the last but one,
    gives way to bisection, so the search ends whatever x is.

    The last step is Newton's on the sum g(t) = Σ c σ(x - t) - goal, and is taken unseen: because
    σ'' ≤ σ', a step δ leaves |g| ≤ δ²/2 · exp(|δ|) · Σ c σ', and Σ c σ' is below the budget.
    """
    wanted = _logit(goal, total - goal)
    # Were all x at one end, t would be that end minus the logit; they all lie between the ends.
    low, high = -reach - wanted, reach - wanted
    t = min(max(guess, low), high)
    last = older = high - low
    for _ in range(_MAX_PASSES):
        kept, slope = _kept_and_slope(x, t)
        excess = kept - goal
        if abs(excess) <= _RESOLVED * goal:
            return t
        if slope > 0 and abs(excess) <= small_step * slope:
            return t + excess / slope
        low, high = (t, high) if excess > 0 else (low, t)
        step = math.inf
        if slope > 0 and 0 < kept < total:
            ahead = _logit(kept, total - kept) - wanted
            step = ahead / slope * kept * (1 - kept / total)
        if not (low < t + step < high and abs(step) <= 0.5 * older):
            step = 0.5 * (high - low) + (low - t)
        if t + step == t:
            return t
        older, last = last, abs(step)
        t += step
    return t


def _kept_and_slope(x: _Scaled, t: float) -> tuple[float, float]:
    """Return Σ c f and Σ c f (1 - f) at f = σ(x - t)."""
    kept = squares = 0.0
    for part, cost in x:
        mask = part.sub_(t).sigmoid_()
        if cost is None:
            kept += mask.sum().item()
            squares += torch.dot(mask, mask).item()
        else:
            kept += torch.dot(cost, mask).item()
            squares += torch.dot(cost, mask.mul_(mask)).item()
    return kept, kept - squares


def _logit(inside: float, outside: float) -> float:
    return math.log(inside) - math.log(outside)


def _solve_on_device(
    m: Tensor, budget: float | Tensor, temperature: float, cost: Tensor | None
) -> Tensor:
    """Find θ without a single read of a value by the host."""

    def scalar(value: float) -> Tensor:
        # torch.tensor(value, device=...) copies from the host and waits; filling does not.
        return torch.full((), value, dtype=torch.float64, device=m.device)

    total = scalar(m.numel()) if cost is None else cost.sum()
    check_scalar_budget(budget)
    if isinstance(budget, Tensor) and not on_host(budget):
        goal = budget.detach().reshape(()).to(torch.float64)
    else:
        goal = scalar(float(budget))

    least, most = torch.aminmax(m.to(torch.float64))
    centre = 0.5 * least + 0.5 * most
    x = m.to(torch.float64).sub(centre).div_(temperature)
    reach = (0.5 * most - 0.5 * least) / temperature
    low = -reach - (goal.log() - (total - goal).log())
    part = 2 * reach / (_POINTS + 1)
    count = torch.arange(1, _POINTS + 1, dtype=torch.float64, device=m.device)
    for _ in range(_SECTIONS):
        # What is kept falls along the points, so those that keep too much come first.
        too_low = (_kept_at(x, cost, low + part * count) > goal).sum()
        low = low + part * too_low
        part = part / (_POINTS + 1)
    theta = centre + temperature * (low + 0.5 * part)

    theta = torch.where(goal >= total, scalar(-math.inf), theta)
    return torch.where(goal <= 0, scalar(math.inf), theta)


def _kept_at(x: Tensor, cost: Tensor | None, points: Tensor) -> Tensor:
    """Return Σ c σ(x - t) for each t of points, shape of points."""
    kept = torch.zeros_like(points)
    for part in chunks(x):
        mask = torch.sigmoid(x[part] - points.unsqueeze(1))
        kept += mask.sum(1) if cost is None else mask @ cost[part]
    return kept


def weighed_sum(weight: Tensor, x: Tensor) -> float:
    """Σ w_i x_i in float64, of vectors on a CPU; the weights are float64."""
    return sum(torch.dot(weight[part], x[part].double()).item() for part in chunks(x))


def chunks(x: Tensor) -> Iterator[slice]:
    """Cut a vector into parts of which float64 copies are cheap to make."""
    length = _CHUNK_ON_HOST * torch.get_num_threads() if on_host(x) else _CHUNK_ON_DEVICE
    for first in range(0, x.numel(), length):
        yield slice(first, first + length)
