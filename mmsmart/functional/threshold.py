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
from itertools import repeat

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
from .runs import Runs

# Far above what the search needs (see benchmarks/soft_topk.py); a bound, so that it always ends.
_MAX_PASSES = 200
# |Σ c f - B| <= this share of B is as near as a float64 sum can tell.
_RESOLVED = 1e-13
# From 16 times as many blocks on, every n-th is searched first, at least so many in all.
_SAMPLE = 2**12
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
    cost: Tensor | Runs | None = None,
    start: float | Tensor | None = None,
) -> Tensor:
    """Find θ such that the soft mask meets the budget: Σ c_i σ((m_i - θ)/τ) = B.

    The budget is met to 1e-6 of itself, as long as ``|m| / τ`` stays below about 1e9: beyond it a
    float64 cannot hold θ finely enough.

    On a CPU this is Halley's method inside a bracket, and stops as soon as the step left to take is
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
    cost: Tensor | Runs | None,
    start: float | Tensor | None,
) -> Tensor:
    x = _Scaled(m, temperature, cost)
    goal = checked_budget(budget, x.total)
    wide = m.float() if m.element_size() < 4 else m  # torch 2.1 has none for halves
    least, most = wide.amin().item(), wide.amax().item()
    if not -math.inf < least <= most < math.inf:
        raise ValueError(
            f'importance ranges over [{least}, {most}]; every entry must be finite. NaN or inf '
            f'usually means that training diverged: lower the learning rate of the importance'
        )
    if goal == 0 or goal == x.total:
        return torch.tensor(math.inf if goal == 0 else -math.inf, dtype=torch.float64)

    x.centre = 0.5 * least + 0.5 * most
    reach = 0.5 * most / temperature - 0.5 * least / temperature
    if start is not None and math.isfinite(float(start)):
        guess = (float(start) - x.centre) / temperature
    else:
        guess = _first_guess(x, goal, reach)
    # A step δ leaves at most δ³ of the budget: 8e-9, and 8e-15 where the mask is float64.
    small_step = 2e-5 if m.dtype == torch.float64 else 2e-3
    t = _halley(x, goal, reach, guess, small_step, _RESOLVED * goal)
    return torch.tensor(x.centre + temperature * t, dtype=torch.float64)


class _Scaled:
    """x = (m - centre)/τ with its costs: what is summed over it, in float64.

    Sums are taken part by part, in memory that each part reuses.
    """

    centre = 0.0

    def __init__(self, m: Tensor, temperature: float, cost: Tensor | Runs | None) -> None:
        self.m, self.rate, self.cost = m, 1 / temperature, cost
        self.total = float(len(m)) if cost is None else cost.sum().item()
        self._parts = list(parts(m, cost))
        longest = len(self._parts[0][0])
        self._f, self._v = (torch.empty(longest, dtype=torch.float64) for _ in range(2))

    def every(self, stride: int) -> _Scaled:
        """A sample of x, evenly spread."""
        m, cost, first = [], [], 0
        for part, price in self._parts:
            chosen = slice(-first % stride, None, stride)
            m.append(part[chosen])
            cost += [] if price is None else [price[chosen]]
            first += len(part)
        sample = _Scaled(torch.cat(m), 1 / self.rate, torch.cat(cost) if cost else None)
        sample.centre = self.centre
        return sample

    def mean_and_variance(self) -> tuple[float, float]:
        first = second = 0.0
        for m, cost in self._parts:
            x = self._f[: len(m)].copy_(m).sub_(self.centre).mul_(self.rate)
            weighted = x if cost is None else torch.mul(cost, x, out=self._v[: len(m)])
            first += weighted.sum().item()
            second += torch.dot(weighted, x).item()
        mean = first / self.total
        return mean, max(second / self.total - mean * mean, 0.0)

    def kept(self, t: float) -> tuple[float, float, float]:
        """Return Σ c f at f = σ(x - t), minus its slope in t, and its second derivative."""
        kept = slope = tail = 0.0
        theta = self.centre + t / self.rate
        for m, cost in self._parts:
            f, v = self._f[: len(m)], self._v[: len(m)]
            f.copy_(m).sub_(theta).mul_(self.rate).sigmoid_()
            torch.addcmul(f, f, f, value=-1, out=v)
            if cost is None:
                kept += f.sum().item()
            else:
                kept += torch.dot(cost, f).item()
                v.mul_(cost)
            slope += v.sum().item()
            tail += torch.dot(v, f).item()
        return kept, slope, slope - 2 * tail


def _first_guess(x: _Scaled, goal: float, reach: float) -> float:
    """Return the root of a sample, or what it would be were x normal.

    In the latter case E σ(x) ≈ σ(E x / √(1 + π/8 Var x)).
    """
    stride = len(x.m) // _SAMPLE
    if stride >= 16:
        few = x.every(stride)
        goal *= few.total / x.total
        # A tenth of what the sum over a sample is off anyway.
        enough = 0.1 * math.sqrt(goal * (few.total - goal) / len(few.m))
        return _halley(few, goal, reach, _first_guess(few, goal, reach), 0.0, enough)
    mean, variance = x.mean_and_variance()
    return mean - _logit(goal, x.total - goal) * math.sqrt(1 + math.pi / 8 * variance)


def _halley(
    x: _Scaled, goal: float, reach: float, guess: float, small_step: float, enough: float
) -> float:
    """Solve Σ c σ(x - t) = goal for t, where x lies in [-reach, reach].

    Newton's method runs on the logit of both sides, which is nearly linear in t where the sum
    itself is exponential; steps below 1 heed the second derivative too (Halley's method). A step
    that leaves the bracket, or that is not half of the last but one, gives way to bisection, so the
    search ends whatever x is.

    The last step is taken unseen. It solves g(t) = Σ c σ(x - t) - goal to second order: because
    no higher derivative of σ up to the third exceeds σ', a step δ leaves |g| ≤ |δ|³ Σ c σ', and
    Σ c σ' is below the budget.
    """
    wanted = _logit(goal, x.total - goal)
    # Were all x at one end, t would be that end minus the logit; they all lie between the ends.
    low, high = -reach - wanted, reach - wanted
    t = min(max(guess, low), high)
    last = older = high - low
    for _ in range(_MAX_PASSES):
        kept, slope, bend = x.kept(t)
        excess = kept - goal
        if abs(excess) <= enough:
            return t
        if slope > 0 and abs(excess) <= small_step * slope:
            step = excess / slope
            return t + step * (1 + 0.5 * step * bend / slope)
        low, high = (t, high) if excess > 0 else (low, t)
        step = math.inf
        if slope > 0 and 0 < kept < x.total:
            moved = kept * (1 - kept / x.total)
            step = (_logit(kept, x.total - kept) - wanted) * moved / slope
            if abs(step) <= 1:
                bend = bend / slope - slope / moved * (1 - 2 * kept / x.total)
                step /= max(1 - 0.5 * step * bend, 0.5)
        if not (low < t + step < high and abs(step) <= 0.5 * older):
            step = 0.5 * (high - low) + (low - t)
        if t + step == t:
            return t
        older, last = last, abs(step)
        t += step
    return t


def _logit(inside: float, outside: float) -> float:
    return math.log(inside) - math.log(outside)


def _solve_on_device(
    m: Tensor, budget: float | Tensor, temperature: float, cost: Tensor | Runs | None
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


def _kept_at(x: Tensor, cost: Tensor | Runs | None, points: Tensor) -> Tensor:
    """Return Σ c σ(x - t) for each t of points, shape of points."""
    kept = torch.zeros_like(points)
    for part, price in parts(x, cost):
        mask = torch.sigmoid(part - points.unsqueeze(1))
        kept += mask.sum(1) if price is None else mask @ price
    return kept


def weighed_sum(weight: Tensor | Runs, x: Tensor) -> float:
    """Σ w_i x_i in float64, of vectors on a CPU; the weights are float64."""
    return sum(torch.dot(w, part.double()).item() for w, part in parts(weight, x))


def parts(*vectors: Tensor | Runs | None) -> Iterator[tuple[Tensor | None, ...]]:
    """Cut vectors alike into parts of which float64 copies are cheap to make; None stays None."""
    first = vectors[0]
    length = _CHUNK_ON_HOST * torch.get_num_threads() if on_host(first) else _CHUNK_ON_DEVICE
    if len(first) <= length and not any(isinstance(x, Runs) for x in vectors):
        return iter([vectors])
    return zip(*(repeat(None) if x is None else x.split(length) for x in vectors))
