"""What the functions of this package accept, checked in one place.

A value that lies on a GPU is not looked at: reading it would make the host wait for the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .runs import Runs

# A budget within this share of the total outside [0, total] counts as rounding and is clamped.
BUDGET_SLACK = 1e-6


def on_host(tensor: Tensor) -> bool:
    """Tell whether the tensor's values can be read without waiting for a device."""
    return tensor.device.type == 'cpu'


def check_importance(importance: Tensor) -> None:
    """Raise unless importance is a floating-point tensor with at least one entry."""
    if not importance.is_floating_point():
        raise ValueError(
            f'importance has dtype {importance.dtype}; it must be a floating-point tensor, '
            f'e.g. importance.float()'
        )
    if importance.numel() == 0:
        raise ValueError(
            f'importance is empty (shape {tuple(importance.shape)}); it needs at least one block. '
            f'Check that some layer is prunable'
        )


def check_temperature(temperature: float) -> None:
    """Raise unless the temperature is positive and finite."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f'temperature is {temperature}; it must be > 0 and finite. '
            f'For the limit temperature -> 0 use hard_topk'
        )


def flat_cost(cost: Tensor | Runs | None, importance: Tensor) -> Tensor | Runs | None:
    """Return the costs as a float64 vector, by runs if so given, or None where all cost 1.

    Raises:
        ValueError: cost differs from importance in shape or device, or some cost is not a positive
            finite number (not looked at on a GPU).
    """
    if cost is None:
        return None
    if cost.shape != importance.shape:
        raise ValueError(
            f'cost and importance must have the same shape:\n'
            f'  cost:       {tuple(cost.shape)}\n'
            f'  importance: {tuple(importance.shape)}\n'
            f'Give one cost a block, or cost=None where every block costs 1'
        )
    if cost.device != importance.device:
        raise ValueError(
            f'cost and importance must be on the same device:\n'
            f'  cost:       {cost.device}\n'
            f'  importance: {importance.device}\n'
            f'Move one with .to(...)'
        )
    flat = cost if isinstance(cost, Runs) else cost.detach().reshape(-1).to(torch.float64)
    seen = cost.values if isinstance(cost, Runs) else flat
    if on_host(seen):
        low, high = seen.amin().item(), seen.amax().item()
        if not 0 < low <= high < math.inf:
            raise ValueError(
                f'cost ranges over [{low}, {high}]; every cost must be > 0 and finite. '
                f'A block that costs nothing need not be pruned: leave it out'
            )
    return flat


def check_scalar_budget(budget: float | Tensor) -> None:
    """Raise if the budget is a tensor of more or less than one number."""
    if isinstance(budget, Tensor) and budget.numel() != 1:
        raise ValueError(
            f'budget has shape {tuple(budget.shape)}; it must be one number for all blocks together'
        )


def checked_budget(budget: float | Tensor, total: float) -> float:
    """Return the budget as a float inside [0, total].

    Raises:
        ValueError: budget is not one number, NaN, or outside [0, total] by more than rounding.
    """
    check_scalar_budget(budget)
    value = float(budget)
    slack = BUDGET_SLACK * total
    if not -slack <= value <= total + slack:
        raise ValueError(
            f'budget is {value}; it must lie in [0, {total}], 0 up to the cost of all blocks. '
            f'For a target sparsity s give (1 - s) * {total}'
        )
    return min(max(value, 0.0), total)
