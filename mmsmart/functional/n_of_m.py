"""N of M: a top-k of its own for every small group of blocks, all groups at once.

The soft operator is that of :mod:`.topk`, row by row. A row may hold fewer than M blocks: what is
not `valid` has mask 0 and takes part in nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_importance, check_temperature, on_host

# Bisection alone needs 60 for a float64; the logit steps between make it five to ten.
_MAX_PASSES = 64
_RESOLVED = 1e-9
# Rows solved at a time: a row that is slow to converge holds up its chunk only.
_CHUNK = 1 << 17


@torch.no_grad()
def solve_row_thresholds(
    importance: Tensor,
    keep: int,
    temperature: float,
    valid: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Find, for every row, θ such that Σ_i σ((m_i - θ)/τ) = N over its valid entries.

    Args:
        importance: m, `(rows, m)`, floating point.
        keep: N ≥ 1. A row with no more valid entries than that keeps them all.
        temperature: τ > 0.
        valid: Entries that are there, bool, shape of importance; None for all.
        start: A guess, `(rows,)`, usually the last θ.

    Returns:
        θ, float64 `(rows,)`; `-inf` where all is kept.

    Raises:
        ValueError: If an argument is out of range, or on a CPU importance is not finite.

    Example:
        >>> m = torch.tensor([[3.0, 1.0, -1.0, -3.0]])
        >>> solve_row_thresholds(m, 2, temperature=0.5).abs() < 1e-6
        tensor([True])
    """
    check_importance(importance)
    check_temperature(temperature)
    if importance.ndim != 2 or keep < 1:
        raise ValueError(
            f'expected importance of shape (rows, m) and keep of at least 1, got '
            f'{tuple(importance.shape)} and {keep}'
        )
    if on_host(importance) and not bool(importance.isfinite().all()):
        raise ValueError(
            'importance is not finite everywhere. NaN or inf usually means that training '
            'diverged: lower the learning rate of the importance'
        )
    thresholds = torch.empty(len(importance), dtype=torch.float64, device=importance.device)
    for begin in range(0, len(importance), _CHUNK):
        rows = slice(begin, begin + _CHUNK)
        thresholds[rows] = _newton(
            importance[rows].double(),
            keep,
            temperature,
            None if valid is None else valid[rows],
            None if start is None else start[rows],
        )
    return thresholds


def _newton(
    m: Tensor, keep: int, temperature: float, valid: Tensor | None, start: Tensor | None
) -> Tensor:
    """Newton's method on the logit of both sides, bracketed, for all rows at once."""
    count = m.shape[1] if valid is None else valid.sum(1)
    present = torch.ones_like(m, dtype=torch.bool) if valid is None else valid
    least = m.masked_fill(~present, torch.inf).amin(1)
    most = m.masked_fill(~present, -torch.inf).amax(1)
    everything = torch.as_tensor(count, device=m.device).expand(len(m)) <= keep
    # Rows that keep everything are solved for what can be, and replaced at the end.
    goal = torch.full_like(least, float(keep)).where(~everything, 0.5 * torch.ones_like(least))
    total = torch.as_tensor(count, dtype=torch.float64, device=m.device).expand(len(m))
    total = total.where(~everything, torch.ones_like(least))
    centre = torch.where(everything, 0.0, 0.5 * (least + most))
    reach = torch.where(everything, 1.0, 0.5 * (most - least) / temperature)
    x = ((m - centre.unsqueeze(1)) / temperature).masked_fill(~present, -torch.inf)
    wanted = goal.log() - (total - goal).log()
    low, high = -reach - wanted, reach - wanted
    t = 0.5 * (low + high)
    if start is not None:
        guess = (start - centre) / temperature
        t = torch.where((guess > low) & (guess < high), guess, t)
    for _ in range(_MAX_PASSES):
        mask = torch.sigmoid(x - t.unsqueeze(1))
        kept = mask.sum(1)
        done = ((kept - goal).abs() <= _RESOLVED * goal) | everything
        if on_host(m) and bool(done.all()):
            break
        slope = kept - mask.square_().sum(1)
        above = kept > goal
        low, high = torch.where(above, t, low), torch.where(above, high, t)
        ahead = kept.log() - (total - kept).log() - wanted
        moved = t + ahead * kept * (1 - kept / total) / slope
        inside = (moved > low) & (moved < high)
        t = torch.where(done, t, torch.where(inside, moved, 0.5 * (low + high)))
    return torch.where(everything, -torch.inf, centre + temperature * t)


def rows_mask(
    importance: Tensor, thresholds: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    """The soft mask of every row at its threshold, shape and dtype of importance.

    Example:
        >>> m = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
        >>> rows_mask(m, solve_row_thresholds(m, 2, 1.0), 1.0)
        tensor([[0.8176, 0.6225, 0.3775, 0.1824]])
    """
    mask = torch.sigmoid((importance.double() - thresholds.unsqueeze(1)) / temperature)
    return (mask if valid is None else mask.masked_fill(~valid, 0.0)).to(importance.dtype)


@torch.no_grad()
def rows_vjp(
    importance: Tensor,
    thresholds: Tensor,
    temperature: float,
    grad_mask: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Turn ∂L/∂f into ∂L/∂m row by row: the closed form of :func:`soft_topk_vjp` at equal costs."""
    z = (importance.double() - thresholds.unsqueeze(1)) / temperature
    v = torch.sigmoid(z).mul_(torch.sigmoid(-z))
    if valid is not None:
        v.masked_fill_(~valid, 0.0)
    weight = v.sum(1, keepdim=True)
    mean = (v * grad_mask).sum(1, keepdim=True) / torch.where(weight > 0, weight, 1.0)
    return (v * (grad_mask - mean) / temperature).to(importance.dtype)


@torch.no_grad()
def rows_topk(importance: Tensor, keep: int, valid: Tensor | None = None) -> Tensor:
    """Keep the N most important entries of every row, ties by lower index; 0 and 1.

    Example:
        >>> rows_topk(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), 2)
        tensor([[1., 0., 1., 0.]])
    """
    m = importance if valid is None else importance.masked_fill(~valid, -torch.inf)
    order = torch.argsort(m, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(importance).scatter_(1, order[:, :keep], 1.0)
    return mask if valid is None else mask.masked_fill(~valid, 0.0)
